"""Comparing runs: what may share a table, a chart or a test; hostile names; two hundred runs; what is exported; the entry page."""

import ast
import csv
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mbnb import compare, compare_figures, writers
from mbnb.compare import CompareError, filter_runs, make_sheets, read_runs, run_frame
from mbnb.compare_panel import ComparePanel
from mbnb.events import MbnbError
from mbnb.runs import RunFolder

ROOT = Path(__file__).parents[1]
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
TEST = {"HR@10": 0.4, "NDCG@10": 0.3, "MRR": 0.2, "AUC": 0.9, "mean rank": 40.0}


def made(
    folder,
    name,
    *,
    model="gear",
    seed=0,
    dataset="toy",
    fingerprints=None,
    data_hash="d" * 64,
    settings=None,
    ranks=True,
    rule="pop",
    shift=0,
    n=200,
    **more,
):
    "A finished run folder with made-up numbers."
    g = np.maximum(0, np.random.default_rng(7).integers(0, 60, n) - shift)
    arrays = dict(
        case=np.arange(n),
        user=np.arange(n) // 2,
        target=np.arange(n) % 50 + 1,
        g=g,
        e=np.zeros(n, int),
        m=np.full(n, 99),
        repeat=np.arange(n) % 3 > 0,
    )
    parts = {
        "model": {"d_model": 8} | (settings or {}),
        "fit": {"seed": seed, "threads": 1},
        "loss": {},
        "data": {},
        "eval": {"seen_filter": "none", "seed": 0},
        "stages": [{"name": "fit", "lr": 0.1}],
    }
    names = {"model": model, "preset": "small", "dataset": dataset, "loss": "ce", "seed": seed, "select_on": "valid"}
    fingerprints = fingerprints or {"full": "aaaa0000"}
    test = {k + ("" if p == "full" else f"[{p}]"): v + 0.001 * shift for p in fingerprints for k, v in TEST.items()}
    result = names | {
        "run_id": name,
        "protocol": ", ".join(fingerprints),
        "fingerprint": next(iter(fingerprints.values())),
        "fingerprints": fingerprints,
        "n_cases": n,
        "best_epoch": 2,
        "epochs": 4,
        "test": test,
        "ci": {"NDCG@10": [0.28, 0.33]},
        "slices": {"repeat": {"n": 130, "metrics": {"NDCG@10": 0.4}}, "novel": {"n": 9, "metrics": "not measurable"}},
        "baselines": {"random": {"NDCG@10": 0.01}, rule: {"NDCG@10": 0.31}},
        "params": 1000,
        "seconds": {"prepare": 1, "train": 60, "evaluate": 2, "total": 66},
        "targets_per_cpu_second": 5,
        "peak_rss_mb": 300,
    }
    with RunFolder.create(folder, name) as run:
        run.write_json("config.json", names | {"resolved": parts, "config": parts, "data_hash": data_hash, "split_hash": "s" * 64} | more)
        for k in range(-1, 4):
            run.append(
                {
                    "kind": "epoch",
                    "epoch": k,
                    "stage": "fit",
                    "value": 0.1 * k,
                    "error": 0.01,
                    "metrics": {"NDCG@10": 0.1 + 0.05 * k},
                    "eval_seconds": 1.0,
                }
                | ({"rows": 100, "train_seconds": 15.0} if k >= 0 else {})
            )
            run.append({"kind": "step", "loss": 1.0, "epoch": k, "step": k})
        if ranks:
            run.save_ranks("test", "", arrays)
        if ranks and len(fingerprints) > 1:
            run.save_ranks("test", list(fingerprints)[1], arrays)
        run.write_json("result.json", result)
        run.status("done", "all epochs done")
    return run.path


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    "Three seeds of one model, one run of another, and one of other data."
    root = tmp_path_factory.mktemp("five")
    for seed in range(3):
        made(root, f"gear-{seed}", seed=seed, shift=seed)
    made(root, "mgpt-0", model="mgpt", settings={"d_model": 16, "scales": [2, 4]}, shift=9)
    made(root, "other", dataset="other", data_hash="e" * 64, fingerprints={"full": "bbbb0000"})
    return root


@pytest.fixture
def runs(five, tmp_path):
    "The five, to be spoiled."
    return shutil.copytree(five, tmp_path / "runs")


@pytest.fixture(scope="module")
def frame(five):
    return run_frame(sheet_of(five))


def sheet_of(root):
    return next(iter(make_sheets(read_runs(root)).values()))


# ---- one fingerprint, one sheet ----


