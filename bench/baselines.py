"""Rank many cases of a synthetic shop under every training-free rule; prints one JSON line: seconds by step, peak memory.

    python bench/baselines.py [--cases 1000000] [--items 100000] [--length 12] [--threads 2] [--rules pop markov ...] [--sampled 99]
"""
import argparse
import json
import os
import resource
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ.setdefault(name, "2")

import numpy as np

from mbnb.evaluators.baselines import BASELINES, Fitted, rank_baselines
from mbnb.evaluators.metrics import per_case
from mbnb.evaluators.ranks import Plan
from mbnb.sequences import Cases, Sequences


def shop(n_users, n_items, length, seed=0):
    "Popularity falls as 1/rank; a third of the events repeat the item before, a third go on to a neighbor of it. Two held-out events a user."
    rng = np.random.default_rng(seed)
    n = rng.poisson(length, n_users).clip(4)
    offsets = np.append(0, np.cumsum(n))
    total = int(offsets[-1])
    item = np.exp(rng.random(total) * np.log(n_items)).astype(np.int32).clip(1, n_items)
    kind = rng.random(total)
    item[1:] = np.where(kind[1:] < 1 / 3, item[:-1], np.where(kind[1:] < 2 / 3, item[:-1] * 7919 % n_items + 1, item[1:]))
    behavior = rng.choice(np.array([1, 2, 3], np.int32), total, p=[.8, .15, .05])
    when = (np.arange(total) - np.repeat(offsets[:-1], n)) * 3600
    user = np.arange(n_users)
    def cases(stop): return Cases(user, offsets[:-1], stop, item[stop], behavior[stop], when[stop])
    test, train = cases(offsets[1:] - 1), cases(offsets[1:] - 3)
    return Sequences("bench", user.astype(object), np.arange(n_items + 1).astype(object), ("", "view", "cart", "buy"), offsets, item, behavior,
                     when, np.ones(total, bool), train, test.take(slice(0, 0)), test, target_behaviors=(1, 2, 3))


def main():
    ask = argparse.ArgumentParser()
    ask.add_argument("--cases", type=int, default=1_000_000)
    ask.add_argument("--items", type=int, default=100_000)
    ask.add_argument("--length", type=int, default=12, help="mean events a user")
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--rules", nargs="*", choices=list(BASELINES), default=list(BASELINES))
    ask.add_argument("--sampled", type=int, default=0, help="also rank against this many uniform negatives")
    a = ask.parse_args()
    s = shop(a.cases, a.items, a.length)
    plans = [Plan("", "full", None, None, np.full(a.cases, s.n_items, np.int32))]
    if a.sampled:
        negatives = np.random.default_rng(1).integers(1, s.n_items + 1, (a.cases, a.sampled)).astype(np.int32)
        negatives[negatives == s.test.target[:, None]] = 0
        plans.append(Plan(f"uni{a.sampled}", f"uni{a.sampled}", None, negatives, (negatives > 0).sum(1).astype(np.int32) + 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    fitted = Fitted(s)
    scores = {name: BASELINES[name](fitted) for name in a.rules if BASELINES[name]}
    fit = time.perf_counter() - begin
    ranks = rank_baselines(s, s.test, plans, {name: (lambda f, r=scores.get(name): r) if BASELINES[name] else None for name in a.rules}, fitted=fitted, threads=a.threads)
    print(json.dumps({"bench": "baselines", "cases": a.cases, "items": a.items, "events": int(s.offsets[-1]), "rules": len(a.rules), "plans": len(plans),
                      "threads": a.threads, "seconds_fit": round(fit, 1), "seconds_total": round(time.perf_counter() - begin, 1),
                      "data_mb": round(before / 1024), "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                      "NDCG@10": {n: round(float(per_case(r[""], "NDCG", 10).mean()), 4) for n, r in ranks.items()}}))


if __name__ == "__main__":
    main()
