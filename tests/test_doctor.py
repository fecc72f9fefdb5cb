"The doctor in a run: before the first step, in the loop, at the end, on the command line; F20 and F26."
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mbnb.experiment as experiment
from mbnb.cli import main
from mbnb.compare import read_entry
from mbnb.datasets import load
from mbnb.doctor import CHECKS, DoctorError
from mbnb.doctor.config import overfit
from mbnb.doctor.training import Watch
from mbnb.events import DataError
from mbnb.experiment import configure, doctor, run_experiment
from mbnb.fit import FitError
from mbnb.losses.ce import CE
from mbnb.models.gear import GEAR
from mbnb.report import write_report
from mbnb.runs import load_run
from mbnb.sequences import collate

SMALL = "model.d_model=16 eval.bootstrap=20"


def run(folder, say=lambda line: None, more="", **given):
    "A run of seconds on the tiny shop -> Run."
    given = dict(dataset="toyshop-tiny", epochs=2, runs_dir=str(folder), set=f"{SMALL} {more}") | given
    return load_run(run_experiment(configure(**given), say)["path"])


def cards(run, *severities): return {c["id"]: c for c in run.cards if c["severity"] in (severities or "EWI")}
def weights(run): return load_file(max((run.path / "checkpoints").glob("*.safetensors"), key=lambda p: p.name))


def test_the_doctor_changes_no_weight(tmp_path):
    seen = [weights(run(tmp_path / mode, doctor=mode)) for mode in ("off", "stop")]
    assert seen[0].keys() == seen[1].keys() and all(torch.equal(seen[0][k], seen[1][k]) for k in seen[0])
    assert load_run(next((tmp_path / "off").glob("*"))).cards is None


def test_every_check_has_a_say_in_every_run(tmp_path):
    made = run(tmp_path)
    found = {c["id"] for c in made.cards}
    assert found == set(CHECKS)
    for c in made.cards:
        assert c["title"] and c["why"]
        if c["severity"] in "EWI": assert c["fix"] and any(x.isdigit() for x in c["message"]), c
        if c["severity"] == "skipped": assert c["message"].startswith("not checked: ")


WRONG = dict(more="data.target=buy doctor.D09.least=.9")                            # a bound that no shop keeps


def test_an_error_stops_the_run_before_its_first_step(tmp_path):
    with pytest.raises(DoctorError, match="stopped before the first step by 1 finding of severity E: E D09 funnel: buy .*-p doctor warn"):
        run(tmp_path, **WRONG)
    left = load_run(next(tmp_path.glob("*")))
    assert left.status["state"] == "failed" and "D09" in left.status["reason"] and "D09" in cards(left, "E")
    assert not list(left.path.glob("checkpoints/*")) and left.result is None


def test_a_run_that_was_stopped_is_stopped_again_on_resume(tmp_path):
    with pytest.raises(DoctorError): run(tmp_path, run_name="stopped", **WRONG)
    with pytest.raises(DoctorError, match="stopped before the first step by 1 finding of severity E: E D09"):
        run_experiment(configure(resume="stopped", runs_dir=str(tmp_path)), lambda line: None)
    left = load_run(tmp_path / "stopped")
    assert not left.checkpoints and left.result is None and list(cards(left, "E")) == ["D09"]


def test_warn_runs_all_the_same_and_marks_the_run_invalid(tmp_path):
    said = []
    made = run(tmp_path, said.append, doctor="warn", **WRONG)
    assert any("E D09" in line for line in said) and "1 E" in read_entry(made).badge
    write_report(made)
    assert "THE DOCTOR MARKS THIS RUN AS INVALID: D09" in (made.path / "report.md").read_text()


def test_a_muted_card_lets_the_run_go_on_and_stays_recorded(tmp_path):
    made = run(tmp_path, more=WRONG["more"] + " doctor.mute=D09")
    assert cards(made, "E")["D09"]["muted"] and "E" not in read_entry(made).badge
    assert made.config["mute"] == "D09" and made.config["thresholds"]["D09.least"] == .9


