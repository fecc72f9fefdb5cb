"""One training step on retail_beh, batch 64, the data's own mix of lengths: M-GPT in published form (200 slots always; the graph as one product, cross-entropy at
masked slots only) and in general form at the same sizes, and GEAR and MBHT beside them. Every side runs alone in a process of its own, the same batches, threads and
precision. Seconds and rows of the Prediction a CPU-second are means over the steps, `loss_seconds` the cross-entropy in them (its gradients too), which all sides
share; memory is the peak of the whole process. One JSON line."""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

from _peers import child

SIDES = {"mgpt_published": ("mgpt", "published"), "mgpt_general": ("mgpt", "retail"), "mbht_general": ("mbht", "published"), "gear": ("gear", "published")}
CHANGES = {"mbht_general": {"form": "general"}, "gear": {"form": "masked"}}


class Timed:
    "A loss that tells how long it took; CE makes its gradients on the way forward."

    def __init__(self, loss):
        self.loss, self.seconds = loss, 0.0

    def __call__(self, prediction, rng):
        start = time.perf_counter()
        value = self.loss(prediction, rng)
        self.seconds += time.perf_counter() - start
        return value


def one_side(name, steps, threads, batch_size, tokens, data):
    "Train `steps` steps and tell what they cost."
    import torch

    from mbnb.datasets import load
    from mbnb.experiment import build_model, configure
    from mbnb.fit import make_optimizer, partition, start_fabric, train_step
    from mbnb.losses.ce import CE
    from mbnb.sequences import batches

    torch.set_num_threads(threads)
    model, preset = SIDES[name]
    changes = " ".join(f"model.{k}={v}" for k, v in CHANGES.get(name, {}).items())
    config = configure(model=model, preset=preset, dataset=data, set=changes)
    sequences = load(data)
    torch.manual_seed(0)
    net = build_model(config, sequences)[0].train()
    stage = config.stages[0]
    optimizer = make_optimizer(net, stage, partition(net, stage))
    fabric = start_fabric(config.fit)
    rng = torch.Generator().manual_seed(0)
    source = batches(sequences, sequences.train, batch_size, net.config.max_len, rng=rng, tokens=tokens or None)
    loss = Timed(CE())
    wall, cpu, rows = 0.0, 0.0, 0
    for step, batch in zip(range(steps + 2), source):
        w, c = time.perf_counter(), time.process_time()
        _, n, _, _ = train_step(fabric, net, optimizer, [batch], loss, stage.loss_weights, rng)
        if step < 2:
            loss.seconds = 0.0
        else:
            wall, cpu, rows = wall + time.perf_counter() - w, cpu + time.process_time() - c, rows + n
    return {
        "seconds_per_step": wall / steps,
        "loss_seconds": loss.seconds / steps,
        "rows_per_step": rows / steps,
        "targets_per_cpu_second": rows / cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps_per_epoch": -(-len(sequences.train) // batch_size),
    }


ap = argparse.ArgumentParser()
ap.add_argument("--side", choices=SIDES)
ap.add_argument("--steps", type=int, default=24)
ap.add_argument("--repeats", type=int, default=3)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--batch-size", type=int, default=64)
ap.add_argument("--tokens", type=int, default=0, help="padded slots a batch may hold; 0 = no limit")
ap.add_argument("--data", default="retail_beh")
a = ap.parse_args()
if a.side:
    print(json.dumps(one_side(a.side, a.steps, a.threads, a.batch_size, a.tokens, a.data)))
    sys.exit()
given = ["--steps", a.steps, "--threads", a.threads, "--batch-size", a.batch_size, "--tokens", a.tokens, "--data", a.data]
found = {name: [] for name in SIDES}
for _ in range(a.repeats):
    for name in SIDES:
        found[name].append(child(sys.executable, Path(__file__).name, "--side", name, *given))
sides = {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in found.items()}
published, general = sides["mgpt_published"], sides["mgpt_general"]
ratio = published["seconds_per_step"] / general["seconds_per_step"]
model = (published["seconds_per_step"] - published["loss_seconds"]) / (general["seconds_per_step"] - general["loss_seconds"])
setting = {"data": a.data, "batch_size": a.batch_size, "threads": a.threads}
print(json.dumps({"bench": "mgpt_step", **setting, "general_is_faster": ratio, "without_loss": model, **sides}))
