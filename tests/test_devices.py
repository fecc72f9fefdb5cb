"Several processes against one: gradients, weights, ranks, resume; and what they share."
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import together

from mbnb import datasets, experiment
from mbnb import fit as fitting
from mbnb.devices import ALONE, Team, culprit, join_team, merge_rows
from mbnb.doctor.parity import parity_cards, team_parity
from mbnb.evaluators import ranks
from mbnb.evaluators.protocols import make_plan
from mbnb.experiment import configure
from mbnb.fit import FitConfig, FitError, FitState, Stage, fit, seed_everything, start_fabric
from mbnb.losses.ce import CE
from mbnb.losses.sampled_softmax import SampledSoftmax
from mbnb.models.sasrec import SASRec
from mbnb.runs import load_run, read_checkpoint
from mbnb.sequences import batches

fitting_backward = fitting.backward
SMALL = {"dataset": "toyshop-tiny", "epochs": 3, "patience": 50, "doctor": "off",
         "set": "model.d_model=16 model.ff_dim=32 eval.bootstrap=50 fit.threads=1 fit.batch_size=32"}
HALVES = Stage("halves", epochs=9, train=(("items",), ("*",)), lr=.001)
# what is trained: (stages, config), 20 steps of each. Adam makes much of rounding where a gradient is near 0: hence the small rate
PLANS = {
    "plain": ([Stage(epochs=9, lr=.001)], FitConfig(batch_size=33)),
    "accumulated and clipped": ([Stage(epochs=9, lr=.001)], FitConfig(batch_size=16, accumulate=3, clip=.5)),
    "a last batch of one row": ([Stage(epochs=20, lr=.001)], FitConfig(batch_size=199)),
    "accumulated, one process without rows at the end": ([Stage(epochs=9, lr=.001)], FitConfig(batch_size=9, accumulate=2)),
    "by slots": ([Stage(epochs=9, lr=.001)], FitConfig(batch_size=32, tokens=600)),
    "two stages, the second in turns": ([Stage("frozen", epochs=1, freeze=("items",), lr=.001), HALVES], FitConfig(batch_size=33)),
}


def shop(): return datasets.load("toyshop-tiny")


def fresh(dropout=0.):
    torch.manual_seed(1)
    return SASRec(SASRec.Config.small(shop().n_items, d_model=16, ff_dim=32, dropout=dropout))


def trained(team, stages, config, steps=20, loss=None):
    "-> (weights, records) after some steps without dropout."
    model, records, n = fresh(), [], itertools.count(1)
    judged = lambda m: {"value": 0., "error": 1., "metrics": {}}
    loop = fit(model, {None: loss or CE()}, shop(), stages, replace(config, threads=1), judged, FitState(seed_everything(0)), team=team)
    for r in loop:
        records.append(r)
        if r["kind"] == "step" and next(n) == steps: break
    loop.close()
    return {k: v.clone() for k, v in model.state_dict().items()}, records


def rank_all(team, size):
    s, model = shop(), fresh().eval()
    plans = [make_plan(s, s.test, p, seen_filter="none", split="test", seed=0) for p in ("full", "uni19")]
    found = ranks.rank_parts(lambda batch: {None: model.score(batch)}, s, s.test, plans, batch_size=size, max_len=50, team=team)[None]
    return [getattr(found[p.name], k) for p in plans for k in ("case", "user", "target", "g", "e", "m", "repeat")]


def again_by_hand(fabric, model, chunk, *args):
    "What a runner does that does not trust DDP."
    fitting_backward(fabric, model, chunk, *args)
    for p in model.parameters():
        if p.grad is None: continue
        dist.all_reduce(p.grad)
        p.grad /= 2


def rows_forgotten(fabric, model, chunk, loss, weights, rng, team, called):
    "The mean of the processes' means."
    for batch in chunk: fabric.backward(called(lambda m, batch=batch: loss(m(batch), rng)) / len(chunk))


def parities(team):
    s, found = shop(), {}
    chunk = list(itertools.islice(batches(s, s.train, 33, 50, rng=torch.Generator().manual_seed(0), part=(team.rank, team.size)), 3))
    for name, loss, dropout, freeze in (("ce", CE(), 0., ()), ("dropout, drawn negatives", SampledSoftmax(), .3, ("items",))):
        found[name] = team_parity(team, fresh(dropout), chunk, loss, Stage(freeze=freeze))
    for step in (again_by_hand, rows_forgotten):
        fitting.backward = step
        found[step.__name__] = team_parity(team, fresh(), chunk, CE(), Stage())
    fitting.backward = fitting_backward
    return found


