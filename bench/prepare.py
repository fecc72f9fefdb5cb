"""Time and peak memory of preparing a large log: csv -> Events -> Sequences (5-core, leave one out).

    python bench/prepare.py [--events 10000000] [--users 500000] [--items 100000]

The log is generated in a temporary folder; a fresh child process reads and splits it, so that the peak is that of the
preparation alone. Prints one JSON line. Aim: at most 60 s and 4 GiB for 10 M events.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def generate(path, n_events, n_users, n_items, seed=0):
    "Writes a csv log of `n_events` rows in time order: heavy-tailed users and items, three behaviors, whole seconds."
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(seed)
    def heavy(n, size):
        "Ranks 0..n-1, the first ones most often (Zipf-like), numbered in random order."
        rank = (n * rng.random(size) ** 2).astype(np.int64)
        return rng.permutation(n)[rank]
    frame = pl.DataFrame({
        "user": heavy(n_users, n_events), "item": heavy(n_items, n_events),
        "behavior": pl.Series(rng.choice(3, n_events, p=[.85, .1, .05])).replace_strict([0, 1, 2], ["view", "cart", "buy"]),
        "timestamp": 1_500_000_000 + np.sort(rng.integers(0, 30 * 86_400, n_events)),
    })
    frame.write_csv(path)


def _now():
    return time.perf_counter(), time.process_time()


def _spans(clock, *times):
    "Seconds between the `_now` of the stages; clock 0 = wall, 1 = CPU of all threads."
    t = [x[clock] for x in times]
    return dict(zip(("import", "read", "build", "total"), (round(b - a, 2) for a, b in [*zip(t, t[1:]), (t[0], t[-1])])))


def prepare(path):
    "Reads and splits the log; -> figures of this process."
    started = _now()
    from mbnb.events import read_events
    from mbnb.sequences import from_events
    imported = _now()
    events = read_events(path)
    read = _now()
    sequences = from_events(events, name="bench", split="leave_one_out", min_user=5, min_item=5)
    built = _now()
    scale = 1 if platform.system() == "Darwin" else 1024          # ru_maxrss: bytes there, kilobytes elsewhere
    return {"events": events.frame.height, "used": sequences.counts["used"], "cases": len(sequences.test),
            "seconds": _spans(0, started, imported, read, built), "cpu_seconds": _spans(1, started, imported, read, built),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(prepare(args.child)))
    if args.write:
        return generate(args.write, args.events, args.users, args.items)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        # generated in a child too: polars keeps memory, and the parent's peak is no one's figure
        sizes = [str(n) for n in (args.events, args.users, args.items)]
        asked = ["--events", sizes[0], "--users", sizes[1], "--items", sizes[2]]
        subprocess.run([sys.executable, __file__, *asked, "--write", str(log)], check=True)
        size = log.stat().st_size
        done = subprocess.run([sys.executable, __file__, "--child", str(log)], check=True, stdout=subprocess.PIPE, text=True)
    print(json.dumps({"bench": "prepare", "users": args.users, "items": args.items, "csv_mb": round(size / 2**20), "cpus": os.cpu_count(),
                      **json.loads(done.stdout.splitlines()[-1])}))


if __name__ == "__main__":
    main()
