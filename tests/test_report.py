"Reports and static twins: true for any run, text as text, both languages, one file without a script."

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mbnb.experiment import configure, run_experiment
from mbnb.plots import LANGS, decimate, static_twin, svg_curves
from mbnb.report import PHRASES, SECTIONS, pick_run, report_page, tell, write_report
from mbnb.runs import RunError

EVIL = "<img src=x onerror=alert(1)>"
NAN = float("nan")
GONE = {"pid": 2**22 + 5, "boot_id": "another", "heartbeat": 1.7e9, "created": 1.7e9 - 60}
PROTOCOLS = {"full": "0a1b2c3d", "uni99": "4e5f6071"}


def epoch(k, value, stage="fit", **more):
    metrics = {"HR@10": None if value is None else 2 * value, "NDCG@10": value, "MRR@10": value}
    return (
        {"kind": "epoch", "stage": stage, "epoch": k, "value": value, "error": 0.01, "metrics": metrics, "eval_seconds": 0.5}
        | ({"loss": 5.0 - k, "train_seconds": 2.0, "rows": 99} if k >= 0 else {})
        | more
    )


def steps(n, stage="fit"):
    return [
        {"kind": "step", "stage": stage, "epoch": k // 10, "step": k + 1, "loss": 5 - 0.01 * k, "rows": 10, "lr": 0.001, "seconds": 0.1}
        for k in range(n)
    ]


RULES = {
    "kind": "rules",
    "split": "valid",
    "table": {
        "pop": {"HR@10": 0.2, "NDCG@10": 0.1, "MRR@10": 0.05},
        EVIL: {"HR@10": 0.3, "NDCG@10": 0.2, "MRR@10": 0.1},
        "pop_recent": {"note": "not applicable: the events have an order but no time stamps"},
    },
}


def config(**more):
    stages = [{"name": "fit", "epochs": 9, "loss_weights": {}, "patience": 3}]
    return {
        "model": EVIL,
        "preset": "small",
        "dataset": f"data/{EVIL}",
        "loss": "ce",
        "protocol": "full, uni99",
        "seed": 0,
        "select_on": "valid",
        "data_hash": "ab" * 32,
        "config": {"model": {"n_items": 100, "n_behaviors": 3}},
        "resolved": {"stages": stages, "fit": {"clip": 0.0}, "data": {"title": EVIL}},
    } | more


def result(**more):
    ks, names = (1, 5, 10, 20, 50), [f"{m}@{k}{s}" for s in ("", "[uni99]") for m in ("HR", "NDCG", "MRR") for k in (1, 5, 10, 20, 50)]
    test = {n: 0.1 + 0.01 * ks.index(int(re.search(r"@(\d+)", n)[1])) for n in names}
    test |= {n + s: v for s in ("", "[uni99]") for n, v in (("MRR", 0.1), ("AUC", 0.8), ("mean rank", 20.0), ("median rank", 9.0))}
    table = {"pop": dict.fromkeys(names, 0.01), EVIL: dict.fromkeys(names, 0.5), "oracle": {n: 0.9 for n in names if "[" not in n}}
    slices = {
        "repeat": {"n": 60, "metrics": dict.fromkeys(names, 0.16)},
        "novel": {"n": 40, "metrics": dict.fromkeys(names, 0.06)},
        f"after_{EVIL}": {"n": 3, "metrics": "not measurable"},
        "after_buy": {"n": 0, "metrics": "not measurable"},
    }
    return {
        "run_id": "r",
        "model": EVIL,
        "preset": "small",
        "dataset": EVIL,
        "loss": "ce",
        "protocol": "full, uni99",
        "fingerprint": "0a1b2c3d",
        "fingerprints": PROTOCOLS,
        "n_cases": 100,
        "best_epoch": 1,
        "epochs": 3,
        "test": test,
        "ci": {n: [v - 0.02, v + 0.02] for n, v in test.items() if "@" in n},
        "slices": slices,
        "baselines": table,
        "params": 1234,
        "seconds": {"prepare": 1.0, "train": 60.0, "evaluate": 3.0, "total": 64.0},
        "targets_per_cpu_second": None,
        "peak_rss_mb": 512.5,
        "badges": [f"below copy: NDCG@10 0.1200 on 60 repeat cases, {EVIL} has 0.5000", f"something new {EVIL}"],
    } | more


def folder(path, state="done", reason="all 3 epochs done", records=(), **files):
    path.mkdir(parents=True)
    (path / "status.json").write_text(json.dumps({"state": state, "reason": reason} | GONE))
    if records is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


CURVE = [RULES, *steps(30), epoch(-1, 0.01), epoch(0, 0.1), epoch(1, 0.2), epoch(2, 0.19)]
RUNS = {
    "done": dict(
        records=CURVE,
        config=config(),
        result=result(),
        doctor=[
            {"id": EVIL, "severity": "E", "message": EVIL, "value": EVIL, "threshold": 0.5, "fix": EVIL, "patch": {EVIL: EVIL}},
            {"id": "T04", "severity": "I", "message": "m", "muted": True},
        ],
    ),
    "chosen on test": dict(records=CURVE, config=config(select_on="test"), result=result(badges=[])),
    "stopped": dict(state="stopped", reason="signal SIGTERM", records=CURVE[:-1], config=config()),
    "failed on NaN": dict(
        state="failed",
        reason=f"FitError: the loss is nan {EVIL}",
        records=[*CURVE, *[s | {"loss": NAN} for s in steps(3)], epoch(3, NAN)],
        config=config(),
    ),
    "crashed": dict(state="running", reason="training", records=CURVE[:20], config=config()),
    "queued": dict(state="queued", reason="", records=None),
    "one epoch": dict(records=[*steps(1), epoch(0, 0.3)], config=config(), result=result()),
    "only the untrained model": dict(state="stopped", reason="stop was requested", records=[RULES, epoch(-1, 0.3)], config=config()),
    "all NaN": dict(
        state="failed", reason="x", records=[s | {"loss": NAN} for s in steps(5)] + [epoch(k, NAN) for k in range(4)], config=config()
    ),
    "two stages": dict(
        records=[
            RULES,
            *steps(9, "a"),
            epoch(-1, 0.01, "a"),
            epoch(0, 0.2, "a"),
            *steps(9, f"b {EVIL}"),
            epoch(-1, 0.2, f"b {EVIL}"),
            epoch(0, 0.1, f"b {EVIL}"),
            epoch(1, 0.1, f"b {EVIL}"),
            epoch(2, 0.1, f"b {EVIL}"),
        ],
        config=config(),
    ),
    "strange values": dict(
        records=[
            {"kind": "rules", "table": 7},
            {"kind": "step"},
            {"kind": "epoch"},
            {"kind": "epoch", "epoch": "x", "value": "y", "metrics": [1], "stage": 3},
            epoch(0, None),
            epoch(1, float("inf")),
        ],
        config=config(resolved=7, protocol=None, config=[], seed=None),
    ),
    "no doctor's card": dict(records=CURVE, config=config(), doctor=[]),
}


@pytest.fixture(params=RUNS)
def run(request, tmp_path):
    return folder(tmp_path / "run <i>", **RUNS[request.param])


@pytest.mark.parametrize("lang", LANGS)
def test_a_report_and_a_twin_of_every_kind_of_run(run, lang):
    paths = write_report(run, lang)
    html, md, twin = paths["html"].read_text(), paths["md"].read_text(), static_twin(run, lang)
    for text in (html, twin):
        assert not re.search(r"<(img|script|i|iframe|link)\b|onerror=\"|\bsrc=\"", text), "text must stay text"
        assert text.count("<svg") == text.count("</svg>") and not re.search(
            r"(nan|inf)[ \"LZM]", " ".join(re.findall(r'\b(?:d|x|y|cx|cy|transform)="[^"]*"', text))
        )
        assert "{" not in re.sub(r"<style>.*?</style>|<pre.*?</pre>|<td>\{.*?</td>|<td>\[\{.*?</td>", "", text, flags=re.S), (
            "a phrase with a hole"
        )
    outside = re.sub(r"```.*?```", "", md, flags=re.S)
    assert (
        "<img" not in outside
        and "<i>" not in outside
        and re.findall(r"^## (\d+)\.", md, re.M) == [str(i) for i in range(1, len(SECTIONS) + 1)]
    )
    assert len(html) < 1_000_000 and len(twin) < 60_000 and html.count("<section") == len(SECTIONS)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    for body in re.findall(r"<section.*?</section>", html, re.S):
        assert len(re.sub(r"<[^>]*>", "", body.split("</h2>")[1])) > 5, "an empty section"


def sentences(path, lang="en", **run):
    return write_report(folder(path, **run), lang)["md"].read_text()


def test_what_is_said_is_true_of_the_run(tmp_path):
    done = sentences(tmp_path / "done", **RUNS["done"])
    assert "NDCG@10 is 0.1200, 95 % interval over users 0.1000 to 0.1400 (100 cases, fingerprint 0a1b2c3d)" in done
    assert "has 0.5000. It lies above that interval: on this run the rule is higher" in done and "no model can exceed it" in done
    assert "0.1200 = 0.6000 × 0.1600 (repeat) + 0.4000 × 0.0600 (novel)" in done and "Slices without a single case: after_buy" in done
    assert "epoch 1: NDCG@10 0.2000 ± 0.0196 on the validation cases, the highest of 4 evaluations" in done
    assert "I note (muted)" in done and "CHOSEN ON THE TEST CASES" not in done
    test = sentences(tmp_path / "test", **RUNS["chosen on test"])
    assert "CHOSEN ON THE TEST CASES" in test and "was not chosen" not in test and "No badge" in test
    stopped = sentences(tmp_path / "stopped", **RUNS["stopped"])
    assert (
        "■ stopped – it got the signal SIGTERM" in stopped
        and "The test cases have not been scored" in stopped
        and "Best so far is epoch 1" in stopped
    )
    crashed = sentences(tmp_path / "crashed", **RUNS["crashed"])
    assert (
        "✗ crashed – process 4194309 is gone and did not say why; it was running" in crashed
        and "No evaluation has given a number yet" in crashed
    )
    bad = sentences(tmp_path / "bad", **RUNS["failed on NaN"])
    assert "In 3 of 33 steps the loss was not a number" in bad and "1 of 5 evaluations gave no number" in bad
    assert "With fewer than two evaluations there are no phases" in sentences(tmp_path / "one", **RUNS["one epoch"])
    two = sentences(tmp_path / "two", **RUNS["two stages"])
    assert (
        "The run has 2 stages; the best epoch is that of the last one" in two
        and "onerror=alert(1)&gt; start" in two
        and "overfitting" in two
    )
    assert "The doctor looked at the run and found nothing to say" in sentences(tmp_path / "clear", **RUNS["no doctor's card"])


def test_chinese_is_chinese(tmp_path):
    text = sentences(tmp_path / "zh", "zh", **RUNS["stopped"])
    assert "状态：■ 已停止——收到信号 SIGTERM" in text and "目前没有：运行目录中没有 doctor.json。" in text
    assert 'lang="zh-CN"' in (tmp_path / "zh" / "report.html").read_text()


def test_no_phrase_lacks_a_language_or_a_number():
    for key, pair in PHRASES.items():
        assert len(pair) == len(LANGS) and all(pair), key
        assert len({tuple(sorted(re.findall(r"\{(\w*)\}", p))) for p in pair}) == 1, key
        assert not re.search("[\u3000-\u9fff]", pair[0]), key


def test_a_broken_folder_is_named_with_what_to_do(tmp_path):
    with pytest.raises(RunError, match="no run there"):
        write_report(tmp_path / "nothing")
    with pytest.raises(RunError, match="give a Run or the path"):
        write_report(7)
    run = folder(tmp_path / "run", **RUNS["done"])
    with pytest.raises(RunError, match="lang='fr'.*'en' and 'zh'"):
        write_report(run, "fr")
    for name, content, said in [
        ("doctor.json", "{}", "expected a list of cards"),
        ("doctor.json", "[{}]", "let the doctor write it again"),
        ("result.json", "{}", "result.json: lacks run_id"),
        ("result.json", "[", "not readable as JSON"),
        ("config.json", "[]", "expected an object of settings"),
        ("ranks-test.npz", "x", "evaluate the run again"),
        ("status.json", "{", "not readable as JSON"),
    ]:
        was = (run / name).read_text() if (run / name).exists() else None
        (run / name).write_text(content)
        with pytest.raises(RunError, match=said) as e:
            write_report(run)
        assert name in str(e.value)
        (run / name).write_text(was) if was is not None else (run / name).unlink()
    assert not (run / "report.html").exists(), "nothing half written"
    (run / "report.md").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run)


