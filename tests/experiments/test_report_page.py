"""The HTML page: complete in itself, accessible in its structure, and with the numbers of the runs."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import THREE_SEEDS, write_comparison, write_run

from metamom.experiments.families.family import ACCURACY, MEAN_SQUARED_ERROR
from metamom.experiments.recipes import Recipe
from metamom.experiments.report import Method, Page, Section, SeedRun, can_write_page, write_page
from metamom.experiments.report.plots import COLOURS
from metamom.experiments.report.reading import read_page
from metamom.experiments.report.views import table_columns
from metamom.training.directory import environment

pytestmark = pytest.mark.skipif(not can_write_page(), reason="Bokeh is not installed")

MOST = 3_000_000  # bytes


class Outline(HTMLParser):
    """The tags of a page with their attributes, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_cell = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self._in_cell:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The page of a comparison."""
    path = write_comparison(tmp_path_factory.mktemp("compared") / "run", THREE_SEEDS)
    return write_page(path / "report.html", read_page([path]).page)


def markup(file: Path) -> str:
    """A page without its scripts."""
    return re.sub(r"<script.*?</script>", "", file.read_text(), flags=re.DOTALL)


def test_the_models_of_a_page_are_gone_through_once(tmp_path, monkeypatch):
    """And not once for each figure, which took more than a second."""
    from bokeh.document.models import DocumentModelManager

    calls, recompute = [], DocumentModelManager.recompute
    monkeypatch.setattr(DocumentModelManager, "recompute", lambda models: calls.append(1) or recompute(models))
    path = write_comparison(tmp_path / "run", THREE_SEEDS)
    write_page(path / "report.html", read_page([path]).page)
    assert len(calls) == 1


def test_a_page_is_complete_in_itself(compared):
    assert compared.stat().st_size < MOST
    outline = Outline(compared.read_text())
    links = [attributes.get(name) for _, attributes in outline.tags for name in ("src", "href", "action", "data")]
    assert all(link.startswith("#") for link in links if link)
    assert not outline.all("link")
    assert not outline.all("iframe")
    assert "@import" not in markup(compared)
    assert "url(" not in markup(compared)


def test_the_structure_of_a_page(compared):
    html = markup(compared)
    outline = Outline(html)
    assert html.startswith("<!DOCTYPE html>")
    assert outline.all("html") == [{"lang": "en"}]
    assert "<title>Report: run</title>" in html
    headings = [int(name[1]) for name, _ in outline.tags if re.fullmatch(r"h\d", name)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    names = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    for _, attributes in outline.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(names)
    figures = len(outline.all("figure"))
    assert figures == 9  # curves, loss, test and table of both sections, and differences
    assert len(outline.all("figcaption")) == len(outline.all("details")) == figures
    plots = [attributes for attributes in outline.all("div") if attributes.get("class") == "plot"]
    assert len(plots) == 7
    assert all(len(attributes["aria-label"]) > 40 for attributes in plots)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "http-equiv" not in html


def test_the_numbers_of_a_page_are_those_of_the_runs(compared):
    sections = read_page([compared.parent]).page.sections
    tables = Outline(markup(compared)).tables
    for section in sections:
        columns = table_columns(section)
        rows = [[column.cells[row] for column in columns] for row in range(len(section.methods))]
        assert [[column.title for column in columns], *rows] in tables
    curve, *_ = tables
    assert curve[0] == ["iterations", *(method.label for method in sections[0].methods)]
    assert [row[0] for row in curve[1:]] == ["20", "40"]
    assert curve[2][2].startswith("0.900 ± ")
    gaps = next(table for table in tables if table[0][-1] == "seed 2")
    assert [row[3:] for row in gaps[1:] if row[1] == "5"] == [["-0.100", "-0.200", "-0.300"]]
    facts = dict(tables[-1])
    assert facts["seeds"] == "0, 1, 2"
    assert facts["PyTorch"] == environment()["torch"]


def test_labels_are_escaped(tmp_path):
    section = Section("<b>", ACCURACY, (Method("</script><script>alert(1)</script>", (SeedRun(0, ((1, 0.5),)),)),))
    page = Page("<i>", (section,), ("<u>",), ({"command": ["metamom", "<s>"]},))
    html = write_page(tmp_path / "report.html", page).read_text()
    assert "<script>alert" not in html
    assert not {"b", "i", "u", "s"} & {tag for tag, _ in Outline(html).tags}


def test_long_and_many_runs_stay_small(tmp_path):
    curve = tuple((at, 1.0 / at) for at in range(1, 10_001))
    methods = tuple(Method(f"method {n}", tuple(SeedRun(s, curve, curve) for s in (0, 1))) for n in range(50))
    section = Section("many", MEAN_SQUARED_ERROR, methods, baseline="method 7")
    html = write_page(tmp_path / "report.html", Page("Many", (section,) * 2)).read_text()
    assert len(html.encode()) < MOST
    assert "The figures show 12 of 50 methods" in html
    assert any(len(table) == 51 for table in Outline(markup(tmp_path / "report.html")).tables)


def test_a_page_without_measurements(tmp_path):
    run = write_run(tmp_path / "run", Recipe("sinusoid"), {}, iterations=1)
    (run / "metrics.jsonl").unlink()
    assert "There are no measurements yet." in write_page(run / "report.html", read_page([run]).page).read_text()
    assert "<h1>Empty</h1>" in write_page(tmp_path / "empty.html", Page("Empty", ())).read_text()


def test_a_page_of_a_run_under_way_reloads_itself(tmp_path):
    html = write_page(tmp_path / "report.html", Page("Mine", ()), reload_every=5).read_text()
    assert '<meta http-equiv="refresh" content="5">' in html
    assert "reloads every 5 seconds" in html


def test_only_a_page_is_replaced(tmp_path):
    file, page = tmp_path / "new" / "report.html", Page("Mine", ())
    write_page(file, page)
    write_page(file, page)
    for text in ("<html></html>", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"report\.html exists, and it is not a page of `metamom report`"):
            write_page(file, page)
        assert file.read_text() == text
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not a page"):
        write_page(file, page)


def test_without_bokeh(tmp_path, monkeypatch):
    monkeypatch.setattr("metamom.experiments.report.html.can_write_page", lambda: False)
    with pytest.raises(ValueError, match=r"needs Bokeh, which is not installed: pip install 'metamom\[report\]'\.$"):
        write_page(tmp_path / "report.html", Page("Mine", ()))
    assert not list(tmp_path.iterdir())


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_contrast(compared):
    """WCAG 2 AA: 4.5 of text, 3 of lines, in the light theme and in the dark one."""
    rules = re.findall(r":root \{[^}]*#[^}]*\}", markup(compared))
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", rule)) for rule in rules]
    assert len(themes) == 2
    for theme in themes:
        for text in ("text", "accent", "quiet"):
            assert min(contrast(theme[text], theme[back]) for back in ("page", "soft")) >= 4.5
        for colour in COLOURS:
            assert contrast(colour, theme["page"]) >= 3, colour
