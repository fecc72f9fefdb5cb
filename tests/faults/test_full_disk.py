"""Fault F05 on whole runs: a disk that is full, or becomes so, and a limit on the size of files."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mbnb import experiment, runs
from mbnb.experiment import configure, run_experiment
from mbnb.runs import Journal, RunFolder, StorageError, load_run, read_checkpoint, read_records

SET = "model.d_model=4 model.ff_dim=4 model.n_heads=1 model.n_layers=1 eval.bootstrap=20 fit.threads=1"
TINY = {"dataset": "toyshop-tiny", "epochs": 6, "patience": 50, "max_len": 20, "doctor": "off", "set": SET}
CHILD = """
import json, resource, sys
from mbnb.events import MbnbError
from mbnb.experiment import configure, run_experiment
limit = int(sys.argv[2])
if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try: run_experiment(configure(**json.loads(sys.argv[1])), say=lambda line: print(line, flush=True))
except MbnbError as e: sys.exit(str(e))     # as an entry page ends: the message, exit code 1
"""


def quiet(**parameters):
    return run_experiment(configure(**parameters), say=lambda line: None)


def child(limit=0, **parameters):
    command = [sys.executable, "-c", CHILD, json.dumps(parameters), str(limit)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def same(a, b):
    "Weights, ranks and epochs of two run folders are equal bit by bit."
    x, y = read_checkpoint(a), read_checkpoint(b)
    assert x.weights.keys() == y.weights.keys() and all(torch.equal(x.weights[k], y.weights[k]) for k in x.weights)
    assert (Path(a) / "ranks-test.npz").read_bytes() == (Path(b) / "ranks-test.npz").read_bytes()
    steps = [[(r["step"], r["loss"]) for r in read_records(Path(p) / "metrics.jsonl")[0] if r["kind"] == "step"] for p in (a, b)]
    assert steps[0] == steps[1], "every record once"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return quiet(**TINY, runs_dir=str(tmp_path_factory.mktemp("runs")), run_name="whole")["path"]


def disk(monkeypatch, free):
    "A disk that tells `free()` bytes are free."
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free()))


# ---- records ----
def test_f05_a_record_that_was_not_taken_is_written_once_there_is_room(tmp_path):
    journal, half = Journal(tmp_path / "metrics.jsonl"), iter([10, None])
    journal.append({"kind": "eval", "n": 0})
    file, journal.file = journal.file, SimpleNamespace(write=lambda data: refuse(file, data, next(half)), closed=False)
    for n in (1, 2):
        with pytest.raises(StorageError, match="metrics.jsonl: cannot be written.*the disk is full"):
            journal.append({"kind": "eval", "n": n})
        half = iter([None])
    journal.file = file
    journal.append({"kind": "eval", "n": 3})
    journal.finish()
    records, _, notes = read_records(tmp_path / "metrics.jsonl")
    assert [r["n"] for r in records] == [0, 1, 2, 3] and notes == []


def refuse(file, data, taken):
    "A disk that takes some bytes, and then none."
    if taken is None: raise OSError(28, "No space left on device")
    return file.write(bytes(data[:taken]))


# ---- checkpoints ----
def test_f05_no_room_for_a_checkpoint_is_a_warning_and_the_old_one_stays(tmp_path, monkeypatch, undisturbed):
    said, begun = [], runs.need_room
    calls = iter(range(100))
    def room(folder, size):
        if 2 <= next(calls) < 5: raise StorageError(f"{folder}: 0.1 MB free, a checkpoint wants twice its size")
        begun(folder, size)
    monkeypatch.setattr(runs, "need_room", room)
    run_experiment(configure(**TINY, runs_dir=str(tmp_path), run_name="short"), say=said.append)
    warned = [line for line in said if line.startswith("warning: no checkpoint of this epoch, training goes on")]
    assert len(warned) == 3 and "0.1 MB free" in warned[0]
    records = read_records(tmp_path / "short" / "metrics.jsonl")[0]
    assert [r["action"] for r in records if r["kind"] == "control"] == ["no checkpoint"] * 3
    same(undisturbed, tmp_path / "short")


def test_f05_without_room_for_the_first_checkpoint_nothing_is_trained(tmp_path, monkeypatch):
    disk(monkeypatch, lambda: 30_000)
    monkeypatch.setattr(experiment, "RESERVE", 0)
    with pytest.raises(StorageError, match="wants twice its size.*\n.*-p resume none -p runs_dir"):
        quiet(**TINY, runs_dir=str(tmp_path), run_name="none")
    run = load_run(tmp_path / "none")
    assert run.status["state"] == "failed" and "twice its size" in run.status["reason"] and "step" not in set(run.metrics.kind)


# ---- the run waits ----
def test_f05_a_run_waits_for_room_and_goes_on(tmp_path, monkeypatch, undisturbed):
    said, states, looks = [], [], iter(range(10_000))
    def free():
        if said and said[-1].startswith("paused"): states.append(load_run(tmp_path / "waits").status["state"])
        return 100 if 10 <= next(looks) < 20 else 10**9
    disk(monkeypatch, free)
    monkeypatch.setattr(experiment, "LOOK", 0.001)
    run_experiment(configure(**TINY, runs_dir=str(tmp_path), run_name="waits"), say=said.append)
    told = [line for line in said if "disk" in line]
    assert len(told) == 2 and "paused: the disk is full (0.0001 MB free" in told[0] and "room again" in told[1]
    assert set(states) == {"paused"} and load_run(tmp_path / "waits").status["state"] == "done"
    same(undisturbed, tmp_path / "waits")


@contextlib.contextmanager
def small_disk(folder, mb):
    "A file system of its own; the test is skipped where that is not allowed."
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mb}m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode: pytest.skip(f"no small disk can be made here: {made.stderr.strip()}")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    "Take every byte that is left."
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as f:
        while f.write(b"x" * 4096): pass


def test_f05_a_disk_that_is_full_to_the_last_byte(tmp_path):
    "The run is training when the disk fills up; it waits, is resumed by room alone, and nothing is lost."
    if not shutil.which("mount"): pytest.skip("no mount here")
    with small_disk(tmp_path / "disk", 8) as place:
        process = child(**TINY | {"epochs": 30}, runs_dir=str(place), run_name="full")
        for line in process.stdout:
            if line.startswith("epoch   2"): break
        fill(place)
        assert shutil.disk_usage(place).free < 100_000
        paused = next(line for line in process.stdout if line.startswith("paused"))
        waited = load_run(place / "full").metrics
        time.sleep(1)
        assert process.poll() is None and len(load_run(place / "full").metrics) == len(waited)
        assert read_checkpoint(place / "full").weights
        os.unlink(place / "filler")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "the disk has room again" in out, err
        assert "paused: the disk is full (0" in paused
        records = read_records(place / "full" / "metrics.jsonl")[0]
        epochs = [r["epoch"] for r in records if r["kind"] == "epoch"]
        assert epochs == list(range(-1, 30)) and load_run(place / "full").status["state"] == "done"


def test_f05_a_disk_that_is_full_from_the_start(tmp_path):
    if not shutil.which("mount"): pytest.skip("no mount here")
    with small_disk(tmp_path / "disk", 1) as place:
        fill(place)
        with pytest.raises(StorageError, match=f"{place}/full.*the disk is full: free some space"):
            quiet(**TINY, runs_dir=str(place), run_name="full")


# ---- a limit on files ----
@pytest.mark.slow
def test_f05_a_limit_on_files_ends_the_run_and_it_can_be_resumed(tmp_path):
    "RLIMIT_FSIZE hits the records, not the smaller checkpoints: the run ends with one message, and goes on where the limit is gone."
    long = TINY | {"epochs": 25}
    process = child(40_000, **long, runs_dir=str(tmp_path), run_name="limited")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert "metrics.jsonl: cannot be written" in err and "ulimit -f" in err and "-p resume limited" in err
    assert read_checkpoint(tmp_path / "limited").weights and load_run(tmp_path / "limited").status["state"] in ("failed", "crashed")
    quiet(resume="limited", runs_dir=str(tmp_path))
    whole = quiet(**long, runs_dir=str(tmp_path), run_name="whole")
    same(whole["path"], tmp_path / "limited")


def test_f05_closing_on_a_full_disk_gives_the_lock_back(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path, "x")
    run.status("running")
    def full(*args): raise StorageError("the disk is full")
    with monkeypatch.context() as m:
        m.setattr(runs, "write_stream", full)
        with pytest.raises(StorageError): run.close()
    RunFolder.reopen(tmp_path, "x").close()