def test_the_newest_finished_run_is_meant_when_none_is_named(tmp_path):
    for k, (name, state) in enumerate([("old", "done"), ("new", "done"), ("newer", "stopped")]):
        path = folder(tmp_path / name, state=state)
        (path / "status.json").write_text(json.dumps({"state": state, "reason": "", "created": k} | {"pid": 1}))
    assert (
        pick_run("", tmp_path).name == "new"
        and pick_run("newer", tmp_path).name == "newer"
        and pick_run(str(tmp_path / "old")).name == "old"
    )
    with pytest.raises(RunError, match="the newest there: newer, new, old"):
        pick_run("nwe", tmp_path)


def test_a_million_steps_are_drawn_with_their_extremes(tmp_path):
    y = np.sin(np.arange(1_000_000) / 1e4)
    y[123_456], y[3] = 9.0, -7.0
    start = time.perf_counter()
    x, kept = decimate(np.arange(len(y)), y)
    assert time.perf_counter() - start < 0.5 and len(x) <= 500 and (np.diff(x) > 0).all()
    assert kept.max() == 9 and x[kept.argmax()] == 123_456 and kept.min() == -7 and (x[0], x[-1]) == (0, len(y) - 1)
    run = folder(tmp_path / "long", records=steps(20_000) + [epoch(k, 0.1) for k in range(3_000)], config=config())
    assert len(static_twin(run)) < 60_000 and len(svg_curves(run)) < 40_000
    assert write_report(run)["html"].stat().st_size < 200_000