def library(job):
    team = join_team(2)
    largest = team.largest(np.array([team.rank, -1])).tolist()
    sums = team.sum([team.rank, .5]), team.number(7 + team.rank), team.tell(f"from {team.rank}"), team.collect(team.rank), largest
    weights = {name: trained(team, *plan) for name, plan in PLANS.items()}
    return {"sums": sums, "trained": weights, "parity": parities(team), "ranks": {n: rank_all(team, n) for n in (32, 1000)}}


@pytest.fixture(scope="module")
def pair(): return together(library)


def test_what_they_tell_each_other(pair):
    for found in pair: assert found["sums"] == ([1., 1.], 7, "from 0", [0, 1], [1, -1])


@pytest.mark.parametrize("name", PLANS)
def test_twenty_steps_give_the_weights_of_one_process(pair, name):
    want, records = trained(ALONE, *PLANS[name])
    for found in pair:
        weights, own = found["trained"][name]
        assert weights.keys() == want.keys()
        assert max((weights[k] - want[k]).abs().max() for k in want) < 1e-5
        for a, b in zip(own, records, strict=True):
            assert a["kind"] == b["kind"] and a["step"] == b["step"] and a.get("rows") == b.get("rows") and a["stage"] == b["stage"]
            if a["kind"] != "step": continue
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5) and math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3)
    assert all(torch.equal(pair[0]["trained"][name][0][k], pair[1]["trained"][name][0][k]) for k in want)


def test_the_doctor_finds_the_gradient_of_one_big_batch(pair):
    for found in pair:
        for name in ("ce", "dropout, drawn negatives"):
            p = found["parity"][name]
            assert p.off < 1e-5 and p.spread < 1e-6 and p.reduced == 0 and p.accumulate == 3
            assert [c.severity for c in parity_cards(p)] == ["ok", "ok"]
        assert [c.severity for c in parity_cards(found["parity"]["again_by_hand"])] == ["ok", "W"]
        assert [c.severity for c in parity_cards(found["parity"]["rows_forgotten"])] == ["E", "ok"]


def test_ranks_are_those_of_one_process_bit_by_bit(pair):
    for size in (32, 1000):
        want = rank_all(None, size)
        for found in pair: assert all(np.array_equal(a, b) for a, b in zip(found["ranks"][size], want, strict=True))


# ---- runs ----

class Broken:
    "Cross-entropy that is NaN once, in the second process."
    def __init__(self, rank): self.calls, self.rank, self.at_init = itertools.count(), rank, CE().at_init
    def __call__(self, prediction, rng=None): return CE()(prediction) * (math.nan if self.rank and next(self.calls) == 12 else 1.)


def stop_after(n):
    "Control.wanted of a run that is stopped after its n-th record."
    looks = itertools.count(1)
    return lambda self: "test" if next(looks) == n else ""


def run(team, **parameters):
    told = []
    try: experiment.one_process(configure(**parameters), told.append, team)
    except experiment.RunStopped: pass
    return told


def runs(job):
    team, small = join_team(2), SMALL | job
    plain, losses = experiment.Control.wanted, experiment.build_losses
    run(team, **small, run_name="whole", devices=2)
    experiment.Control.wanted = stop_after(12)
    run(team, **small, run_name="half", devices=2)
    experiment.Control.wanted = plain
    if team.rank == 0: stopped = load_run(Path(job["runs_dir"]) / "half").status
    run(team, resume="half", runs_dir=job["runs_dir"])

    def halved(self):
        self.state.scale = .5
        return ""
    experiment.Control.wanted = halved
    run(team, **small, run_name="halved", devices=2)
    experiment.Control.wanted = plain

    experiment.build_losses = lambda config, sequences: {None: Broken(team.rank)}
    run(team, **small | {"doctor": "warn"}, run_name="broken", devices=2)
    experiment.build_losses = losses
    run(team, resume="one", runs_dir=job["runs_dir"], devices=2)
    return {"stopped": stopped} if team.rank == 0 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Runs of two processes: whole; half, stopped and resumed; halved by request; broken by a NaN; one, begun by a single process."
    path, plain = tmp_path_factory.mktemp("runs"), experiment.Control.wanted
    try:
        experiment.Control.wanted = stop_after(12)
        run(ALONE, **SMALL, run_name="one", runs_dir=str(path))
    finally: experiment.Control.wanted = plain
    found = together(runs, {"runs_dir": str(path)})[0]
    return path, found


