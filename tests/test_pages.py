"""One test a page: its cells run from top to bottom, and its assertions hold."""
import ast
import contextlib
import io
import re
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
BUDGET, MODEL_BUDGET = 15, 25       # seconds beyond imports, on two cores


def is_entry(path):
    "Entry pages carry no number; `tests/` runs them by papermill."
    return path.parent.name == "studies" or path.parent == NBS and not path.stem[0].isdigit() and path.stem != "index"


PAGES = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and not is_entry(p))


def only_imports(source):
    "Does a cell import and do nothing else?"
    try: body = ast.parse(source).body
    except SyntaxError: return False        # a magic
    return bool(body) and all(isinstance(line, ast.Import | ast.ImportFrom) for line in body)


def run(path, skip):
    "Runs a page as nbdev does; -> (did it pass, {cell id: seconds}, what it said)."
    from nbdev.test import test_nb
    said, interrupt = io.StringIO(), signal.getsignal(signal.SIGINT)
    try:
        with contextlib.redirect_stdout(said): passed, _ = test_nb(path, skip_flags=skip, basepath=ROOT, cell_timing_min=0, profile=False)
    finally: signal.signal(signal.SIGINT, interrupt)
    times = re.findall(rf"^{re.escape(path.name)}:(\S+): ([0-9.]+)s$", said.getvalue(), re.M)
    return passed, {cell: float(seconds) for cell, seconds in times}, said.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_page(page, request, record_property, capfd):
    from fastcore.nbio import read_nb
    path = NBS / page
    passed, times, _ = run(path, [] if request.config.getoption("--slow") else ["slow"])
    imports = sum(times.get(c.id, 0) for c in read_nb(path).cells if c.cell_type == "code" and only_imports(c.source))
    for name, value in {"page": page, "seconds": sum(times.values()) - imports, "imports": imports,
                        "budget": MODEL_BUDGET if page.startswith("models/") else BUDGET}.items(): record_property(name, value)
    assert passed, f"nbs/{page} failed:\n{capfd.readouterr().err[-6000:]}"


def test_there_are_pages(): assert PAGES
