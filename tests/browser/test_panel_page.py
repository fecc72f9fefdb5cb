"The training panel in a headless Chromium: start, watch, steer, leave and come back."
import json
import time

import pytest

from mbnb.experiment import configure, run_experiment
from mbnb.runs import load_run, read_checkpoint

pytestmark = pytest.mark.browser
ROWS = "() => document.querySelectorAll('.mbnb-tab tbody tr').length >= {}"


def wait_state(tab, *states):
    shown = "document.querySelector('.mbnb-state')?.classList.contains(s)"
    tab.wait_for_function(f"() => {json.dumps(states)}.some(s => {shown})")


def press(tab, name): tab.get_by_role("button", name=name, exact=True).first.click()


def fill(tab, name, value):
    control = tab.locator(f'[data-name="{name}"]')
    if control.evaluate("n => n.tagName") == "SELECT": control.select_option(value)
    else:
        control.fill(value)
        control.press("Tab")


def wait_command(tab, text):
    tab.wait_for_function(f"() => document.querySelector('.mbnb-command')?.textContent.includes({json.dumps(text)})")


def start(tab, **settings):
    for name, value in settings.items():
        fill(tab, name, value)
        wait_command(tab, value)
    press(tab, "Start")


def only_run(lab): return sorted((lab.folder / "runs").glob("*/status.json"), key=lambda p: p.stat().st_ctime)[-1].parent


def records(folder, kind): return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


SETTINGS = {"dataset": "toyshop-tiny", "epochs": "400", "patience": "400", "model.d_model": "16", "eval.bootstrap": "50"}


CONTROLS = "[...document.querySelectorAll('.mbnb button:enabled, .mbnb select, .mbnb input')].filter(n => n.getClientRects().length)"
NAME = "(n => n.dataset.name || n.getAttribute('aria-label') || n.labels?.[0]?.textContent.trim() || n.textContent)"


def tab_reaches_every_control_in_order(lab, tab):
    wanted = tab.evaluate(f"{CONTROLS}.map({NAME})")
    tab.evaluate(f"{CONTROLS}[0].focus()")
    reached = []
    for _ in range(2 * len(wanted)):
        if tab.evaluate("document.activeElement.matches('button, select, input')"):         # a list that scrolls can be reached as well
            reached.append(tab.evaluate(f"{NAME}(document.activeElement)"))
        tab.keyboard.press("Tab")
    assert reached[:len(wanted)] == wanted and all(wanted) and len(wanted) > 10


def a_word_half_typed_outlives_an_update(lab, tab):
    control = tab.locator('[data-name="model.d_model"]')
    tab.locator('[data-name="dataset"]').select_option("toyshop-tiny")      # its answer comes while the other field is typed into
    control.focus()
    control.select_text()
    tab.keyboard.type("1")
    wait_command(tab, "dataset toyshop-tiny")
    tab.keyboard.type("6")
    tab.keyboard.press("Tab")
    wait_command(tab, "model.d_model=16")
    assert control.input_value() == "16" and tab.locator(".mbnb-command").inner_text().split("d_model=")[1].split("'")[0] == "16"


def start_shows_the_first_points_and_the_command(lab, tab):
    start(tab, **SETTINGS)
    begun = time.monotonic()
    wait_state(tab, "running")
    running = time.monotonic()
    tab.wait_for_selector('.mbnb-chart[data-chart="loss"] canvas')
    first = time.monotonic()
    tab.wait_for_function(ROWS.format(3))
    epochs = time.monotonic()
    print(f"running after {running - begun:.1f} s, first point {first - running:.1f} s later, two epochs {epochs - first:.1f} s later")
    tab.wait_for_function("() => document.querySelectorAll('.mbnb-chart canvas').length === 4")
    tab_reaches_every_control_in_order(lab, tab)
    tab.evaluate(f"{CONTROLS}.find(n => n.textContent === 'Stop').focus()")
    tab.wait_for_timeout(1500)
    assert tab.evaluate("document.activeElement.textContent") == "Stop", "what is new does not take the focus away"
    tab.get_by_role("tab", name="Command").click()
    shown = tab.locator(".mbnb-tab pre").inner_text()
    assert "-p dataset toyshop-tiny" in shown and "model.d_model=16" in shown
    tab.get_by_role("tab", name="Epochs").click()


