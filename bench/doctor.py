"""What the doctor costs the run it watches: the loop of `mbnb.fit` on the toy shop, SASRec small, with nobody looking and with `mbnb.doctor.training.Watch` fed as a run feeds it.
Wall seconds of a step (the loop's own bookkeeping included, evaluation not) are medians over the repeats, each side in a process of its own, in turns; `told` is the share that the
watch has measured of itself, its looks after each epoch included. One JSON line."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from _peers import child


def one_side(watched, steps, threads, data, model):
    "Train `steps` steps and tell what one took."
    import numpy as np
    import torch

    from mbnb.datasets import load
    from mbnb.doctor.training import Watch
    from mbnb.experiment import build_losses, build_model, configure
    from mbnb.fit import FitState, fit, seed_everything
    from mbnb.sequences import collate

    torch.set_num_threads(threads)
    config = configure(model=model, dataset=data, patience=10**6, epochs=10**6)
    sequences = load(data, **config.data)
    state = FitState(seed_everything(0))
    net = build_model(config, sequences)[0]
    losses, watch = build_losses(config), None
    spread = lambda cases, n: np.unique(np.linspace(0, len(cases) - 1, n).astype(int))
    if watched:
        batch = collate(sequences, sequences.train, spread(sequences.train, config.fit.batch_size), net.config.max_len)
        asked = collate(sequences, sequences.valid, spread(sequences.valid, 200), net.config.max_len)
        watch = Watch(stages=config.stages, losses=losses, batch=batch, cases=asked, config=config.fit)
    judged = lambda model: {"value": 0.0, "error": 1.0}
    wall, done, last = 0.0, 0, None
    for record in fit(net, losses, sequences, config.stages, config.fit, judged, state):
        if watch: watch.step(record, net) if record["kind"] == "step" else watch.epoch(record, net)
        now = time.perf_counter()
        if record["kind"] == "step":
            if last is not None: wall, done = wall + now - last, done + 1
            if done >= steps: break
        last = now if record["kind"] == "step" else None
    told = {"told": watch.seconds / watch.train, "looks": {k: round(v / watch.train, 5) for k, v in watch.spent.items()}} if watch else {}
    return {"seconds_per_step": wall / done, "steps": done} | told


ap = argparse.ArgumentParser()
ap.add_argument("--side", choices=("alone", "watched"))
ap.add_argument("--steps", type=int, default=1500)
ap.add_argument("--repeats", type=int, default=3)
ap.add_argument("--threads", type=int, default=1)
ap.add_argument("--data", default="toyshop")
ap.add_argument("--model", default="sasrec")
a = ap.parse_args()
if a.side:
    print(json.dumps(one_side(a.side == "watched", a.steps, a.threads, a.data, a.model)))
    sys.exit()
given = ["--steps", a.steps, "--threads", a.threads, "--data", a.data, "--model", a.model]
found = {"alone": [], "watched": []}
for _ in range(a.repeats):
    for side in found:
        found[side].append(child(sys.executable, Path(__file__).name, "--side", side, *given))
seconds = {side: statistics.median(r["seconds_per_step"] for r in runs) for side, runs in found.items()}
told = statistics.median(r["told"] for r in found["watched"])
print(json.dumps({"bench": "doctor", "data": a.data, "model": a.model, "threads": a.threads, "steps": a.steps, **seconds, "share": seconds["watched"] / seconds["alone"] - 1, "told": told, "looks": found["watched"][-1]["looks"]}))
