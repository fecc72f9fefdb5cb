"""One training step of every model of the zoo at the same width, length, batch and data: targets a CPU-second, seconds a step, memory and parameters. A model that joins
`mbnb.zoo.MODELS` joins here by itself.

    python bench/models.py [--models sasrec,mamba4rec] [--length 50 100 200 400] [--items 1000 10000 100000] [--users 2000 20000]

The data are made up: users with `length` events to read and the next one to name, three behaviors, side tables where a model reads them (what they hold changes no time). Each model has its preset `small` but for width and
length, its own loss, and of several stages the last; each cell runs alone in a process of its own. A target is a label, however many rows of the Prediction it takes (M-GPT: one a level): models that name all next items of a row get `length` of them for one pass, those that
name the last get one, and that is the point of the first figure; models that write ids count the tokens of an id. GRAM and GRAM-C take batches of `FEWER` rows: what a target costs can be compared, what a step costs cannot. Seconds are the median of the steps after two that warm up (one, where a step takes a minute); CPU seconds are those of all threads. `model_mb` is what the peak of the process rose by, from
before the model was made. Where several values of length, items or users are given, each is changed alone, the others at their first values, and `exponents` tells by which power the seconds of a step grow along each. One JSON line a cell, and one
with all; a table on stderr. `--out FILE` keeps that line for `nbs/studies/fair_comparison.ipynb`."""

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

FEWER = {"gram": 4, "gram_c": 4}  # rows of a batch at most: with 64 of them, every event of each a prompt of its own, a step wants some 15 and 45 GB
WIDTHS = {"d_model", "d_out"}  # what models call the width of the vectors that they compare with those of the items
AXES = ("length", "items", "users")
SHOWN = ("model", *AXES, "batch", "targets_per_cpu_second", "seconds_per_step", "targets_per_step", "model_mb", "peak_mb", "params", "error")


def made_up(length, items, users):
    "Sequences of `users` users with length + 3 events each: one row trains, the last two events are asked for."
    import numpy as np

    from mbnb.sequences import Cases, Sequences

    g, n = np.random.default_rng(0), length + 3
    item = 1 + (items * g.random(users * n) ** 2).astype(np.int32)  # the first items are met most
    behavior = g.choice(3, users * n, p=[0.8, 0.12, 0.08]).astype(np.int32) + 1
    clock = (g.integers(1, 5_000, (users, n)).cumsum(1) + 1_500_000_000).ravel()
    start = np.arange(users) * n

    def cases(read):
        at = start + read
        return Cases(np.arange(users), start, at, item[at], behavior[at], clock[at])

    names = np.array(["", *(f"i{v}" for v in range(1, items + 1))], dtype=object)
    who = np.array([f"u{u}" for u in range(users)], dtype=object)
    parts = cases(length), cases(length + 1), cases(length + 2)
    offsets = np.append(start, users * n)
    return Sequences("made up", who, names, ("", "view", "cart", "buy"), offsets, item, behavior, clock, np.ones(users * n, bool), *parts)


def build(cls, sequences, width, length):
    "The model in its small preset, at this width and length."
    from dataclasses import fields

    import torch

    from mbnb.checks import random_items

    items = random_items(sequences.n_items, len(sequences.users)) if getattr(cls, "sides", None) else None
    sizes = {"n_items": sequences.n_items, "n_behaviors": sequences.n_behaviors, "n_users": len(sequences.users)} | (items.widths() if items else {})
    known = {f.name for f in fields(cls.Config)}
    wide = dict.fromkeys(known & WIDTHS, width)
    torch.manual_seed(0)
    model = cls(cls.Config.small(**{k: v for k, v in sizes.items() if k in known}, **wide, max_len=length))
    if hasattr(model, "prepare"):
        model.prepare(sequences, items)
    return model


def step_of_nothing(torch):
    "What torch loads on its first step is not the model's."
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.sum().backward()
    optimizer.step()


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def rows_of(name, a): return min(a.batch, FEWER.get(name, a.batch))


