"What the comparisons share: an environment for each peer, one file of events for all, children that run alone, and lines of JSON."

import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

BENCH = Path(__file__).parent
REQUIREMENTS = {
    "rectools": ["torch==2.13.0", "rectools[torch]==0.19.0", "psutil"],
    "recbole": ["torch==2.13.0", "recbole==1.2.1", "setuptools<81", "numpy==1.26.4", "pandas==2.2.3"],
}


def peer_python(name):
    "Python of the peer's own environment under build/bench/, made on first use."
    folder = BENCH.parent / "build" / "bench" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {name} into {folder} (once)", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        env = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], check=True, env=env)
        (folder / "ready").touch()
    return python


def child(python, script, *args):
    "Run a script alone and return the JSON of its last line."
    done = subprocess.run([python, BENCH / script, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def event_file(name):
    "A data set as a tab-separated file user, item, position for every side; users with three events or more, in our canonical order."
    from mbnb import datasets

    s = datasets.load(name)
    path = Path(tempfile.mkdtemp(prefix="mbnb-bench-")) / "events.tsv"
    with open(path, "w") as out:
        out.write("user_id\titem_id\ttimestamp\n")
        for u in range(len(s.users)):
            for k, e in enumerate(range(s.offsets[u], s.offsets[u + 1])):
                out.write(f"{u + 1}\t{s.item[e]}\t{k + 1}\n")
    return path


def in_turn(sides, repeats):
    "Run the sides {name: call} one after the other, `repeats` times, printing each line; -> {name: [results]}."
    found = {name: [] for name in sides}
    for k in range(repeats):
        for name, call in sides.items():
            row = call(k)
            found[name].append(row)
            print(json.dumps({"side": name, "repeat": k} | row), flush=True)
    return found


def medians(rows, *keys):
    return {k: statistics.median(r[k] for r in rows) for k in keys}