def pause_lr_and_resume_are_obeyed(lab, tab):
    run = only_run(lab)
    asked = time.monotonic()
    press(tab, "Pause")
    wait_state(tab, "paused")
    assert time.monotonic() - asked < 15
    before = len(records(run, "step"))
    press(tab, "lr × 0.5")
    tab.wait_for_timeout(1500)
    assert len(records(run, "step")) == before, "the step counter stands still"
    press(tab, "Resume")
    wait_state(tab, "running")
    for _ in range(100):
        rates = [r["lr"] for r in records(run, "step")]
        if rates[-1] == rates[0] / 2: break
        time.sleep(.1)
    assert rates[before - 1] == rates[0] and rates[-1] == rates[0] / 2
    assert [r["action"] for r in records(run, "control")] == ["pause", "lr", "resume"]


def reload_and_a_new_kernel_lose_nothing(lab, tab):
    run = only_run(lab)
    lab.save(tab)
    tab.reload()
    lab.ready(tab)
    tab.wait_for_selector(".mbnb-chart canvas")
    wait_state(tab, "running")
    name = tab.locator(".mbnb-name").inner_text()
    assert name == run.name
    lab.menu(tab, "Kernel", "Restart Kernel…")
    tab.locator(".jp-Dialog .jp-mod-accept, .jp-Dialog .jp-mod-warn").last.click()
    tab.wait_for_timeout(1500)
    lab.ready(tab)
    lab.run_all(tab)
    tab.wait_for_selector(".mbnb-chart canvas")
    assert tab.locator(".mbnb-name").inner_text() == run.name, "a new kernel finds the run that works"
    steps = len(records(run, "step"))
    facts = tab.locator(".mbnb-row > span").all_inner_texts()
    shown = next(t for t in facts if t.startswith("step "))
    assert int(shown.split()[1].replace(",", "")) > steps // 2, "the curve is whole"


def two_panels_agree_and_stop_leaves_a_checkpoint(lab, tab):
    run = only_run(lab)
    other = lab.open("second.ipynb")
    lab.run_all(other)
    other.wait_for_selector(".mbnb-chart canvas")
    asked = time.monotonic()
    press(other, "Stop")
    wait_state(tab, "stopping", "stopped")
    acknowledged = time.monotonic() - asked
    wait_state(tab, "stopped")
    wait_state(other, "stopped")
    print(f"acknowledged after {acknowledged:.2f} s, stopped after {time.monotonic() - asked:.2f} s")
    assert time.monotonic() - asked < 45
    other.close()
    assert load_run(run).status["reason"] == "stop was requested" and list((run / "checkpoints").glob("*.json"))


def resume_goes_on_and_stop_now_is_resumable(lab, tab):
    run = only_run(lab)
    epochs = len(records(run, "epoch"))
    press(tab, "Resume")
    wait_state(tab, "running")
    for _ in range(300):
        if len(records(run, "epoch")) > epochs: break
        time.sleep(.1)
    tab.once("dialog", lambda d: d.accept())
    press(tab, "Stop now")
    wait_state(tab, "crashed")
    steps = [(r["epoch"], r["step"]) for r in records(run, "step")]
    assert len(set(steps)) == len(steps), "no step twice"


def fork_begins_with_the_best_weights(lab, tab):
    run = only_run(lab)
    best = read_checkpoint(run, "best").state["fit"]["best"]            # an epoch just before Stop now may have no checkpoint
    press(tab, "Fork from best")
    wait_command(tab, f"fork {run.name}")
    start(tab, epochs="1")
    wait_state(tab, "done")
    forked = only_run(lab)
    assert forked != run and records(forked, "epoch")[0]["value"] == pytest.approx(best), "its untrained epoch is the other's best"
    lab.shot(tab.locator(".mbnb").first, "panel")


