"""Fault F10: a run of an older mbnb loads, and goes on. `tests/golden/runs/v1` was written by the first version that could train (commit
70333e7): SASRec of width 4 on the tiny toy shop, 4 epochs, of its checkpoints only that of epoch 3, no ranks of the validation cases; names
of the machine taken out."""
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from mbnb import runs
from mbnb.experiment import before_they_existed, configure, find_run, run_experiment
from mbnb.fit import FitConfig, FitState, Stage
from mbnb.runs import RunError, RunFolder, digest, filled, list_runs, load_run, read_checkpoint, refuse_differences

GOLDEN = Path(__file__).parents[1] / "golden" / "runs"
SET = "model.d_model=4 model.ff_dim=4 eval.bootstrap=20 fit.threads=1"
SMALL = {"dataset": "toyshop-tiny", "epochs": 2, "doctor": "off", "max_len": 20, "set": SET}


@pytest.fixture
def v1(tmp_path):
    "A copy of the golden run."
    shutil.copytree(GOLDEN / "v1", tmp_path / "v1")
    return tmp_path / "v1"


def quiet(**parameters):
    return run_experiment(configure(**parameters), say=lambda line: None)


def test_the_golden_run_is_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*")) < 100_000


def test_f10_an_old_run_is_read(v1):
    run = load_run(v1)
    assert run.status["state"] == "done" and run.config["model"] == "sasrec" and run.environment["packages"]["mbnb"] == "0.1.0"
    assert run.metrics.kind.value_counts()["step"] == 16 and run.metrics.query("kind == 'epoch'").epoch.tolist() == [-1, 0, 1, 2, 3]
    assert not run.notes
    assert len(run.ranks()["g"]) == run.result["n_cases"] == 200
    found = read_checkpoint(v1)
    assert found.name == "fit-0003" and found.state["fit"]["epoch"] == 2 and found.weights["best.items.weight"].shape == (101, 4)
    row = list_runs(v1.parent).iloc[0]
    assert (row.run, row.state, row["NDCG@10"]) == ("v1", "done", run.result["test"]["NDCG@10"])


def test_f10_it_lacks_settings_that_exist_now(v1):
    "Else the golden run would prove nothing."
    saved = load_run(v1).config["resolved"]
    assert {f.name for f in fields(FitConfig)} - saved["fit"].keys() >= {"average", "unseen"}
    assert {f.name for f in fields(Stage)} - saved["stages"][0].keys() >= {"beta2"}
    assert {f.name for f in fields(FitState)} - read_checkpoint(v1).state["fit"].keys() >= {"begun", "taken"}


def test_f10_an_old_run_goes_on_to_its_end(v1):
    "Killed in its last epoch, resumed today: settings that it does not have stand at their defaults, its records and result go on."
    was = load_run(v1).result
    (v1 / "result.json").unlink()
    (v1 / "ranks-test.npz").unlink()
    now = quiet(resume="v1", runs_dir=str(v1.parent))
    run = load_run(v1)
    assert run.status["state"] == "done" and run.metrics.query("kind == 'epoch'").epoch.tolist() == [-1, 0, 1, 2, 3]
    assert now["n_cases"] == was["n_cases"] and now["params"] == was["params"] and now["epochs"] == was["epochs"] == 4
    assert abs(now["test"]["NDCG@10"] - was["test"]["NDCG@10"]) < 0.02       # the arithmetic of a step is not that of the first version


def test_f10_an_old_finished_run_is_finished(v1):
    assert quiet(resume="v1", runs_dir=str(v1.parent))["test"] == load_run(GOLDEN / "v1").result["test"]


def test_f10_an_old_run_is_found_by_its_meaning(v1):
    "What a study made once is not made again because a setting was added."
    given = ("dataset", "epochs", "patience", "batch_size", "lr", "max_len", "set")
    parameters = {k: v for k, v in load_run(v1).config.items() if k in given}
    assert find_run(configure(**parameters, runs_dir=str(v1.parent))).id == "v1"


