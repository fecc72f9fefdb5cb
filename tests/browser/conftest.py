"A JupyterLab as Jupyter ships it, and a headless Chromium that uses it as a person would."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mbnb.runs import LIVE, load_run

NBS = Path(__file__).parents[2] / "nbs"
PATIENCE = 180_000      # ms that a tab waits for anything: two of these tests may share two slow cores
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-sync", "--no-first-run"]
PROMPTS = "[...document.querySelectorAll('.jp-NotebookPanel .jp-InputPrompt')].map(p => p.textContent)"
STATUS = "document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator')?.dataset.status"
BEGUN = f"() => {PROMPTS}.some(p => /\\[(\\d+|\\*)\\]/.test(p))"
DONE = f"() => {STATUS} === 'idle' && {PROMPTS}.some(p => /\\[\\d+\\]/.test(p)) && !{PROMPTS}.some(p => p.includes('[*]'))"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def page_with(name, lines=()):
    "The entry page with lines of its own at the end of its parameters cell."
    page = json.loads((NBS / name).read_text())
    cell = next(c for c in page["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = [*cell["source"], *["\n" + line for line in lines]]
    return json.dumps(page)


class Lab:
    "A server of its own on loopback with a token; its files are in `folder`."
    def __init__(self, folder, browser):
        self.folder, self.browser, self.port, self.token = folder, browser, free_port(), "a-token-for-this-test"
        command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}"]
        command += [f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={folder}"]
        command += ["--allow-root"] if os.geteuid() == 0 else []
        own = ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        env = os.environ | {name: str(folder / f".{name.lower()}") for name in own}
        self.setting("notification", {"fetchNews": "false", "checkForUpdates": False})       # no question in the way of a picture
        with open(folder / "lab.log", "w") as log:
            self.server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(300):
            try: urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/status?token={self.token}", timeout=1); return
            except OSError: time.sleep(.2)
        pytest.fail((folder / "lab.log").read_text()[-2000:])

    def page(self, file, of, *lines):
        "A copy of an entry page with lines of its own."
        (self.folder / file).write_text(page_with(of, lines))

    def setting(self, name, values):
        "What a person would set in Lab's own settings."
        file = self.folder / ".jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))

    def dark(self):
        "From the next tab on the theme is the dark one."
        self.setting("themes", {"theme": "JupyterLab Dark"})

    def open(self, page, width=1280, height=2400):
        "A tab with the page, its kernel idle."
        tab = self.browser.new_page(viewport={"width": width, "height": height})
        tab.set_default_timeout(PATIENCE)
        tab.goto(f"http://127.0.0.1:{self.port}/lab/tree/{page}?token={self.token}&reset")
        self.ready(tab)
        return tab

    def ready(self, tab): tab.wait_for_selector(".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status=idle]")

    def menu(self, tab, name, item):
        tab.get_by_role("menuitem", name=name, exact=True).first.click(timeout=5_000)
        tab.get_by_text(item, exact=True).first.click(timeout=5_000)

    def run_all(self, tab):
        "Menu Run > Run All Cells once the kernel is idle; a dialog in the way (which kernel?) is answered; tried again if nothing began."
        from playwright.sync_api import TimeoutError
        for _ in range(8):
            try:
                if tab.locator(".jp-Dialog .jp-mod-accept").count(): tab.locator(".jp-Dialog .jp-mod-accept").first.click(timeout=5_000)
                tab.wait_for_function("() => /\\| Idle/.test(document.body.innerText)", timeout=30_000)
                self.menu(tab, "Run", "Run All Cells")
                tab.wait_for_function(BEGUN, timeout=10_000)
            except TimeoutError:
                if not tab.evaluate(BEGUN): continue
            return tab.wait_for_function(DONE)
        pytest.fail(f"no cell began to run; dialogs: {tab.locator('.jp-Dialog').all_inner_texts()}")

    def save(self, tab):
        tab.keyboard.press("Control+s")
        tab.wait_for_timeout(1500)

    def shot(self, place, name):
        "A picture, kept where MBNB_SCREENSHOTS says."
        shots = Path(os.environ.get("MBNB_SCREENSHOTS", self.folder))
        shots.mkdir(parents=True, exist_ok=True)
        place.screenshot(path=shots / f"{name}.png")

    def close(self):
        "End the server, and the runs that it was not to take with it."
        for file in self.folder.glob("runs/*/status.json"):
            status = load_run(file.parent).status
            if status["state"] in LIVE: os.kill(status["pid"], signal.SIGKILL)
        self.server.terminate()
        self.server.wait(timeout=20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=ARGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    "Lab on copies of entry pages with small settings."
    folder = tmp_path_factory.mktemp("lab")
    small = 'dataset, epochs, set = "toyshop-tiny", 2, "model.d_model=16 eval.bootstrap=50"'
    for page in ("03_sequences.ipynb", "losses/01_ce.ipynb"): shutil.copy(NBS / page, folder / Path(page).name)
    (folder / "train.ipynb").write_text(page_with("train.ipynb", [small]))
    for name in ("panel", "second"): (folder / f"{name}.ipynb").write_text(page_with("panel.ipynb"))
    made = Lab(folder, browser)
    yield made
    made.close()