def the_saved_page_shows_the_last_state_without_a_kernel(lab, tab):
    twin = "document.querySelector('[data-mbnb-twin]')"                     # it follows the panel
    tab.wait_for_function(f"() => {twin}?.textContent.includes('all 1 epochs done')")
    lab.save(tab)
    page = lab.folder / "panel.ipynb"
    assert page.stat().st_size < 300_000
    outputs = [o for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    html = "".join("".join(o["data"].get("text/html", "")) for o in outputs if "data" in o)
    assert "all 1 epochs done" in html and "<svg" in html and "<script" not in html


STEPS = [
    tab_reaches_every_control_in_order,
    a_word_half_typed_outlives_an_update,
    start_shows_the_first_points_and_the_command,
    pause_lr_and_resume_are_obeyed,
    reload_and_a_new_kernel_lose_nothing,
    two_panels_agree_and_stop_leaves_a_checkpoint,
    resume_goes_on_and_stop_now_is_resumable,
    fork_begins_with_the_best_weights,
    the_saved_page_shows_the_last_state_without_a_kernel,
]


def test_a_day_with_the_panel(lab):
    "One run from Start to its fork; each step goes on from the one before, so they are one test."
    tab = lab.open("panel.ipynb")
    lab.run_all(tab)
    tab.wait_for_selector(".mbnb")
    try:
        for step in STEPS:
            print(step.__name__)
            step(lab, tab)
    except Exception:
        tell(lab, tab)
        raise
    tab.close()


def tell(lab, tab):
    "What a person would look at when it went wrong."
    lab.shot(tab, "panel-failed")
    run = only_run(lab)
    print((run / "status.json").read_text(), len(records(run, "step")), "steps", len(records(run, "epoch")), "epochs")
    print(tab.locator(".mbnb").all_inner_texts(), (run / "papermill.log").read_text()[-1000:])


BAD = "<img src=x onerror=document.title='taken'>"


def hostile_runs(folder):
    "Two finished runs whose data set, items and reasons hold a script."
    for seed in (0, 1):
        small = {"dataset": "toyshop-tiny", "epochs": 1, "set": "model.d_model=16 eval.bootstrap=50"}
        run_experiment(configure(**small, seed=seed, runs_dir=str(folder), run_name=f"bad{seed}"), say=lambda text: None)
        data = ('"toyshop-tiny"', f'"{BAD}"')
        places = {"metrics.jsonl": ('[["i', f'[["{BAD}i'), "config.json": data, "result.json": data, "status.json": ("epochs done", BAD)}
        for name, (find, put) in places.items():
            file = folder / f"bad{seed}" / name
            assert find in file.read_text(), f"nothing to replace in {name}"
            file.write_text(file.read_text().replace(find, put))


def test_titles_with_a_script_are_text(lab):
    hostile_runs(lab.folder / "bad")
    live = ("panel", 'run, runs_dir = "bad0", "bad"', ".mbnb-chart canvas")
    for page, line, shown in (live, ("compare", 'runs_dir = "bad"', ".jp-OutputArea-output table")):
        lab.page(f"bad-{page}.ipynb", f"{page}.ipynb", line)
        tab = lab.open(f"bad-{page}.ipynb")
        lab.run_all(tab)
        tab.wait_for_selector(shown)
        if page == "panel": tab.get_by_role("tab", name="Cases").click()
        text = tab.locator(".jp-OutputArea").all_inner_texts()
        assert any(BAD in t for t in text), "the name is shown as it is"
        assert not tab.locator("img[src=x]").count() and tab.title() != "taken"
        tab.close()


def own_panel(lab, file, call):
    "The panel's page with a call of its own in the last cell."
    lab.page(file, "panel.ipynb")
    page = json.loads((lab.folder / file).read_text())
    page["cells"][-1]["source"] = [f"show_errors_short()\npanel = {call}\npanel"]
    (lab.folder / file).write_text(json.dumps(page))


def test_preflight_tells_what_is_wrong_and_blocks_the_start(lab):
    wrong = "data.target=buy doctor.D09.least=.9 model.d_model=16 eval.bootstrap=50"         # a bound that no shop keeps
    own_panel(lab, "preflight.ipynb", f'TrainPanel(runs_dir="pre", dataset="toyshop-tiny", epochs=1, set="{wrong}")')
    tab = lab.open("preflight.ipynb")
    lab.run_all(tab)
    tab.wait_for_selector(".mbnb-command")
    start = tab.get_by_role("button", name="Start", exact=True)
    press(tab, "Preflight")
    tab.wait_for_selector(".mbnb-card.E")
    assert start.is_disabled() and "D09" in tab.locator(".mbnb-card.E").inner_text()
    tab.locator(".mbnb-card.E summary").click()
    tab.wait_for_timeout(1500)                                      # two updates later it is still open
    assert "why it matters" in tab.locator(".mbnb-card.E").inner_text()
    lab.shot(tab.locator(".mbnb").first, "preflight")
    tab.get_by_label("run anyway").check()
    wait_command(tab, "doctor warn")
    press(tab, "Start")                                             # waits until it may be pressed: the panel first asks anew
    wait_state(tab, "done")
    tab.get_by_role("tab", name="Doctor").click()
    assert tab.locator(".mbnb-tab .mbnb-card.E").count() == 1
    tab.get_by_label("Mute in the next fork D09").click()
    tab.wait_for_selector("text=For the next fork:")
    lab.shot(tab.locator(".mbnb").first, "doctor-tab")
    press(tab, "Fork from best")
    wait_command(tab, "doctor.mute=D09")
    tab.close()
