"""Our SASRec against RecTools 0.19 on ml-100k at equal width, layers, heads, loss, length, dropout, batch, epochs and targets.

Both sides in turn, each alone in a process of its own, median of three, in float32 and in bfloat16. The figure is training targets per
CPU second, all threads, first epoch left out. NDCG@10 is over the whole catalogue without a filter, with the weights after the last epoch."""

import argparse
import json
import sys

from _peers import child, event_file, in_turn, medians, peer_python

ap = argparse.ArgumentParser()
ap.add_argument("--data", default="ml-100k")
ap.add_argument("--epochs", type=int, default=20)
ap.add_argument("--repeats", type=int, default=3)
ap.add_argument("--precisions", nargs="*", default=["32", "bf16"])
a = ap.parse_args()
data, peer = event_file(a.data), peer_python("rectools")


def side(python, script, precision, *more):
    return lambda k: child(python, script, data, "--epochs", a.epochs, "--precision", precision, "--seed", k, *more)


for precision in a.precisions:
    found = in_turn({"mbnb": side(sys.executable, "_ours.py", precision, "--ff", 64), "rectools": side(peer, "_rectools.py", precision)}, a.repeats)
    ours, theirs = found["mbnb"], found["rectools"]
    if {r["test_items"] for r in ours} != {r["test_items"] for r in theirs}:
        sys.exit("the two sides have other test items: nothing was compared")
    x, y = (medians(r, "targets_per_cpu_second", "ndcg10", "se", "train_seconds") for r in (ours, theirs))
    print(
        json.dumps(
            {
                "bench": "sasrec_vs_rectools",
                "data": a.data,
                "precision": precision,
                "epochs": a.epochs,
                "repeats": a.repeats,
                "mbnb": x,
                "rectools": y,
                "targets_per_epoch": [ours[0]["targets_per_epoch"], theirs[0]["targets_per_epoch"]],
                "ratio_targets_per_cpu_second": x["targets_per_cpu_second"] / y["targets_per_cpu_second"],
                "ndcg10_difference_in_se": (x["ndcg10"] - y["ndcg10"]) / y["se"],
            }
        ),
        flush=True,
    )
