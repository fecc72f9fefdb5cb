"""The console script as a person starts it: in a process of its own, in an empty folder."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MBNB = Path(sys.executable).parent / "mbnb"
ready = pytest.mark.skipif(not (ROOT / "nbs" / "train.ipynb").exists(), reason="nbs/train.ipynb is not there yet")


@pytest.fixture
def mbnb(tmp_path):
    "Runs the console script in an empty folder; -> exit code, stdout, stderr."
    def call(*argv):
        done = subprocess.run([MBNB, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr
    return call


def test_version(mbnb):
    import mbnb as package
    assert mbnb("--version") == (0, f"mbnb {package.__version__}\n", "")


def test_unknown_command_is_exit_2(mbnb): assert mbnb("trian")[0] == 2


def test_the_package_itself_is_the_command():
    done = subprocess.run([sys.executable, "-m", "mbnb", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == subprocess.run([MBNB, "--version"], capture_output=True, text=True, timeout=60).stdout


def test_a_reader_that_has_read_enough_ends_it_quietly():
    line = f'"{MBNB}" data toyshop-tiny | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_no_runs(mbnb): assert mbnb("runs") == (0, "no runs in runs\n", "")


def test_unknown_data_set_is_one_line(mbnb):
    status, out, err = mbnb("data", "ml100k")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "ml-100k" in err


def test_data_in_words(mbnb):
    status, out, err = mbnb("data", "toyshop")
    assert (status, err) == (0, "")
    assert "toyshop" in out


@pytest.mark.parametrize(("argv", "told"), [
    (["a.json"], "a.json: found list, expected an object of parameters"),
    (["--stage", "d"], "--stage d: d is no stage; expected letters out of D"),
    (["first", "-p", "doctor", "warn"], "-p doctor warn and first: expected one of the two"),
])
def test_the_doctor_says_what_it_cannot_look_at(mbnb, tmp_path, argv, told):
    (tmp_path / "a.json").write_text("[1]")
    status, out, err = mbnb("doctor", *argv)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert told in err


@ready
def test_notebooks_are_copied_once(mbnb, tmp_path):
    assert mbnb("notebooks", "mine")[0] == 0
    assert (tmp_path / "mine" / "train.ipynb").read_bytes() == (ROOT / "nbs" / "train.ipynb").read_bytes()
    status, _, err = mbnb("notebooks", "mine")
    assert status == 1
    assert "not written over" in err


@ready
def test_mistyped_parameter_writes_nothing(mbnb, tmp_path):
    status, out, err = mbnb("train", "-p", "modle", "sasrec")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "nearest: model" in err
    assert not list(tmp_path.iterdir())


@ready
def test_refused_value_writes_nothing(mbnb, tmp_path):
    status, _, err = mbnb("train", "-p", "model", "sasrek", "-p", "dataset", "toyshop-tiny")
    assert status == 1
    assert "sasrec" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/status.json"))


@ready
def test_a_run_from_the_command_line(mbnb, tmp_path):
    status, out, err = mbnb("train", "-p", "dataset", "toyshop-tiny", "-p", "epochs", "1", "-p", "run_name", "first")
    assert status == 0, err
    folder = tmp_path / "runs" / "first"
    assert str(folder) in out
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert json.loads((folder / "train.ipynb").read_text())["cells"]
    assert "first" in mbnb("runs")[1]
    again = mbnb("train", "-p", "dataset", "toyshop-tiny", "-p", "run_name", "first")
    assert again[0] == 1
    assert "exists already" in again[2]


@ready
@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_a_run_that_goes_on(tmp_path):
    command = [MBNB, "train", "-p", "dataset", "toyshop-tiny", "-p", "epochs", "4000", "-p", "patience", "4000", "-p", "run_name", "long"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)             # what a shell starts in the background does not hear it
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not child.stdout.readline().startswith("untrained"): assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "mbnb: interrupted; a run that had begun goes on with "
                                             f"`mbnb train -p resume long -p runs_dir {tmp_path / 'runs'}`\n")
    status = json.loads((tmp_path / "runs" / "long" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "signal SIGINT")