def test_two_fingerprints_share_nothing_and_the_fields_are_named(runs):
    panel = ComparePanel(runs)
    assert [len(s.entries) for s in panel.sheets.values()] == [4, 1]
    assert "other" not in panel.table()["run"].tolist()
    shown = "\n".join(b.text for b in panel.tables())
    assert "Kept apart" in shown and "| bbbb0000 | 1 | other |" in shown
    with pytest.raises(CompareError, match="answer different questions.*dataset.*data"):
        compare.judge(panel.entry("gear-0"), panel.entry("other"))
    with pytest.raises(CompareError, match="share no table, chart or test"):
        compare_figures.rank_figure(panel.entry("gear-0"), panel.entry("other"))
    drawn = panel.curves()[0]
    assert "other" not in drawn.layout.meta["runs"] and len(drawn.data) == 4


def test_a_difference_that_no_folder_records_is_said(tmp_path):
    a, b = (compare.read_entry(made(tmp_path, f"r{k}", fingerprints={"full": f"{k}" * 8})) for k in (1, 2))
    with pytest.raises(CompareError, match="none that the run folders record"):
        compare.judge(a, b)


def test_protocols_of_one_run_have_sheets_of_their_own(tmp_path):
    for seed in range(2):
        made(tmp_path, f"r{seed}", seed=seed, fingerprints={"full": "aaaa0000", "uni9": "cccc0000"})
    panel = ComparePanel(tmp_path, fingerprint="cccc0000")
    assert panel.table()["NDCG@10"].tolist()[:2] == [0.3, 0.3]
    assert "there are no curves on this sheet" in panel.curves()[0].text
    assert panel.verdict()[0].text.startswith("A = ") and "uni9" in panel.verdict()[0].text
    assert compare.slice_frame(panel.sheet)["slice"].tolist() == ["repeat", "novel"]


def test_other_cases_under_one_fingerprint_are_not_tested(tmp_path):
    "A rank file changed by hand, or a fingerprint that collides: the cases decide."
    a, b = (compare.read_entry(made(tmp_path, f"r{n}", n=n)) for n in (200, 150))
    with pytest.raises(MbnbError, match="answer different cases"):
        compare.judge(a, b)


def test_curves_chosen_on_test_and_on_valid_share_no_chart(tmp_path):
    made(tmp_path, "honest")
    path = made(tmp_path, "other", seed=1, select_on="test")
    result = json.loads((path / "result.json").read_text()) | {"select_on": "test"}
    (path / "result.json").write_text(json.dumps(result))
    panel = ComparePanel(tmp_path)
    assert "share no chart" in panel.curves()[0].text
    assert any("TEST cases" in n for n in panel.table()["notes"])
    assert "chose its epoch on the test cases" in panel.verdict()[0].text


def test_a_run_that_training_only_spoilt_is_told(tmp_path):
    made(tmp_path, "honest")
    path = made(tmp_path, "other", seed=1)
    (path / "result.json").write_text(json.dumps(json.loads((path / "result.json").read_text()) | {"best_epoch": -1}))
    panel = ComparePanel(tmp_path)
    assert [n for n in panel.table()["notes"] if "no epoch above its start" in n] and "none of 4" in set(panel.table()["best epoch"])
    assert "is not one of training" in panel.verdict()[0].text


# ---- the table ----


def test_columns_only_where_runs_differ(runs):
    panel = ComparePanel(runs)
    assert "model.d_model" not in panel.table().columns and "Differ only from model to model: model.d_model" in panel.tables()[
        0
    ].text.replace("\\", "")
    made(runs, "gear-wide", settings={"d_model": 32})
    table = ComparePanel(runs).table()
    assert "model.d_model" in table.columns and "fit.lr" not in table.columns and "fit.seed" not in table.columns


def test_seeds_fold_only_where_nothing_else_differs(runs):
    folded = ComparePanel(runs, by="settings").table()
    gear = folded[folded["model"] == "gear"].iloc[0]
    assert gear["seeds"] == 3 and gear["over seeds"] == "± 0.0010 (3 seeds)"
    assert "no spread from fewer than 3" in folded[folded["model"] == "mgpt"]["over seeds"].iloc[0]
    mixed = ComparePanel(runs, by="preset").table().iloc[0]
    assert "settings mixed" in mixed["over seeds"] and "differ in model" in mixed["notes"] and "±" not in mixed["over seeds"]
    made(runs, "gear-again", seed=2)
    assert "repeat a seed" in ComparePanel(runs, by="settings").table().query("model == 'gear'")["over seeds"].iloc[0]


def test_rules_chance_and_reference_are_rows(runs):
    table = ComparePanel(runs, reference="gear-1").table()
    assert table["run"].tolist()[0] == "gear-1" and table.attrs["kind"][-2:] == ["rule", "chance"]
    assert table.set_index("run")["to reference"].drop("gear-1").astype(float).round(3).to_dict() == {
        "mgpt-0": 0.008,
        "gear-2": 0.001,
        "gear-0": -0.001,
        "pop": 0.009,
        "random": -0.291,
    }
    assert table["notes"].tolist()[0] == "below pop"
    kept = ComparePanel(runs, reference="gear-1", filter='model == "mgpt"', hidden=("minutes", "NDCG@10")).table()
    assert kept["run"].tolist()[:2] == ["gear-1", "mgpt-0"] and "minutes" not in kept and "NDCG@10" in kept


