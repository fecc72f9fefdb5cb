"""Sweeps: runs of the page as trials, kills, budgets, Ctrl-C. Where training itself is not the point, a stand-in writes the run folders."""
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from mbnb.experiment import configure
from mbnb.runs import RunError, list_runs, load_run, process_start, read_records
from mbnb.sweep import (PATIENCE, best_command, best_trial, labels_of, propose, read_plan, run_sweep, set_budget, sweep_path, sweep_table,
                        train_command)
from mbnb.zoo import ConfigError

PAGE = Path(__file__).parents[1] / "nbs" / "sweep.ipynb"
TINY = {"dataset": "toyshop-tiny", "epochs": 2, "set": "eval.bootstrap=50"}
GRID = {"lr": [1e-3, 1e-2], "model.d_model": [8, 16]}
STAND_IN = """
import json, math, sys, time
from mbnb.runs import RunFolder, load_run
p = json.loads(sys.argv[1])
new = "resume" not in p
with (RunFolder.create(p["runs_dir"], p["run_name"]) if new else RunFolder.reopen(p["runs_dir"], p["resume"])) as run:
    if new: run.write_json("config.json", p)
    p, begun = load_run(run.path).config, 0 if new else int((load_run(run.path).metrics.get("kind") == "epoch").sum())
    run.status("running")
    for epoch in range(begun, p["epochs"]):
        time.sleep(p.get("patience", 0) / 100)
        run.append({"kind": "step", "epoch": epoch, "rows": 100, "seconds": .01})
        value = .3 - .05 * (math.log10(p["lr"]) + 2)**2 - .1 / (epoch + 1)
        run.append({"kind": "epoch", "stage": "fit", "epoch": epoch, "value": value, "error": .01, "metrics": {"NDCG@10": value}})
        for request in run.requests():
            if p.get("batch_size") == 7: continue               # deaf
            run.acknowledge(request)
            run.status("stopped", "stop was requested"); sys.exit(1)
    if p["lr"] == .5: raise ValueError("the loss is nan")
    run.write_json("result.json", {"test": {"NDCG@10": 1 - value}})
    run.status("done", "all epochs done")
"""
ONE = {"lr": [.1]}
TOY = {"dataset": "toyshop-tiny", "epochs": 3}
LONG = {"dataset": "toyshop-tiny", "epochs": 30, "patience": 5}


@pytest.fixture(autouse=True)
def looked_at_often(monkeypatch): monkeypatch.setattr("mbnb.sweep.POLL", .05)


def stand_in(parameters): return [sys.executable, "-c", STAND_IN, json.dumps(parameters)]


def sweep(folder, name="s", space=None, fixed=TOY, **more):
    "A sweep of stand-ins; -> its table and what it said."
    said = []
    table = run_sweep(name, space or {"lr": [1e-3, 1e-2]}, fixed, **dict(runs_dir=folder, say=said.append, command=stand_in) | more)
    return table, "\n".join(said)


def said_to_file(folder, **more):
    "A sweep in a process of its own; what it raises goes to said.txt."
    try: sweep(folder, **more)
    except Exception as e: (folder / "said.txt").write_text(f"{type(e).__name__}: {e}")


def in_a_process(folder, **more):
    "Starts a sweep in a process of its own, without importing everything again for each."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mbnb.sweep", "pytest"])
    child = context.Process(target=said_to_file, args=(folder,), kwargs=more)
    child.start()
    return child


def starts(folder, name="s"):
    "Numbers of the trials in the order in which they were started."
    return [r["trial"] for r in read_records(sweep_path(folder, name) / "trials.jsonl")[0] if r["kind"] == "start"]


def until(ready, seconds=60):
    "Waits until `ready()` is true."
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.05)


def running(folder):
    "{run: pid} of the runs at work."
    states = {p.parent.name: load_run(p.parent).status for p in Path(folder).glob("*/status.json")}
    return {name: s["pid"] for name, s in states.items() if s["state"] == "running"}


