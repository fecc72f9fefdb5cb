"""Training in stages: what is judged, what is kept, what begins anew."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from mbnb.config import make_config
from mbnb.datasets import load
from mbnb.experiment import configure, find_run, run_experiment
from mbnb.fit import FitConfig, FitError, FitState, Stage, fit, make_optimizer, partition, seed_everything
from mbnb.losses.ce import CE
from mbnb.models.sasrec import SASRec
from mbnb.runs import load_run
from mbnb.zoo import ConfigError


@pytest.fixture(scope="module")
def shop():
    return load("toyshop-tiny")


def model_of(shop):
    torch.manual_seed(0)
    return SASRec(SASRec.Config.small(shop.n_items, d_model=16, max_len=20))


class Halves(SASRec):
    "A model of two parts: SASRec, and the popularity of item numbers."

    parts = ("sequence", "both")

    def score_parts(self, batch):
        z = super().score(batch)
        return {"sequence": z, "both": z + torch.arange(z.shape[1]) * 100.0}

    def score(self, batch):
        return self.score_parts(batch)["both"]


def told(values):
    "An evaluation that says these values, one after the other, and notes what it was asked for."
    values, asked = iter(values), []

    def evaluate(model, part=None):
        asked.append(part)
        return {"value": next(values), "error": 0.0, "metrics": {}}

    return evaluate, asked


def carried_out(shop, stages, values, model=None):
    evaluate, asked = told(values)
    state = FitState(seed_everything(0))
    model = model or model_of(shop)
    records = list(fit(model, {None: CE()}, shop, stages, FitConfig(batch_size=64, threads=1), evaluate, state))
    return records, asked, model, state


def test_lr_restarts_per_stage(shop):
    "A cosine schedule ends with its stage, and the next one begins at its own rate."
    stages = [Stage("a", epochs=2, lr=1e-2, schedule="cosine", patience=0), Stage("b", epochs=2, lr=4e-3, schedule="cosine", patience=0)]
    rates = [(r["stage"], r["lr"]) for r in carried_out(shop, stages, [0.1] * 6)[0] if r["kind"] == "step"]
    first, second = ([lr for s, lr in rates if s == name] for name in "ab")
    assert first[0] == pytest.approx(1e-2) and first[-1] < 2e-3 and second[0] == pytest.approx(4e-3)
    assert first == sorted(first, reverse=True) and second == sorted(second, reverse=True)


def test_best_of_all_stages_is_kept(shop):
    "A second stage that only gets worse ends with the weights it began from."
    stages = [Stage("a", epochs=2, patience=0), Stage("b", epochs=2, patience=0)]
    records, _, model, state = carried_out(shop, stages, [0.1, 0.2, 0.5, 0.5, 0.3, 0.2])
    assert [r["value"] for r in records if r["kind"] == "epoch" and r["best"]] == [0.1, 0.2, 0.5, 0.5]
    assert state.best == 0.5 and state.best_epoch == -1, "the start of the last stage is its best"
    alone = carried_out(shop, stages[:1], [0.1, 0.2, 0.5])[2]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters()))


def test_stage_monitors_own_component(shop):
    torch.manual_seed(0)
    halves = Halves(Halves.Config.small(shop.n_items, d_model=16, max_len=20))
    stages = [Stage("a", epochs=1, monitor="sequence"), Stage("b", epochs=1)]
    assert carried_out(shop, stages, [0.1] * 4, halves)[1] == ["sequence", "sequence", None, None]


def test_a_monitor_that_is_no_part_is_refused(shop):
    with pytest.raises(FitError, match="monitor='text' is no part of the model; its parts: none"):
        partition(model_of(shop), Stage("a", monitor="text"))


def test_settings_by_stage():
    config = make_config(model="ur4rec", dataset="toyshop-tiny", set="fit.epochs=(4,3,2,1)")
    assert [s.epochs for s in config.stages] == [4, 3, 2, 1]
    assert {s.epochs for s in make_config(model="ur4rec", dataset="toyshop-tiny", epochs=2).stages} == {2}
    assert {s.lr for s in make_config(model="ur4rec", dataset="toyshop-tiny", lr=0.002).stages} == {0.002}
    with pytest.raises(ConfigError, match="found 2 values, expected one for all stages, or 4"):
        make_config(model="ur4rec", dataset="toyshop-tiny", set="fit.epochs=(4,3)")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "UR4Rec in four short stages."
    small = "model.d_model=16 model.width=16 model.n_positions=2 model.n_neg=10 model.n_ctx=4 fit.threads=1 eval.bootstrap=50"
    given = {"runs_dir": str(tmp_path_factory.mktemp("runs")), "max_len": 20, "epochs": 1, "doctor": "warn"}
    result = run_experiment(configure(model="ur4rec", dataset="toyshop-tiny", set=small, **given), say=lambda line: None)
    return load_run(result["path"])


def test_every_evaluation_has_all_parts(run):
    epochs = [r for r in run.metrics.to_dict("records") if r["kind"] == "epoch"]
    assert len(epochs) == 8, "each of four stages is judged before its first step and after its only epoch"
    for r in epochs:
        assert set(r["parts"]) == {"sasrec", "retriever", "fused"}
        watched = {"pretrain_sasrec": "sasrec", "pretrain_retriever": "retriever"}.get(r["stage"], "fused")
        assert r["value"] == pytest.approx(r["parts"][watched]["NDCG@10"])
        assert all(math.isfinite(v) for v in r["inside"].values())


def test_result_has_all_parts(run):
    parts = run.result["parts"]
    assert parts["fused"] == run.result["test"] and set(parts) == {"sasrec", "retriever", "fused"}
    assert len(run.ranks("test", "full-sasrec")["g"]) == len(run.ranks("test")["g"]) == run.result["n_cases"]


def test_stage_one_is_frozen_in_stage_two(run):
    "What a stage does not train scores the same after it."
    rows = {(r["stage"], r["epoch"]): r["parts"] for r in run.metrics.to_dict("records") if r["kind"] == "epoch"}
    assert rows["pretrain_retriever", 0]["sasrec"] == rows["pretrain_retriever", -1]["sasrec"]
    assert rows["pretrain_sasrec", 0]["retriever"] == rows["pretrain_sasrec", -1]["retriever"]


def test_targets_that_end_in_an_early_stage_judge_what_was_trained(tmp_path):
    config = configure(model="sigma_mule", dataset="toyshop-tiny", runs_dir=str(tmp_path), set="fit.targets=100 eval.bootstrap=20")
    result = run_experiment(config, say=lambda line: None)
    assert result["stage"] == config.stages[0].name and result["test"]["NDCG@10"] == result["parts"]["graph"]["NDCG@10"]


def test_frozen_weights_keep_no_gradient_of_the_stage_before(shop):
    model, left = model_of(shop), []
    others = tuple({n.split(".")[0] for n, _ in model.named_parameters()} - {"items"})
    stages = [Stage(name="one", epochs=1), Stage(name="two", epochs=1, train=("items",), freeze=others)]
    for record in fit(model, {None: CE()}, shop, stages, FitConfig(threads=1), told([0.1] * 4)[0]):
        if record["stage"] == "two" and record["kind"] == "step":
            left += [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert record["stage"] == "two" and not left


def interrupted(tmp_path, **parameters):
    "A run that was killed after its first epoch, then gone on with -> result."
    def stop(line):
        if line.startswith("epoch   0"): raise KeyboardInterrupt
    common = {"dataset": "toyshop-tiny", "epochs": 2, "runs_dir": str(tmp_path), "set": "eval.bootstrap=20 model.d_model=16"}
    with pytest.raises(KeyboardInterrupt): run_experiment(configure(run_name="cut", **common, **parameters), say=stop)
    return lambda: run_experiment(configure(resume="cut", runs_dir=str(tmp_path)), say=lambda line: None)


def test_a_run_in_two_sessions_counts_the_time_of_both(tmp_path):
    seconds = interrupted(tmp_path)()["seconds"]
    assert seconds["total"] > seconds["prepare"] + seconds["train"] + seconds["evaluate"] and min(seconds.values()) > 0


def test_a_fork_goes_on_when_its_parent_is_gone(tmp_path):
    small = {"dataset": "toyshop-tiny", "epochs": 1, "runs_dir": str(tmp_path), "set": "eval.bootstrap=20 model.d_model=16"}
    first = run_experiment(configure(run_name="parent", **small), lambda line: None)
    go_on = interrupted(tmp_path, fork="parent")
    shutil.rmtree(first["path"])
    assert go_on()["epochs"] == 2


def test_a_run_with_a_loss_that_is_no_more_is_only_another_run(tmp_path):
    parameters = {"dataset": "toyshop-tiny", "epochs": 1, "runs_dir": str(tmp_path), "set": "eval.bootstrap=20 model.d_model=16"}
    path = Path(run_experiment(configure(**parameters), lambda line: None)["path"])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"loss": "of_old"}))
    assert find_run(configure(**parameters)) is None


def test_rates_name_what_is_there_and_the_longest_name_counts(shop):
    model = model_of(shop)
    with pytest.raises(FitError, match="'nowhere', which holds no parameter"):
        carried_out(shop, [Stage(epochs=1, lr={"nowhere": 1.0, "*": 0.1})], [0.1, 0.2], model)
    stage = Stage(lr={"items": 0.1, "items.weight": 0.2, "*": 0.3})
    assert {g["lr"] for g in make_optimizer(model, stage, partition(model, stage)).param_groups} == {0.2, 0.3}
