"""The page in a real browser: at the width of a small desktop nothing has to be scrolled sideways."""

import shutil

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's test drives a browser by playwright"
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")

TOO_WIDE = """[...document.querySelectorAll('body, .scroll, pre, svg')]
    .filter(element => element.scrollWidth > element.clientWidth + 1)
    .map(element => `${element.outerHTML.slice(0, 200)}: ${element.scrollWidth}`)"""
OUTSIDE = """[...document.querySelectorAll('td, th, pre, p, li')]
    .filter(element => element.getBoundingClientRect().right > innerWidth)
    .map(element => element.textContent)"""


@pytest.fixture(scope="module")
def tab():
    with playwright.sync_playwright() as driver:
        # A container's root has no user namespaces to make a sandbox of.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(5000)
        yield tab
        browser.close()


def test_every_table_fits_a_window_of_1280_pixels(runs, report, tab):
    """Long names of arms and runs, every column filled, five seeds for the bootstrap, and controls."""
    long = {"loss__temperature": 2.5, "granularity__blocks": [0, 1, 2], "teacher__depth": 7}
    arms = [{"method": "none"}, {}, {"alpha": 0.00015, "loss": "mse"}, {"alpha": 0.015} | long]
    arms += [{"method__control": "shuffled_maps"}, {"alpha": 0.015, "teacher__trained": False} | long]
    arms += [
        {"teacher__checkpoint": f"outputs/digits/{'dataset.augment-randaugment_' * 6}/student.safetensors"}
    ]
    for number, arm in enumerate(arms):
        for seed in range(5):
            acc = 0.5 + 0.01 * seed + 0.003 * number * (seed % 3)
            times = {"test/teacher_agreement": 0.5 + 0.1 * (seed % 2), "wall_seconds": 5000.0 + seed}
            runs.add(acc=acc, best=acc, seed=seed, metrics=times, **arm)
    runs.add("alpha-0.00015_granularity-encoder_loss-mse_" * 3 + "seed-0", seed=0, state="failed")
    report(runs.outputs)

    tab.goto((runs.outputs / "report" / "report.html").as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")

    assert tab.evaluate("innerWidth") == 1280
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.evaluate(OUTSIDE) == []
