"JupyterLab in a headless Chromium: a person opens a page, runs all cells and sees figures and tables, no error."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
NBS = Path(__file__).parents[2] / "nbs"
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-sync", "--no-first-run"]
PROMPTS = "[...document.querySelectorAll('.jp-NotebookPanel .jp-InputPrompt')].map(p => p.textContent)"
STATUS = "document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator')?.dataset.status"
BEGUN = f"() => {PROMPTS}.some(p => /\\[(\\d+|\\*)\\]/.test(p))"
DONE = f"() => {STATUS} === 'idle' && {PROMPTS}.some(p => /\\[\\d+\\]/.test(p)) && !{PROMPTS}.some(p => p.includes('[*]'))"


def run_all(tab):
    "Menu Run > Run All Cells once the kernel is idle; a dialog in the way (which kernel?) is answered; tried again if nothing began."
    from playwright.sync_api import TimeoutError
    for _ in range(8):
        try:
            if tab.locator(".jp-Dialog .jp-mod-accept").count(): tab.locator(".jp-Dialog .jp-mod-accept").first.click(timeout=5_000)
            tab.wait_for_function("() => /\\| Idle/.test(document.body.innerText)", timeout=30_000)
            tab.get_by_role("menuitem", name="Run", exact=True).first.click(timeout=5_000)
            tab.get_by_text("Run All Cells", exact=True).first.click(timeout=5_000)
            tab.wait_for_function(BEGUN, timeout=10_000)
        except TimeoutError:
            if not tab.evaluate(BEGUN): continue
        return tab.wait_for_function(DONE, timeout=150_000)
    pytest.fail(f"no cell began to run; dialogs: {tab.locator('.jp-Dialog').all_inner_texts()}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab on a copy of three pages, as Jupyter ships it: loopback and a token."
    folder, port, token = tmp_path_factory.mktemp("lab"), free_port(), "a-token-for-this-test"
    for page in ("03_sequences.ipynb", "losses/01_ce.ipynb"): shutil.copy(NBS / page, folder / Path(page).name)
    page = json.loads((NBS / "train.ipynb").read_text())
    cell = next(c for c in page["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] += ['\ndataset, epochs, set = "toyshop-tiny", 2, "model.d_model=16 eval.bootstrap=50"']
    (folder / "train.ipynb").write_text(json.dumps(page))
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    command += ["--allow-root"] if os.geteuid() == 0 else []
    own = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    env = os.environ | {name: str(folder / f".{name.lower()}") for name in own}
    with open(folder / "lab.log", "w") as log: server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=1); break
            except OSError: time.sleep(.2)
        else: pytest.fail((folder / "lab.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset", folder
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=ARGS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("page, figures", [("train.ipynb", 2), ("03_sequences.ipynb", 0), ("01_ce.ipynb", 1)])
def test_a_page_runs_in_the_browser(lab, browser, page, figures):
    url, folder = lab
    tab = browser.new_page(viewport={"width": 1280, "height": 2400})
    tab.goto(url.format(page), timeout=60_000)
    tab.wait_for_selector(".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=90_000)
    run_all(tab)
    tab.keyboard.press("Control+s")
    tab.wait_for_timeout(1500)
    shots = Path(os.environ.get("MBNB_SCREENSHOTS", folder))
    shots.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=shots / f"{page}.png")
    if figures:
        tab.locator(".js-plotly-plot").first.scroll_into_view_if_needed(timeout=30_000)
        tab.wait_for_timeout(500)
        tab.screenshot(path=shots / f"{page}-figure.png")
        assert tab.locator(".js-plotly-plot .main-svg").first.bounding_box()["height"] > 100, "the figure is drawn"
    tab.close()
    saved = [c for c in json.loads((folder / page).read_text())["cells"] if c["cell_type"] == "code"]
    errors = [o for c in saved for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, errors
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for c in saved for o in c["outputs"]) == figures
