"""What the doctor costs the run it watches: the loop of `mbnb.fit` on the toy shop, SASRec small, with `mbnb.doctor.training.Watch` fed as a run feeds it in every other block of
20 steps, and nobody looking in between; then the other way round, for blocks differ in the lengths of their rows. Processor seconds of a step are medians over the steps of a kind
(the loop's own bookkeeping included, evaluation not), medians again over repeats in processes of their own; the watch's rare looks are in `told`, the share of the training time
that it has measured of itself in a run watched throughout. One JSON line."""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

from _peers import child


def one_side(throughout, parity, steps, threads, data, model):
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
    losses = build_losses(config, sequences)
    spread = lambda cases, n: np.unique(np.linspace(0, len(cases) - 1, n).astype(int))
    batch = collate(sequences, sequences.train, spread(sequences.train, config.fit.batch_size), net.config.max_len)
    asked = collate(sequences, sequences.valid, spread(sequences.valid, 200), net.config.max_len)
    watch = Watch(stages=config.stages, losses=losses, batch=batch, cases=asked, config=config.fit)
    judged = lambda model: {"value": 0.0, "error": 1.0}
    wall, last, made = {False: [], True: []}, None, 0
    for record in fit(net, losses, sequences, config.stages, config.fit, judged, state):
        on, is_step = throughout or made // 20 % 2 == parity, record["kind"] == "step"
        if on:
            watch.step(record, net) if is_step else watch.epoch(record, net)
        now = time.process_time()
        if is_step:
            made += 1
            if last is not None:
                wall[on].append(now - last)
            if made >= steps:
                break
        last = now if is_step else None
    if throughout:
        return {"told": watch.seconds / watch.train, "looks": {k: round(v / watch.train, 5) for k, v in watch.spent.items()}}
    return {"alone": statistics.median(wall[False]), "watched": statistics.median(wall[True])}


ap = argparse.ArgumentParser()
ap.add_argument("--side", choices=("blocks", "throughout"))
ap.add_argument("--parity", type=int, default=0, help="which blocks are watched")
ap.add_argument("--steps", type=int, default=800)
ap.add_argument("--repeats", type=int, default=3)
ap.add_argument("--threads", type=int, default=1)
ap.add_argument("--data", default="toyshop")
ap.add_argument("--model", default="sasrec")
a = ap.parse_args()
if a.side:
    print(json.dumps(one_side(a.side == "throughout", a.parity, a.steps, a.threads, a.data, a.model)))
    sys.exit()
given = ["--steps", a.steps, "--threads", a.threads, "--data", a.data, "--model", a.model]
pairs = [[child(sys.executable, Path(__file__).name, "--side", "blocks", "--parity", p, *given) for p in (0, 1)] for _ in range(a.repeats)]
seconds = {side: statistics.median(r[side] for pair in pairs for r in pair) for side in ("alone", "watched")}
share = statistics.median(math.prod(r["watched"] / r["alone"] for r in pair) ** 0.5 - 1 for pair in pairs)  # each block was on both sides
told = child(sys.executable, Path(__file__).name, "--side", "throughout", *given)
print(
    json.dumps(
        {"bench": "doctor", "data": a.data, "model": a.model, "threads": a.threads, "steps": a.steps, **seconds, "share": share, **told}
    )
)
