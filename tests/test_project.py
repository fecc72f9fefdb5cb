"""The project as a whole: one source of metadata, package and pages in step, a wheel that works, imports that go down only."""
import ast
import configparser
import difflib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from mbnb.checks import check_floors

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE = ROOT / "nbs", ROOT / "mbnb"
BIN = Path(sys.executable).parent
ENTRY = sorted(p for p in NBS.glob("[a-z]*.ipynb") if p.stem != "index")
SKIP = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "notebooks", "runs", ".*")


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def lines(key): return [line.strip() for line in settings()[key].splitlines() if line.strip()]


def run(*command, cwd=ROOT):
    "Output of a command that has to succeed. nbdev does nothing while it thinks that a page is being tested."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode: pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}", pytrace=False)
    return done.stdout


def texts(folder, pattern): return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in sorted(folder.rglob(pattern))}


def must_equal(have, want, advice):
    "Two {name: text}; the message names the files that differ and shows the first lines that do."
    apart = [name for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]
    if not apart: return
    one = apart[0]
    old, new = (side.get(one, "").splitlines() for side in (have, want))
    diff = list(difflib.unified_diff(old, new, "as committed", "as made now", lineterm="", n=0))
    pytest.fail(f"{', '.join(apart)}: {advice}\n{one}:\n" + "\n".join(line[:200] for line in diff[:20]), pytrace=False)


# ---- package and pages ----

def test_the_doctor_finds_every_page_of_the_package_exported():
    from mbnb.doctor.config import exported, unexported
    card = exported(PACKAGE.rglob("*.py"))
    assert card.severity == "ok", card.message
    assert sum(unexported(p) is not None for p in PACKAGE.rglob("*.py")) > 75


