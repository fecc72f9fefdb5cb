"JupyterLab in a headless Chromium: a person opens a page, runs all cells and sees figures and tables, no error."
import json

import pytest

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("page, figures", [("train.ipynb", 2), ("03_sequences.ipynb", 0), ("01_ce.ipynb", 1)])
def test_a_page_runs_in_the_browser(lab, page, figures):
    tab = lab.open(page)
    lab.run_all(tab)
    lab.save(tab)
    lab.shot(tab, page)
    if figures:
        tab.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
        tab.wait_for_timeout(500)
        lab.shot(tab, f"{page}-figure")
        assert tab.locator(".js-plotly-plot .main-svg").first.bounding_box()["height"] > 100, "the figure is drawn"
    tab.close()
    saved = [c for c in json.loads((lab.folder / page).read_text())["cells"] if c["cell_type"] == "code"]
    errors = [o for c in saved for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, errors
    assert sum("application/vnd.plotly.v1+json" in o.get("data", {}) for c in saved for o in c["outputs"]) == figures
