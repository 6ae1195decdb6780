"""A comparison's report: what its words say of which seeds."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from endings import contents
from scipy import stats

from metamom import evaluate
from metamom.experiments.compare import Comparison, Outcome, _place, compare
from metamom.experiments.recipes import Recipe
from metamom.experiments.report import write_report
from metamom.experiments.shared.numerals import distinguishable, shortest

NEAR = 0.1 + 1e-9  # a step size that six digits do not tell from 0.1
# by lr and seed; None is a run that diverged
Results = dict[float, list[float | None]]


def reported(folder: Path, plain: Results, momentum: Results, *, target: float = 0.85) -> str:
    """The report on runs that ended with these test accuracies after 1 step; their validation was 0.1 above."""
    comparison = Comparison(
        base=Recipe("omniglot"),
        betas=(1.0, 0.1),
        first_steps=("zero",),
        lrs=tuple(plain),
        seeds=len(next(iter(plain.values()))),
        iterations=30,
        evaluate_every=20,
        validation_tasks=4,
        test_tasks=4,
        steps=(1,),
        target=target,
    )
    outcomes = []
    for beta, results in ((1.0, plain), (0.1, momentum)):
        for lr, ends in results.items():
            for seed, end in enumerate(ends):
                recipe = replace(comparison.base, lr=lr, beta=beta, seed=seed)
                if end is None:
                    outcomes.append(Outcome(recipe, [(20, 0.95)], (1,), None, None, 25, folder))
                else:
                    curve = [(20, 0.2), (30, end + 0.1)]
                    outcomes.append(Outcome(recipe, curve, (1,), (end,), (0.03,), None, folder))
    return write_report(comparison, outcomes, folder).read_text()


def tables(report: str) -> list[list[list[str]]]:
    """The cells of each table, without its head."""
    found = [part.splitlines() for part in report.split("\n\n") if part.startswith("| method")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] for lines in found]


def interval(values: list[float]) -> str:
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{100 * np.mean(values):.1f} ± {100 * half:.1f} %"


def test_all_seeds_finished(tmp_path):
    report = reported(tmp_path, {0.1: [0.5, 0.6, 0.7]}, {0.1: [0.6, 0.65, 0.8]})
    (table,) = tables(report)
    assert [row[2] for row in table] == [interval([0.5, 0.6, 0.7]), interval([0.6, 0.65, 0.8])]
    assert [row[-1] for row in table] == ["0 of 3", "0 of 3"]
    assert "± is the 95 % interval of the mean over 3 seeds (Student's t). Iterations to target" in report
    assert "diverge" not in report.split("## Figures")[1]
    assert "mean and range of 3 seeds." in report
    gap = interval([0.1, 0.05, 0.1]).removesuffix(" %")
    assert f"- momentum, β = 0.1, v₋₁ = 0, γ = 0.1: {gap} % after 1 step." in report


def test_seeds_that_diverged_are_reported_where_their_mean_stands(tmp_path):
    report = reported(tmp_path, {0.1: [0.5, 0.6, 0.7]}, {0.1: [None, 0.65, 0.8]})
    (table,) = tables(report)
    assert [row[2] for row in table] == [interval([0.5, 0.6, 0.7]), interval([0.65, 0.8]) + " (2 of 3 seeds)"]
    assert "Where seeds diverged, mean and interval cover only the others" in report
    assert "mean and range of the seeds that did not diverge" in report
    assert "- momentum, β = 0.1, v₋₁ = 0, γ = 0.1: none, because seeds diverged." in report


def test_of_several_seeds_one_is_left(tmp_path):
    """Its interval over test tasks is not the one over seeds that the caption tells of."""
    report = reported(tmp_path, {0.1: [None, 0.6, None]}, {0.1: [0.6, 0.65, 0.8]})
    (table,) = tables(report)
    assert table[0][2] == "60.0 % (1 of 3 seeds)"
    assert "a single one has no interval" in report
    assert "No differences from plain meta-SGD (β = 1): seeds of it diverged at every step size." in report


def test_one_seed(tmp_path):
    report = reported(tmp_path, {0.1: [0.5]}, {0.1: [None]})
    (table,) = tables(report)
    assert [row[2] for row in table] == ["50.0 ± 3.0 %", "—"]
    assert "± is the 95 % interval over the test tasks of the single seed" in report
    assert "Where seeds diverged" not in report
    assert "Difference" not in report


def test_all_diverged(tmp_path):
    report = reported(tmp_path, {0.1: [None, None], 0.3: [None, None]}, {0.1: [None, None], 0.3: [None, None]})
    first, best = tables(report)
    assert [row[2] for row in first + best] == ["—"] * 6
    assert "step sizes at which a seed diverged are left out, unless a seed diverged at all of them" in report


def test_the_best_step_size_is_the_best_of_those_with_the_fewest_diverged_seeds(tmp_path):
    report = reported(
        tmp_path,
        {0.1: [0.5, 0.5], 0.3: [0.6, 0.6], 1.0: [0.9, None]},
        {0.1: [0.5, None], 0.3: [0.7, None], 1.0: [None, None]},
    )
    assert [row[1] for row in tables(report)[1]] == ["0.3", "0.3"]
    assert "unless a seed diverged at all of them: then the best of those with the fewest." in report


def test_iterations_to_a_target(tmp_path):
    """Those of seeds that reach it, before they diverge too; a median between two iterations keeps its half."""
    report = reported(tmp_path, {0.1: [0.5, 0.6, 0.7]}, {0.1: [None, 0.85, 0.2]}, target=0.8549)
    (table,) = tables(report)
    assert [row[3] for row in table] == ["never", "25 (2 of 3 seeds)"]
    assert "is at least 85.49 %, looked at every 20 iterations and at the end: the median over the seeds" in report


def test_step_sizes_that_six_digits_do_not_tell_apart(tmp_path):
    """Two runs, two rows, two names."""
    lrs = (0.1, NEAR)
    report = reported(tmp_path, {lr: [0.5, 0.6] for lr in lrs}, {lr: [0.6, 0.7] for lr in lrs})
    assert [row[1] for row in tables(report)[0]] == ["0.1", "0.100000001"] * 2
    assert "γ ∈ {0.1, 0.100000001}" in report
    recipes = [Recipe("omniglot", lr=lr, beta=beta) for lr in lrs for beta in lrs]
    assert len({_place(recipe, tmp_path) for recipe in recipes}) == 4
    assert _place(Recipe("omniglot", lr=0.03, beta=1.0), tmp_path).name == "beta1-zero_lr0.03_seed0"


def test_betas_that_six_digits_do_not_tell_apart_are_two_arms(tmp_path):
    comparison = Comparison(
        Recipe("omniglot"), (0.1, NEAR), ("zero",), (0.1,), 1, 10, 10, 4, 4, (1,), 0.9
    )  # fmt: skip
    outcomes = [Outcome(arm, [(10, 0.5)], (1,), (0.5,), (0.1,), None, tmp_path) for arm in comparison.arms()]
    (table,) = tables(write_report(comparison, outcomes, tmp_path).read_text())
    assert [row[0] for row in table] == [f"momentum, β = {beta}, v₋₁ = 0" for beta in ("0.1", "0.100000001")]


SMALL = Comparison(
    Recipe("sinusoid", shots=2, queries=2, meta_batch=2), (0.1,), ("zero",), (0.01, 0.02), 1, 4, 2, 2, 2, (0, 1), 1.0
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that is finished."""
    path = tmp_path_factory.mktemp("compared") / "run"
    compare(SMALL, path)
    return path