def at_work(run):
    "Has the run trained already?"
    return run.exists() and b'"step"' in run.read_bytes()


# ---- the page itself, by papermill ----

def kill_first(folder, run):
    "Kills the kernel of a run as soon as it trains; -> the thread that does."
    def kill():
        until(lambda: run in running(folder))
        os.kill(running(folder)[run], signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    return killer


def check_runs(folder, table):
    "Are these runs of the page, each with the settings of its row?"
    for name, width in zip(table.run, table["model.d_model"]):
        run = load_run(folder / name)
        assert run.config["resolved"]["model"]["d_model"] == width and (run.path / "train.ipynb").exists()
        assert run.environment["variables"]["OMP_NUM_THREADS"] == "1"
        assert run.metrics.query("kind == 'epoch'").epoch.tolist() == list(range(-1, run.config["epochs"])), "each epoch once"


def test_a_run_of_the_page_is_killed_and_the_entry_page_goes_on_with_it(tmp_path):
    folder, space, tiny = tmp_path / "runs", {"model.d_model": [8]}, TINY | {"epochs": 1}
    killer = kill_first(folder, "one-t000")
    table = run_sweep("one", space, tiny, n_jobs=2, runs_dir=folder, say=lambda line: None)
    killer.join()
    assert table.state.tolist() == ["crashed"] and "is gone" in table.reason[0]

    page = [sys.executable, "-m", "papermill", str(PAGE), str(tmp_path / "out.ipynb"), "--cwd", str(tmp_path), "--no-progress-bar"]
    given = tiny | {"sweep": "one", "space": repr(space), "n_jobs": 2, "runs_dir": str(folder)}
    done = subprocess.run([*page, *(w for k, v in given.items() for w in ("-p", k, str(v)))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    table = sweep_table("one", folder)
    assert table.state.tolist() == ["done"] and table["rank"].tolist() == [1] and starts(folder, "one") == [0, 0]
    check_runs(folder, table)
    assert best_trial("one", folder).run == table.run[0]
    assert sorted(list_runs(folder).run) == sorted(table.run), "the sweep's own folder is no run"
    shown = (tmp_path / "out.ipynb").read_text()
    assert "0 finished before, 0 running, 1 to go on with" in shown
    assert "papermill nbs/train.ipynb out.ipynb -p dataset toyshop-tiny -p epochs 1" in shown
    assert "application/vnd.plotly.v1+json" in shown and len(shown) < 100_000


def test_the_page_goes_on_in_its_kernel(tmp_path, monkeypatch):
    "Its cells are run again after an interrupt; what the first time has left behind is no parameter."
    monkeypatch.setattr("mbnb.sweep.run_sweep", partial(run_sweep, command=stand_in))
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(PAGE.read_text())["cells"] if c["cell_type"] == "code"]
    names = {}
    for _ in range(2):
        for cell in cells:
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []): names.update(TOY, space=ONE)
    assert names["found"].state.tolist() == ["done"] and starts(tmp_path / "runs", names["arguments"]["name"]) == [0]


@pytest.mark.slow
def test_a_grid_of_two_by_two_runs_of_the_page(tmp_path):
    killer = kill_first(tmp_path, "grid-t001")
    table = run_sweep("grid", GRID, TINY, n_jobs=2, runs_dir=tmp_path)
    killer.join()
    assert table.state.tolist() == ["done"] * 3 + ["crashed"]
    table = run_sweep("grid", GRID, TINY, n_jobs=2, runs_dir=tmp_path)
    assert table.state.tolist() == ["done"] * 4 and table["rank"].tolist() == [1, 2, 3, 4]
    assert table["valid NDCG@10"].is_monotonic_decreasing
    assert sorted(starts(tmp_path, "grid")) == [0, 1, 1, 2, 3], "no finished trial ran twice"
    check_runs(tmp_path, table)


def test_a_grid_of_two_by_two_completes(tmp_path):
    table, said = sweep(tmp_path, space=GRID, n_jobs=2)
    assert table.state.tolist() == ["done"] * 4 and table["rank"].tolist() == [1, 2, 3, 4] and starts(tmp_path) == [0, 1, 2, 3]
    assert {(r.lr, r["model.d_model"]) for _, r in table.iterrows()} == {(lr, d) for lr in GRID["lr"] for d in GRID["model.d_model"]}
    assert said.count("trial ") == 4 and "4 trials" in said
    _, said = sweep(tmp_path, space=GRID, n_jobs=2)
    assert "4 finished before" in said and starts(tmp_path) == [0, 1, 2, 3], "the same sweep again runs nothing twice"


# ---- what is refused before anything starts ----

@pytest.mark.parametrize("space, fixed, words", [
    ({"modle.d_model": [8]}, TOY, "nearest: 'model'"),
    ({"model.d_modle": [8]}, TOY, "'d_model'"),
    ({"learning_rate": [.1]}, TOY, "unknown key of the space"),
    ({"lr": .1}, TOY, "expected a list of choices"),
    ({"lr": ["fast"]}, TOY, "expected float"),
    ({"lr": [.1, 0.1]}, TOY, "give the same run"),
    ({"seen_filter": ["none", "all_seen"]}, TOY, "changes what is measured"),
    ({"fit.threads": [1, 2]}, TOY, "give the same run"),
    ({"run_name": ["a"]}, TOY, "cannot be searched"),
    ({"lr": [.1]}, TOY | {"select_on": "test"}, "never by test"),
    ({"lr": [.1]}, TOY | {"run_name": "a"}, "set by the sweep"),
    ({"lr": [.1]}, {"modle": "sasrec"}, "unknown parameter 'modle'"),
    ({"lr": [.1]}, {"dataset": "toyshop-tiyn"}, "toyshop-tiyn"),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_a_wrong_space_starts_nothing(tmp_path, space, fixed, words):
    with pytest.raises(Exception, match="(?s)" + words.replace("(", r"\(")) as e: sweep(tmp_path / "runs", space=space, fixed=fixed)
    assert type(e.value).__name__ in ("ConfigError", "DataError")
    assert not (tmp_path / "runs").exists()


def test_without_optuna_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"mbnb\[sweep\]"): sweep(tmp_path, search="optuna", trials=2)


def test_another_plan_under_the_same_name_is_refused(tmp_path):
    sweep(tmp_path)
    with pytest.raises(RunError, match="(?s)another plan.*space.lr.choices.*fixed.epochs"):
        sweep(tmp_path, space={"lr": [1e-3]}, fixed=TOY | {"epochs": 4})
    assert len(starts(tmp_path)) == 2


def test_a_list_of_trials_may_go_on(tmp_path):
    one = TOY | {"lr": 1e-2}
    sweep(tmp_path, space={"seed": [0]}, fixed=one)
    table, said = sweep(tmp_path, space={"seed": [0, 1, 2]}, fixed=one, n_jobs=2)
    assert table.state.tolist() == ["done"] * 3 and "1 finished before" in said
    assert starts(tmp_path) == [0, 1, 2], "the first seed is not run again"
    for other in ([0], [0, 2, 1], [1, 0, 2, 3]):
        with pytest.raises(RunError, match="another plan"): sweep(tmp_path, space={"seed": other}, fixed=one)
    assert read_plan(sweep_path(tmp_path, "s"))["space"]["seed"]["choices"] == [0, 1, 2]


def test_a_run_of_that_name_that_is_no_trial_is_left_alone(tmp_path):
    (tmp_path / "s-t000").mkdir(parents=True)
    with pytest.raises(RunError, match="no trial of this sweep"): sweep(tmp_path)


# ---- the search ----

@pytest.mark.parametrize("search", ["random", "optuna"])
def test_the_seed_decides_the_trials(tmp_path, search):
    space, more = {"lr": (1e-4, 1., "log"), "batch_size": (8, 64)}, dict(fixed=TOY | {"epochs": 1}, search=search, trials=3)
    whole, _ = sweep(tmp_path / "a", space=space, seed=3, n_jobs=2, **more)
    again, _ = sweep(tmp_path / "b", space=space, seed=3, n_jobs=2, **more)
    keys = ["trial", "lr", "batch_size", "valid NDCG@10"]
    assert whole[keys].equals(again[keys]) and (whole.state == "done").all() and whole.batch_size.dtype.kind == "i"
    assert set(whole.lr).isdisjoint(propose(read_plan(sweep_path(tmp_path / "a", "s")) | {"seed": 4}, k, [])["lr"] for k in range(3))


def test_zip_takes_the_choices_side_by_side(tmp_path):
    table, _ = sweep(tmp_path, space={"lr": [1e-2, 1e-3, 1e-2], "seed": [0, 0, 1]}, search="zip")
    pairs = table.sort_values("trial")[["lr", "seed"]].values.tolist()
    assert pairs == [[1e-2, 0], [1e-3, 0], [1e-2, 1]] and (table.state == "done").all()
    uneven = {"lr": [.1, .2], "seed": [0]}
    with pytest.raises(ConfigError, match="2 of lr, 1 of seed"): sweep(tmp_path, "b", space=uneven, search="zip")


def test_values_of_test_do_not_rank(tmp_path):
    table, _ = sweep(tmp_path)
    assert table.lr.tolist() == [1e-2, 1e-3] and table["test NDCG@10"][0] < table["test NDCG@10"][1]
    assert best_command("s", tmp_path) == "papermill nbs/train.ipynb out.ipynb -p dataset toyshop-tiny -p epochs 3 -p lr 0.01"


def test_a_command_line_means_what_the_parameters_mean():
    given = {"lr": 1e-3, "precision": "32", "set": "model.d_model=16"}
    words = train_command(given)[4:]
    assert list(zip(words[1::3], words[2::3])) == [("lr", "0.001"), ("precision", "32"), ("set", "model.d_model=16")]
    assert configure(**given).parameters["precision"] == "32"


# ---- the budget ----

def test_training_targets_are_a_budget(tmp_path):
    table, said = sweep(tmp_path, fixed=LONG | {"epochs": 100}, targets=400, n_jobs=2)
    assert table.state.tolist() == ["stopped"] * 2 and "training targets" in table.reason[0] and "budget spent" in said
    assert 400 <= table.targets.sum() < 6000
    assert set(list_runs(tmp_path).state) == {"stopped"}, "asked through the run folder, and they answered"
    again, _ = sweep(tmp_path, fixed=LONG | {"epochs": 100}, targets=400, n_jobs=2)
    assert len(starts(tmp_path)) == 2 and again.targets.equals(table.targets), "spent stays spent"
    set_budget("s", tmp_path, targets=table.targets.sum() + 300)
    more, _ = sweep(tmp_path, fixed=LONG | {"epochs": 100}, targets=int(table.targets.sum() + 300), n_jobs=2)
    assert more.targets.sum() >= table.targets.sum() + 300 and len(starts(tmp_path)) == 4, "a larger one goes on"


def test_minutes_and_trials_are_budgets(tmp_path):
    start = time.monotonic()
    table, _ = sweep(tmp_path, fixed=LONG | {"epochs": 400}, minutes=.015)
    assert table.state.tolist() == ["stopped"] and time.monotonic() - start < 15
    table, _ = sweep(tmp_path, "few", trials=1)
    assert table.state.tolist() == ["done"]


# ---- what is killed ----

def killed(folder, run, n=2, **more):
    "A sweep whose run `run` is killed after some epochs."
    def kill():
        records = folder / run / "metrics.jsonl"
        until(lambda: records.exists() and records.read_bytes().count(b'"epoch", "stage"') >= n)
        os.kill(load_run(folder / run).status["pid"], signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    try: return sweep(folder, **more)
    finally: killer.join()


def test_a_killed_trial_is_marked_and_resumed(tmp_path):
    fixed = LONG | {"epochs": 12}
    table, said = killed(tmp_path, "s-t001", fixed=fixed)
    assert table.state.tolist() == ["done", "crashed"] and "is gone" in table.reason[1] and "crashed" in said
    marked, _ = sweep(tmp_path, fixed=fixed, crashed="mark")
    assert marked.state.tolist() == ["done", "crashed"] and len(starts(tmp_path)) == 2
    table, said = sweep(tmp_path, fixed=fixed)
    assert table.state.tolist() == ["done", "done"] and starts(tmp_path) == [0, 1, 1]
    assert "1 finished before, 0 running, 1 to go on with" in said
    assert table.targets.tolist() == [1200, 1200]


def test_targets_are_labels_not_rows_of_the_loss():
    assert labels_of({"rows": 6, "labels": 2}) == 2 and labels_of({"rows": 6}) == 6          # records older than the count have rows alone


def test_a_trial_that_is_killed_each_time_is_given_up(tmp_path):
    def dies(parameters): return [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    for state in ("crashed", "crashed", "crashed", "failed", "failed"):
        table, _ = sweep(tmp_path, space=ONE, command=dies)
        assert table.state.tolist() == [state]
    assert starts(tmp_path) == [0, 0, 0] and "killed 3 times" in table.reason[0]


def test_after_a_reboot_the_trial_goes_on(tmp_path):
    "Sweep and trial are killed together; then the boot id in their folders is another one."
    child = in_a_process(tmp_path, fixed=LONG, space=ONE)
    until(lambda: at_work(tmp_path / "s-t000" / "metrics.jsonl"))
    trial = load_run(tmp_path / "s-t000").status["pid"]
    for pid in (child.pid, trial): os.kill(pid, signal.SIGKILL)
    child.join()
    until(lambda: process_start(trial) is None)                 # no child of ours: it may still write
    for file in (tmp_path / "s-t000" / "status.json", tmp_path / "s-t000" / "lock", tmp_path / "sweeps" / "s" / "lock"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"boot_id": "before", "pid": os.getpid()}))
    assert sweep_table("s", tmp_path).state.tolist() == ["crashed"]
    table, _ = sweep(tmp_path, fixed=LONG, space=ONE)
    assert table.state.tolist() == ["done"] and starts(tmp_path) == [0, 0]


def test_a_trial_that_outlives_its_sweep_is_watched_not_started_again(tmp_path):
    child = in_a_process(tmp_path, fixed=LONG | {"epochs": 40}, space=ONE)
    until(lambda: at_work(tmp_path / "s-t000" / "metrics.jsonl"))
    with pytest.raises(RunError, match="working on this sweep"): sweep(tmp_path, fixed=LONG | {"epochs": 40}, space=ONE)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert sweep_table("s", tmp_path).state.tolist() == ["running"]
    table, said = sweep(tmp_path, fixed=LONG | {"epochs": 40}, space=ONE)
    assert table.state.tolist() == ["done"] and starts(tmp_path) == [0] and "1 running" in said


def test_a_failed_trial_says_why_and_stays_failed(tmp_path):
    table, _ = sweep(tmp_path, space={"lr": [.5, .1]})
    assert table.state.tolist() == ["done", "failed"] and "the loss is nan" in table.reason[1]
    def refused(parameters): return [sys.executable, "-c", "import sys; sys.exit('mbnb: d_model and heads do not fit')"]
    table, _ = sweep(tmp_path, "refused", space={"lr": [.5]}, command=refused)
    assert table.reason.tolist() == ["d_model and heads do not fit"]
    with pytest.raises(RunError, match="1 failed; trial 0: d_model and heads do not fit .*failed=retry"): best_command("refused", tmp_path)
    sweep(tmp_path, space={"lr": [.5, .1]})
    assert starts(tmp_path) == [0, 1]


# ---- Ctrl-C ----

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_sweep_leaves_no_child_and_goes_on(tmp_path, number):
    child = in_a_process(tmp_path, fixed=LONG | {"epochs": 40}, n_jobs=2)
    until(lambda: len(running(tmp_path)) == 2 and all(at_work(tmp_path / run / "metrics.jsonl") for run in running(tmp_path)))
    start = time.monotonic()
    os.kill(child.pid, number)
    child.join(30)
    said = (tmp_path / "said.txt").read_text()
    assert time.monotonic() - start < 10 and said.startswith(f"SweepStopped: sweep s was interrupted by {number.name}")
    assert set(list_runs(tmp_path).state) == {"stopped"} and not running(tmp_path)
    table = sweep_table("s", tmp_path)
    assert table.state.tolist() == ["stopped"] * 2 and table.reason.str.contains("interrupted").all()
    if number == signal.SIGTERM: return
    table, said = sweep(tmp_path, fixed=LONG | {"epochs": 40}, n_jobs=2, crashed="mark")
    assert "2 to go on with" in said and len(starts(tmp_path)) == 4 and table.state.tolist() == ["done"] * 2


def test_a_run_that_does_not_answer_is_killed(tmp_path, monkeypatch):
    monkeypatch.setitem(PATIENCE, "budget", .3)
    table, _ = sweep(tmp_path, fixed=LONG | {"epochs": 400, "batch_size": 7}, minutes=.03, space=ONE)
    assert table.state.tolist() == ["stopped"] and list_runs(tmp_path).state.tolist() == ["crashed"]


def test_a_trial_stopped_by_hand_stays_stopped(tmp_path):
    from mbnb.runs import send_request

    def stop():
        until(lambda: at_work(tmp_path / "s-t000" / "metrics.jsonl"))
        send_request(tmp_path / "s-t000", "stop")

    hand = threading.Thread(target=stop)
    hand.start()
    table, _ = sweep(tmp_path, fixed=LONG | {"epochs": 400}, space=ONE)
    hand.join()
    assert table.state.tolist() == ["stopped"] and table.reason.tolist() == ["stop was requested"]
    sweep(tmp_path, fixed=LONG | {"epochs": 400}, space=ONE)
    assert starts(tmp_path) == [0]
    assert math.isfinite(table["valid NDCG@10"][0]) and table["rank"].isna().all()


def test_when_nobody_can_be_told_no_child_is_left(tmp_path):
    def say(line):
        if "trial" in line and "/2" in line: raise BrokenPipeError("nobody reads")
    with pytest.raises(BrokenPipeError): sweep(tmp_path, space={"lr": [.5, .1]}, fixed=LONG | {"epochs": 20}, n_jobs=2, say=say)
    assert not running(tmp_path) and set(list_runs(tmp_path).state) <= {"failed", "done", "stopped"}


def test_a_trial_that_failed_is_tried_again_where_that_is_asked(tmp_path):
    "The data file has a broken row; it is mended before the third call."
    file = tmp_path / "mine.csv"
    rows = [f"u{u},i{(u + t) % 20},view,{t}" for u in range(60) for t in range(8)]
    file.write_text("\n".join(["user,item,behavior,timestamp", *rows, "u1,i2,view,soon"]) + "\n")
    call = dict(name="mended", space={"lr": [1e-2]}, fixed=TINY | {"dataset": str(file), "epochs": 1}, command=train_command)
    table, _ = sweep(tmp_path, **call)
    assert table.state.tolist() == ["failed"] and "soon" in table.reason[0], table.reason.tolist()
    assert sweep(tmp_path, **call)[0].state.tolist() == ["failed"] and starts(tmp_path, "mended") == [0]
    file.write_text("\n".join(["user,item,behavior,timestamp", *rows]) + "\n")
    table, _ = sweep(tmp_path, failed="retry", **call)
    assert table.state.tolist() == ["done"] and starts(tmp_path, "mended") == [0, 0], table.reason.tolist()
