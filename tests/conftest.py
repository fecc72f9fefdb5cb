"""What every test shares: where the real data stand, which tests are left out, and what is told at the end."""
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):     # two workers on two cores: one thread each
    if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault(name, "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests and cells that are marked slow as well")


@pytest.fixture(scope="session")
def shared_data():
    "Path of the folder with the real data sets; skips where there is none."
    places = [Path(os.environ["MBNB_DATA"]).expanduser()] if os.environ.get("MBNB_DATA") else []
    places.append(ROOT.parent / "shared" / "data")
    for place in places:
        if (place / "retail_beh").is_dir(): return place
    pytest.skip(f"no real data sets in {' or '.join(map(str, places))}")


def no_browser():
    "Why a browser test cannot run; '' if it can."
    if os.environ.get("MBNB_NO_BROWSER") == "1": return "MBNB_NO_BROWSER=1 leaves the browser tests out"
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))): return "no Chromium here: make setup-browser"
    return ""


def pytest_collection_modifyitems(config, items):
    without = no_browser()
    for item in items:
        slow = item.get_closest_marker("slow") and not config.getoption("--slow")
        if slow: item.add_marker(pytest.mark.skip(reason="slow: make test-slow"))
        if without and item.get_closest_marker("browser"): item.add_marker(pytest.mark.skip(reason=without))
        if item.get_closest_marker("real_data") and not slow: item.user_properties.append(("real_data", True))


# ---- what is told at the end: reports reach the main process, from which worker ever they come ----

def pytest_configure(config):
    if not hasattr(config, "workerinput"): config.pluginmanager.register(Closing(config), "closing")


class Closing:
    "Counts the real-data tests, keeps the pages' times, and says both."
    def __init__(self, config): self.config, self.ran, self.skipped, self.pages = config, set(), {}, {}

    def pytest_runtest_logreport(self, report):
        told = dict(report.user_properties)
        if "page" in told and report.when == "call": self.pages[told["page"]] = told
        if "real_data" not in told: return
        if report.skipped: self.skipped[report.nodeid] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif report.when == "call": self.ran.add(report.nodeid)

    @property
    def missing(self): return bool(self.skipped) and os.environ.get("MBNB_REQUIRE_REAL_DATA") == "1"

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.missing and session.exitstatus == 0: session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.pages: page_table(terminalreporter, self.pages.values())
        if not self.missing: return
        terminalreporter.section("real-data tests were skipped although MBNB_REQUIRE_REAL_DATA=1")
        for test, reason in sorted(self.skipped.items()): terminalreporter.line(f"{test}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self):
        if self.ran or self.skipped or self.pages: print(f"real-data tests: {len(self.ran)} ran, {len(self.skipped)} skipped")


def page_table(out, pages):
    "A line a page, slowest first: seconds of its cells without those that only import, against the budget. Told, never a failure."
    out.section("pages: seconds beyond imports")
    for p in sorted(pages, key=lambda p: -p["seconds"]):
        over = f"   over the budget of {p['budget']} s" if p["seconds"] > p["budget"] else ""
        out.line(f"{p['seconds']:7.1f}  (+{p['imports']:.1f} imports)  {p['page']}{over}")