# ---- settings younger than the run ----
def older(path, *missing, **other):
    """The run as it would be had these settings (`fit.average`, `stages.beta2`) not existed, or had been others, when it was written;
    killed after its first epoch."""
    for name in ("result.json", "ranks-test.npz", "ranks-valid.npz"): (path / name).unlink(missing_ok=True)
    for file in sorted((path / "checkpoints").glob("*.json"))[1:]: file.unlink()
    for file in [*(path / "checkpoints").glob("*.json"), path / "config.json"]:
        saved = json.loads(file.read_text())
        for config in [saved["meta"]["config"]] if "meta" in saved else [saved["resolved"], saved["config"]]:
            for part, name in (key.split(".") for key in [*missing, *other]):
                for settings in config[part] if isinstance(config[part], list) else [config[part]]:
                    settings.pop(name, None)
                    if f"{part}.{name}" in other: settings[name] = other[f"{part}.{name}"]
        saved.pop("sha256", None)
        file.write_text(json.dumps(saved | ({"sha256": digest(saved)} if "meta" in saved else {})))


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    return Path(quiet(**SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")), run_name="today")["path"])


def test_f10_a_setting_younger_than_the_run_stands_at_its_default(today, tmp_path):
    shutil.copytree(today, tmp_path / "old")
    before = load_run(today).result["test"]
    older(tmp_path / "old", "fit.average", "fit.unseen", "eval.valid_cases", "stages.beta2", "model.head", "model.n_behaviors")
    assert quiet(resume="old", runs_dir=str(tmp_path))["test"] == before


OTHERS = [
    ("fit.average", "fit.average=.5", ["config.fit.average", "0.0", "0.5"]),
    ("stages.schedule", "fit.schedule=linear", ["config.stages.0.schedule", "constant", "linear"]),
]


@pytest.mark.parametrize("missing, given, named", OTHERS)
def test_f10_with_another_value_it_is_refused(missing, given, named, tmp_path):
    "The run was made without it: what it would be now is not what it was."
    run = Path(quiet(**SMALL | {"set": f"{SMALL['set']} {given}"}, runs_dir=str(tmp_path), run_name="old")["path"])
    older(run, missing)
    with pytest.raises(RunError, match="another config or data") as refused: quiet(resume="old", runs_dir=str(tmp_path))
    assert all(word in str(refused.value) for word in named) and "config.fit.clip" not in str(refused.value)


def test_f10_a_size_of_the_data_is_no_setting(today, tmp_path):
    "The hash of the data answers for it; a saved one that differs is refused all the same."
    shutil.copytree(today, tmp_path / "old")
    older(tmp_path / "old", **{"model.n_items": 99})
    with pytest.raises(RunError, match="config.model.n_items +99 +100"): quiet(resume="old", runs_dir=str(tmp_path))


def test_f10_weights_that_the_model_does_not_have_are_refused_in_words(today, tmp_path, monkeypatch):
    shutil.copytree(today, tmp_path / "old")
    older(tmp_path / "old")
    load = RunFolder.load_checkpoint
    def renamed(self, which="last"):
        found = load(self, which)
        found.weights["last.table.weight"] = found.weights.pop("last.items.weight")
        return found
    monkeypatch.setattr(RunFolder, "load_checkpoint", renamed)
    with pytest.raises(RunError, match="weights of checkpoint fit-0001 are not those of this model.*start a new run"):
        quiet(resume="old", runs_dir=str(tmp_path))


def test_f10_a_checkpoint_of_a_newer_format_is_named(today, tmp_path, monkeypatch):
    shutil.copytree(today, tmp_path / "new")
    (tmp_path / "new" / "result.json").unlink()
    monkeypatch.setattr(runs, "FORMAT", 0)
    with pytest.raises(RunError, match="format 1 of a newer mbnb; this one reads 0"): quiet(resume="new", runs_dir=str(tmp_path))


def test_filled_goes_into_lists_and_leaves_what_is_there():
    defaults = {"fit": {"clip": 0.0, "seed": 0}, "stages": {"lr": 1e-3, "beta2": 0.98}}
    saved = {"fit": {"clip": 1.0}, "stages": [{"lr": 0.1}, {"lr": 0.2, "beta2": 0.9}], "data_hash": "x"}
    found = filled(saved, defaults)
    assert found == {"fit": {"clip": 1.0, "seed": 0}, "stages": [{"lr": 0.1, "beta2": 0.98}, {"lr": 0.2, "beta2": 0.9}], "data_hash": "x"}
    assert filled(saved, None) == saved and "seed" not in saved["fit"]
    now = found | {"stages": [{"lr": 0.1, "beta2": 0.98}, {"lr": 0.2, "beta2": 0.98}]}
    with pytest.raises(RunError, match="stages.1.beta2 +0.9 +0.98"): refuse_differences(saved, now, defaults=defaults)


def test_defaults_are_those_of_the_classes(today):
    class Model: config = FitConfig()
    defaults = before_they_existed(Model, Stage(), {"config": {"model": {"n_items": 7}}})["config"]
    assert defaults["fit"] == asdict(FitConfig()) and defaults["stages"] == asdict(Stage()) and defaults["model"]["n_items"] == 7
