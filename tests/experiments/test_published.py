"""Published recipes: their records, budgets, runs, tables and figure."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import metamom
from metamom import cli
from metamom.common.options import declared
from metamom.experiments.options import RecipeOptions
from metamom.experiments.published import __main__ as collect
from metamom.experiments.published import alphabets, report
from metamom.experiments.published import run as published_run
from metamom.experiments.published.budgets import HOUR, SHORT_SECONDS, TEST_TASKS, VALIDATING, cost
from metamom.experiments.published.curves import labels, validations
from metamom.experiments.published.outcome import FILE, Measurement, Outcome, read_all, write
from metamom.experiments.published.recipes import BUDGETS, OMNIGLOT, OPTIMIZERS, ROWS, SINUSOID
from metamom.experiments.published.record import WITHIN_ALPHABET
from metamom.experiments.published.run import Plan, plan_omniglot, plan_sinusoid, reproduce
from metamom.nets import Conv4
from metamom.tasks import Omniglot, OmniglotRuns

pytestmark = pytest.mark.usefixtures("few_validation_tasks")
KNOWN = {each.name for each in declared(RecipeOptions)}
T_2 = 4.302653  # the 97.5 % quantile of Student's t with two degrees of freedom


def every_plan() -> list[Plan]:
    plans = []
    for budget, optimizer in itertools.product(BUDGETS, OPTIMIZERS):
        choices = {"budget": budget, "optimizer": optimizer}
        plans += [plan_omniglot(row, name, **choices) for row in ROWS for name in OMNIGLOT]
        plans += [plan_sinusoid(shots, name, **choices) for shots in (5, 10) for name in SINUSOID]
    return plans


def test_every_setting_has_a_source_and_is_an_option():
    for published, ways in [(p, w) for p in OMNIGLOT.values() for w in (5, 20)] + [
        (p, None) for p in SINUSOID.values()
    ]:
        sources = published.sources(ways)
        assert set(published.options(ways)) <= KNOWN
        assert {*published.options(ways), "iterations", "meta_batch"} <= set(sources)
        assert all(len(source) > 10 for source in sources.values())


def test_every_plan_is_a_run():
    for each in every_plan():
        assert each.iterations >= 1
        assert each.recipe.meta_batch is not None
        assert each.recipe.optimizer == ("adam" if each.optimizer == "adam" else "momentum")
        assert each.recipe.beta == (1.0 if each.optimizer == "sgd" else 0.1)
        assert each.recipe.queries == (1 if each.name == "maml++" and each.row else each.recipe.shots)


@pytest.mark.parametrize(
    ("row", "inner_lr", "inner_steps", "meta_batch", "shots", "short"),
    [
        ("5w1s", 0.4, 1, 32, 1, (20_000, 16)),
        ("5w5s", 0.4, 1, 32, 5, (4_000, 16)),
        ("20w1s", 0.1, 5, 16, 1, (2_700, 8)),
        ("20w5s", 0.1, 5, 16, 5, (540, 8)),
    ],
)
def test_maml_on_omniglot(row, inner_lr, inner_steps, meta_batch, shots, short):
    """The appendix of the paper, and the budget for an hour."""
    long = plan_omniglot(row, "maml", budget="published")
    found = long.recipe
    assert (found.inner_lr, found.inner_steps, found.meta_batch, found.shots) == (
        inner_lr,
        inner_steps,
        meta_batch,
        shots,
    )
    assert (long.iterations, found.lr, found.schedule, long.optimizer) == (60_000, 0.001, "constant", "adam")
    brief = plan_omniglot(row, "maml")
    assert (brief.iterations, brief.recipe.meta_batch) == short
    assert brief.recipe.schedule == "cosine"
    assert replace(brief.recipe, meta_batch=meta_batch, schedule="constant") == found


def test_short_budgets_take_an_hour(monkeypatch):
    """Training, validations and tests together; what the second core does is a reserve."""
    monkeypatch.setattr(published_run, "VALIDATION_TASKS", 200)
    for each in filter(lambda plan: plan.row is not None and plan.budget == "short", every_plan()):
        recipe = each.recipe
        options = {name: getattr(recipe, name) for name in ("shots", "queries", "inner_steps", "meta_batch")}
        of_task = cost(each.published, recipe.ways, options)
        training = of_task.trained * each.iterations * recipe.meta_batch
        every, tasks = each.validations
        validating = of_task.evaluated * each.iterations // every * tasks
        testing = of_task.evaluated * TEST_TASKS * (2 if recipe.ways in WITHIN_ALPHABET else 1)
        assert training + validating + testing <= HOUR
        assert validating <= 1.1 * VALIDATING * training  # whole numbers of tasks and iterations
        assert 10 <= each.iterations // every <= 40
        at_most = min(SHORT_SECONDS, (HOUR - testing) / (1 + VALIDATING))
        assert 0.9 * at_most < training <= at_most or each.iterations == each.published.iterations.value


def test_rows_are_tested_within_alphabets_where_there_are_any():
    assert {ways for ways, _ in ROWS.values() if Omniglot.has_alphabets("test", ways)} == set(WITHIN_ALPHABET)


@pytest.mark.parametrize(
    ("row", "recipe", "iterations", "expected"),
    [
        ("5w1s", "maml", None, (500, 200)),
        ("20w1s", "imaml", None, (54, 86)),  # 200 tasks would take two minutes, 40 times
        ("5w5s", "maml", 4, (1, 10)),
        ("20w5s", "imaml", 4, (1, 10)),
    ],
)
def test_validations_do_not_take_long(row, recipe, iterations, expected, monkeypatch):
    monkeypatch.setattr(published_run, "VALIDATION_TASKS", 200)
    assert plan_omniglot(row, recipe, iterations=iterations).validations == expected


def test_parts_of_maml_plus_plus():
    """Losses of all steps in 10 of 150 epochs, no second derivatives in 50 of them."""
    long = plan_omniglot("20w1s", "maml++", budget="published").recipe
    assert (long.multi_step, long.first_order_until, long.schedule) == (5_000, 25_000, "cosine")
    assert (long.learn_inner_lr, long.inner_steps, long.inner_lr, long.meta_batch) == ("tensor-step", 5, 0.1, 8)
    assert long.step_norms
    brief = plan_sinusoid(5, "maml++", iterations=30).recipe
    assert (brief.multi_step, brief.first_order_until, brief.step_norms) == (2, None, None)
    assert brief.positive_inner_lr


def test_maml_on_sinusoids_trains_one_network():
    five, ten = (plan_sinusoid(shots, "maml", budget="published") for shots in (5, 10))
    assert five == ten
    assert (ten.iterations, ten.recipe.meta_batch, ten.recipe.inner_lr, ten.recipe.lr) == (70_000, 25, 0.01, 0.001)
    assert plan_sinusoid(5, "meta-sgd").recipe.shots == 5
    assert plan_sinusoid(10, "maml", optimizer="composite", lr=0.3, seed=4).recipe.lr == 0.3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plan_omniglot("5w2s", "maml"), "row must be one of 5w1s, 5w5s, 20w1s, 20w5s; got '5w2s'"),
        (lambda: plan_omniglot("5w1s", "mamle"), "did you mean maml?"),
        (lambda: plan_sinusoid(7, "maml"), "shots must be one of 5, 10; got 7"),
        (lambda: plan_sinusoid(5, "anil"), "recipe must be one of maml, fomaml, meta-sgd, maml++; got 'anil'"),
        (lambda: plan_sinusoid(5, "maml", budget="long"), "budget must be one of short, published"),
        (lambda: plan_sinusoid(5, "maml", optimizer="lion"), "optimizer must be one of adam, sgd, composite"),
        (lambda: plan_sinusoid(5, "maml", iterations=0), "iterations must be >= 1; got 0"),
        (lambda: list(read_all("no-folder")), "no-folder is not a folder with runs"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_validation_tasks) -> Path:
    run = tmp_path_factory.mktemp("published") / "run"
    reproduce(plan_sinusoid(10, "maml", iterations=4, seed=1), run_dir=run, tasks=6)
    return run


def test_a_run_is_an_ordinary_run(finished):
    ((path, outcome),) = read_all(finished.parent)
    assert path == finished
    run = metamom.load(finished)
    assert outcome.checkpoint == run.step
    assert (outcome.iterations, outcome.meta_batch, outcome.seed, outcome.optimizer) == (4, 25, 1, "adam")
    for shots in (5, 10):
        again = metamom.evaluate(run.learner, run.sampler(shots=shots), tasks=6, steps=tuple(range(11)))
        assert outcome.named(f"{shots} shots").mean == pytest.approx(again.mean, rel=1e-6)
    assert cli.main(["evaluate", str(finished), "--tasks", "4"]) == 0
    assert outcome.sources["iterations"].startswith("the authors' code")
    assert (finished / "figures" / "published.png").stat().st_size > 10_000


def test_resumed_as_in_one_go(finished, tmp_path):
    parts = tmp_path / "parts"
    reproduce(plan_sinusoid(10, "maml", iterations=2, seed=1), run_dir=parts, resume=True, tasks=4)
    with pytest.raises(ValueError, match="resume"):
        reproduce(plan_sinusoid(10, "maml", iterations=4, seed=1), run_dir=parts, tasks=4)
    with pytest.raises(ValueError, match="lr"):
        reproduce(plan_sinusoid(10, "maml", iterations=4, seed=1, lr=0.5), run_dir=parts, resume=True, tasks=4)
    there = reproduce(plan_sinusoid(10, "maml", iterations=4, seed=1), run_dir=parts, resume=True, tasks=6)
    ((_, straight),) = read_all(finished.parent)
    assert there.tested == straight.tested
    weights = [metamom.load(each, "newest").learner.state_dict() for each in (parts, finished)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_command(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["reproduce", "sinusoid", "--shots", "5", "--recipe", "meta-sgd", "--optimizer", "composite"]
    words += ["--iterations", "2", "--tasks", "4", "--run-dir", str(run), "--resume"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        "Meta-SGD on sinusoids, trained with 5 shots: 2 iterations of 25 tasks with momentum, γ = 0.1"
    )
    assert said[2].split() == ["steps", "5", "shots", "10", "shots", "published"]
    assert len(said) == 15
    assert said[4].endswith("0.46 (5 shots)")
    outcome = json.loads((run / FILE).read_text(encoding="utf-8"))
    assert outcome["environment"]["torch"] == torch.__version__
    assert cli.main([*words[:-1], "--seed", "1"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "omniglot", "--row", "6w1s", "--run-dir", str(run)])


def test_omniglot_with_both_kinds_of_statistics(data_root, tmp_path, capsys):
    words = ["reproduce", "omniglot", "--row", "5w1s", "--recipe", "anil", "--iterations", "1", "--tasks", "4"]
    assert cli.main([*words, "--run-dir", str(tmp_path / "run"), "--data-root", str(data_root)]) == 0
    said = capsys.readouterr().out
    assert "ANIL on Omniglot, 5-way 1-shot: 1 iteration of 16 tasks" in said
    ((_, outcome),) = read_all(tmp_path)
    run = metamom.load(tmp_path / "run")
    sampler = run.sampler(root=str(data_root))
    assert run.learner.adapted == ("head.weight", "head.bias")
    for norm in ("batch", "support"):
        again = metamom.evaluate(run.learner, sampler, tasks=4, steps=(0, 1, 3), norm=norm)
        assert outcome.named(norm).mean == pytest.approx(again.mean)
        assert outcome.named(norm).steps == (0, 1, 3)
        within = run.sampler(root=str(data_root), within_alphabet=True)
        again = metamom.evaluate(run.learner, within, tasks=4, steps=(0, 1, 3), norm=norm)
        assert outcome.named(f"{norm}, within an alphabet").mean == pytest.approx(again.mean)
    assert "tasks within an alphabet" in said


def test_within_new_alphabets(data_root, tmp_path, monkeypatch, capsys):
    words = ["alphabets", "--run-dir", str(tmp_path), "--data-root", str(data_root), "--recipe", "anil"]
    monkeypatch.setattr("sys.argv", [*words, "--iterations", "1", "--tasks", "3"])
    alphabets.main()
    assert "published runs, support" in capsys.readouterr().out
    tested = json.loads((tmp_path / alphabets.FILE).read_text(encoding="utf-8"))["tested"]
    learner = metamom.load(tmp_path, model=Conv4(20)).learner
    runs = OmniglotRuns(data_root)
    for norm in ("batch", "support"):
        again = metamom.evaluate(learner, runs, tasks=20, steps=(0, 5), norm=norm)
        assert tested[f"published runs, {norm}"]["mean"] == pytest.approx(again.mean)
        assert tested[f"random tasks, {norm}"]["tasks"] == 3
    monkeypatch.setattr("sys.argv", [*words, "--iterations", "1"])
    with pytest.raises(SystemExit, match="2"):
        alphabets.main()
    assert "already holds a run" in capsys.readouterr().err


def made(seed: int, accuracy: float, **changes: object) -> Outcome:
    """An outcome on Omniglot with a transductive accuracy after three steps; an inductive one of 0.1 less."""
    steps = (0, 1, 3)
    tested = tuple(
        Measurement(name, steps, (0.2, 0.3, accuracy - less), (0.01,) * 3, 1000, "accuracy", (0,) * 3, (None,) * 3)
        for name, less in (("batch", 0.0), ("support", 0.1))
    )
    return replace(
        Outcome("omniglot", "maml", "5w1s", 1, "short", "adam", 0.001, seed, 20_000, 16, 20_000, 30.0, tested),
        **changes,
    )


def on_sinusoids(seed: int, recipe: str, shots: int, error: float) -> Outcome:
    errors = (error,) * 11
    measured = (tuple(range(11)), errors, (0.01,) * 11, 1000, "loss", (0,) * 11, errors)
    tested = tuple(Measurement(f"{shots} shots", *measured) for shots in (5, 10))
    return Outcome("sinusoid", recipe, None, shots, "published", "adam", 0.001, seed, 70_000, 25, 70_000, 5.0, tested)


def test_tasks_that_diverge_are_counted_and_left_out():
    values = torch.tensor([[1.0, 2.0, 3.0, 100.0], [1.0, 3.0, 101.0, math.nan]], dtype=torch.float64)
    result = metamom.evaluation.Evaluation((0, 1), tuple(values.mean(1).tolist()), (0.0, 0.0), values, "loss", 0.95)
    found = Measurement.of("5 shots", result)
    assert found.diverged == (0, 2)
    assert found.mean == (26.5, 2.0)
    assert found.halfwidth[1] == pytest.approx(1.959964 * math.sqrt(2) / math.sqrt(2))
    assert found.mean_of_all == (26.5, None)
    outcome = replace(on_sinusoids(0, "maml", 10, 0.4), tested=(found, found))
    said = report.lines(outcome)
    assert said[4].split("  ")[-2:] == ["2.000 ± 1.960, 2 diverged", "0.35 (10 shots), 0.7 (5 shots)"]
    assert "error above 100" in said[5]


def test_runs_of_different_lengths_have_names_of_their_own():
    assert labels([made(0, 0.9), made(1, 0.9)]) == ["MAML, Adam 0.001"] * 2
    found = labels([made(0, 0.9), made(0, 0.9, iterations=4_000), made(0, 0.9, optimizer="sgd", lr=0.5)])
    first, second = (f"MAML, Adam 0.001, {length} iterations" for length in ("20,000", "4,000"))
    assert found == [first, second, "MAML, plain meta-SGD 0.5"]


def test_tables_over_seeds():
    runs = [made(seed, accuracy) for seed, accuracy in enumerate((0.96, 0.97, 0.98))]
    *_, line = report.omniglot_table([*runs, on_sinusoids(0, "maml", 10, 0.4)])
    half = T_2 * 1.0 / math.sqrt(3)
    assert line == (
        f"| 5w1s | MAML, 3 steps | short: 20,000 × 16 | Adam, 0.001 | 3 | 97.00 ± {half:.2f} | 87.00 ± {half:.2f} | "
        " |  | 98.7 ± 0.4 | 30 |"
    )
    assert len(report.omniglot_table([*runs, made(0, 0.9, optimizer="composite", lr=0.5)])) == 4
    *_, alone = report.omniglot_table([runs[0]])
    assert "| 1 | 96.00 ± 1.00 | 86.00 ± 1.00 |  |  |" in alone
    within = tuple(replace(test, name=f"{test.name}, within an alphabet") for test in runs[1].tested)
    *_, line = report.omniglot_table([replace(runs[0], tested=runs[0].tested + within)])
    assert "| 96.00 ± 1.00 | 86.00 ± 1.00 | 97.00 ± 1.00 | 87.00 ± 1.00 |" in line
    assert "98.7 ± 0.4" in report.lines(runs[0])[-2]
    said = report.lines(replace(runs[0], iterations=1, checkpoint=1))
    assert ": 1 iteration of 16 tasks" in said[0]
    assert said[-1].endswith("the checkpoint after 1 iteration)")


def test_networks_of_five_and_ten_points():
    """MAML's one network stands under both; Meta-SGD's under the shots that it was trained with."""
    runs = [on_sinusoids(0, "maml", 10, 0.4), on_sinusoids(0, "meta-sgd", 5, 0.3), on_sinusoids(0, "meta-sgd", 10, 0.2)]
    rows = [line.split(" | ") for line in report.sinusoid_table(runs)[2:]]
    assert [(row[0], row[1], row[5]) for row in rows] == [
        ("| 5 points", "MAML", "0.400 ± 0.010"),
        ("| 5 points", "Meta-SGD", "0.300 ± 0.010"),
        ("| 10 points", "MAML", "0.400 ± 0.010"),
        ("| 10 points", "Meta-SGD", "0.200 ± 0.010"),
    ]


def test_a_collection(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "runs" / "a")
    (tmp_path / "runs" / "b").mkdir()
    write(made(0, 0.96), tmp_path / "runs" / "b")
    lines = [{"step": step, "validation": value} for step, value in ((0, math.nan), (4, 0.5), (9, 0.9))]
    (tmp_path / "runs" / "b" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert validations(tmp_path / "runs" / "b", 16) == ([0.08, 0.16], pytest.approx([50.0, 10.0]))
    command = ["published", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    collect.main()
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "2 runs" in text
    for name in ("sinusoid", "omniglot"):
        assert (tmp_path / "out" / "figures" / f"{name}-published.png").stat().st_size > 10_000
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["published", str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="2"):
        collect.main()
    assert "no finished run" in capsys.readouterr().err


def test_the_page_has_the_figures_and_budgets():
    page = Path(__file__).parents[2] / "docs" / "results" / "omniglot.md"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text(encoding="utf-8").splitlines()]
    for method in OMNIGLOT.values():
        assert [method.title, *(str(method.figures.get(row, "")) for row in ROWS)] in rows
    for row in ROWS:
        long, short = (plan_omniglot(row, "maml", budget=budget) for budget in ("published", "short"))
        (found,) = [cells for cells in rows if cells[:1] == [f"`{row}`"]]
        steps = OMNIGLOT["maml"].test_steps[long.recipe.ways].value
        assert found[1:3] == [f"{long.recipe.inner_steps}, {steps}", str(long.recipe.inner_lr)]
        budgets = [f"{each.iterations:,} × {each.recipe.meta_batch}" for each in (long, short)]
        assert [cell.removesuffix(" tasks") for cell in found[3:]] == budgets