def test_doctor_cards_are_a_badge_and_an_e_makes_a_run_invalid(runs):
    cards = [{"id": i, "severity": s, "message": "1"} for i, s in (("T01", "E"), ("D03", "W"), ("D07", "W"))]
    cards[-1]["muted"] = True
    (runs / "gear-0" / "doctor.json").write_text(json.dumps(cards))
    (runs / "gear-1" / "doctor.json").write_text("[]")
    panel = ComparePanel(runs, a="gear-0", b="gear-1")
    assert panel.table().set_index("run")["doctor"].to_dict() | {"gear-2": ""} == panel.table().set_index("run")["doctor"].to_dict()
    assert (
        panel.table().set_index("run")["doctor"]["gear-0"] == "1 E, 1 W (invalid)"
        and panel.table().set_index("run")["doctor"]["gear-1"] == "fine"
    )
    assert "marked invalid by the doctor" in panel.verdict()[0].text


def test_damaged_and_unfinished_runs_are_said_not_dropped(runs):
    (runs / "gear-0" / "result.json").write_text('{"test": ')
    (runs / "gear-1" / "result.json").write_text('["a list"]')
    (runs / "gear-2" / "result.json").unlink()
    with open(runs / "mgpt-0" / "metrics.jsonl", "ab") as file:
        file.write(b'not json "kind": "epoch"\n{"kind": "epoch", "metr')
    panel = ComparePanel(runs, fingerprint="aaaa0000")
    told = panel.tables()[-1].text
    assert all(name in told for name in ("gear-0", "gear-1", "gear-2")) and "unreadable" in told
    assert panel.table()["run"].tolist()[0] == "mgpt-0" and len(panel.curves()[0].data[0].x) == 5


def test_a_rule_that_differs_between_runs_is_noted(runs):
    path = runs / "gear-2" / "result.json"
    result = json.loads(path.read_text())
    result["baselines"]["pop"]["NDCG@10"] = 0.5
    path.write_text(json.dumps(result))
    assert "the rule changed between the runs" in ComparePanel(runs).tables()[0].text


def test_typed_in_numbers_stay_in_a_block_of_their_own(runs):
    panel = ComparePanel(runs, literature=tuple(compare.read_literature("A paper; NDCG@10; .9; Table 1")))
    assert "A paper" not in panel.table()["run"].tolist()
    assert panel.tables()[-1].text.startswith("Not comparable") and "unknown" in panel.tables()[-1].text


# ---- filter ----


@pytest.mark.parametrize(
    "text, n",
    [
        ('model=="mgpt" and ndcg10>.05', 1),
        ("seed >= 1", 2),
        ("not (seed == 0) or model == 'mgpt'", 3),
        ("`model.d_model` in [8]", 3),
        ("model.d_model / 2 == 8", 1),
        ('("gear" in run) & ~(seed == 2)', 2),
        (".2 < ndcg10 < .305", 3),
        ('"gear" not in run', 1),
        ("params * 2 > 1e3", 4),
        ("", 4),
        ("scales == '[2, 4]'", 1),
    ],
)
def test_filters(frame, text, n):
    assert len(filter_runs(frame, text)) == n


@pytest.mark.parametrize(
    "text, words",
    [
        ("modle == 'gear'", "nearest: 'model'"),
        ("model = 'gear'", "equality is written =="),
        ("model > 3", "model > 3.*cannot be compared with a number.*There are: run, label"),
        ("model", "is a value, not a condition"),
        ("model ==", "cannot be read"),
        ("x" * 501, "at most 500"),
        ("model / 2 == 1", "does not fit these columns"),
        ("1 / 0 == 2", "division by zero"),
        ("seed in 3", "does not fit"),
        ("@seed == 1", "may not hold '@'.*no @name"),
        ("run.str.len() > 3", "may not hold 'run.str.len.'.*no calls, no attributes"),
        ("model.lower == 'a'", "may not hold 'model.lower'"),
    ],
)
def test_a_bad_filter_says_what_is_wrong(frame, text, words):
    with pytest.raises(CompareError, match=words):
        filter_runs(frame, text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch owned')",
        "@pd.io.common.os.system('touch owned')",
        "model.__class__.__mro__[1]",
        "(lambda: 1)() == 1",
        "[x for x in (1,)] == 1",
        "run.str.len() > 3",
        "9**9**9 > 1",
        "'a' * 10**9 == 'b'",
        "'a'.upper() == 'A'",
        "seed.values[0] == 1",
        "f'{model}' == 'a'",
        "(x := 1) == 1",
        "model[0] == 'g'",
        "open('owned', 'w')",
        "1 if seed else 2",
        "await x",
        "(" * 400,
        "not " * 120 + "x",
        "-" * 480 + "1 < 2",
        "seed @ seed",
        "`a` `b`",
        "model == b'a'",
    ],
)
def test_a_filter_cannot_run_code(frame, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompareError):
        filter_runs(frame, text)
    assert not (tmp_path / "owned").exists()


