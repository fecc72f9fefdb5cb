"""Forward and backward of a loss from made-up states of width 64, as many rows as a batch of 256 sequences of eight labels has, with the user's 50 items left out of the
negatives: cross-entropy over the whole catalogue, gBCE with negatives of its own in each row, sampled softmax with one draw for all rows. Median seconds of the
repeats, the losses in turn, after one that warms up; `times_faster` is against cross-entropy. One JSON line."""

import argparse
import json
import statistics
import time

import torch

from mbnb.losses.ce import CE
from mbnb.losses.gbce import GBCE
from mbnb.losses.sampled_softmax import SampledSoftmax
from mbnb.sequences import Prediction

ap = argparse.ArgumentParser()
ap.add_argument("--items", type=int, nargs="+", default=[12_101, 100_000])
ap.add_argument("--rows", type=int, default=2048)
ap.add_argument("--negatives", type=int, default=256)
ap.add_argument("--width", type=int, default=64)
ap.add_argument("--repeats", type=int, default=5)
ap.add_argument("--threads", type=int, default=1)
a = ap.parse_args()
torch.set_num_threads(a.threads)
LOSSES = {"ce": CE(), "gbce": GBCE(n_neg=a.negatives), "sampled_softmax": SampledSoftmax(n_neg=a.negatives)}


def made(items):
    "Rows of users with 50 items each; the target is one of them."
    g = torch.Generator().manual_seed(0)
    user = torch.randint(1, items + 1, (-(-a.rows // 8), 50), generator=g).repeat_interleave(8, 0)[: a.rows]
    states, table = torch.randn(a.rows, a.width, generator=g), torch.randn(items + 1, a.width, generator=g) * 0.05
    return Prediction(states.requires_grad_(), user[torch.arange(a.rows), torch.arange(a.rows) % 50], table.requires_grad_(), exclude=user)


def step(loss, prediction, rng):
    "Seconds of one forward and backward."
    prediction.states.grad = prediction.table.grad = None
    start = time.perf_counter()
    loss(prediction, rng).backward()
    return time.perf_counter() - start


found = {}
for items in a.items:
    p, rng = made(items), torch.Generator().manual_seed(0)
    took = {name: [] for name in LOSSES}
    for _ in range(a.repeats + 1):
        for name, loss in LOSSES.items():
            took[name].append(step(loss, p, rng))
    seconds = {name: statistics.median(t[1:]) for name, t in took.items()}
    found[items] = {name: {"seconds": round(s, 4), "times_faster": round(seconds["ce"] / s, 1)} for name, s in seconds.items()}
print(json.dumps({"bench": "losses", "rows": a.rows, "negatives": a.negatives, "width": a.width, "threads": a.threads, "repeats": a.repeats, "torch": torch.__version__, "items": found}))
