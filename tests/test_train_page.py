"The entry page under papermill, as a user starts it: what it writes, and how it refuses what it does not know (F49)."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mbnb.compare import read_runs
from mbnb.experiment import configure, run_experiment
from mbnb.panel import attach
from mbnb.report import pick_run
from mbnb.runs import list_runs
from mbnb.zoo import ConfigError

PAGE = Path(__file__).parents[1] / "nbs" / "train.ipynb"
QUICK = [
    "-p",
    "dataset",
    "toyshop-tiny",
    "-p",
    "epochs",
    "1",
    "-p",
    "set",
    "model.d_model=16 model.ff_dim=32 eval.bootstrap=50 fit.threads=1",
]


def papermill(folder, *args):
    command = [sys.executable, "-m", "papermill", str(PAGE), str(folder / "out.ipynb"), "--cwd", str(folder), "--no-progress-bar", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def outputs(folder):
    cells = json.loads((folder / "out.ipynb").read_text())["cells"]
    return [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]


def test_a_run_leaves_its_folder_and_its_picture(tmp_path):
    done = papermill(tmp_path, *QUICK, "-p", "run_name", "first")
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "first"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["test"]["NDCG@10"] < 1 and result["ci"]["NDCG@10"][0] < result["test"]["NDCG@10"] < result["ci"]["NDCG@10"][1]
    assert {"pop", "markov", "markov_behavior", "copy_recency", "random"} <= result["baselines"].keys()
    shown = outputs(tmp_path)
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for o in shown) == 2, "the metric and the loss figure"
    assert any("text/html" in o.get("data", {}) and "markov_behavior" in "".join(o["data"]["text/html"]) for o in shown), (
        "the table of the model among the rules"
    )
    assert (tmp_path / "out.ipynb").stat().st_size < 300_000


@pytest.mark.parametrize(
    "args, words",
    [
        (["-p", "modle", "sasrec"], ["unknown parameter 'modle'", "'model'"]),
        (["-p", "model", "sasrek"], ["unknown model 'sasrek'", "'sasrec'"]),
        (["-p", "epochs", "ten"], ["epochs='ten'", "expected int"]),
        (["-p", "model", "sasrec'); open('owned', 'w"], ["unknown model"]),
        (["-p", "set", "model.d_modle=3"], ["'d_modle'", "'d_model'"]),
    ],
    ids=["unknown name", "unknown model", "wrong type", "injected code", "unknown key"],
)
def test_f49_a_wrong_parameter_ends_with_one_clear_message(tmp_path, args, words):
    done = papermill(tmp_path, *QUICK[:3], *args)
    assert done.returncode == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists() and not (tmp_path / "owned").exists(), "nothing was written"
    errors = [o for o in outputs(tmp_path) if o["output_type"] == "error"]
    assert len(errors) == 1 and len(errors[0]["traceback"]) == 1, "a sentence, not a traceback"


def run_cells(page, names, given):
    "Runs the code cells of an entry page in `names`, as a kernel does, with the parameters `given` behind its own."
    for cell in json.loads((PAGE.parent / page).read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []): names.update(given)


def test_the_pages_run_twice_in_one_kernel(tmp_path, monkeypatch):
    "What the first time has left behind is no parameter of the second; a name beside them still is."
    monkeypatch.chdir(tmp_path)
    train, report, given = {}, {}, dict(dataset="toyshop-tiny", epochs=1, doctor="off", set="model.d_model=8 eval.bootstrap=20")
    for _ in range(2):
        run_cells("train.ipynb", train, given)
        run_cells("report.ipynb", report, {})
    assert len(list_runs("runs")) == 2 and report["paths"]["md"].parent.name == train["result"]["run_id"]
    with pytest.raises(ConfigError, match="unknown parameter 'modle'"): run_cells("train.ipynb", train, {"modle": "gear"})


def test_pages_of_a_clone_share_its_runs(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").touch()
    made, quick = [], dict(dataset="toyshop-tiny", epochs=1, doctor="off", set="model.d_model=8 eval.bootstrap=20")
    for place in (tmp_path, tmp_path / "nbs"):                      # as `make train` starts one, and as JupyterLab does
        monkeypatch.chdir(place)
        made.append(run_experiment(configure(**quick), say=lambda text: None))
    here = [Path(r["path"]).name for r in made]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == sorted(here) and not (tmp_path / "nbs" / "runs").exists()
    assert sorted(e.id for e in read_runs("runs")) == list_runs("runs").run.sort_values().tolist() == sorted(here)
    assert pick_run() == tmp_path / "runs" / here[1]
    assert attach(here[0]).run.id == here[0]
