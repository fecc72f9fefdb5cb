"Faults of a step: F17 memory runs out, F18 a process dies, F21 gradients overflow in 16 bits."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mbnb import datasets, devices, experiment
from mbnb import fit as fitting
from mbnb.devices import DevicesError, Team
from mbnb.evaluators.ranks import EvalError
from mbnb.experiment import RunStopped, configure, run_experiment
from mbnb.fit import Diverged, FitConfig, FitError, FitState, Stage, fit, in_memory, out_of_memory, seed_everything
from mbnb.losses.ce import CE
from mbnb.models.sasrec import SASRec
from mbnb.runs import load_run, process_start, send_request

SMALL = {"dataset": "toyshop-tiny", "epochs": 2, "patience": 50,
         "set": "model.d_model=16 model.ff_dim=32 model.dropout=0. eval.bootstrap=50 fit.threads=1"}
LONG = SMALL | {"epochs": 400, "doctor": "off"}
ROWS = 300      # labels that fit into the memory of these tests


class Hungry:
    "Cross-entropy that asks the machine for a petabyte where a batch has more than ROWS labels: the allocator's own refusal."
    def __init__(self, rows=ROWS): self.rows, self.at_init = rows, CE().at_init
    def __call__(self, prediction, rng=None):
        if len(prediction.targets) > self.rows: torch.empty(2**50)
        return CE()(prediction)


def fresh():
    torch.manual_seed(1)
    return SASRec(SASRec.Config.small(datasets.load("toyshop-tiny").n_items, d_model=16, ff_dim=32, dropout=0.))


def trained(loss, config=None, epochs=2, lr=.001, model=None, state=None):
    model, state = model or fresh(), state or FitState(seed_everything(0))
    config, judged = config or FitConfig(batch_size=32, threads=1), lambda m: {"value": float(state.epoch), "error": 0., "metrics": {}}
    stages = [Stage(epochs=epochs, lr=lr, patience=0)]
    records = list(fit(model, {None: loss}, datasets.load("toyshop-tiny"), stages, config, judged, state))
    return model.state_dict(), records, state


# ---- F17 ----

def test_f17_a_batch_that_does_not_fit_is_cut_and_the_step_is_the_same():
    want, plain, _ = trained(CE())
    got, records, state = trained(Hungry())
    assert max((got[k] - want[k]).abs().max() for k in want) < 1e-5
    assert state.pieces > 1 and FitState(None, **state.to_dict()).pieces == state.pieces, "a resumed run does not run into it again"
    steps = [[r for r in found if r["kind"] == "step"] for found in (plain, records)]
    assert [r["rows"] for r in steps[0]] == [r["rows"] for r in steps[1]] and steps[1][-1]["pieces"] == state.pieces
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_f17_of_a_gpu_and_of_python(error):
    sizes, state, batch = [], FitState(None), next(iter(datasets_batches(8)))
    def step(chunk):
        sizes.append([len(b) for b in chunk])
        if len(chunk) < 4: raise error
        return "done"
    assert in_memory(step, [batch], state) == "done"
    assert sizes == [[8], [4, 4], [2, 2, 2, 2]] and state.pieces == 4


def datasets_batches(size):
    from mbnb.sequences import batches
    s = datasets.load("toyshop-tiny")
    return batches(s, s.train, size, 20)


def test_f17_the_floor_is_a_clear_error():
    with pytest.raises(FitError, match="single row a batch .*lower max_len"): trained(Hungry(0))
    def step(chunk): raise torch.OutOfMemoryError("CUDA out of memory")
    some = list(datasets_batches(8))[:1]
    with pytest.raises(FitError, match=r"process 1 of 2 .*lower batch_size and raise fit.accumulate"):
        in_memory(step, some, FitState(None), Team(1, 2))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    def wrong(chunk): raise RuntimeError("shapes")
    with pytest.raises(RuntimeError, match="shapes"): in_memory(wrong, some, FitState(None))