def test_a_resumed_run_equals_an_undisturbed_one(folder):
    path, found = folder
    assert found["stopped"]["state"] == "stopped"
    x, y = (read_checkpoint(path / name) for name in ("whole", "half"))
    assert x.weights.keys() == y.weights.keys() and all(torch.equal(x.weights[k], y.weights[k]) for k in x.weights)
    assert not any("module" in k or "_forward" in k for k in x.weights) and len(x.state["fit"]["others"]) == 1
    for a, b in [(x.state["rng"], y.state["rng"]), (x.state["fit"]["others"][0], y.state["fit"]["others"][0])]:
        assert torch.equal(a["torch"], b["torch"]) and torch.equal(a["generator:loader"], b["generator:loader"])
    assert not torch.equal(x.state["rng"]["torch"], x.state["fit"]["others"][0]["torch"])
    for name in ("ranks-test.npz", "ranks-valid.npz"):
        with np.load(path / "whole" / name) as p, np.load(path / "half" / name) as q:
            assert all(np.array_equal(p[k], q[k]) for k in p.files)
    half, whole = (load_run(path / name).metrics.query("kind == 'step'") for name in ("half", "whole"))
    assert half.loss.tolist() == whole.loss.tolist()


def test_what_a_run_writes_is_of_all_processes(folder):
    path, _ = folder
    whole = load_run(path / "whole")
    assert whole.config["devices"] == 2 and whole.config["resolved"]["fit"]["devices"] == 2 and whole.status["state"] == "done"
    assert whole.metrics.query("kind == 'epoch' and epoch >= 0").rows.nunique() == 1
    two, one = (load_run(path / name).metrics.query("kind == 'step' and epoch == 0") for name in ("whole", "one"))
    assert two.rows.tolist() == one.rows.tolist() and 0 < two.slots.sum() <= one.slots.sum()
    assert whole.result["targets_per_cpu_second"] > 0 and whole.result["n_cases"] == len(shop().test)


def test_the_learning_rate_is_that_of_all(folder):
    steps = load_run(folder[0] / "halved").metrics.query("kind == 'step'")
    full = load_run(folder[0] / "whole").metrics.query("kind == 'step'")
    assert (steps.lr.to_numpy()[1:] * 2 == full.lr.to_numpy()[1:]).all() and load_run(folder[0] / "halved").status["state"] == "done"


def test_a_nan_in_one_process_rolls_all_of_them_back(folder):
    broken = load_run(folder[0] / "broken")
    assert broken.status["state"] == "done" and (broken.metrics.action == "roll back").sum() == 1
    found = {c["id"]: c["severity"] for c in broken.cards}
    assert found["C15"] == "ok" and found["T01"] == "W"


def test_one_process_and_two_read_each_others_checkpoints(folder):
    path, _ = folder
    assert load_run(path / "one").status["state"] == "done"
    again = configure(resume="half", runs_dir=str(path))
    (path / "half" / "result.json").unlink()
    told = []
    experiment._run(replace(again, fit=replace(again.fit, devices=1)), told.append)
    assert any("NOT EXACT: saved by 2 processes" in line for line in told) and load_run(path / "half").result["n_cases"] == len(shop().test)


# ---- small parts ----

def test_rows_that_several_processes_remember():
    before = torch.arange(3.)
    assert merge_rows(before, [torch.tensor([0., 5., 2.]), torch.tensor([9., 7., 2.])]).tolist() == [9., 5., 2.]


def test_who_failed():
    assert culprit({0: {"kind": "RuntimeError", "lost": True, "time": 1.}}, {0: 2., 1: 3.}) == 1
    assert culprit({0: {"value": 1, "time": 1.}}, {0: 2.}) is None


def test_refusals(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FitError, match="this machine has 1 GPU, and each"): start_fabric(FitConfig(devices=2))
    with pytest.raises(FitError, match="expected 1 or more"): start_fabric(FitConfig(devices=0))
    assert Team().size == 1
