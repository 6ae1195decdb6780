"""`metamom report`: where the page goes, what is refused, and runs under way."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from command import the_error
from report_runs import THREE_SEEDS, write_comparison, write_run

from metamom.experiments.recipes import Recipe
from metamom.experiments.report import can_write_page

needs_bokeh = pytest.mark.skipif(not can_write_page(), reason="Bokeh is not installed")


@needs_bokeh
def test_a_single_run_keeps_its_page(metamom, trained, tmp_path):
    """Of metamom train; written again without asking."""
    for _ in range(2):
        said = metamom("report", trained)
        assert (said.code, said.out) == (0, f"page: {trained}/report.html\n"), said
    assert "sinusoids" in (trained / "report.html").read_text()
    assert metamom("train", "sinusoid", "--iterations", "1", "--run-dir", trained).code == 2  # it is a run still


@needs_bokeh
def test_a_folder_that_is_a_file(metamom, trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = the_error(metamom("report", trained, "--out", tmp_path / "notes.txt"))
    assert said.endswith(f"{tmp_path / 'notes.txt'} is a file. Name another folder.")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@needs_bokeh
def test_several_runs(metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / f"r{seed}", Recipe("sinusoid", seed=seed), {10: 1.0 + seed}) for seed in (0, 1)]
    (tmp_path / "e.json").write_text(json.dumps({"steps": [1], "mean": [0.5], "halfwidth": [0.1], "tasks": 4}))
    assert metamom("report", *runs, "e.json").out == "page: report.html\n"
    assert metamom("report", *runs, "--out", "new/place").out == "page: new/place/report.html\n"
    html = Path("report.html").read_text()
    assert "Evaluation: e" in html
    assert html.count("<section") == 3


@needs_bokeh
def test_a_run_of_an_earlier_version(metamom, tmp_path):
    run = Path(__file__).parents[1] / "support" / "run_of_0_1"
    assert metamom("report", run, "--out", tmp_path).code == 0
    assert "3.463" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("words", [["--watch", "0"], ["--watch", "x"], []])
def test_bad_arguments(metamom, tmp_path, words):
    the_error(metamom("report", tmp_path, *words))
    assert not list(tmp_path.iterdir())


@needs_bokeh
def test_a_file_of_another_is_kept(metamom, tmp_path):
    run = write_comparison(tmp_path / "run", THREE_SEEDS)
    (run / "report.html").write_text("mine")
    assert "is not a page of `metamom report`" in the_error(metamom("report", run))
    assert (run / "report.html").read_text() == "mine"


@needs_bokeh
@pytest.mark.parametrize("ends", [True, False])
def test_watching_a_run(metamom, tmp_path, monkeypatch, ends):
    """The page reloads itself until the run has ended, or the command is interrupted."""
    run = write_run(tmp_path / "run", Recipe("sinusoid"), {1: 2.0}, total=2)
    pages = []

    def sleep(seconds: float) -> None:
        pages.append((run / "report.html").read_text())
        assert seconds == 3
        if not ends:
            raise KeyboardInterrupt
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 1, "loss": 1.0, "validation": 1.5}) + "\n")

    monkeypatch.setattr(time, "sleep", sleep)
    said = metamom("report", run, "--watch", 3)
    assert said.code == (0 if ends else 130)
    assert len(pages) == 1
    assert '<meta http-equiv="refresh" content="3">' in pages[0]
    html = (run / "report.html").read_text()
    assert "http-equiv" not in html
    assert ("1.500" in html) == ends


@needs_bokeh
def test_opening_the_page(metamom, tmp_path, monkeypatch):
    run, opened = write_run(tmp_path / "run", Recipe("sinusoid"), {1: 2.0}), []
    monkeypatch.setattr("webbrowser.open", lambda url: not opened.append(url) and False)
    said = metamom("report", run, "--open")
    assert opened == [(run / "report.html").resolve().as_uri()]
    assert "no browser was found" in said.out


def test_without_bokeh(metamom, tmp_path, monkeypatch):
    monkeypatch.setattr("metamom.experiments.report.html.can_write_page", lambda: False)
    run = write_run(tmp_path / "run", Recipe("sinusoid"), {1: 2.0})
    assert "needs Bokeh, which is not installed: pip install 'metamom[report]'" in the_error(metamom("report", run))


@needs_bokeh
def test_ctrl_c_while_compare_writes_its_page(metamom, tmp_path, monkeypatch):
    """Nothing half-written stays, and the error says what to do; all runs are kept."""
    from metamom.experiments.report import plots

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    asked = ["--seeds", 1, "--lrs", "0.03", "--iterations", 2, "--tasks", 4, "--evaluate-tasks", 4, "--run-dir", run]
    with monkeypatch.context() as patched:
        patched.setattr(plots, "table", interrupt)
        said = metamom("compare", "sinusoid", *asked)
    assert said.code == 130
    assert said.err.endswith(
        f"metamom: interrupted before the page was written; all runs are finished. To write it: metamom report {run}\n"
    )
    assert not [*run.rglob("*.tmp"), *run.glob("report.html")]
    assert metamom("report", run).code == 0


def test_ctrl_c_while_compare_draws_its_figures(metamom, tmp_path, monkeypatch):
    from metamom.experiments.shared import figures

    def half(figure: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    run = tmp_path / "run"
    asked = ["--seeds", 1, "--lrs", "0.03", "--iterations", 2, "--tasks", 4, "--evaluate-tasks", 4, "--run-dir", run]
    with monkeypatch.context() as patched:
        patched.setattr(figures.Figure, "savefig", half)
        said = metamom("compare", "sinusoid", *asked)
    assert said.code == 130
    assert "2 of 2 runs are finished" in said.out
    assert said.out.splitlines()[-1].endswith("--resume")
    assert not list((run / "figures").iterdir())
    assert metamom("compare", "sinusoid", *asked, "--resume").code == 0
    assert (run / "figures" / "curves.png").read_bytes()[:4] == b"\x89PNG"