def test_nothing_in_the_rooms_runs_text_or_opens_a_port():
    "Only the checked filter is evaluated, by pandas; no exec, shell or server (F50)."
    for room in ("compare", "compare_figures", "compare_panel", "writers"):
        tree = ast.parse((ROOT / "mbnb" / f"{room}.py").read_text())
        called = [getattr(n.func, "id", getattr(n.func, "attr", "")) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        assert called.count("eval") == (room == "compare") and not {*called} & {"exec", "query", "system", "Popen", "__import__"}
        imported = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
        assert not imported & {"subprocess", "socket", "http", "os", "pickle"}


# ---- verdict ----


def test_the_verdict_is_that_of_the_statistics_page(runs):
    from mbnb.evaluators import metrics, ranks, stats

    panel = ComparePanel(runs)
    a, b = panel.entry("mgpt-0"), panel.entry("gear-0")
    j = compare.judge(a, b)
    va, vb = (metrics.per_case(ranks.Ranks(**e.run.ranks()), "NDCG", 10) for e in (a, b))
    assert j.verdict == stats.compare(va, vb, a.run.ranks()["user"]) and j.verdict.n == 200 and j.verdict.n_users == 100
    whole = sum(j.parts[k]["n"] * j.parts[k]["a"] for k in ("repeat", "novel")) / 200
    assert whole == pytest.approx(j.parts["all"]["a"], abs=1e-12) and j.parts["all"]["n"] == 200
    assert j.changed["key"].tolist() == ["model", "model.d_model"] and j.alone == ["model.scales"]
    text = panel.set(a="mgpt-0", b="gear-0").verdict()[0].text
    assert (
        "2 settings changed: cause not separable" in text
        and "Fewer than three seeds (mgpt-0: 1)" in text
        and "gear-0 and its other seeds: 0.3010 ± 0.0010 (3 seeds)" in text
    )


def test_holm_is_over_all_pairs_shown(runs):
    from mbnb.evaluators import stats

    panel = ComparePanel(runs)
    made_of = compare.judge_all(panel.entry("gear-0"), panel.sheet.entries)
    assert [j.p_holm for j in made_of] == stats.holm([j.verdict.p for j in made_of]) and len(made_of) == 3
    assert "Holm over the 3 pairs shown" in panel.verdict()[0].text
    with pytest.raises(CompareError, match="at most 30"):
        compare.judge_all(panel.entry("gear-0"), [panel.entry("gear-1")] * 31)


def test_what_cannot_be_tested_is_refused(runs):
    panel = ComparePanel(runs, metric="mean rank")
    assert "cannot be tested case by case" in panel.verdict()[0].text
    assert "same run" in ComparePanel(runs, a="gear-0", b="gear-0").verdict()[0].text
    assert "nothing to compare" in ComparePanel(runs, filter="seed == 2").verdict()[0].text
    assert "answers another question" in ComparePanel(runs, a="other").verdict()[0].text
    (runs / "gear-0" / "ranks-test.npz").unlink()
    assert "no such ranks" in ComparePanel(runs, a="gear-0", b="gear-1").verdict()[0].text


# ---- curves and cost ----


def test_minutes_come_from_the_runs_own_clock(runs):
    "A wall clock that was set back in the middle of a run changes nothing (F15)."
    path = runs / "gear-0" / "metrics.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | {"time": 1e9 - 3600 * k}) + "\n" for k, r in enumerate(lines)))
    x, y = compare_figures.curve(ComparePanel(runs).entry("gear-0"), x="minutes")
    assert x.tolist() == pytest.approx([1 / 60, 17 / 60, 33 / 60, 49 / 60, 65 / 60])
    assert compare_figures.best_so_far(-y).tolist() == [-y[0]] * 5
    assert compare_figures.curve(ComparePanel(runs).entry("gear-0"), x="samples")[0].tolist() == [0, 100, 200, 300, 400]


def test_smoothing_leaves_the_raw_line_and_starts_without_bias(runs):
    raw, line = compare_figures.curve_figure(sheet_of(runs), smoothing=0.9).data[:2]
    assert raw.name == "raw" and raw.y[0] == line.y[0] and raw.y[-1] > line.y[-1]


def test_bands_over_seeds(runs):
    fig = compare_figures.curve_figure(sheet_of(runs), seeds=True)
    assert sorted(t.name for t in fig.data if t.name) == ["gear ×3", "mgpt"] and "aaaa0000" in fig.layout.meta["caption"]


def test_front_and_flip(runs):
    assert compare_figures.front([1, 2, 3], [0.3, 0.2, 0.4]) == [0, 2]
    assert compare_figures.front([1, 2, 3], [30, 20, 40], "mean rank") == [0, 1]
    turned = compare_figures.parallel_figure(sheet_of(runs), flip=["model"]).data[0].dimensions[0]
    assert turned.range[0] > turned.range[1] and list(turned.ticktext) == ["gear", "mgpt"]


# ---- brush and importance ----


def test_a_brush_filters_every_room_and_the_next_filter_wipes_it(runs):
    panel = ComparePanel(runs, brush={"model": [0.6, 1.4]})
    assert panel.table()["run"].tolist()[0] == "mgpt-0" and panel.curves()[0].layout.meta["runs"] == ["mgpt-0"]
    assert "1 of 4 runs pass" in panel.tables()[0].text and len(panel.settings()[0].layout.meta["runs"]) == 4
    assert compare_figures.brush_of(panel.settings()[0].data[0]) == {"model": (0.6, 1.4)}
    assert len(panel.set(filter="seed >= 0").frame()) == 4
    assert len(panel.set(brush={"seed": [0.5, 2], "value": [[0, 0.1], [0.3, 0.4]]}).frame()) == 2


def test_a_brush_drawn_in_the_widget_reaches_the_table(runs):
    panel = ComparePanel(runs)
    box = panel.widget()
    box.children[2].selected_index = list(panel.outs).index("Settings")
    live = panel.live["Settings"].children[0]
    live.data[0].dimensions[0].constraintrange = [0.6, 1.4]
    assert panel.frame()["run"].tolist() == ["mgpt-0"] and "1 of 4 runs pass" in panel.outs["Settings"].outputs[0]["data"]["text/plain"]
    assert panel.live["Settings"].children[0] is live, "the figure under the mouse stays"
    live.data[0].dimensions[0].constraintrange = None
    assert len(panel.frame()) == 4


def test_a_click_on_a_case_opens_the_card_of_its_user(runs):
    from plotly.callbacks import Points

    panel = ComparePanel(runs)
    panel.widget().children[2].selected_index = 5
    dots = panel.live["Rank change"].children[0].data[1]
    dots._dispatch_on_click(Points(point_inds=[3]), None)
    user = dots.text[3].removeprefix("user ")
    assert panel.choice.user == int(user) and panel.outs["Rank change"].outputs[-1]["data"]["text/plain"].startswith(f"user row {user}\n")


def test_importance_from_ten_runs_on(runs):
    assert "needs at least 10 runs of one sheet; here are 4" in ComparePanel(runs).settings()[-1].text
    sizes, heads = [8, 16, 32, 64, 128] * 3, ["a", "b", "a"] * 5
    for k, (d, head) in enumerate(zip(sizes, heads)):
        made(runs, f"try-{k}", model="gear", seed=k, shift=d // 8, settings={"d_model": d, "head": head, "with_size": d + 1}, ranks=False)
    panel = ComparePanel(runs, filter='"try" in run')
    worth = compare_figures.importance(panel.frame())
    assert worth["setting"].tolist() == ["model.d_model, model.with_size", "model.head"]
    assert worth["importance"][0] > 0.8 > 0.1 > abs(worth["importance"][1]) and worth.attrs["r2"] > 0.9
    assert "Importance of settings" in panel.settings()[-1].text and "went with the metric" in panel.settings()[-1].text


def test_settings_stand_below_the_run_where_the_page_is_narrow(runs):
    made(runs, "gear-wide", settings={"d_model": 32})
    page = ComparePanel(runs).tables()[0].html
    assert '<th class="n aside">d_model</th>' in page
    assert "hidden> <span>minutes 1.1</span>" in page and "<span>d_model 32</span>" in page
    made(runs, "gear-many", settings={f"s{k}": k for k in range(9)})
    made(runs, "gear-more", settings={f"s{k}": k + 1 for k in range(9)})
    page = ComparePanel(runs).tables()[0].html
    assert ">s3</th>" not in page
    assert '<div class="below"> <span>d_model 8</span> <span>s0 0</span>' in page, "many settings never have columns"


# ---- F47, F48: what data can say ----


@pytest.fixture
def hostile(tmp_path):
    root = tmp_path / "runs"
    made(root, "fine", model=EVIL, dataset=EVIL, settings={"head": EVIL}, rule=EVIL, fingerprints={"full": "aaaa0000"}, shift=5)
    made(root, "second", model="=cmd|' /C calc'!A0", dataset=EVIL, settings={"head": "@SUM(A1)"}, rule=EVIL, seed=1)
    made(root, "third", model="=cmd|' /C calc'!A0", dataset=EVIL, settings={"head": "softmax"}, rule=EVIL, seed=EVIL)
    (root / "fine").rename(root / EVIL.replace("/", "|"))
    return root


def test_hostile_names_are_text_everywhere(hostile):
    panel = ComparePanel(hostile, literature=tuple(compare.read_literature(f"{EVIL}; NDCG@10; .1; {EVIL}")))
    page = writers.to_page(panel.parts(), EVIL)
    assert page.count("<script") == page.count("</script") and EVIL not in page and "<img" not in page.split("plotly.js v")[0]
    for part in writers.with_captions(panel.parts()):
        kept = writers.bundle(part)["data"]
        assert "<img" not in kept.get("text/html", "") + kept.get("image/svg+xml", "") and "<script" not in kept.get(
            "text/html", ""
        ) + kept.get("image/svg+xml", "")
        assert "<img" not in json.dumps({k: v for k, v in kept.get("application/vnd.plotly.v1+json", {}).items() if k == "data"})
    assert "<img" not in writers.to_markdown(panel.table()).replace("\\<", "")
    panel.widget()
    panel.controls["filter"].value = EVIL
    assert "no column" in panel.message.value and "<img" not in panel.message.value


@pytest.mark.browser
def test_hostile_names_run_nothing_in_a_browser(hostile, tmp_path):
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(writers.to_page(ComparePanel(hostile).parts(), "Comparison"), encoding="utf-8")
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))),
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        tab, asked = browser.new_page(viewport={"width": 900, "height": 900}), []
        tab.on("request", lambda r: asked.append(r.url))
        tab.goto(f"file://{tmp_path}/page.html")
        tab.wait_for_function("() => document.querySelectorAll('.js-plotly-plot .main-svg').length >= 5")
        assert tab.title() == "Comparison" and not tab.locator("img").count() and "onerror" in tab.inner_text("body")
        assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == [], "the page asks for nothing from a network"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 900
        browser.close()


