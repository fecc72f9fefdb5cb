"""What a panel costs the run it shows: the same papermill run with nobody looking and with a panel that reads it four times a second in another process.
Median seconds of a training step as the run itself measured them, and the processor time of the panel. Beside them the seconds from Start to the run's first sign of
life (a kernel and torch are started) and from there to the first step that the panel can draw. One JSON line."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

VIEWER = """
import json, sys, time
from pathlib import Path
from mbnb.panel import TrainPanel
folder = Path(sys.argv[1])
while not (folder / "status.json").exists(): time.sleep(.05)
panel = TrainPanel(folder.name, folder.parent)
begun, life, first = time.process_time(), time.monotonic(), None
while panel.state()["state"] not in ("done", "failed", "stopped"):
    panel.hear({"action": "tick"})
    if first is None and len(panel.tail.steps["loss"]): first = time.monotonic() - life
    time.sleep(.25)
print(json.dumps({"panel_cpu_seconds": time.process_time() - begun, "first_point_seconds": first}))
"""


def one_run(folder, watched, epochs):
    "-> (median seconds of a step, what the panel says of itself) of a run in `folder`."
    from mbnb.panel import start_run
    from mbnb.runs import Tail

    settings = {"dataset": "toyshop", "epochs": epochs, "patience": epochs, "runs_dir": str(folder), "run_name": "watched" if watched else "alone", "set": "fit.threads=1"}
    path, child = start_run(settings)
    viewer = subprocess.Popen([sys.executable, "-c", VIEWER, str(path)], stdout=subprocess.PIPE, text=True) if watched else None
    if child.wait(): sys.exit((path / "papermill.log").read_text()[-2000:])
    tail = Tail(path)
    tail.read()
    return statistics.median(tail.steps["seconds"][20:]), json.loads(viewer.communicate()[0]) if watched else {}


ap = argparse.ArgumentParser()
ap.add_argument("--epochs", type=int, default=3)
ap.add_argument("--repeats", type=int, default=3)
a = ap.parse_args()
found = {False: [], True: []}
for _ in range(a.repeats):
    for watched in found:
        with tempfile.TemporaryDirectory() as folder: found[watched].append(one_run(Path(folder), watched, a.epochs))
alone, seen = (statistics.median(s for s, _ in found[w]) for w in (False, True))
own = {k: statistics.median(told[k] for _, told in found[True]) for k in found[True][0][1]}
print(json.dumps({"bench": "panel", "step_alone": alone, "step_watched": seen, "slower_by": seen / alone - 1, **own}))
