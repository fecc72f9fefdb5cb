"""Faults F02, F04-F09 and F11-F13 on the run folder: real processes, real signals."""
import ctypes
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from mbnb.runs import (ENV_ALLOWED, RunError, RunFolder, digest, environment, list_runs, load_run, process_start, read_checkpoint,
                       read_json, read_manifest, read_records, refuse_differences, restore_rng, rng_state, this_process)

HEAD = """
import os, signal, sys, time
from pathlib import Path
from mbnb.events import MbnbError
from mbnb.runs import *
runs_dir, run_id = sys.argv[1:3]
def main():
{body}
try: main()
except MbnbError as e: sys.exit(str(e))     # as an entry page ends: the message, exit code 1
"""
PARTS = ("safetensors", "state.pt", "json")


def child(body, *args, **popen):
    "A real process that runs `body` with runs_dir and run_id."
    code = HEAD.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **popen)


def said(process, word):
    "Wait for a line of the child and return it; a child that ends without it fails the test with its own words."
    for line in process.stdout:
        if line.startswith(word): return line.strip()
    raise AssertionError(process.stderr.read())


def finish(process, timeout=60):
    "-> exit code, what it wrote to stderr."
    _, err = process.communicate(timeout=timeout)
    return process.returncode, err


def write(run, step, best=False):
    "A checkpoint whose every part tells its step."
    state = {"m": torch.full((500,), float(step)), "step": step}
    return run.save_checkpoint(f"epoch-{step}", {"w": torch.full((500,), float(step))}, state, {"epoch": step}, best=best)


def is_whole(checkpoint):
    "Do all parts of the checkpoint tell the same step?"
    step = checkpoint.meta["epoch"]
    same = (checkpoint.weights["w"] == step).all() and (checkpoint.state["m"] == step).all()
    return bool(same) and checkpoint.state["step"] == step


@pytest.fixture
def saved(tmp_path):
    "A closed run with checkpoints epoch-1 (best), epoch-2, epoch-3."
    with RunFolder.create(tmp_path, "saved") as run:
        for step in (1, 2, 3):
            run.append({"kind": "eval", "epoch": step})
            write(run, step, best=step == 1)
        run.status("done")
    return run.path


# F02 ------------------------------------------------------------------------------------------
SAVER = """
import torch
torch.set_num_threads(1)
run = RunFolder.create(runs_dir, run_id)
run.status("running")
for step in range(1, 100000):
    run.append({"kind": "eval", "epoch": step})
    values = torch.full((400_000,), float(step))
    run.save_checkpoint(f"epoch-{step}", {"w": values}, {"m": values, "step": step}, {"epoch": step}, best=step % 3 == 0)
    print("saved", step, flush=True)
"""


def killed_while_saving(tmp_path, seed):
    "Kill a process that does nothing but save, look at what is left, and reopen it. -> was something half written?"
    process = child(SAVER, tmp_path, f"kill-{seed}")
    for _ in range(3): confirmed = int(said(process, "saved").split()[1])
    time.sleep(random.Random(seed).uniform(0, .25))
    process.kill()
    for line in process.communicate()[0].splitlines(): confirmed = int(line.split()[1])
    path = tmp_path / f"kill-{seed}"
    found = read_checkpoint(path)
    assert is_whole(found) and found.meta["epoch"] in (confirmed, confirmed + 1), (found.meta, confirmed)
    assert not found.failed
    best = read_checkpoint(path, "best")
    assert is_whole(best) and best.meta["epoch"] % 3 == 0 and best.meta["epoch"] >= confirmed - 3
    litter = list(path.glob("**/*.tmp.*"))
    with RunFolder.reopen(tmp_path, path.name) as run:
        assert not list(path.glob("**/*.tmp.*"))
        assert len([note for note in run.notes if "left half written" in note]) == len(litter)
        run.truncate(found.offset)
        assert [r["epoch"] for r in read_records(path / "metrics.jsonl")[0]] == list(range(1, found.meta["epoch"] + 1))
        assert is_whole(run.load_checkpoint())
    return bool(litter)