REFUSED = [
    ("doctor.mute=D99", "D99.*which is no check"),
    ("doctor.D03.paddin=.5", "D03.paddin is no threshold; those of D03: D03.padding"),
    ("doctor.D03.padding=much", "expected a number"),
]


@pytest.mark.parametrize("given, said", REFUSED)
def test_unknown_names_are_refused_before_anything_is_written(tmp_path, given, said):
    with pytest.raises(DoctorError, match=said): run(tmp_path, more=given)
    assert not list(tmp_path.glob("*"))


# ---- F20, F26: what is not a number ----

def poison(monkeypatch, steps):
    "From now on the gradient of the item table is NaN in these backward passes of a run's own model."
    real, seen = experiment.prepare, []
    def prepare(config, bad_rows_to):
        parts = real(config, bad_rows_to)
        def spoil(gradient):
            seen.append(len(seen))
            return gradient * math.nan if len(seen) - 1 in steps else gradient
        parts.model.items.weight.register_hook(spoil)
        return parts
    monkeypatch.setattr(experiment, "prepare", prepare)


def test_f20_a_poisoned_gradient_sends_the_run_back_and_it_ends_well(tmp_path, monkeypatch):
    poison(monkeypatch, {6})
    made = run(tmp_path, epochs=3)
    card = cards(made, "W")["T01"]
    assert "items.weight" in card["message"] and "on cases" in card["message"] and "half the learning rate" in card["fix"]
    assert all(v.isfinite().all() for v in weights(made).values() if v.is_floating_point())
    records = made.metrics.to_dict("records") if hasattr(made.metrics, "to_dict") else list(made.metrics)
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [-1, 0, 1, 2]                 # each epoch once
    assert any(r["kind"] == "control" and r.get("action") == "roll back" for r in records)
    lr = [r["lr"] for r in records if r["kind"] == "step"]
    assert lr[-1] == pytest.approx(lr[0] / 2)


def test_f20_after_three_roll_backs_it_fails_and_the_weights_are_sound(tmp_path, monkeypatch):
    poison(monkeypatch, set(range(6, 100)))
    with pytest.raises(FitError, match="gradient of items.weight is nan on cases"): run(tmp_path, epochs=3)
    left = load_run(next(tmp_path.glob("*")))
    card = cards(left, "E")["T01"]
    assert left.status["state"] == "failed" and "3 of at most 3 roll-backs" in card["message"]
    assert all(v.isfinite().all() for v in weights(left).values() if v.is_floating_point())


def test_f26_a_learning_rate_of_a_million_is_t01(tmp_path):
    with pytest.raises(FitError): run(tmp_path, lr=1e6, epochs=30)
    assert "T01" in cards(load_run(next(tmp_path.glob("*"))), "E")


def test_f26_a_learning_rate_of_nothing_is_t09(tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "_room", lambda self, kind: True)        # looks at the weights whatever they cost: a busy machine grants few
    made = run(tmp_path, more="fit.lr=0.0", epochs=12, batch_size=8, patience=50)
    assert "T09" in cards(made, "W")


# ---- asked from outside ----

