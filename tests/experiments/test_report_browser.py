"""The page in a browser: hover, zoom, switching methods off, sorting, by mouse and by keyboard.

Needs Playwright and a Chromium or Chrome that is installed; skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from report_runs import THREE_SEEDS, write_comparison, write_run

from metamom.experiments.recipes import Recipe
from metamom.experiments.report import can_write_page, write_page
from metamom.experiments.report.reading import read_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [
    what
    for what, found in (
        ("Bokeh", can_write_page()),
        ("Playwright", importlib.util.find_spec("playwright")),
        ("a Chromium or Chrome on the PATH", BROWSER),
    )
    if not found
]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
    pytest.mark.xdist_group("browser"),
]
PLAIN, MOMENTUM = "plain meta-SGD (β = 1), γ = 0.03", "momentum, β = 0.1, v₋₁ = 0, γ = 0.01"
# figures are painted on a canvas: what they show is asked of the document that they are painted from
VISIBLE = """label => [...Bokeh.documents[0]._all_models.values()]
    .filter(m => m.name == label && m.type == 'GlyphRenderer').map(m => m.visible)"""
FOCUS = """() => { let e = document.activeElement
    while (e && e.shadowRoot && e.shadowRoot.activeElement) e = e.shadowRoot.activeElement
    return [e.tagName, e.getAttribute('aria-label') || e.title || ''] }"""
RANGE = "() => { const r = Bokeh.documents[0].roots().find(m => m.type == 'Figure').x_range; return [r.start, r.end] }"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """The page of a comparison with two sections."""
    path = write_comparison(tmp_path_factory.mktemp("compared") / "run", THREE_SEEDS)
    return write_page(path / "report.html", read_page([path]).page).as_uri()


@pytest.fixture
def page(browser, url) -> Iterator[Any]:
    """The page, drawn; it must not report errors, nor ask for any other file."""
    with Opened(browser, url) as tab:
        yield tab


class Opened:
    """A tab at an address, with checks of what it did when it closes."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.tab = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **settings})
        self.tab.set_default_timeout(60_000)
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.url = url

    def __enter__(self) -> Any:
        self.tab.goto(self.url)
        self.tab.wait_for_function("() => window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
        self.tab.locator(".slick-row").first.wait_for()
        return self.tab

    def __exit__(self, *exception: object) -> None:
        self.tab.close()
        assert not self.problems
        assert {each for each in self.asked if not each.startswith(("data:", "blob:"))} == {self.url}


def first_column(page: Any) -> list[str]:
    """The methods in the table of the whole grid, from top to bottom."""
    table = page.locator("div.table").nth(1)
    rows = sorted(table.locator(".slick-row").all(), key=lambda row: row.bounding_box()["y"])
    return [row.locator(".slick-cell").first.inner_text() for row in rows]


def canvas(page: Any, number: int) -> Any:
    return page.locator("div.plot").nth(number).locator(".bk-events").first


LISTED = ["plain meta-SGD (β = 1), γ = 0.01", PLAIN, MOMENTUM, "momentum, β = 0.1, v₋₁ = 0, γ = 0.03"]


def test_hover_shows_the_values(page):
    plot = canvas(page, 0)
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.move(box["x"] + box["width"] - 60, box["y"] + 120, steps=4)
    page.locator(".bk-Tooltip", has_text="0.900 ± 0.248").first.wait_for()


def test_drag_zooms_and_reset_undoes_it(page):
    before = page.evaluate(RANGE)
    plot = canvas(page, 0)
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 400, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 700, box["y"] + 160, steps=5)
    page.mouse.up()
    page.wait_for_function(f"() => {{ const [a, b] = ({RANGE})(); return b - a < {0.5 * (before[1] - before[0])} }}")
    page.locator("div.plot").first.locator("[title=Reset]").first.click()
    page.wait_for_function(f"() => Math.abs(({RANGE})()[1] - {before[1]}) < 1e-9")


def test_the_legend_switches_a_method_off(page):
    shown = page.evaluate(VISIBLE, MOMENTUM)
    assert shown
    assert all(shown)
    page.locator("div.plot").first.locator(".bk-item", has_text=MOMENTUM).click()
    page.wait_for_function(f"label => !({VISIBLE})(label)[0]", arg=MOMENTUM)
    assert not page.get_by_role("checkbox", name=MOMENTUM).first.is_checked()
    assert all(page.evaluate(VISIBLE, PLAIN))


def test_a_checkbox_switches_a_method_off_in_every_figure_of_its_section(page):
    """From the keyboard."""
    box = page.get_by_role("checkbox", name=MOMENTUM).first
    box.focus()
    page.keyboard.press("Space")
    assert not box.is_checked()
    shown = page.evaluate(VISIBLE, MOMENTUM)
    assert not all(shown)
    assert any(shown)  # those of the other section
    page.keyboard.press("Space")
    assert all(page.evaluate(VISIBLE, MOMENTUM))


def test_a_heading_sorts(page):
    assert first_column(page) == LISTED
    heading = page.locator("div.table").nth(1).locator(".slick-header-column", has_text="validation error")
    heading.click()
    ascending = [LISTED[3], LISTED[2], LISTED[1], LISTED[0]]
    assert first_column(page) == ascending
    heading.click()
    assert first_column(page) == ascending[::-1]


def test_sorting_from_the_keyboard(page):
    page.get_by_label("Sort by").nth(1).focus()
    page.keyboard.type("val")
    assert first_column(page)[0] == LISTED[3]
    page.get_by_label("Sort by").nth(1).select_option(label="as listed")
    assert first_column(page) == LISTED


def test_controls_are_reached_with_tab(page):
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUS))
    assert [tag for tag, _ in reached[:5]] == ["A", "A", "A", "INPUT", "INPUT"]
    assert {"Zoom In", "Zoom Out", "Reset"} <= {name for _, name in reached}
    assert ["SUMMARY", ""] in reached


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_narrow_screen_and_both_themes(browser, url, theme):
    """Nothing but tables scrolls sideways; the page's colours are the theme's."""
    with Opened(browser, url, viewport={"width": 390, "height": 844}, color_scheme=theme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if theme == "light" else "rgb(22, 23, 27)")
        legend = page.locator("div.plot").first.locator(".bk-label").first
        colour = legend.evaluate("e => getComputedStyle(e).color")
        assert colour == page.evaluate("getComputedStyle(document.body).color")
        assert page.locator("div.plot").first.bounding_box()["width"] <= 390
        chosen = page.locator("select").first.evaluate(
            "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
        )
        assert chosen == [background, colour]


@pytest.mark.parametrize("width", [390, 1280])
def test_long_labels_wrap(browser, tmp_path, width):
    """Those of runs that differ in many settings, in the checkboxes and in the legends."""
    paths = [
        write_run(tmp_path / str(n), Recipe("sinusoid", beta=b, lr=b, meta_batch=32, workers=w, bias=bias), {9: b})
        for n, (b, w, bias) in enumerate([(1.0, 4, "topk:5%"), (0.1, 1, "none")])
    ]  # fmt: skip
    url = write_page(tmp_path / "report.html", read_page(paths).page).as_uri()
    with Opened(browser, url, viewport={"width": width, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for label in page.locator(".bk-input-group span, .bk-label").all():
            box = label.bounding_box()
            assert box["x"] + box["width"] <= width
            assert label.evaluate("e => e.scrollWidth <= e.clientWidth || getComputedStyle(e).display == 'inline'")