def test_f17_is_told_and_written_down(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(experiment, "build_losses", lambda config, sequences: {None: Hungry()})
    result = run_experiment(configure(**SMALL, runs_dir=str(tmp_path), doctor="off"), say=told.append)
    run = load_run(result["path"])
    assert run.status["state"] == "done" and any("memory ran out at step 1" in line for line in told)
    assert (run.metrics.action == "smaller pieces").sum() >= 1 and run.metrics.pieces.max() > 1


# ---- F21 ----

def half_precision(monkeypatch, scale=2.**40):
    "16 bits on a CPU, with torch's own scaler, which begins far too high."
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.plugins.precision import MixedPrecision
    def start(config):
        torch.set_num_threads(1)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        return Fabric(accelerator="cpu", devices=1, plugins=[precision, LightningEnvironment()])
    monkeypatch.setattr(fitting, "start_fabric", start)
    monkeypatch.setattr(experiment, "start_fabric", start)


@pytest.mark.parametrize("config", [FitConfig(batch_size=32, threads=1), FitConfig(batch_size=16, accumulate=2, clip=1., threads=1)])
def test_f21_steps_that_overflow_are_left_out_counted_and_no_divergence(monkeypatch, config):
    half_precision(monkeypatch)
    before = {k: v.clone() for k, v in fresh().state_dict().items()}
    weights, records, state = trained(CE(), config, epochs=8)
    steps = [r for r in records if r["kind"] == "step"]
    assert 0 < state.skipped < len(steps) and state.skipped == sum(r.get("skipped", False) for r in steps)
    assert all(("grad_norm" in r) != r.get("skipped", False) for r in steps) and steps[0]["skipped"] and not steps[-1].get("skipped")
    assert [r for r in records if r["kind"] == "epoch"][-1]["skipped"] == state.skipped
    assert all(v.isfinite().all() for v in weights.values()) and any(not torch.equal(before[k], weights[k]) for k in before)
    assert state.scaler["scale"] < 2.**40


def test_f21_no_weight_moves_in_a_step_that_is_left_out(monkeypatch):
    half_precision(monkeypatch)
    model = fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    judged, config = lambda m: {"value": 0., "error": 0., "metrics": {}}, FitConfig(batch_size=32, threads=1)
    loop = fit(model, {None: CE()}, datasets.load("toyshop-tiny"), [Stage()], config, judged)
    record = next(r for r in loop if r["kind"] == "step")
    assert record["skipped"] and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_f21_a_resumed_run_knows_its_factor(monkeypatch):
    half_precision(monkeypatch)
    _, _, state = trained(CE(), epochs=8)
    again = FitState(torch.Generator().manual_seed(0), **state.to_dict() | {"done": False, "epoch": 6}, best_weights=state.best_weights)
    _, records, after = trained(CE(), epochs=8, state=again)
    assert after.skipped == state.skipped and not any(r.get("skipped") for r in records if r["kind"] == "step")


def test_f21_gradients_that_never_become_finite_are_a_divergence(monkeypatch):
    half_precision(monkeypatch, scale=2.**4)
    model = fresh()
    model.items.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(Diverged, match="items.weight"): trained(CE(), epochs=20, model=model)


def test_f21_is_shown(monkeypatch, tmp_path):
    half_precision(monkeypatch)
    told = []
    small = SMALL | {"epochs": 8, "set": SMALL["set"] + " fit.batch_size=32", "runs_dir": str(tmp_path), "doctor": "off"}
    result = run_experiment(configure(**small), say=told.append)
    assert result["skipped_steps"] > 0 and any(f"{result['skipped_steps']} steps left out (overflow)" in line for line in told)


# ---- F18: there are no loader workers; the processes of a run are what can die ----

@pytest.fixture
def processes(monkeypatch):
    "The Processes that `launch` starts."
    seen, start = [], devices.Processes
    def noted(*args):
        seen.append(start(*args))
        return seen[-1]
    monkeypatch.setattr(devices, "Processes", noted)
    return seen


def gone(team): return all(process_start(who["pid"]) != who["started"] for who in team.ranks_seen) and team.child.poll() is not None


def test_f18_a_process_that_dies_is_named_and_none_is_left(processes, tmp_path):
    died = []
    def kill(line):
        team = processes[-1]
        team.ranks_seen = list(team.ranks().values())
        if line.startswith("epoch") and not died:
            died.append(time.monotonic())
            os.kill(team.ranks()[1]["pid"], signal.SIGKILL)
    with pytest.raises(DevicesError, match=r"process 1 of 2 \(counted from 0\) \(pid \d+\) is gone without a word(.|\n)*-p resume two"):
        run_experiment(configure(**LONG, devices=2, run_name="two", runs_dir=str(tmp_path)), say=kill)
    assert time.monotonic() - died[0] < 60 and gone(processes[-1])
    status = load_run(tmp_path / "two").status
    assert status["state"] == "failed" and "process 1 of 2" in status["reason"]
    assert load_run(tmp_path / "two").checkpoints and not Path("/proc", str(processes[-1].child.pid)).exists()


@pytest.mark.slow
def test_f18_an_error_in_one_process_is_the_error_of_the_run(processes, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(EvalError, match="process 1 of 2 .*no such case"): devices.launch("test_steps:one_fails", {}, 2)
    assert not processes[-1].alive()


def one_fails(job, say):
    team = devices.join_team(2)
    if team.rank: raise EvalError("no such case")
    return team.sum([1.])


@pytest.mark.slow
def test_a_request_stops_all_and_the_run_goes_on(tmp_path):
    told = []
    def stop(line):
        if line.startswith("epoch   0"): send_request(tmp_path / "two", "stop")
    with pytest.raises(RunStopped, match="stop was requested"):
        run_experiment(configure(**LONG, devices=2, run_name="two", runs_dir=str(tmp_path)), say=stop)
    status = load_run(tmp_path / "two").status
    assert status["state"] == "stopped"
    def again(line):
        told.append(line)
        if line.startswith("epoch   5"): send_request(tmp_path / "two", "stop")
    with pytest.raises(RunStopped): run_experiment(configure(resume="two", runs_dir=str(tmp_path)), say=again)
    assert not any("NOT EXACT" in line for line in told)
    assert load_run(tmp_path / "two").metrics.query("kind == 'epoch'").epoch.is_monotonic_increasing


CHILD = "import json, sys; from mbnb.experiment import configure, run_experiment; run_experiment(configure(**json.loads(sys.argv[1])))"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_starting_process_stops_all(how, tmp_path):
    parameters = json.dumps(LONG | {"devices": 2, "run_name": "two", "runs_dir": str(tmp_path)})
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, "-c", CHILD, parameters], start_new_session=True, **quiet)
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("two/checkpoints/*.json")) and time.monotonic() < deadline: time.sleep(.1)
    status = load_run(tmp_path / "two").status
    sent = time.monotonic()
    child.send_signal(how)
    child.wait(60)
    while process_start(status["pid"]) == status["started"] and time.monotonic() - sent < 60: time.sleep(.1)
    after = load_run(tmp_path / "two").status
    assert time.monotonic() - sent < 60
    assert after["state"] == "stopped" and ("SIGINT" if how == signal.SIGINT else "SIGTERM") in after["reason"]
    time.sleep(3)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"mbnb.experiment import one_process" in _read(p)]
    assert not left


def _read(path):
    try: return path.read_bytes()
    except OSError: return b""