def call(capsys, *argv):
    status = main([*map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_line_looks_at_a_run_and_at_parameters(tmp_path, capsys):
    made = run(tmp_path)
    status, out, _ = call(capsys, "doctor", made.id, "--runs-dir", tmp_path, "--json")
    found = json.loads(out)
    assert status == 0 and {"D03", "C11", "T01", "R01"} <= {c["id"] for c in found}
    assert {"id", "severity", "line", "message", "value", "threshold"} <= set(found[0])
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(dict(dataset="toyshop-tiny", set=f"{SMALL} {WRONG['more']}")))
    status, out, _ = call(capsys, "doctor", file, "--stage", "D")
    assert status == 1 and "E D09 funnel" in out and " C11 " not in out
    status, _, err = call(capsys, "doctor", "-p", "modle", "sasrec")
    assert status == 1 and "nearest: model" in err
    assert call(capsys, "doctor", tmp_path / "none.json")[0] == 1


def test_a_run_without_the_doctor_is_looked_at_later(tmp_path):
    made = run(tmp_path, doctor="off")
    found = {c.id for c in doctor(made)}
    assert {"D12", "C11", "T04", "R02"} <= found
    assert {c.id[0] for c in doctor(made, "R")} == {"R"}


@pytest.mark.real_data
@pytest.mark.parametrize("model", ["sasrec", *(pytest.param(m, marks=pytest.mark.slow) for m in ("gear", "mbht", "mgpt"))])
def test_every_model_on_retail_beh_carries_its_findings(shared_data, monkeypatch, model):
    monkeypatch.setenv("MBNB_DATA", str(shared_data))
    found = {c.id: c for c in doctor(configure(model=model, dataset="retail_beh"))}
    assert "253 of 2,000" in found["D11"].message and "99.3 %" in found["D12"].message and "6.65 %" in found["D13"].message
    assert found["D17"].severity == "W" and "one list of 100" in found["D17"].message
    assert not [c for c in found.values() if c.severity == "E"]


@pytest.mark.real_data
def test_sasrec_on_ml_100k_carries_only_what_is_true(shared_data):
    try: load("ml-100k")
    except DataError as e: pytest.skip(f"ml-100k cannot be had here: {e}")
    found = {c.id: c.message for c in doctor(configure(dataset="ml-100k")) if c.severity in "EW"}
    assert found.keys() == {"D03", "D08"} and "44.0 % of 943" in found["D08"] and "longer than max_len 50" in found["D03"]


@pytest.mark.slow
def test_the_default_run_carries_neither_error_nor_warning(tmp_path):
    made = load_run(run_experiment(configure(runs_dir=str(tmp_path)), lambda line: None)["path"])
    assert not {c["id"]: c["message"] for c in made.cards if c["severity"] in "EW" and c["id"] != "T03"}     # a busy machine is no fault


@pytest.mark.slow
def test_a_rate_that_is_too_high_is_not_a_broken_model():
    "GEAR of width 64 gets nowhere at .01 and learns its eight cases at .003."
    shop = load("toyshop-tiny")
    few = collate(shop, shop.train, np.arange(8), 50)

    def card(**rates):
        torch.manual_seed(1)
        model = GEAR(GEAR.Config.small(shop.n_items, shop.n_behaviors, d_model=64, dropout=0.0))
        return overfit(model, few, CE(), seconds=60, **rates)[0]

    assert card(rates=(1e-2,)).severity != "ok" and card().severity == "ok"


def test_bad_rows_are_set_aside_for_a_look_and_for_a_run(tmp_path):
    "A look before a run writes nothing; a run writes where it is told to, and says what was wrong where nothing is set aside."
    rows = [f"u{u},i{(u + k) % 40},view,{k}" for u in range(60) for k in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["user,item,behavior,timestamp", *rows, "u1,i2,view,soon"]) + "\n")
    aside, given = tmp_path / "aside.csv", dict(dataset=str(tmp_path / "a.csv"), epochs=1, runs_dir=str(tmp_path))
    more = f"{SMALL} data.on_bad_rows=quarantine data.bad_rows_to={aside}"
    assert {"D01", "C11"} <= {c.id for c in doctor(configure(**given, set=more))} and not aside.exists()
    run_experiment(configure(**given, set=more), say=lambda line: None)
    assert "soon" in aside.read_text()
    with pytest.raises(DataError, match="(?s)found 'soon'.*-p set 'data.on_bad_rows="):
        run_experiment(configure(**given, set=SMALL), say=lambda line: None)


def test_a_finished_run_hears_nothing_twice(tmp_path):
    found = doctor(run(tmp_path))
    assert len(found) == len({(c.id, c.severity, c.message) for c in found})