@pytest.mark.parametrize("seed", range(2))
def test_f02_kill_while_saving(tmp_path, seed): killed_while_saving(tmp_path, seed)


@pytest.mark.slow
def test_f02_kill_while_saving_12_times(tmp_path):
    hit = sum([killed_while_saving(tmp_path, seed) for seed in range(100, 112)])
    assert hit > 0, "no kill fell into a write: the test proves nothing, change its delays"


# F04 ------------------------------------------------------------------------------------------
def test_f04_dead_process_is_crashed_never_running(tmp_path):
    process = child("""
        run = RunFolder.create(runs_dir, run_id)
        run.status("running", epoch=2)
        for step in range(1000): run.append({"kind": "step", "step": step, "epoch": 2})
        run.journal.flush()
        print("ready", flush=True)
        time.sleep(60)
        """, tmp_path, "dead")
    said(process, "ready")
    path = tmp_path / "dead"
    assert load_run(path).status["state"] == "running"
    process.kill()
    while process_start(process.pid) is not None: time.sleep(.01)
    unreaped = load_run(path).status["state"]
    process.wait()
    assert unreaped == load_run(path).status["state"] == "crashed"
    assert str(process.pid) in load_run(path).status["reason"]
    assert read_json(path / "status.json")["state"] == "running", "crashed is derived, never written"
    assert list_runs(tmp_path).state.tolist() == ["crashed"]
    assert len(load_run(path).metrics) == 1000


