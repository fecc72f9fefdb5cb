"One run of our SASRec on a file of events; prints one line of JSON. Child of the comparisons."

import argparse
import hashlib
import json
import resource
import time

import torch

from mbnb.datasets import load
from mbnb.evaluators.metrics import per_case
from mbnb.evaluators.protocols import make_plan
from mbnb.evaluators.ranks import rank_cases
from mbnb.fit import FitConfig, FitState, Stage, fit, seed_everything
from mbnb.losses.ce import CE
from mbnb.models.sasrec import SASRec

ap = argparse.ArgumentParser()
ap.add_argument("data")
ap.add_argument("--epochs", type=int, default=20)
ap.add_argument("--batch", type=int, default=128)
ap.add_argument("--ff", type=int, default=256)
ap.add_argument("--seed", type=int, default=0)
ap.add_argument("--precision", default="32")
a = ap.parse_args()

torch.set_num_threads(2)
s = load(a.data, columns={"user": "user_id", "item": "item_id", "timestamp": "timestamp"}, behavior="view")
state = FitState(seed_everything(a.seed))
model = SASRec(SASRec.Config.small(s.n_items, dropout=0.2, ff_dim=a.ff))
no_check = lambda model: {"value": 0.0, "error": 0.0, "metrics": {}}
start = time.perf_counter()
for record in fit(
    model, {None: CE()}, s, [Stage(epochs=a.epochs, patience=0)], FitConfig(batch_size=a.batch, precision=a.precision), no_check, state
):
    if record["kind"] == "epoch" and record["epoch"] == a.epochs - 1:
        break  # the last weights, not the "best": nothing was compared
wall = time.perf_counter() - start
model.eval()
begin = time.perf_counter()
found = rank_cases(
    model.score, s, s.test, [make_plan(s, s.test, "full/none", seen_filter="none", split="test")], batch_size=256, max_len=50
)["full/none"]
ndcg = per_case(found, "NDCG", 10)
test = hashlib.sha256("\n".join(sorted(f"{s.users[u]} {s.items[t]}" for u, t in zip(s.test.user, s.test.target))).encode()).hexdigest()
print(
    json.dumps(
        {
            "peer": "mbnb",
            "precision": a.precision,
            "epochs": a.epochs,
            "targets_per_epoch": state.targets // (a.epochs - 1),
            "targets_per_cpu_second": state.targets / state.cpu_seconds,
            "train_seconds": state.seconds,
            "wall_seconds": wall,
            "eval_seconds": time.perf_counter() - begin,
            "ndcg10": float(ndcg.mean()),
            "se": float(ndcg.std() / len(ndcg) ** 0.5),
            "params": sum(p.numel() for p in model.parameters()),
            "test_items": test[:12],
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
)
