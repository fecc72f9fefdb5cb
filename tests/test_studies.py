"The studies, by papermill as a user starts them, in miniature: short runs, one seed. Their stored outputs come from whole runs."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[1] / "nbs" / "studies"
SMALL = {
    "mgpt_retail_beh": {"seeds": "0", "epochs": "1"},
    "gear_taobao": {"seeds": "0", "gear_epochs": "2", "mbht_epochs": "1"},
    "losses": {"seeds": "0", "datasets": "ml-100k", "epochs": "2", "losses": "ce,gbce,bpr", "negatives": "4"},
    "ur4rec_ml100k": {"seeds": "0", "ablations": "0", "epochs": "2,1,1,1", "changes": "fixed weights"},
    "bpr_beauty": {"seeds": "0", "epochs": "1,1,1", "whole": "1", "parts": "1,1,1", "changes": "temperature .2, bpr, no text"},
}


@pytest.mark.parametrize("name", sorted(p.stem for p in STUDIES.glob("*.ipynb")))
def test_a_study_has_parameters_outputs_and_run_ids(name):
    cells = [c for c in json.loads((STUDIES / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1
    shown = json.dumps([c["outputs"] for c in cells])
    assert not [c["source"][:80] for c in cells if any(o["output_type"] == "error" for o in c["outputs"])]
    assert "-s0-" in shown, "no run id stands beside the numbers"


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