def test_formulas_are_prefixed_in_csv(hostile):
    panel = ComparePanel(hostile)
    rows = list(csv.reader(io.StringIO(writers.to_csv(panel.table(), dataset="=1+1", fingerprint="aaaa0000"))))
    cells = [c for row in rows for c in row]
    assert "'=cmd|' /C calc'!A0" in cells and "'@SUM(A1)" in cells and "'=1+1" in cells
    assert not [c for c in cells if c[:1] in "=+-@\t\r" and c and not c.lstrip("-").replace(".", "").isdigit()]
    assert [writers.safe_cell(x) for x in (-0.5, " =a", "\tx", "＝a", "a=b", None, "-")] == [-0.5, "' =a", "'\tx", "'＝a", "a=b", "", "'-"]


# ---- export ----


def test_exports_keep_protocol_chance_and_rules(runs, tmp_path):
    panel = ComparePanel(runs, reference="gear-0")
    files = panel.export(tmp_path / "out", figures="svg")
    assert [f.name for f in files] == [
        "table.csv",
        "table.md",
        "table.tex",
        "table.html",
        *(f"figure-{k}.svg" for k in range(1, 6)),
        "compare.html",
    ]
    for f in files[:4]:
        text = f.read_text()
        assert "aaaa0000" in text and "random" in text and "pop" in text and "200" in text, f
    assert "aaaa0000" in files[4].read_text() and "gear-2" in files[4].read_text(), "the caption is part of the figure"
    tex = (tmp_path / "out" / "table.tex").read_text()
    assert r"\midrule" in tex and r"NDCG@10" in tex and r"to\_reference" not in tex and "Holm" in tex
    assert list(csv.reader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))[1][1:4] == ["gear", "0", "0.3"], "full precision"


