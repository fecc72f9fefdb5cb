"""Our SASRec against RecBole 1.2.1 on ml-100k at equal width, layers, heads, loss, length and dropout.

RecBole trains on one padded row a target, so an epoch takes minutes: a few batches after a warm-up are timed. Both sides in turn, median of
three; the figure is training targets per CPU second, all threads."""

import argparse
import json
import sys

from _peers import child, event_file, in_turn, medians, peer_python

ap = argparse.ArgumentParser()
ap.add_argument("--data", default="ml-100k")
ap.add_argument("--batches", type=int, default=4)
ap.add_argument("--repeats", type=int, default=3)
a = ap.parse_args()
data, peer = event_file(a.data), peer_python("recbole")
found = in_turn(
    {
        "mbnb": lambda k: child(sys.executable, "_ours.py", data, "--epochs", 4, "--seed", k),
        "recbole": lambda k: child(peer, "_recbole.py", data, "--batches", a.batches),
    },
    a.repeats,
)
x, y = (medians(found[side], "targets_per_cpu_second", "peak_rss_mb") for side in ("mbnb", "recbole"))
print(
    json.dumps(
        {
            "bench": "sasrec_vs_recbole",
            "data": a.data,
            "repeats": a.repeats,
            "mbnb": x,
            "recbole": y,
            "ratio_targets_per_cpu_second": x["targets_per_cpu_second"] / y["targets_per_cpu_second"],
        }
    )
)