def test_export_in_sync(tmp_path):
    "Exporting all pages into an empty package gives exactly mbnb/: no module by hand, none left over."
    shutil.copytree(NBS, tmp_path / "nbs", ignore=SKIP)
    for name in ("pyproject.toml", "settings.ini", "mbnb/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    run(sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=tmp_path)
    must_equal(texts(PACKAGE, "*.py"), texts(tmp_path / "mbnb", "*.py"), "mbnb/ is not what nbs/ exports: run `make export`")


def test_notebooks_are_clean(tmp_path):
    shutil.copytree(NBS, tmp_path / "nbs", ignore=SKIP)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    before = texts(tmp_path / "nbs", "*.ipynb")
    run(BIN / "nbdev-clean", cwd=tmp_path)
    must_equal(before, texts(tmp_path / "nbs", "*.ipynb"), "pages carry metadata: run `make clean-pages`")


@pytest.mark.parametrize("page", sorted((NBS / "models").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_model_page_shows_its_curve_and_its_table(page):
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    shows = [c for c in cells if re.match(r"(metric_figure|result_table)\(", "".join(c["source"]).splitlines()[-1])]
    assert len(shows) >= 2, f"{page.name} ends no cell with metric_figure(...) or result_table(...)"
    empty = ["".join(c["source"]) for c in shows if not c["outputs"]]
    assert not empty, f"{page.name}: nothing is stored of {empty}: run `make pages PAGES=models/{page.stem}`"


def test_parameters_cell():
    "Without its tag papermill runs the defaults and says nothing; the comments are what `papermill --help-notebook` shows."
    page = NBS / "train.ipynb"
    if not page.exists(): pytest.skip("nbs/train.ipynb is not there yet")
    cells = [c for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(cells) == 1, f"nbs/train.ipynb: {len(cells)} cells are tagged `parameters`, expected one"
    source = "".join(cells[0]["source"])
    for node in ast.parse(source).body:
        assert isinstance(node, ast.AnnAssign), f"nbs/train.ipynb: `{ast.unparse(node)}` in the parameters cell has no annotation"
        line = source.splitlines()[node.end_lineno - 1]
        assert "#" in line[node.end_col_offset:], f"nbs/train.ipynb: the parameter {node.target.id} has no comment behind it"


ASKING = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and '"parameters"' in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ASKING, ids=lambda p: p.stem)
def test_papermill_sees_every_parameter(page):
    "What it cannot read (a second = on the line, say) it leaves out of its help, and warns of on every use."
    from papermill import inspect_notebook
    cells = [c for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert [n.target.id for c in cells for n in ast.parse("".join(c["source"])).body] == list(inspect_notebook(page))


def test_readme_is_the_index_page(): run(sys.executable, ROOT / ".ci" / "readme.py", "--check")


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ruff():
    folders = [p for p in ("mbnb", "tests", ".ci", "setup.py", "bench") if (ROOT / p).is_file() or any((ROOT / p).glob("**/*.py"))]
    run(sys.executable, "-m", "ruff", "check", "--no-cache", *folders)


# ---- metadata ----

def test_versions_are_equal():
    found = {"settings.ini": settings()["version"],
             "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"].get("version", settings()["version"]),
             "mbnb.__version__": re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.M)[1]}
    assert len(set(found.values())) == 1, found


def test_pyproject_is_thin():
    "nbdev reads [tool.nbdev] only, and a [project] table would be a second source of metadata."
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert content.keys() == {"build-system", "tool"}
    assert content["tool"].keys() == {"nbdev"}
    assert "tags" in content["tool"]["nbdev"]["allowed_cell_metadata_keys"], "nbdev-clean would strip the tag `parameters`"


def requirement_name(text): return re.match(r"[A-Za-z0-9._-]+", text)[0].lower().replace("_", "-").replace(".", "-")


def test_constraints_pin_every_requirement():
    pins = {requirement_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line)}
    keys = [k for k in settings() if k.endswith("requirements") and k != "track_requirements"]
    missing = sorted({requirement_name(r) for k in keys for r in lines(k)} - pins)
    assert not missing, f"constraints.txt does not pin {', '.join(missing)}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel of a copy of the tree (setuptools would find its own leftovers in the tree itself)."
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("mbnb", "nbs"): shutil.copytree(ROOT / name, tree / name, ignore=SKIP)
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        shutil.copyfile(ROOT / name, tree / name)
    run(sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, cwd=tree)
    (made,) = out.glob("*.whl")
    return made


def test_wheel_holds_package_and_entry_notebooks(wheel):
    with zipfile.ZipFile(wheel) as z: files = {n: z.read(n).decode() for n in z.namelist() if n.startswith("mbnb/")}
    want = {f"mbnb/{name}": text for name, text in texts(PACKAGE, "*.py").items()}
    must_equal({n: t for n, t in files.items() if n.endswith(".py")}, want, "the wheel's modules are not those of mbnb/")
    pages = {f"mbnb/notebooks/{p.name}": p.read_text(encoding="utf-8") for p in ENTRY}
    must_equal({n: t for n, t in files.items() if n.endswith(".ipynb")}, pages, "the wheel's notebooks are not the entry pages of nbs/")


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as z: meta = next(z.read(n).decode() for n in z.namelist() if n.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {settings()['version']}\n" in meta
    assert f"\nRequires-Python: >={settings()['min_python']}\n" in meta
    extras = set(re.findall(r"^Provides-Extra: (.+)$", meta, re.M))
    assert {"dev", "all", "sweep", "text", "generative", "xcheck", "track"} <= extras


def test_wheel_finds_its_notebooks(wheel, tmp_path):
    if not ENTRY: pytest.skip("there is no entry page yet")
    with zipfile.ZipFile(wheel) as z: z.extractall(tmp_path)
    code = "import mbnb, mbnb.cli; print(mbnb.__file__); [print(p) for p in mbnb.cli.entry_notebooks().values()]"
    said = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}", cwd=tmp_path).splitlines()
    assert said == [str(tmp_path / "mbnb" / "__init__.py"), *(str(tmp_path / "mbnb" / "notebooks" / p.name) for p in ENTRY)]


# ---- imports ----

MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py")) if not p.name.startswith("_")}


def imported(node, module):
    "Dotted names that an import statement of `module` may load, relative ones made absolute."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if not isinstance(node, ast.ImportFrom): return []
    above = ["mbnb", *module.split(".")]
    stem = ".".join([*above[:len(above) - node.level], node.module or ""]).strip(".") if node.level else node.module
    return [f"{stem}.{a.name}" for a in node.names]


def test_imports_go_down():
    "A room stands on lower floors only; a model never imports a model, a loss never a loss."
    assert check_floors(PACKAGE) == len(MODULES)


def test_imports_are_declared():
    "What a module imports when it is loaded is a requirement; what a function imports may be an extra."
    owners = importlib.metadata.packages_distributions()
    base = {requirement_name(r) for r in lines("requirements")}
    extra = base | {requirement_name(r) for k in settings() if k.endswith("_requirements") and k != "dev_requirements" for r in lines(k)}
    wrong = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            for name in {n.split(".")[0] for n in imported(node, module)} - {"mbnb"} - sys.stdlib_module_names:
                dists = {requirement_name(d) for d in owners.get(name, [])}
                if not dists & (base if node in tree.body else extra): wrong.append(f"mbnb.{module} imports {name}")
    assert not wrong, "not declared in settings.ini: " + "; ".join(sorted(set(wrong)))
