"The studies, by papermill as a user starts them, in miniature: short runs, one seed. Their stored outputs come from whole runs."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

STUDIES = Path(__file__).parents[1] / "nbs" / "studies"
SMALL = {
    "mgpt_retail_beh": {"seeds": "0", "epochs": "1"},
    "gear_taobao": {"seeds": "0", "gear_epochs": "2", "mbht_epochs": "1"},
    "losses": {"seeds": "0", "datasets": "ml-100k", "epochs": "2", "losses": "ce,gbce,bpr", "negatives": "4"},
    "ur4rec_ml100k": {"seeds": "0", "ablations": "0", "epochs": "2,1,1,1", "changes": "fixed weights"},
    "fair_comparison": {
        "datasets": "toyshop,taobao-category",
        "models": "sasrec,mule,sigma_mule",
        "seeds": "0",
        "budget": "0.02",
        "stored": "table.csv",
    },
    "advice": {"seeds": "0,1", "bases": "sasrec,sasrec_bpr", "epochs": "1,1", "changes": "more dropout, the hardest of 10 negatives"},
    "bpr_beauty": {"seeds": "0", "epochs": "1,1,1", "whole": "1", "parts": "1,1,1", "changes": "temperature .2, bpr, no text"},
}


@pytest.mark.parametrize("name", sorted(p.stem for p in STUDIES.glob("*.ipynb")))
def test_a_study_has_parameters_outputs_and_run_ids(name):
    cells = [c for c in json.loads((STUDIES / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1
    shown = json.dumps([c["outputs"] for c in cells])
    assert not [c["source"][:80] for c in cells if any(o["output_type"] == "error" for o in c["outputs"])]
    assert re.search(r"-s0-|-t00\d", shown), "no run id stands beside the numbers"


def test_the_comparison_opens_with_what_its_stored_table_says():
    table = pd.read_csv(STUDIES / "fair_comparison.csv")
    first = "".join(json.loads((STUDIES / "fair_comparison.ipynb").read_text())["cells"][0]["source"])
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in first.splitlines() if re.match(r"\| [\w-]+ \| [\d,]+ \|", line)]
    assert [row[0] for row in rows] == ["toyshop", "ml-100k", "taobao-category", "kuairand", "retail_beh"]

    def same(text, name, value):
        said, number = text.split()[:2]
        return said == name and round(value, len(number) - 1) == float(number)

    for data, cases, rule, model, equal, above in rows:
        t = table[table.dataset == data]
        rules, models = t[t.reads == "rule"].set_index("model")["NDCG@10"], t[t.runs.notna()].set_index("model")
        best = models[models["p the best"].isna()].iloc[0]
        assert int(cases.replace(",", "")) == t.cases.iloc[0] and same(rule, rules.idxmax(), rules.max()), data
        assert same(model, best.name, best["NDCG@10"]), data
        for name, value in re.findall(r"\((\w+) \*untrained\* (\.\d+)\)", model):
            assert models["chosen after"][name] == 0 and same(f"{name} {value}", name, models["NDCG@10"][name])
        level = {m for m, p in models["p the best"].items() if p >= 0.05}
        told = {"none": set(), "none, by one run each": set(), "seven others": level if len(level) == 7 else {"?"}}
        assert told.get(equal, set(equal.split(", "))) == level, data
        assert above == f"{(models['NDCG@10'] > rules.max()).sum()} of {len(models)}", data


def break_me(fault, tmp_path):
    "The page of faults by papermill -> (exit code, what it wrote on stderr, its shown markdown)."
    page, out = STUDIES / "break_me.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(page), str(out), "--cwd", str(tmp_path), "--no-progress-bar", "-p", "fault", fault]
    done = subprocess.run([*command, "-p", "runs_dir", str(tmp_path / "runs")], capture_output=True, text=True)
    outputs = [o for c in json.loads(out.read_text())["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    return done.returncode, done.stderr, ["".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})]


def test_break_me_shows_the_message_and_what_is_left(tmp_path):
    code, err, shown = break_me("truncated, nan_loss, short_rows", tmp_path)
    assert code == 0, err[-3000:]
    cut, nan, short = shown
    assert "bytes, " in cut and "using fit-0002 instead" in cut and "equal those of the undisturbed run, bit by bit" in cut
    assert "the loss is nan on cases" in nan and "bit by bit" in nan
    assert "line 9 (row 7, byte" in short and "short row: 3 fields, expected 4" in short and "bad_rows.csv holds line 9" in short
    assert not any("Traceback" in text or str(tmp_path) in text for text in shown)
    states = {run.name.rsplit("-", 1)[-1]: json.loads((run / "status.json").read_text())["state"] for run in (tmp_path / "runs").iterdir()}
    assert {states[k] for k in ("truncated", "nan_loss", "short_rows")} == {"done"}


@pytest.mark.slow
def test_break_me_survives_every_fault(tmp_path):
    code, err, shown = break_me("all", tmp_path)
    assert code == 0, err[-3000:]
    page = (STUDIES / "break_me.ipynb").read_text()
    assert {text.split()[1] for text in shown} == set(re.findall(r'\\"(\w+)\\": \(\\"(?:F\d|D\d|section)', page)) and len(shown) >= 48
    assert sum("bit by bit" in text for text in shown) >= 12 and not any("Traceback" in text for text in shown)


@pytest.mark.slow
def test_break_me_knows_its_faults(tmp_path):
    code, err, _ = break_me("kiled", tmp_path)
    assert code and "unknown fault 'kiled'; nearest: 'killed'" in err


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_study_runs(name, shared_data, tmp_path):
    page, out = STUDIES / f"{name}.ipynb", tmp_path / "out.ipynb"
    given = [x for k, v in SMALL[name].items() for x in ("-p", k, v)]
    command = [sys.executable, "-m", "papermill", str(page), str(out), "--cwd", str(tmp_path), "--no-progress-bar", *given]
    command += ["-p", "runs_dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MBNB_DATA": str(shared_data)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((run / "result.json").exists() for run in (tmp_path / "runs").iterdir() if run.name != "sweeps")


@pytest.mark.slow
def test_the_comparison_is_the_same_once_more(tmp_path):
    "Two models of the toy shop trained again: the page compares their figures with the stored ones, and fails if they differ."
    page, out, runs = STUDIES / "fair_comparison.ipynb", tmp_path / "out.ipynb", tmp_path / "runs"
    given = {"datasets": "toyshop", "models": "sasrec,gru4rec", "again": "True", "runs_dir": str(runs)}
    given["stored"] = str(STUDIES / "fair_comparison.csv")
    command = [sys.executable, "-m", "papermill", str(page), str(out), "--cwd", str(tmp_path), "--no-progress-bar"]
    command += [x for k, v in given.items() for x in ("-p", k, v)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 runs, " in out.read_text() and not runs.exists(), "made in a folder that is thrown away"