def test_png_without_kaleido_says_what_to_install(runs, tmp_path, monkeypatch):
    fig = compare_figures.pareto_figure(sheet_of(runs))
    with monkeypatch.context() as patched, pytest.raises(writers.WriteError, match="pip install kaleido"):
        patched.setattr(writers.importlib.util, "find_spec", lambda name: None)
        writers.save_figure(fig, tmp_path / "a.png")
    assert writers.save_figure(fig, tmp_path / "a.html").stat().st_size > 1_000_000, "plotly.js is inside"
    with pytest.raises(writers.WriteError, match="a table is written as"):
        writers.save_table(ComparePanel(runs).table(), tmp_path / "a.xlsx")


# ---- two hundred runs ----


def test_two_hundred_runs_open_and_filter_in_time(runs, tmp_path, monkeypatch):
    for k in range(200):
        shutil.copytree(
            runs / ("gear-0", "gear-1", "mgpt-0")[k % 3],
            tmp_path / "big" / f"run-{k:03d}",
            ignore=shutil.ignore_patterns("ranks*", "checkpoints", "requests"),
        )
    for path in (tmp_path / "big").iterdir():
        (path / "metrics.jsonl").chmod(0)
    read, original = [], compare.Run._json
    monkeypatch.setattr(compare.Run, "_json", lambda self, name, absent: read.append((self.id, name)) or original(self, name, absent))
    start = time.perf_counter()
    panel = ComparePanel(tmp_path / "big")
    panel.tables()
    opened, took = time.perf_counter() - start, []
    assert len(read) == len(set(read)) == 600, "each file once"
    for text in ('model=="gear" and ndcg10>.05', "seed == 1", "d_model > 8"):
        start = time.perf_counter()
        panel.set(filter=text).table()
        took.append(time.perf_counter() - start)
    assert opened < 2 and min(took) < 0.2, (opened, took)