@pytest.mark.slow
def test_f04_kernel_dies_under_papermill(tmp_path):
    import nbformat
    papermill = pytest.importorskip("papermill")
    code = f"""import os
from mbnb.runs import RunFolder
RunFolder.create({str(tmp_path)!r}, 'pm').status('running')
os.kill(os.getpid(), 9)"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(book, tmp_path / "in.ipynb")
    with pytest.raises(Exception, match="(?i)kernel"):      # noqa: B017 - nbclient's DeadKernelError
        papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False)
    assert load_run(tmp_path / "pm").status["state"] == "crashed"


# F05 (the part that belongs to the folder) ------------------------------------------------------------------------------------------------
def test_f05_write_that_hits_a_limit_leaves_the_old_checkpoint(tmp_path):
    code, err = finish(child("""
        import resource, torch
        torch.set_num_threads(1)
        run = RunFolder.create(runs_dir, run_id)
        run.save_checkpoint("epoch-1", {"w": torch.ones(500)}, {"step": 1}, {"epoch": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
        for weights, state in [({"w": torch.ones(10**6)}, {}), ({}, {"m": torch.ones(10**6)})]:
            try: run.save_checkpoint("epoch-2", weights, state, {"epoch": 2})
            except RunError as e: print(e, flush=True)
        run.save_checkpoint("epoch-2", {}, {"m": torch.ones(10**6)}, {"epoch": 2})
        """, tmp_path, "full"))
    assert code == 1 and "epoch-2.state.pt: cannot be written" in err and "intact" in err and "Traceback" not in err
    assert {p.name for p in (tmp_path / "full" / "checkpoints").iterdir()} == {f"epoch-1.{part}" for part in PARTS}
    assert read_checkpoint(tmp_path / "full").meta == {"epoch": 1}


def test_f05_records_on_a_full_device(tmp_path):
    if not os.path.exists("/dev/full"): pytest.skip("no /dev/full here")
    run = RunFolder.create(tmp_path, "full")
    run.journal.file.close()
    run.journal.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(RunError, match="metrics.jsonl.*the disk is full"): run.append({"kind": "eval"})


# F06 ------------------------------------------------------------------------------------------
def without_override():
    "Root reads and writes past permission bits; a child that starts with this does not."
    if os.geteuid() == 0: ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)      # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.parametrize("which", ["runs_dir", "run", "checkpoints"])
def test_f06_read_only_folder_fails_before_training(tmp_path, which):
    with RunFolder.create(tmp_path, "x") as run: run.status("done")
    folder = {"runs_dir": tmp_path, "run": run.path, "checkpoints": run.path / "checkpoints"}[which]
    folder.chmod(0o555)
    try:
        call = "create(runs_dir, 'new')" if which == "runs_dir" else "reopen(runs_dir, run_id)"
        code, err = finish(child(f"""
            try: (Path({str(folder)!r}) / "probe").write_text("")
            except OSError: pass
            else: sys.exit(77)
            RunFolder.{call}
            print("training", flush=True)
            """, tmp_path, "x", preexec_fn=without_override))
    finally: folder.chmod(0o755)
    if code == 77: pytest.skip("this user writes into read-only folders")
    assert code == 1 and str(folder) in err and "read-only" in err and "Traceback" not in err
    assert load_run(run.path).status["state"] == "done" and not (run.path / "lock").read_bytes()


# F07, F08 ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0, .1, .5, .999])
@pytest.mark.parametrize("part", PARTS)
def test_f07_truncated_checkpoint(saved, part, share):
    file = saved / "checkpoints" / f"epoch-3.{part}"
    data = file.read_bytes()
    file.write_bytes(data[:min(int(len(data) * share), len(data) - 2)])     # a manifest's last byte is a line end
    found = read_checkpoint(saved)
    assert is_whole(found) and found.name == "epoch-2"
    assert any(f"epoch-3.{part}" in note for note in found.notes) and "using epoch-2 instead" in found.notes


def test_f07_missing_file_and_nothing_left(saved):
    (saved / "checkpoints" / "epoch-3.state.pt").unlink()
    assert read_checkpoint(saved).name == "epoch-2"
    for file in (saved / "checkpoints").glob("*.safetensors"): file.write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint that holds.*epoch-3.*epoch-2.*epoch-1"): read_checkpoint(saved)


def test_f07_best_falls_back_and_says_so(saved):
    (saved / "checkpoints" / "epoch-1.safetensors").write_bytes(b"")
    found = read_checkpoint(saved, "best")
    assert found.name == "epoch-3" and "epoch-3 is not the best checkpoint: the best one is not there" in found.notes


def flipped(saved, times, seed):
    "Flip one bit at random places of the newest checkpoint; each must lead to the previous one, or change nothing that is read."
    rng = random.Random(seed)
    for _ in range(times):
        file = saved / "checkpoints" / f"epoch-3.{rng.choice(PARTS)}"
        data = file.read_bytes()
        bit = rng.randrange(8 * len(data))
        hurt = bytearray(data)
        hurt[bit // 8] ^= 1 << bit % 8
        file.write_bytes(hurt)
        found = read_checkpoint(saved)
        blank = file.suffix == ".json" and same_json(data, hurt)       # a blank that became another blank
        assert is_whole(found) and found.name == ("epoch-3" if blank else "epoch-2"), (file.name, bit)
        file.write_bytes(data)
    assert read_checkpoint(saved).name == "epoch-3"


def same_json(a, b):
    try: return json.loads(a) == json.loads(b)
    except ValueError: return False


def test_f08_flipped_bit(saved): flipped(saved, 20, 0)


@pytest.mark.slow
def test_f08_flipped_bit_200_places(saved): flipped(saved, 200, 1)


def test_f08_writer_sets_the_bad_one_aside(saved):
    (saved / "checkpoints" / "epoch-3.state.pt").write_bytes(b"x")
    with RunFolder.reopen(saved.parent, saved.name) as run:
        assert run.load_checkpoint().name == "epoch-2" and any("epoch-3.state.pt" in note for note in run.notes)
        write(run, 4)
    assert [m["name"] for m in load_run(saved).checkpoints] == ["epoch-4", "epoch-2", "epoch-1"]


def test_tied_and_strided_weights_survive(tmp_path):
    base = torch.arange(12.).reshape(3, 4)
    weights = {"a": base, "tied": base, "part": base[1:], "turned": base.T, "whole": torch.tensor(3), "empty": torch.zeros(0, 4),
               "flag": torch.tensor(True)}
    with RunFolder.create(tmp_path, "tied") as run:
        run.save_checkpoint("epoch-1", weights, {}, {})
        back = run.load_checkpoint().weights
    assert back.keys() == weights.keys() and all(torch.equal(back[k], weights[k]) and back[k].dtype == weights[k].dtype for k in weights)


# F09 ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change,named", [({"model_config": {"d_model": 128}}, ["model_config.d_model", "64", "128"]),
                                          ({"data_hash": "dd"}, ["data_hash", "aa", "dd"])])
def test_f09_other_config_or_data_is_refused(tmp_path, change, named):
    config = {"model": "sasrec", "model_config": {"d_model": 64}, "data_hash": "aa", "fit": {"epochs": 3}}
    with RunFolder.create(tmp_path, "x") as run: run.write_json("config.json", config)
    refuse_differences(load_run(run.path).config, config | {"fit": {"epochs": 9}}, may_differ=["fit.epochs"])
    with pytest.raises(RunError) as error: refuse_differences(load_run(run.path).config, config | change)
    assert all(word in str(error.value) for word in named) and "fit.epochs" not in str(error.value)


# F11 ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("forced", [False, True])
def test_f11_malicious_pickle_is_never_executed(saved, tmp_path, forced):
    "The attacker writes a state file *and* a manifest whose hashes are right."
    code, err = finish(child(f"""
        import torch
        class Evil:
            def __reduce__(self): return (os.system, ("touch {tmp_path}/executed",))
        path = Path(runs_dir) / run_id / "checkpoints"
        import json
        m = read_manifest(path / "epoch-3.json")
        m["files"]["state"] = write_stream(path / "epoch-3.state.pt", lambda f: torch.save({{"optimizer": Evil()}}, f))
        (path / "epoch-3.json").write_text(json.dumps(m | {{"sha256": digest(m)}}))
        found = read_checkpoint(Path(runs_dir) / run_id)
        sys.exit(found.name + " " + " ".join(found.notes))
        """, tmp_path, saved.name, env=os.environ | ({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"} if forced else {})))
    assert err.startswith("epoch-2") and "refused" in err
    assert not (tmp_path / "executed").exists()


def test_f11_manifest_cannot_name_a_file_elsewhere(saved):
    file = saved / "checkpoints" / "epoch-3.json"
    m = read_manifest(file)
    m["files"]["state"]["name"] = "../../../etc/passwd"
    file.write_text(json.dumps(m | {"sha256": digest(m)}))
    assert read_checkpoint(saved).name == "epoch-2"


def test_f11_ranks_with_pickles_are_refused(tmp_path):
    with RunFolder.create(tmp_path, "x") as run: pass
    out = io.BytesIO()
    np.savez(out, case=np.array([{}], dtype=object))
    (run.path / "ranks-test.npz").write_bytes(out.getvalue())
    with pytest.raises(RunError, match="ranks-test.npz"): load_run(run.path).ranks("test")


# F12 ------------------------------------------------------------------------------------------
def draw(generators):
    "One number from every source of randomness."
    return [random.random(), torch.rand(2).tolist(), torch.rand(2, generator=generators["shuffle"]).tolist(),
            generators["negatives"].random()]


@pytest.mark.parametrize("lost", ["python", "torch", "generator:shuffle", "generator:negatives"])
def test_f12_missing_random_state_resumes_and_is_not_exact(tmp_path, lost):
    generators = {"shuffle": torch.Generator().manual_seed(1), "negatives": np.random.default_rng(2)}
    with RunFolder.create(tmp_path, "x") as run:
        run.save_checkpoint("epoch-1", {}, {"rng": rng_state(**generators)}, {})
        drawn = draw(generators)
        state = run.load_checkpoint().state["rng"]
    assert restore_rng(dict(state), **generators) == (True, [])
    assert draw(generators) == drawn
    del state[lost]
    exact, notes = restore_rng(state, **generators)
    assert not exact and len(notes) == 1 and notes[0].startswith("NOT EXACT") and lost in notes[0]
    exact, notes = restore_rng(None, **generators)
    assert not exact and len(notes) >= 4


def test_f12_other_thread_count_is_not_exact(saved):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        found = read_checkpoint(saved)
    finally: torch.set_num_threads(threads)
    assert not found.exact and any("NOT EXACT" in note and "threads" in note for note in found.notes)


# F13 ------------------------------------------------------------------------------------------
HOLDER = """
run = RunFolder.{call}(runs_dir, run_id)
run.status("running")
print("ready", flush=True)
input()
run.close()
"""


def test_f13_second_process_is_refused_and_a_dead_one_is_not(tmp_path):
    first = child(HOLDER.format(call="create"), tmp_path, "one")
    said(first, "ready")
    for call in ("create", "reopen"):
        code, err = finish(child(HOLDER.format(call=call), tmp_path, "one"))
        assert code == 1 and str(first.pid) in err and "run_name" in err and "Traceback" not in err
    assert load_run(tmp_path / "one").status["state"] == "running", "a refused process changes nothing"
    first.kill()
    first.wait()
    with RunFolder.reopen(tmp_path, "one") as run:
        assert any(f"lock of process {first.pid}, which is gone" in note for note in run.notes)


@pytest.mark.parametrize("change", [{"boot_id": "another boot"}, {"started": "1"}, {"pid": 2**22 + 5}])
def test_f13_stale_locks_are_taken_over(saved, change):
    (saved / "lock").write_text(json.dumps(this_process() | change))
    with RunFolder.reopen(saved.parent, saved.name) as run: assert any("took over" in note for note in run.notes)


def test_f13_one_of_six_takes_a_stale_lock(saved):
    (saved / "lock").write_text(json.dumps(this_process() | {"boot_id": "another boot"}))
    starters = [child("""
        print("ready", flush=True)
        input()
        run = RunFolder.reopen(runs_dir, run_id)
        time.sleep(2)
        run.close()
        """, saved.parent, saved.name) for _ in range(6)]
    for process in starters: said(process, "ready")
    for process in starters:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [finish(process) for process in starters]
    assert sorted(code for code, _ in ends) == [0] + [1] * 5, ends
    assert all("is writing this run" in err for code, err in ends if code)


def test_f13_a_forked_child_does_not_hold_the_lock(tmp_path):
    run = RunFolder.create(tmp_path, "forks")
    pid = os.fork()
    if pid == 0:
        run.close()
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(RunError, match="this very process"): RunFolder.reopen(tmp_path, "forks")
    run.close()
    RunFolder.reopen(tmp_path, "forks").close()


# torn lines, orphans, names ---------------------------------------------------------------------------------------------------------------
def test_torn_last_line_is_ignored_reported_and_cut(saved):
    whole = (saved / "metrics.jsonl").read_bytes()
    for cut in range(1, 30, 7):
        (saved / "metrics.jsonl").write_bytes(whole[:-cut])
        run = load_run(saved)
        assert run.metrics.epoch.tolist() == [1, 2] and any("torn last line" in note for note in run.notes)
    with RunFolder.reopen(saved.parent, saved.name) as run:
        assert any("torn last line cut off" in note for note in run.notes)
        run.append({"kind": "eval", "epoch": 9})
    assert load_run(saved).metrics.epoch.tolist() == [1, 2, 9] and not load_run(saved).notes


def test_bad_line_in_the_middle_is_named(saved):
    lines = (saved / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for bad in (b"\x00\x00\n", b"[1]\n", b'{"a": 1}, {"b": 2}\n', b"\n"):
        (saved / "metrics.jsonl").write_bytes(b"".join([lines[0], bad, *lines[1:]]))
        run = load_run(saved)
        assert run.metrics.epoch.tolist() == [1, 2, 3] and any("line 2" in note for note in run.notes)


def test_tail_by_offset_sees_every_record_once(tmp_path):
    run, seen, at = RunFolder.create(tmp_path, "x"), [], 0
    for step in range(200):
        run.append({"kind": "step", "step": step})
        if step % 7 == 0:
            records, at, _ = read_records(run.path / "metrics.jsonl", at)
            seen += records
    run.close()
    seen += read_records(run.path / "metrics.jsonl", at)[0]
    assert [r["step"] for r in seen] == list(range(200))


def test_orphans_of_dead_processes_go_and_those_of_living_ones_stay(saved):
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (saved / f"report.html.tmp.{sleeper.pid}").write_text("still writing")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
    (saved / f"result.json.tmp.{gone}").write_text("half")
    (saved / "checkpoints" / f"epoch-4.state.pt.tmp.{gone}").write_text("half")
    RunFolder.reopen(saved.parent, saved.name).close()
    assert [p.name for p in saved.glob("**/*.tmp.*")] == [f"report.html.tmp.{sleeper.pid}"]
    sleeper.communicate()


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "a b", "<script>", "x" * 81, "x\n", "ünicode", "a\0b"])
def test_run_ids(tmp_path, bad):
    with pytest.raises(RunError, match="run id"): RunFolder.create(tmp_path, bad)
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_runs_folder_is_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="outside of"): RunFolder.create(tmp_path / "runs", "x")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.slow
def test_sixteen_processes_one_folder(tmp_path):
    starters = [child("RunFolder.create(runs_dir, run_id).close()", tmp_path / "runs", f"run-{i}") for i in range(16)]
    assert [finish(process) for process in starters] == [(0, "")] * 16
    assert sorted(list_runs(tmp_path / "runs").run) == sorted(f"run-{i}" for i in range(16))


def test_signal_during_a_save_leaves_no_litter(tmp_path):
    process = child(SAVER, tmp_path, "interrupted")
    said(process, "saved")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert not list((tmp_path / "interrupted").glob("**/*.tmp.*")) and is_whole(read_checkpoint(tmp_path / "interrupted"))


def test_reading_imports_neither_torch_nor_pandas(saved):
    code, err = finish(child("""
        run = load_run(Path(runs_dir) / run_id)
        run.config, run.status, run.result, run.checkpoints, read_records(run.path / "metrics.jsonl")
        assert "torch" not in sys.modules and "pandas" not in sys.modules
        run.metrics
        assert "torch" not in sys.modules
        """, saved.parent, saved.name))
    assert (code, err) == (0, "")


def test_import_is_light():
    "Whoever only looks at runs waits for none of these."
    code = "import sys, mbnb.runs; print(*{'torch', 'pandas', 'plotly', 'scipy', 'IPython', 'ipywidgets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.split(), done


def test_import_is_fast():
    "Half a second; where numpy and polars alone take more than half of that, the machine is slow, and theirs is the measure."
    def seconds(*names):
        code = f"import time; t = time.perf_counter(); import {', '.join(names)}; print(time.perf_counter() - t)"
        return min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) for _ in range(3))
    ours = seconds("mbnb.runs")
    assert ours < .5 or ours < 1.8 * seconds("numpy", "polars"), ours


def test_environment_keeps_to_its_list(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    env = environment()
    assert set(env["variables"]) <= set(ENV_ALLOWED) and "hunter2" not in json.dumps(env)
    assert re.fullmatch(r"\d+\.\d+.*", env["python"]) and env["packages"]["torch"]
