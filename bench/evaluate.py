"""Ranking 22,363 cases against 12,101 items (the size of Amazon Beauty), seen items filtered, from states of width 64: seconds and memory above the start.

Made-up vectors; the figure holds the products, the counting and the metrics. One JSON line."""

import argparse
import json
import resource
import statistics
import time

import numpy as np
import polars as pl
import torch

from mbnb.evaluators.metrics import table
from mbnb.evaluators.protocols import make_plan
from mbnb.evaluators.ranks import rank_cases
from mbnb.events import Events
from mbnb.sequences import from_events

ap = argparse.ArgumentParser()
ap.add_argument("--cases", type=int, default=22_363)
ap.add_argument("--items", type=int, default=12_101)
ap.add_argument("--repeats", type=int, default=3)
a = ap.parse_args()
torch.set_num_threads(2)
g = np.random.default_rng(0)
length = 9
item = (
    np.stack([g.permutation(a.items)[:length] for _ in range(64)])[g.integers(64, size=a.cases)]
    if a.items < 1000
    else (g.integers(a.items, size=(a.cases, 1)) + np.cumsum(g.integers(1, 500, (a.cases, length)), 1)) % a.items
)
item[: -(-a.items // length)] = np.resize(np.arange(a.items), (-(-a.items // length), length))
frame = pl.DataFrame(
    {
        "user": np.repeat(np.arange(a.cases), length).astype(str),
        "item": item.ravel().astype(str),
        "behavior": ["x"] * item.size,
        "timestamp": np.tile(np.arange(length), a.cases),
        "row": np.arange(item.size),
    }
)
s = from_events(Events(frame, "order", "made", {}), name="made")
vectors, users = torch.randn(len(s.items), 64), torch.randn(len(s.users), 64)
plan = make_plan(s, s.test, "full", seen_filter="all_seen", split="test")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
wall, cpu = [], []
for _ in range(a.repeats):
    w, c = time.perf_counter(), time.process_time()
    found = rank_cases(lambda b: users[b.user] @ vectors.T, s, s.test, [plan], batch_size=256, max_len=50)[""]
    table(found)
    wall.append(time.perf_counter() - w)
    cpu.append(time.process_time() - c)
print(
    json.dumps(
        {
            "bench": "evaluate",
            "cases": len(s.test),
            "items": s.n_items,
            "seconds": statistics.median(wall),
            "cpu_seconds": statistics.median(cpu),
            "memory_above_start_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        }
    )
)