def one_cell(name, a, length, items, users):
    "What training steps of a model cost."
    import torch

    from mbnb.fit import FitConfig, Stage, make_optimizer, partition, start_fabric, train_step
    from mbnb.sequences import batches
    from mbnb.zoo import loss_class, model_class

    torch.set_num_threads(a.threads)
    cls, sequences, fabric = model_class(name), made_up(length, items, users), start_fabric(FitConfig())
    step_of_nothing(torch)
    before = peak_mb()
    model = build(cls, sequences, a.width, length).train()
    preset = cls.PRESETS["small"]
    stage = Stage(**preset["stages"][-1])
    loss = loss_class(stage.loss)() if stage.loss else loss_class(preset["loss"])(**preset.get("loss_config", {}))
    if hasattr(loss, "prepare"):
        loss = loss.prepare(sequences)
    optimizer, rng = make_optimizer(model, stage, partition(model, stage)), torch.Generator().manual_seed(0)
    if hasattr(model, "on_epoch"):
        model.on_epoch(stage, 0)
    endless = itertools.chain.from_iterable(
        batches(sequences, sequences.train, rows_of(name, a), getattr(model, "train_len", length), rng=rng) for _ in itertools.count()
    )
    took, begun = [], time.perf_counter()
    for batch in itertools.islice(endless, 2 + a.steps):
        wall, used = time.perf_counter(), time.process_time()
        n = train_step(fabric, model, optimizer, [batch], loss, stage.loss_weights, rng)[1] / getattr(model, "rows_per_target", 1)
        took.append((time.perf_counter() - wall, time.process_time() - used, n))
        if len(took) > 1 and time.perf_counter() - begun > a.seconds:
            break
    walls, cpu, targets = zip(*took[min(2, len(took) - 1) :])
    return {
        "batch": rows_of(name, a),
        "targets_per_cpu_second": round(sum(targets) / sum(cpu), 1),
        "seconds_per_step": round(statistics.median(walls), 5),
        "targets_per_step": round(sum(targets) / len(targets), 1),
        "steps": len(walls),
        "model_mb": round(peak_mb() - before, 1),
        "peak_mb": round(peak_mb(), 1),
        "params": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": stage.loss or preset["loss"],
    }


def alone(name, a, cell):
    "A cell in a process of its own; what it could not do is told in `error`."
    given = ["--cell", name, "--width", a.width, "--batch", a.batch, "--steps", a.steps, "--threads", a.threads, "--seconds", a.seconds]
    given += [x for axis in AXES for x in (f"--{axis}", cell[axis])]
    try:
        done = subprocess.run([sys.executable, __file__, *map(str, given)], capture_output=True, text=True, timeout=a.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {a.limit} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def cells(a):
    "The first values of all axes, then every other value of one axis at a time."
    first = {axis: getattr(a, axis)[0] for axis in AXES}
    return [first] + [first | {axis: v} for axis in AXES for v in getattr(a, axis)[1:]]


def exponents(rows, axis):
    "{model: power of `axis` by which the seconds of a step grow}: the slope of the logarithms, the other axes at their first values."
    found = {}
    for name in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == name and "error" not in r]
        if not own:
            continue
        own = [r for r in own if all(r[x] == own[0][x] for x in AXES if x != axis)]
        x, y = [math.log(r[axis]) for r in own], [math.log(r["seconds_per_step"]) for r in own]
        if len(set(x)) > 1:
            found[name] = round(statistics.linear_regression(x, y).slope, 2)
    return found


def table(rows):
    "The rows for a person."
    columns = [c for c in SHOWN if any(c in r for r in rows)]
    lines = [columns, *([str(r.get(c, "")) for c in columns] for r in rows)]
    wide = [max(len(row[k]) for row in lines) for k in range(len(columns))]
    return "\n".join("  ".join(text.rjust(w) if k else text.ljust(w) for k, (text, w) in enumerate(zip(row, wide))) for row in lines)


def main():
    ap = argparse.ArgumentParser(description="One training step of every model, at the same width, length, batch and data.")
    ap.add_argument("--models", default="", help="names of mbnb.zoo.MODELS, with commas; all by default")
    ap.add_argument("--length", type=int, nargs="+", default=[50])
    ap.add_argument("--items", type=int, nargs="+", default=[10_000])
    ap.add_argument("--users", type=int, nargs="+", default=[2000])
    ap.add_argument("--width", type=int, default=64)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seconds", type=float, default=60, help="no more steps are begun after so many; two are made in any case")
    ap.add_argument("--limit", type=float, default=600, help="seconds after which a cell is given up")
    ap.add_argument("--out", type=Path, help="a file for the last line")
    ap.add_argument("--cell", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.cell:
        return print(json.dumps(one_cell(a.cell, a, a.length[0], a.items[0], a.users[0])))
    from mbnb.zoo import MODELS, unknown

    names = [n.strip() for n in a.models.split(",") if n.strip()] or list(MODELS)
    for name in names:
        if name not in MODELS:
            ap.error(str(unknown("model", name, MODELS)))
    rows = []
    for cell in cells(a):
        for name in names:
            rows.append({"model": name} | cell | alone(name, a, cell))
            print(json.dumps(rows[-1]), flush=True)
    grows = {axis: exponents(rows, axis) for axis in AXES if len(getattr(a, axis)) > 1}
    import torch

    setting = {"width": a.width, "batch": a.batch, "threads": a.threads, "torch": torch.__version__}
    print(table(rows), file=sys.stderr)
    for axis, powers in grows.items():
        print(f"seconds of a step grow with {axis} to the power: " + ", ".join(f"{k} {v}" for k, v in powers.items()), file=sys.stderr)
    found = json.dumps({"bench": "models", **setting, "exponents": grows, "rows": rows})
    print(found)
    if a.out:
        a.out.write_text(found + "\n")


if __name__ == "__main__":
    main()
