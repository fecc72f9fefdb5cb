"""A report and a static twin in a headless Chromium: text stays text, nothing is fetched, nothing overlaps or is cut,
at 900 pixels and wide, light and dark, in both languages."""

import shutil

import pytest

from test_report import RUNS, folder

from mbnb.plots import static_twin
from mbnb.report import write_report

pytestmark = pytest.mark.browser
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
TOUCHING = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const own = svg.getBoundingClientRect(), boxes = [...svg.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]);
    const over = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
    const cut = a => a.right > own.right + 2 || a.left < own.left - 2 || a.bottom > own.bottom + 2;
    const touch = boxes.flatMap(([a, s], i) => boxes.slice(i + 1).filter(([b]) => over(a, b)).map(([, t]) => s + ' | ' + t));
    return touch.concat(boxes.filter(([a]) => cut(a)).map(([, s]) => 'cut: ' + s));
})"""
LIGHTNESS = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.mbnb')).color]
    .map(c => c.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"""


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        browser = p.chromium.launch(executable_path=next(found), args=ARGS)
        yield browser
        browser.close()


def look(browser, path, width, scheme):
    "-> (what went wrong, the background's and the text's brightness)."
    tab, wrong = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme), []
    tab.on("dialog", lambda d: (wrong.append(f"dialog {d.message}"), d.dismiss()))
    tab.on("pageerror", lambda e: wrong.append(f"error {e}"))
    tab.on("request", lambda r: None if r.url.startswith("file:") and r.url.endswith(path.name) else wrong.append(f"request {r.url}"))
    tab.goto(path.as_uri())
    tab.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    if tab.evaluate("() => document.documentElement.scrollWidth") > width:
        wrong.append("wider than the window")
    wrong += tab.evaluate(TOUCHING)
    light = tab.evaluate(LIGHTNESS)
    tab.close()
    return wrong, light


@pytest.mark.parametrize("lang, width, scheme", [("en", 900, "light"), ("zh", 1400, "dark")])
def test_reports_are_readable_and_inert(chromium, tmp_path, lang, width, scheme):
    for name, what in RUNS.items():
        path = write_report(folder(tmp_path / name.replace(" ", "-"), **what), lang)["html"]
        wrong, (back, front) = look(chromium, path, width, scheme)
        assert not wrong, (name, wrong)
        assert abs(back - front) > 400 and (back > front) == (scheme == "light")


def test_a_twin_follows_the_theme_of_jupyterlab(chromium, tmp_path):
    page = tmp_path / "twin.html"
    for theme, scheme in (("true", "dark"), ("false", "light")):
        twin = static_twin(folder(tmp_path / theme, **RUNS["done"]))
        page.write_text(f'<!doctype html><meta charset="utf-8"><body data-jp-theme-light="{theme}">{twin}')
        wrong, (_, front) = look(chromium, page, 900, scheme)
        assert not wrong and (front < 300) == (theme == "true")