def test_the_table_needs_no_torch(runs):
    code = f"import sys; from mbnb.compare_panel import ComparePanel; p = ComparePanel({str(runs)!r})\n"
    code += "p.tables(); p.curves(); p.settings()\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- with real runs of the toy shop ----


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "Two short runs of the toy shop, judged by two protocols."
    from mbnb.experiment import configure, run_experiment

    root = tmp_path_factory.mktemp("toy")
    for name, protocol in (("whole", "full"), ("sampled", "uni10")):
        run_experiment(
            configure(
                model="sasrec",
                dataset="toyshop-tiny",
                epochs=1,
                protocol=protocol,
                runs_dir=str(root),
                run_name=name,
                set="model.d_model=16 eval.bootstrap=20 fit.threads=1",
            ),
            say=lambda text: None,
        )
    return root


def test_a_budget_that_ends_in_the_first_stage_leaves_one_judged_part(tmp_path):
    from mbnb.evaluators.metrics import per_case
    from mbnb.evaluators.ranks import Ranks
    from mbnb.experiment import configure, run_experiment

    more = "fit.targets=300 model.d_model=16 eval.bootstrap=20 fit.threads=1"
    config = configure(model="sigma_mule", dataset="toyshop-tiny", runs_dir=str(tmp_path), doctor="off", set=more)
    made = run_experiment(config, say=lambda text: None)
    entry = compare.read_entry(made["path"])
    assert entry.result["stage"] == "graph"
    valid = Ranks(**entry.run.ranks("valid"))
    assert per_case(valid, "NDCG", 10).mean() == pytest.approx(entry.result["selected"]["value"])
    assert compare.reevaluate(entry, entry).result["test"] == pytest.approx(entry.result["test"])


def test_rows_set_aside_do_not_keep_a_run_from_being_read_again(tmp_path):
    from mbnb.experiment import configure, run_experiment

    rows = [f"{u},{(u + i) % 40},view,{100 * u + i}" for u in range(40) for i in range(9)]
    log = tmp_path / "log.csv"
    log.write_text("\n".join(["user,item,behavior,timestamp", *rows, "1,,view,5"]) + "\n")
    more = "data.on_bad_rows=quarantine model.d_model=16 eval.bootstrap=20 fit.threads=1"
    config = configure(dataset=str(log), epochs=1, runs_dir=str(tmp_path / "runs"), doctor="off", set=more)
    made = run_experiment(config, say=lambda text: None)
    entry = compare.read_entry(made["path"])
    assert (entry.run.path / "bad_rows.csv").exists()
    assert compare.load_data(entry).data_hash == entry.config["data_hash"]
    assert compare.reevaluate(entry, entry).result["test"] == pytest.approx(entry.result["test"])


def test_a_run_can_be_judged_again_like_another(toy):
    a, b = (compare.read_entry(toy / name) for name in ("whole", "sampled"))
    with pytest.raises(CompareError, match="was not judged by"):
        compare.judge(a, b)
    again = compare.reevaluate(a, b)
    assert again.result["fingerprints"] == b.result["fingerprints"] and again.result["test"] == pytest.approx(b.result["test"]), (
        "same weights, same protocol, same numbers"
    )
    assert compare.reevaluate(a, a).result["test"] == pytest.approx(a.result["test"]) and len(make_sheets([again, b])) == 1
    with pytest.raises(CompareError, match="train on the same data"):
        compare.reevaluate(a, compare.replace(b, config=b.config | {"data_hash": "x"}))


def test_runs_together_are_the_mean_of_their_probabilities(toy, tmp_path):
    from mbnb.experiment import configure, run_experiment

    a, b = (compare.read_entry(toy / name) for name in ("whole", "sampled"))
    twin = compare.ensemble([a, a])
    assert twin.result["test"] == pytest.approx(a.result["test"]), "a run and itself are itself"
    assert twin.result["params"] == 2 * a.result["params"]
    both = compare.ensemble([a, b])
    assert both.members == ("whole", "sampled") and both.result["test"] == pytest.approx(a.result["test"]), "same seed, same weights"
    settings = "model.d_model=16 eval.bootstrap=20 fit.threads=1"
    short = dict(model="sasrec", dataset="toyshop-tiny", epochs=1, runs_dir=str(tmp_path), seed=1, set=settings)
    run_experiment(configure(**short, run_name="seed1"), say=lambda text: None)
    run_experiment(configure(**short, run_name="short", max_len=10), say=lambda text: None)
    other, shorter = (compare.read_entry(tmp_path / name) for name in ("seed1", "short"))
    with pytest.raises(CompareError, match="histories of 10 events"):
        compare.ensemble([a, shorter])
    mixed = compare.ensemble([a, other])
    verdict = compare.judge(mixed, other).verdict
    assert verdict.n == a.result["n_cases"] and mixed.result["test"] != pytest.approx(other.result["test"])