def spoil_outcome(run: Path) -> None:
    (run / "outcome.json").write_text("{")


def spoil_metrics(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "x", *lines[1:]]) + "\n")


def lose_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_outcome, "outcome"),
        (spoil_metrics, "line 2 is not a JSON.* or remove the run's folder to repeat the run"),
        (lose_checkpoints, "has no checkpoint yet"),
    ],
)
def test_a_comparison_that_is_refused_is_left_as_it_was(spoil, message, compared, tmp_path):
    run = Path(shutil.copytree(compared, tmp_path / "run"))
    for each in (run / "runs").iterdir():
        spoil(each)
    before = contents(run)
    with pytest.raises(ValueError, match=message):
        compare(SMALL, run, resume=True)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": [math.nan, math.nan]}, "test results are finite numbers"),
        ({"halfwidth": [math.inf, 1.0]}, "test results are finite numbers"),
        ({"halfwidth": [0.1, -0.1]}, "half-widths >= 0"),
        ({"test": None, "halfwidth": None, "diverged": -4}, "diverges at a step from 0 to 4; got -4"),
        ({"test": None, "halfwidth": None, "diverged": 99}, "diverges at a step from 0 to 4; got 99"),
    ],
)
def test_endings_that_no_run_has(changes, message, compared, tmp_path):
    run = Path(shutil.copytree(compared, tmp_path / "run"))
    file = next((run / "runs").iterdir()) / "outcome.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        compare(SMALL, run, resume=True)


def test_test_losses_that_are_not_finite_have_diverged(compared, tmp_path, monkeypatch):
    """So that the comparison ends, and what it says is of numbers."""
    run = Path(shutil.copytree(compared, tmp_path / "run"))
    ending = next((run / "runs").iterdir()) / "outcome.json"
    ending.unlink()
    of_one = evaluate(SMALL.base.learner(), SMALL.base.sampler("test"), tasks=2, steps=(0, 1))
    spoilt = of_one._replace(mean=(1.0, math.inf))
    monkeypatch.setattr("metamom.experiments.compare.evaluate", lambda *_, **__: spoilt)
    assert "1 of 1" in compare(SMALL, run, resume=True).read_text()
    assert json.loads(ending.read_text()) == {"diverged": 4, "test": None, "halfwidth": None}


@pytest.mark.parametrize("value", [0.1, 1.0, 1e12, 1e-7, 0.1 + 1e-17, 1 / 3, 2**0.5, 123456.0, 1234567.0, 1e300])
def test_the_shortest_name_of_a_number_is_its_own(value):
    assert float(shortest(value)) == value
    assert re.fullmatch(r"[\de.+-]+", shortest(value))
    assert len({shortest(value), shortest(np.nextafter(value, 2 * value))}) == 2


def test_labels_of_an_axis():
    assert distinguishable([1 / 3, 0.5]) == ["0.333333", "0.5"]
    assert distinguishable([0.1, NEAR, 1.0]) == ["0.1", "0.100000001", "1"]
