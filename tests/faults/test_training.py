"Faults of a run: F01, F09, F12, F25, F27, F28 on whole experiments, in processes of their own where a process dies."

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mbnb import experiment
from mbnb.experiment import configure, run_experiment
from mbnb.losses.ce import CE
from mbnb.runs import RunError, load_run, read_checkpoint
from mbnb.sequences import Prediction

SMALL = {"dataset": "toyshop-tiny", "epochs": 4, "patience": 50, "set": "model.d_model=16 model.ff_dim=32 eval.bootstrap=50 fit.threads=1"}
CHILD = "import json, sys; from mbnb.experiment import configure, run_experiment; run_experiment(configure(**json.loads(sys.argv[1])))"


def quiet(**parameters):
    return run_experiment(configure(**parameters), say=lambda line: None)


def start(**parameters):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(parameters)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The run that nobody disturbs."
    return quiet(**SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")), run_name="whole")


def same_outcome(a, b):
    "Weights, optimizer, ranks and epochs of two run folders are equal bit by bit."
    x, y = read_checkpoint(a), read_checkpoint(b)
    assert x.weights.keys() == y.weights.keys() and all(torch.equal(x.weights[k], y.weights[k]) for k in x.weights)
    assert torch.equal(x.state["rng"]["torch"], y.state["rng"]["torch"])
    for name in ("ranks-test.npz", "ranks-valid.npz"):
        with np.load(Path(a) / name) as p, np.load(Path(b) / name) as q:
            assert all(np.array_equal(p[k], q[k]) for k in p.files)
    for path in (a, b):
        epochs = load_run(path).metrics.query("kind == 'epoch'").epoch.tolist()
        assert epochs == sorted(set(epochs)) and len(epochs) == SMALL["epochs"] + 1


@pytest.mark.parametrize("k", [*range(2), *(pytest.param(k, marks=pytest.mark.slow) for k in range(2, 20))])
def test_f01_kill_at_any_moment_then_resume_is_exact(k, undisturbed, tmp_path):
    chance = random.Random(k)
    child = start(**SMALL, runs_dir=str(tmp_path), run_name="killed")
    records = tmp_path / "killed" / "metrics.jsonl"
    deadline, enough = time.monotonic() + 120, chance.choice([0, 4_000, 5_500, 7_000])
    while (
        not (records.exists() and records.stat().st_size > enough)
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    time.sleep(chance.random() * 0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = (tmp_path / "killed" / "result.json").exists()
    assert load_run(tmp_path / "killed").status["state"] == ("done" if finished else "crashed") or finished
    quiet(resume="killed", runs_dir=str(tmp_path))
    assert load_run(tmp_path / "killed").status["state"] == "done"
    same_outcome(undisturbed["path"], tmp_path / "killed")


def test_f03_a_signal_stops_cleanly_and_resume_is_exact(undisturbed, tmp_path):
    child = start(**SMALL, runs_dir=str(tmp_path), run_name="stopped")
    records = tmp_path / "stopped" / "metrics.jsonl"
    while not (records.exists() and records.stat().st_size > 4_000) and child.poll() is None:
        time.sleep(0.005)
    sent = time.monotonic()
    child.terminate()
    child.wait(timeout=30)
    assert time.monotonic() - sent < 10
    status = load_run(tmp_path / "stopped").status
    if status["state"] == "done":
        pytest.skip("the run had ended before the signal came")
    assert status["state"] == "stopped" and "SIGTERM" in status["reason"]
    quiet(resume="stopped", runs_dir=str(tmp_path))
    same_outcome(undisturbed["path"], tmp_path / "stopped")


def test_f03_a_stop_within_an_epoch_loses_no_step(undisturbed, tmp_path, monkeypatch):
    looks = itertools.count()
    monkeypatch.setattr(experiment.Control, "wanted", lambda self: "test" if next(looks) == 12 else "")
    with pytest.raises(experiment.RunStopped):
        run_experiment(configure(**SMALL, runs_dir=str(tmp_path), run_name="half"), say=lambda line: None)
    stopped = load_run(tmp_path / "half")
    steps, name = len(stopped.metrics.query("kind == 'step'")), stopped.checkpoints[0]["name"]
    quiet(resume="half", runs_dir=str(tmp_path))
    same_outcome(undisturbed["path"], tmp_path / "half")
    ours, theirs = (load_run(path).metrics.query("kind == 'step'") for path in (tmp_path / "half", undisturbed["path"]))
    assert name.count("-") == 2 and 0 < steps < len(theirs)
    assert ours.step.tolist() == theirs.step.tolist() and ours.loss.tolist() == theirs.loss.tolist()


def test_f09_resume_with_another_setting_is_refused_with_a_table(undisturbed):
    path = Path(undisturbed["path"])
    with pytest.raises(RunError, match="epochs") as refused:
        configure(resume=path.name, runs_dir=str(path.parent), epochs=9)
    assert "4" in str(refused.value) and "9" in str(refused.value)


def test_f09_the_same_protocols_written_otherwise_are_no_other_setting(undisturbed, tmp_path):
    shutil.copytree(undisturbed["path"], tmp_path / "two")
    saved = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(saved | {"protocol": "full, uni20"}))
    assert configure(resume="two", runs_dir=str(tmp_path), protocol="full,uni20").eval.protocol == ("full", "uni20")
    with pytest.raises(RunError, match="protocol"):
        configure(resume="two", runs_dir=str(tmp_path), protocol="uni20,full")


def test_f12_without_generators_it_resumes_and_says_so_loudly(tmp_path, monkeypatch):
    told, looks = [], itertools.count()
    monkeypatch.setattr(experiment, "rng_state", lambda **generators: {})
    monkeypatch.setattr(experiment.Control, "wanted", lambda self: "test" if next(looks) > 12 else "")
    with pytest.raises(experiment.RunStopped):
        run_experiment(configure(**SMALL, runs_dir=str(tmp_path), run_name="half"), say=told.append)
    monkeypatch.undo()
    run_experiment(configure(resume="half", runs_dir=str(tmp_path)), say=told.append)
    assert any("NOT EXACT" in line for line in told) and load_run(tmp_path / "half").status["state"] == "done"


def test_f25_a_batch_without_labels_costs_nothing():
    states = torch.zeros(0, 4, requires_grad=True)
    value = CE()(Prediction(states, torch.zeros(0, dtype=torch.int64), torch.randn(5, 4)))
    value.backward()
    assert value.item() == 0 and states.grad.shape == (0, 4)


def test_f27_same_seed_twice_gives_identical_files(undisturbed, tmp_path):
    again = quiet(**SMALL, runs_dir=str(tmp_path), run_name="again")
    same_outcome(undisturbed["path"], again["path"])
    assert again["test"] == undisturbed["test"] and again["ci"] == undisturbed["ci"]
    a, b = (Path(p["path"]) / "ranks-test.npz" for p in (undisturbed, again))
    assert a.read_bytes() == b.read_bytes()


def test_f28_another_seed_gives_another_result(undisturbed, tmp_path):
    other = quiet(**SMALL, seed=1, runs_dir=str(tmp_path))
    assert other["test"] != undisturbed["test"] and other["fingerprint"] == undisturbed["fingerprint"]


def test_settings_of_the_run_are_written(undisturbed):
    saved = load_run(undisturbed["path"]).config
    assert (
        saved["resolved"]["fit"]["threads"] == 1
        and saved["data_hash"]
        and os.path.exists(os.path.join(undisturbed["path"], "environment.json"))
    )