WRITER = """
import json, sys, time
from mbnb.runs import RunFolder
with RunFolder.create(".", "r") as run:
    run.write_json("config.json", {"model": "m", "protocol": "full"})
    run.status("running", "training")
    for record in json.loads(sys.argv[1]): run.append(record)
    run.sync()
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_report_of_a_run_that_is_killed_while_it_writes(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITER, json.dumps(CURVE)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "written\n"
    assert "▶ running – training" in write_report(tmp_path / "r")["md"].read_text()
    child.kill()
    child.wait()
    child.stdout.close()
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epo')
    text = write_report(tmp_path / "r")["md"].read_text()
    assert (
        f"✗ crashed – process {child.pid} is gone" in text and "Best so far is epoch 1" in text and "crashed" in static_twin(tmp_path / "r")
    )


def test_the_entry_page_shows_and_writes(tmp_path):
    folder(tmp_path / "runs" / "mine", **RUNS["done"])
    page = Path(__file__).parents[1] / "nbs" / "report.ipynb"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(page), "out.ipynb", "--no-progress-bar", "-p", "lang", "zh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [o for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    shown = next(o["data"] for o in outputs if "data" in o)
    assert (
        "训练报告：mine" in "".join(shown["text/html"])
        and "训练报告：mine" in "".join(shown["text/markdown"])
        and (tmp_path / "runs" / "mine" / "report.html").exists()
    )
    assert (tmp_path / "out.ipynb").stat().st_size < 200_000


def test_a_mistyped_parameter_of_the_page_is_an_error():
    with pytest.raises(RunError, match="unknown parameter 'rnu'; nearest: 'run'"):
        report_page(rnu="mine")


def test_numbers_of_a_report_are_the_run_s(tmp_path):
    story = tell(folder(tmp_path / "r", **RUNS["done"]))
    assert (
        story.curves.best == 2
        and story.curves.metric == "NDCG@10"
        and abs(story.curves.at_init - np.log(100)) < 1e-9
        and not story.curves.aux
    )


def test_a_fork_is_not_called_untrained(tmp_path):
    "What stands before its first epoch are the weights of another run; the loss of random scores is no measure for them."
    common, said = dict(dataset="toyshop-tiny", epochs=1, runs_dir=str(tmp_path), set="eval.bootstrap=50"), []
    run_experiment(configure(run_name="one", **common), say=said.append)
    assert any("untrained" in line for line in said)
    with pytest.raises(RunError, match="fork='noe': no run of this name"):
        run_experiment(configure(run_name="none", fork="noe", **common), say=said.append)
    said.clear()
    fork = run_experiment(configure(run_name="two", fork="one", **common), say=said.append)["path"]
    assert any(line.startswith("start ") for line in said) and not any("untrained" in line for line in said)
    text = write_report(fork)["md"].read_text()
    assert "taken over from run one" in text and "ntrained" not in text
    assert "| fork | one |" in re.sub(r" +", " ", text)
