"""What a page says of runs on disk: read, averaged over seeds, paired, and counted to a target."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from report_runs import THREE_SEEDS, write_comparison, write_run
from scipy import stats

from metamom.common.intervals import normal_halfwidth
from metamom.experiments.families.family import ACCURACY, MEAN_SQUARED_ERROR
from metamom.experiments.recipes import Recipe
from metamom.experiments.report import summary
from metamom.experiments.report.contents import Method, Section, SeedRun
from metamom.experiments.report.reading import read_page
from metamom.experiments.report.summary import Estimate, averaged, differences, mean_curve, to_target
from metamom.experiments.report.terminal import table_lines
from metamom.experiments.report.views import table_columns


def halfwidth(values):
    return stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))


def cells(section: Section) -> dict[str, dict[str, str]]:
    """The table of methods: by label, the cells by heading."""
    columns = table_columns(section)
    labels = columns[0].cells
    return {label: {column.title: column.cells[row] for column in columns} for row, label in enumerate(labels)}


PLAIN, MOMENTUM = "plain meta-SGD (β = 1), γ = 0.03", "momentum, β = 0.1, v₋₁ = 0, γ = 0.01"


def test_a_comparison(tmp_path):
    found = read_page([write_comparison(tmp_path / "run", THREE_SEEDS)])
    assert found.finished
    best, grid = found.page.sections
    assert [method.label for method in best.methods] == [PLAIN, MOMENTUM]  # not the one of which a seed diverged
    assert len(grid.methods) == 4
    assert best.baseline == PLAIN
    assert best.metric is MEAN_SQUARED_ERROR
    row = cells(best)[MOMENTUM]
    assert row["test, 5 steps"] == f"0.400 ± {halfwidth([0.5, 0.3, 0.4]):.3f}"
    assert row["validation error"] == f"0.900 ± {halfwidth([1.0, 0.8, 0.9]):.3f}"
    assert row["iterations to target"] == "40"
    assert row["bytes sent by workers"] == "4,000"
    assert cells(best)[PLAIN]["iterations to target"] == "40 (1 of 3)"
    assert "diverged" not in row
    assert "bytes between processes" not in row
    broken = cells(grid)["momentum, β = 0.1, v₋₁ = 0, γ = 0.03"]
    assert (broken["diverged"], broken["runs"]) == ("1", "3")
    assert broken["test, 5 steps"] == f"0.150 ± {halfwidth([0.2, 0.1]):.3f}"
    (pairs,) = (pairs for pairs in differences(best) if pairs.steps == 5)
    gaps = [-0.1, -0.2, -0.3]
    assert [seed for seed, _ in pairs.by_seed] == [0, 1, 2]
    assert [gap for _, gap in pairs.by_seed] == pytest.approx(gaps)
    assert pairs.estimate == pytest.approx((-0.2, halfwidth(gaps)))


def test_a_comparison_at_one_step_size(tmp_path):
    """One section, since there is no choice."""
    path = write_comparison(tmp_path / "run", {key: value for key, value in THREE_SEEDS.items() if key[1] == 0.01})
    (section,) = read_page([path]).page.sections
    assert section.title == "sinusoids"
    assert [line.split("  ")[0] for line in table_lines(section)][1:] == ["plain meta-SGD (β = 1), γ = 0.01", MOMENTUM]
    assert max(map(len, table_lines(section))) <= 100


def test_a_comparison_of_one_seed(tmp_path):
    path = write_comparison(tmp_path / "run", {(1.0, 0.01): [(3.0, 2.0, 1.0)], (0.1, 0.01): [(3.0, 2.0, 0.5)]})
    (section,) = read_page([path]).page.sections
    assert cells(section)[MOMENTUM]["test, 5 steps"] == "0.500 ± 0.050"  # over the test tasks
    assert cells(section)[MOMENTUM]["validation error"] == "1.000"
    assert all(pairs.estimate.half is None for pairs in differences(section))


def test_a_comparison_in_which_everything_diverged(tmp_path):
    path = write_comparison(tmp_path / "run", {(1.0, 0.01): [None, None], (0.1, 0.01): [None, None]})
    (section,) = read_page([path]).page.sections
    assert {row["diverged"] for row in cells(section).values()} == {"2"}
    assert differences(section) == []
    assert len(table_lines(section)) == 3


def test_a_comparison_under_way(tmp_path):
    """Of three runs, one has ended, one has validated once, and one is missing."""
    path = write_comparison(tmp_path / "run", {(1.0, 0.01): [(3.0, 2.0, 1.0), (3.0, 2.0, 1.0)]}, seeds=3)
    (path / "runs" / "beta1-zero_lr0.01_seed1" / "outcome.json").unlink()
    found = read_page([path])
    assert not found.finished
    assert "1 of 3 runs have ended" in found.page.sections[0].text
    assert len(found.page.sections[0].methods[0].runs) == 2


def test_runs_are_grouped_by_their_settings(tmp_path):
    """All but the seed, and where and how a run is computed."""
    paths = [
        write_run(
            tmp_path / f"{beta}-{seed}",
            Recipe("sinusoid", beta=beta, seed=seed, chunk_size="auto" if seed else None),
            {10: 3.0, 20: beta + seed},
        )
        for beta in (0.1, 1.0) for seed in (0, 1)
    ]  # fmt: skip
    found = read_page(paths)
    (section,) = found.page.sections
    assert [method.label for method in section.methods] == ["beta = 0.1", "beta = 1"]
    assert section.baseline == "beta = 1"
    assert [[run.seed for run in method.runs] for method in section.methods] == [[0, 1], [0, 1]]
    (pairs,) = differences(section)
    assert pairs.steps is None
    assert pairs.estimate.mean == pytest.approx(-0.9)
    assert found.finished


def test_runs_on_other_tasks_are_a_section_of_their_own(tmp_path):
    one = write_run(tmp_path / "one", Recipe("sinusoid"), {10: 1.0})
    two = write_run(tmp_path / "two", Recipe("omniglot", ways=5, shots=1), {10: 0.7}, total=20)
    found = read_page([one, two])
    assert [section.metric for section in found.page.sections] == [MEAN_SQUARED_ERROR, ACCURACY]
    assert cells(found.page.sections[1])["two"]["validation accuracy"] == "70.0 %"
    assert not found.finished


def test_the_same_seed_twice(tmp_path):
    paths = [write_run(tmp_path / name, Recipe("sinusoid"), {10: 1.0}) for name in "ab"]
    (section,) = read_page([*paths, paths[0]]).page.sections
    assert [[run.seed for run in method.runs] for method in section.methods] == [[0, "0 (2)"]]


def test_a_run_without_validation_and_one_that_has_just_started(tmp_path):
    run = write_run(tmp_path / "run", Recipe("sinusoid"), {}, iterations=10)
    started = write_run(tmp_path / "started", Recipe("sinusoid", beta=0.5), {}, iterations=1, total=10)
    (started / "metrics.jsonl").unlink()
    (section,) = read_page([run, started]).page.sections
    assert section.target is None
    assert [method.runs[0].iterations for method in section.methods] == [10, 0]
    assert math.isnan(section.methods[0].runs[0].final)
    assert not read_page([started]).finished


def test_a_loss_that_is_not_finite_has_diverged(tmp_path):
    run = write_run(tmp_path / "run", Recipe("sinusoid"), {5: 1.0}, iterations=9, total=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": NaN}\n')
    found = read_page([run])
    assert found.finished
    assert found.page.sections[0].methods[0].runs[0].diverged == 10


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path):
    run = write_run(tmp_path / "run", Recipe("sinusoid"), {10: 1.0})
    text = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([text[0], "x", *text[1:]]) + "\n")
    with pytest.warns(UserWarning, match="1 unreadable line is left out"):
        (section,) = read_page([run]).page.sections
    assert section.methods[0].runs[0].final == 1.0


# evaluations


def test_an_evaluation(tmp_path):
    """As metamom evaluate --json prints it."""
    found = {"steps": [0, 1], "mean": [0.2, 0.8], "halfwidth": [0.01, 0.02], "tasks": 600, "metric": "accuracy"}
    (tmp_path / "mine.json").write_text(json.dumps(found))
    (section,) = read_page([tmp_path / "mine.json"]).page.sections
    assert cells(section)["mine"] == {
        "method": "mine", "test, 0 steps": "20.0 ± 1.0 %", "test, 1 step": "80.0 ± 2.0 %", "runs": "1"
    }  # fmt: skip


def test_baselines_of_an_evaluation(tmp_path):
    baseline = {"steps": [0], "mean": [0.6], "halfwidth": [0.03], "difference": [-0.2], "difference_halfwidth": [0.01]}
    found = {"steps": [0, 1], "mean": [0.2, 0.8], "halfwidth": [0.01, 0.02], "tasks": 600}
    (tmp_path / "mine.json").write_text(json.dumps({**found, "baselines": {"nearest centroid": baseline}}))
    (section,) = read_page([tmp_path / "mine.json"]).page.sections
    (pairs,) = differences(section)
    assert (pairs.label, pairs.steps, pairs.estimate) == ("nearest centroid", 1, Estimate(-0.2, 0.01))


def test_a_comparison_of_runs(tmp_path):
    """As metamom compare RUN RUN --json prints it."""
    one = {"steps": [1], "mean": [0.5], "halfwidth": [0.1]}
    two = {**one, "mean": [0.7], "difference": [0.2], "difference_halfwidth": [0.05]}
    (tmp_path / "f.json").write_text(json.dumps({"metric": "loss", "tasks": 9, "runs": {"a": one, "b": two}}))
    (section,) = read_page([tmp_path / "f.json"]).page.sections
    assert section.baseline == "a"
    assert [pairs.estimate for pairs in differences(section)] == [Estimate(0.2, 0.05)]


def test_every_task_of_an_evaluation(tmp_path):
    """As metamom evaluate --csv writes it."""
    values = {"learner": [0.5, 0.7, 0.9], "scratch": [0.1, 0.5, 0.3]}
    rows = [f"{name},1,{task},{value}" for name, each in values.items() for task, value in enumerate(each)]
    (tmp_path / "f.csv").write_text("\n".join(["learner,steps,task,accuracy", *rows]) + "\n")
    (section,) = read_page([tmp_path / "f.csv"]).page.sections
    half = normal_halfwidth(np.std(values["learner"], ddof=1) / np.sqrt(3))
    assert summary.tested(section.methods[0], 1) == pytest.approx((0.7, half))
    (pairs,) = differences(section)
    gaps = np.subtract(values["scratch"], values["learner"])
    assert pairs.estimate == pytest.approx((gaps.mean(), normal_halfwidth(gaps.std(ddof=1) / np.sqrt(3))))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f.json", "{"), ("f.json", "[]"), ("f.json", "{}"),
        ("f.json", '{"steps": [1], "mean": ["x"], "halfwidth": [1], "tasks": 5}'),
        ("f.csv", ""), ("f.csv", "a,b\n"), ("f.csv", "learner,steps,task,loss\nlearner,1,0,0.5\n"),
        ("f.csv", "learner,steps,task,loss\nlearner,1,0,x\n"),
    ],
)  # fmt: skip
def test_files_that_are_no_evaluation(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is not what metamom evaluate --json or --csv writes"):
        read_page([tmp_path / name])


def test_places_without_a_run(tmp_path):
    write_run(tmp_path / "runs" / "one", Recipe("sinusoid"), {10: 1.0})
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"settings": {"x": 1}}))
    for place, message in (
        ("runs", "holds no run: .* It holds runs, such as one"),
        ("nothing", "does not exist"),
        ("notes.txt", "is neither a run directory nor"),
        ("other", "is not a run of metamom train, compare or metamom.train"),
        ("none.json", "is not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_page([tmp_path / place])


# sums


def test_a_mean_curve_is_over_the_iterations_that_all_seeds_have():
    curves = [((1, 1.0), (2, 2.0), (3, 3.0)), ((1, 3.0), (3, 5.0)), ()]
    found = mean_curve(curves)
    assert [at for at, _ in found] == [1, 3]
    assert [estimate.mean for _, estimate in found] == [2.0, 4.0]
    assert found[0][1].half == pytest.approx(halfwidth([1.0, 3.0]))


def test_long_curves_are_thinned_and_keep_their_end():
    curve = tuple((at, 1.0 / at) for at in range(1, 10_001))
    found = mean_curve([curve])
    assert len(found) <= 300
    assert found[-1] == (10_000, Estimate(1e-4, None))
    blocks = averaged(curve, 100)
    assert len(blocks) == 100
    assert blocks[1] == (200, pytest.approx(np.mean([1 / at for at in range(101, 201)])))


def test_seeds_that_reach_the_target_before_they_diverge_count():
    section = Section("", ACCURACY, (Method("a", (SeedRun(0, ((10, 0.5), (20, 0.9)), diverged=25),)),), target=0.8)
    assert to_target(section, section.methods[0]) == [20]
    assert to_target(replace(section, target=None), section.methods[0]) == []


def test_labels_must_differ():
    with pytest.raises(ValueError, match="must differ; got a, a"):
        Section("", ACCURACY, (Method("a", ()), Method("a", ())))
    with pytest.raises(ValueError, match="baseline must be one of the methods a; got 'b'"):
        Section("", ACCURACY, (Method("a", ()),), baseline="b")