def test_the_button_judges_runs_of_other_sheets_again(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "runs")
    made(tmp_path / "runs", "other", dataset="other")
    panel = ComparePanel(tmp_path / "runs", reference="sampled")
    panel.widget()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    panel.again.click()
    assert "choose runs of other sheets first" in panel.message.value
    panel.others.value = ("whole", "other")
    panel.again.click()
    assert "whole: ranked again by uni10" in panel.message.value and "other and sampled differ in dataset" in panel.message.value
    assert set(panel.sheet.names) == {"whole", "sampled"} and before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    table = panel.table().set_index("run")
    assert "judged again" in table["notes"]["whole"] and table["NDCG@10"]["whole"] == pytest.approx(table["NDCG@10"]["sampled"])
    verdict = panel.set(a="whole", b="sampled").verdict()[0].text
    assert "difference +0.0000" in verdict and "uni10" in verdict, "the new ranks are tested, not those of the file"
    assert len(panel.curves()[0].data) == 1, "its curve was measured by another protocol"


def test_slices_and_cards_with_the_data(toy, tmp_path):
    shutil.copytree(toy / "whole", tmp_path / "one")
    shutil.copytree(toy / "whole", tmp_path / "two")
    panel = ComparePanel(tmp_path, data=True)
    text = panel.slices()[0].text
    assert all(name in text for name in ("length", "popularity 9", "time, quarter 4", "after\\_buy", "cold")), text
    masks = compare.data_masks(panel.data())
    for group in ("popularity", "time", "length"):
        assert sum(m for k, m in masks.items() if k.startswith(group)).tolist() == [1] * len(panel.data().test), group
    assert sum(m for k, m in masks.items() if "->" in k).tolist() == [1] * len(panel.data().test)
    card = panel.rank_change()[2].text
    assert "history, newest last" in card and "asked for: " in card
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    for name in ("one", "two"):
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"split_hash": "changed"}))
    assert "slices would be of other cases" in ComparePanel(tmp_path, data=True).slices()[0].text


# ---- the entry page ----


CELLS = [c for c in json.loads((ROOT / "nbs" / "compare.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
ASKED = {"runs_dir": "runs", "export": "out", "filter": "ndcg10 > 0", "literature": "A paper; NDCG@10; .9; Table 1"}


def shows_everything(kept, folder):
    "Outputs of the page, as a notebook keeps them."
    figures = [d for d in kept if "application/vnd.plotly.v1+json" in d]
    assert len(figures) == 6 and all(d["image/svg+xml"] for d in figures), "each figure is there as plotly and as SVG"
    shown = "".join("".join(d.get("text/html", d.get("text/plain", ""))) for d in kept)
    words = "Kept apart", "Not comparable", "cause not separable", "fingerprint aaaa0000", "by slice", "Largest changes", "rank under A"
    assert all(w in shown for w in (*words, "at least 10 runs of one sheet")), shown[:3000]
    assert (folder / "out" / "compare.html").exists()


def test_the_entry_page_shows_everything_without_a_browser(runs, tmp_path, monkeypatch):
    "Its cells one by one; what it publishes is what a notebook would keep."
    import IPython.display

    kept, names = [], {}
    monkeypatch.setattr(IPython.display, "display", lambda data, raw=False: kept.append(data) if raw else None)
    monkeypatch.chdir(tmp_path)
    exec("".join(CELLS[0]["source"]), names)
    names |= ASKED
    for cell in CELLS[1:]:
        exec("".join(cell["source"]), names)
    shows_everything(kept, tmp_path)


@pytest.mark.slow
def test_papermill_runs_the_entry_page(runs, tmp_path):
    asked = [word for k, v in ASKED.items() for word in ("-p", k, v)]
    page = [str(ROOT / "nbs" / "compare.ipynb"), str(tmp_path / "out.ipynb"), "--cwd", str(tmp_path), "-k", "python3", "--no-progress-bar"]
    done = subprocess.run([sys.executable, "-m", "papermill", *page, *asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    shows_everything([o["data"] for c in cells if c["cell_type"] == "code" for o in c["outputs"] if "data" in o], tmp_path)
    assert (tmp_path / "out.ipynb").stat().st_size < 1_000_000


def test_the_entry_page_says_what_is_wrong_in_one_line(runs):
    names = {}
    exec("".join(CELLS[0]["source"]), names)
    names |= {"runs_dir": str(runs), "filter": "modle == 1", "widget": False}
    exec("".join(CELLS[1]["source"]), names)
    with pytest.raises(CompareError, match="no column 'modle'; nearest: 'model'") as told:
        for cell in CELLS[2:]:
            exec("".join(cell["source"]), names)
    assert "\n" not in str(told.value)
