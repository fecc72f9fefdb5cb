"""Runs the pages and stores their outputs, so that what a reader sees comes from a real run.

    python .ci/pages.py                        every numbered page and the index
    python .ci/pages.py 00_events train        these; an entry page runs in a folder of its own, so its runs/ does not land in nbs/
    python .ci/pages.py studies/gear_taobao    a study, with the runs in runs/: what is missing there is run, which may take hours

A page is written back only if it ran to its end, holds no more than LIMIT bytes of output and names no path of this machine.
Cells marked `eval: false` or `slow` keep the output they have.
"""
import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from fastcore.nbio import nb2str
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from traitlets.config import Config

root = Path(__file__).resolve().parents[1]
LIMIT = 200_000
WIDGET = "application/vnd.jupyter.widget-view+json"
PRIVATE = sorted({str(root), str(root.parent / "shared"), str(Path.home()), tempfile.gettempdir()} - {"/"}, key=len, reverse=True)
os.environ |= {"OMP_NUM_THREADS": "1", "PLOTLY_RENDERER": "plotly_mimetype", "TQDM_DISABLE": "1"} | os.environ


class PageError(Exception):
    "Why a page was not stored."


def pages(names):
    "Paths of the named pages; all but the entry pages and studies without names."
    found = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if not names: return [p for p in found if not entry(p) and not study(p)]
    by_name = {key: p for p in found for key in (p.stem, str(p.relative_to(root / "nbs").with_suffix("")), str(p.relative_to(root)))}
    unknown = [n for n in names if n not in by_name]
    if unknown: sys.exit(f"no page {', '.join(unknown)}; pages are: {', '.join(sorted(p.stem for p in found))}")
    return [by_name[n] for n in names]


def entry(path):
    "Entry pages stand at the top of nbs/ and carry no number."
    return path.parent == root / "nbs" and not path.stem[0].isdigit() and path.stem != "index"


def study(path): return path.parent.name == "studies"


def left_out(cell): return cell.cell_type != "code" or re.search(r"^#\|\s*(eval:\s*false|slow)", cell.source, re.M)


def last_of_line(text):
    "What a terminal would show: the text after the last carriage return of a line."
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def joined(outputs):
    "Outputs with neighboring pieces of one stream joined, widgets dropped."
    kept = []
    for o in outputs:
        if WIDGET in o.get("data", {}): continue
        if kept and o.output_type == "stream" and kept[-1].output_type == "stream" and kept[-1].name == o.name: kept[-1].text += o.text
        else: kept.append(o)
    for o in kept:
        if o.output_type == "stream": o.text = last_of_line(o.text)
    return kept


def run(nb, folder, sockets, timeout):
    "Executes the cells in order, each output left in its cell. Raises CellExecutionError."
    local = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, config=local)
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if left_out(cell): continue
            client.execute_cell(cell, i)
            cell.outputs = joined(cell.outputs)


def check(nb):
    "Raises PageError for outputs that are too large or name a path of this machine."
    outputs = [(i, json.dumps(c.outputs)) for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.outputs]
    size = sum(len(text) for _, text in outputs)
    largest = max(outputs, key=lambda o: len(o[1]), default=(0, ""))
    if size > LIMIT:
        raise PageError(f"{size:,} bytes of output, at most {LIMIT:,}; the largest is cell {largest[0]} with {len(largest[1]):,}")
    for i, text in outputs:
        named = next((p for p in PRIVATE if p in text), None)
        if named: raise PageError(f"the output of cell {i} names {named}, a path of this machine")
    return size


def stored(nb, before):
    "Text of the cleaned notebook with the metadata that the file had."
    plain = json.loads(nbformat.writes(nb))
    plain["metadata"] = before["metadata"]
    clean_nb(plain, allowed_cell_metadata_keys=["tags"])
    return nb2str(plain)


def make(path):
    "Runs one page and stores it; -> (ok, line for a person)."
    name, start = str(path.relative_to(root)), time.perf_counter()
    before = json.loads(path.read_text(encoding="utf-8"))
    nb = nbformat.reads(json.dumps(before), as_version=4)
    try:
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as sockets:
            run(nb, empty if entry(path) else root if study(path) else path.parent, sockets, None if study(path) else 900)
        size = check(nb)
    except CellExecutionError as e: return False, f"{name}: {e}"
    except PageError as e: return False, f"{name}: {e}"
    if json.loads(path.read_text(encoding="utf-8")) != before: return False, f"{name}: the file changed while it ran; not stored"
    path.write_text(stored(nb, before), encoding="utf-8")
    noisy = [i for i, c in enumerate(nb.cells) if c.cell_type == "code" and any(o.get("name") == "stderr" for o in c.outputs)]
    told = f"; writes to stderr in cell {', '.join(map(str, noisy))}" if noisy else ""
    return True, f"{name}: {time.perf_counter() - start:.1f} s, {size:,} bytes{told}"


def main():
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for ok, line in pool.map(make, pages(sys.argv[1:])):
            print(line, flush=True)
            failed += not ok
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
