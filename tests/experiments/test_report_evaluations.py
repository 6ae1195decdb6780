"""Pages of evaluations: what was evaluated, on which tasks, by which metric, and what was run."""

from __future__ import annotations

import json
import sys

import pytest
from report_runs import write_run

from metamom.cli.app import main
from metamom.experiments.families.family import ACCURACY, LOSS, MEAN_SQUARED_ERROR
from metamom.experiments.recipes import Recipe
from metamom.experiments.report import Method, Section, SeedRun, can_write_page
from metamom.experiments.report.html import command_line
from metamom.experiments.report.reading import places_of, read_page
from metamom.experiments.report.views import view


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two iterations, and the record of an evaluation of each and of both."""
    folder = tmp_path_factory.mktemp("evaluated")
    asked = ["--tasks", "4", "--steps", "0,1"]
    for name, beta in (("one", "0.1"), ("two", "1")):
        run = str(folder / name)
        main(["train", "sinusoid", "--iterations", "2", "--meta-batch", "2", "--beta", beta, "--run-dir", run])
        main(["evaluate", run, *asked, "--seed", "7", "--record", str(folder / f"{name}.json")])
    both = [str(folder / name) for name in ("one", "two")]
    main(["compare", *both, *asked, "--record", str(folder / "both.json")])
    return folder


def test_a_recorded_evaluation_says_what_was_run(runs):
    page = read_page([runs / "one.json"]).page
    (section,) = page.sections
    assert page.title == section.title == f"Evaluation: {runs / 'one'} on sinusoid 10-shot"
    assert section.metric == MEAN_SQUARED_ERROR
    assert [method.label for method in section.methods] == [str(runs / "one")]
    facts = dict(page.facts)
    assert (facts["split"], facts["seed of the tasks"], facts["iterations of training"]) == ("test", "7", "2")
    assert (facts["adaptation steps"], facts["number of tasks"]) == ("0, 1", "4")
    (environment,) = page.environments
    assert command_line(environment) == command_line({"command": sys.argv})
    assert environment["torch"]


def test_the_record_holds_the_numbers_that_json_prints(runs, capsys):
    main(["evaluate", str(runs / "one"), "--tasks", "4", "--steps", "0,1", "--seed", "7", "--json"])
    printed = json.loads(capsys.readouterr().out)
    recorded = json.loads((runs / "one.json").read_text())
    assert {name: recorded[name] for name in printed} == printed


def test_recorded_evaluations_on_the_same_tasks_share_a_section(runs):
    page = read_page([runs / "one.json", runs / "two.json"]).page
    assert page.title == "Evaluations on sinusoid 10-shot"
    assert [method.label for method in page.sections[0].methods] == [str(runs / "one"), str(runs / "two")]
    other = json.loads((runs / "two.json").read_text())
    other["evaluated"]["seed of the tasks"] = 8
    (runs / "other.json").write_text(json.dumps(other))
    assert len(read_page([runs / "one.json", runs / "other.json"]).page.sections) == 2


def test_a_recorded_comparison_of_runs(runs):
    (section,) = read_page([runs / "both.json"]).page.sections
    assert section.title == f"Evaluation: {runs / 'one'} and {runs / 'two'} on sinusoid 10-shot"
    assert section.baseline == str(runs / "one")
    assert section.metric == MEAN_SQUARED_ERROR


@pytest.mark.parametrize(
    ("mean", "named", "metric"),
    [(0.5, {}, "accuracy or loss"), (2.0, {}, "loss"), (0.5, {"metric": "accuracy"}, "accuracy")],
)
def test_a_file_without_a_record_says_so(tmp_path, mean, named, metric):
    """As --json prints it: its metric is named as far as it is known."""
    found = {"steps": [1], "mean": [mean], "halfwidth": [0.1], "tasks": 4, **named}
    (tmp_path / "e.json").write_text(json.dumps(found))
    page = read_page([tmp_path / "e.json"]).page
    assert page.sections[0].metric.name == metric
    assert dict(page.facts)["not recorded"] == (
        "how e.json was made: metamom evaluate --record FILE writes a file that says so"
    )


def test_a_title_counts_runs_comparisons_and_evaluations(runs):
    assert read_page([runs / "one", runs / "two"]).page.title == "Report: 2 runs, sinusoids"
    assert read_page([runs / "one", runs / "one.json"]).page.title == "Report: 1 run and 1 evaluation"


def test_the_runs_of_another_command_are_read(tmp_path):
    """Such as the demo's, which keeps them in a folder of its own."""
    kept = [write_run(tmp_path / "demo" / "runs" / name, Recipe("sinusoid", beta=b), {10: b}) for name, b in
            (("a", 1.0), ("b", 0.1))]  # fmt: skip
    (tmp_path / "demo" / "config.json").write_text(json.dumps({"settings": {"demo": {}, "best": {}}}))
    assert places_of([tmp_path / "demo"]) == kept
    (section,) = read_page([tmp_path / "demo"]).page.sections
    assert [method.label for method in section.methods] == ["beta = 1", "beta = 0.1"]


@pytest.mark.parametrize(
    ("metric", "interval", "drawn"),
    [
        (MEAN_SQUARED_ERROR, (-0.5, 1.5), (0.0, 1.5)),
        (ACCURACY, (0.9, 1.1), (0.9, 1.0)),
        (LOSS._replace(least=float("-inf")), (-0.5, 1.5), (-0.5, 1.5)),
    ],
)
def test_no_interval_is_drawn_beyond_the_bounds_of_its_metric(metric, interval, drawn):
    assert metric.within(*interval) == drawn


@pytest.mark.skipif(not can_write_page(), reason="Bokeh is not installed")
def test_the_band_of_a_figure_ends_at_zero():
    """Two seeds at 0.1 and 0.9 have a mean of 0.5 ± 5.08."""
    runs = tuple(SeedRun(seed, curve=((1, value),)) for seed, value in enumerate((0.1, 0.9)))
    (part, _) = view(Section("", MEAN_SQUARED_ERROR, (Method("mine", runs),))).parts
    from bokeh.models import ColumnDataSource

    (data,) = {id(each): each.data for each in part.model.select({"type": ColumnDataSource})}.values()
    assert data["low"] == [0.25]  # a logarithmic axis has no zero: half of the smallest mean
    assert data["high"] == [pytest.approx(5.582, abs=1e-3)]
    assert "Intervals are cut off at 0, the limit of the mean squared error." in part.caption
