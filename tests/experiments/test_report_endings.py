"""How runs ended, on the page and for --watch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import THREE_SEEDS, write_comparison, write_run

from metamom.cli.app import main
from metamom.experiments.recipes import Recipe
from metamom.experiments.report import can_write_page, write_page
from metamom.experiments.report.reading import read_page


def ends(run: Path, kind: str, step: int, reason: str | None = None) -> Path:
    """Record how a run ended, as `metamom.training.ending` does."""
    config = json.loads((run / "config.json").read_text())
    ended = {"kind": kind, "step": step, "reason": reason, "time": "2026-01-01T00:00:00Z"}
    config["history"] = [{"length": config["length"], "environment": config["environment"], "ended": ended}]
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.mark.parametrize(
    ("kind", "reason", "how"),
    [
        ("stopped", "the loss no longer falls", "stopped early: the loss no longer falls"),
        ("diverged", "the loss is nan", "diverged: the loss is nan"),
        ("interrupted", "SIGTERM", "interrupted: SIGTERM"),
        ("failed", "the disk is full", "failed: the disk is full"),
    ],
)
def test_a_run_that_ended_before_its_last_iteration(tmp_path, kind, reason, how):
    run = ends(write_run(tmp_path / "run", Recipe("sinusoid"), {10: 1.0}, total=50), kind, 10, reason)
    found = read_page([run])
    assert found.finished
    (ended,) = found.page.endings
    assert (ended.name, ended.seed, ended.iterations, ended.how) == ("run", 0, 10, how)
    (section,) = found.page.sections
    assert section.text == f"1 run, 10 of 50 iterations done: {how}."
    assert section.methods[0].runs[0].diverged == (10 if kind == "diverged" else None)


def test_runs_without_a_record(tmp_path):
    """Those of earlier versions, and those under way."""
    whole = write_run(tmp_path / "whole", Recipe("sinusoid"), {10: 1.0})
    part = write_run(tmp_path / "part", Recipe("sinusoid", seed=1), {10: 1.0}, total=50)
    found = read_page([whole, part])
    assert not found.finished
    assert [each.how for each in found.page.endings] == ["completed", "not ended: under way, or killed"]
    assert found.page.sections[0].text == "2 runs, 20 of 60 iterations done: 1 completed, 1 not ended."


def test_an_interrupted_comparison_is_over(tmp_path):
    path = write_comparison(tmp_path / "run", THREE_SEEDS, seeds=4)  # twelve of sixteen runs
    assert not read_page([path]).finished
    run = next(path.glob("runs/*seed0"))
    (run / "outcome.json").unlink()
    ends(run, "interrupted", 40, "SIGINT")
    found = read_page([path])
    assert found.finished
    assert len(found.page.endings) == 12


@pytest.mark.skipif(not can_write_page(), reason="Bokeh is not installed")
def test_the_page_of_a_run_that_diverged(tmp_path):
    """Of metamom train, from its first iteration to the last: the page says so, and draws how far it went."""
    run = tmp_path / "run"
    asked = ["--iterations", "300", "--meta-batch", "2", "--inner-lr", "0.1", "--lr", "1000"]
    assert main(["train", "sinusoid", *asked, "--run-dir", str(run)]) == 1
    found = read_page([run])
    assert found.finished
    (section,) = found.page.sections
    assert section.methods[0].runs[0].diverged is not None
    html = write_page(run / "report.html", found.page).read_text()
    assert "1 run diverged. Its curve ends there, and no table has a result of it." in html
    assert "<td>diverged: " in html
    assert "Training loss: the numbers" in html


def test_a_run_that_a_callback_stopped(tmp_path):
    run = tmp_path / "run"
    asked = ["--iterations", "500", "--meta-batch", "2", "--evaluate-every", "5", "--evaluate-tasks", "4"]
    assert main(["train", "sinusoid", *asked, "--patience", "1", "--run-dir", str(run)]) == 0
    found = read_page([run])
    assert found.finished
    assert found.page.endings[0].iterations < 500
    assert found.page.endings[0].how.startswith("stopped early: ")
