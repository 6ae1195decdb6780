"""Run a published recipe: train, or resume, then test as its paper did, and record the outcome."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from metamom.common.checks import MOST, check_whole
from metamom.common.did_you_mean import did_you_mean
from metamom.evaluation import evaluate, evaluate_norms
from metamom.experiments.published.budgets import TEST_TASKS, Validations, length, validations_during
from metamom.experiments.published.outcome import WITHIN, Measurement, Outcome, write
from metamom.experiments.published.recipes import (
    BUDGETS,
    OMNIGLOT,
    OPTIMIZERS,
    ROWS,
    SINUSOID,
    STEP_SIZES,
    Budget,
    Published,
)
from metamom.experiments.published.report import sinusoid_figure
from metamom.experiments.recipe_training import train_recipe
from metamom.experiments.recipes import Recipe
from metamom.experiments.saved import SavedRun, load_run
from metamom.tasks import Omniglot
from metamom.training.directory import environment, read_metrics

SINUSOID_STEPS = tuple(range(11))  # of adaptation, as in MAML's figure
TEST_SHOTS = (5, 10)  # of sinusoids
VALIDATION_TASKS = 200  # at most
BETA = 0.1  # of composite momentum


class Plan(NamedTuple):
    """What a run will do.

    Attributes:
        experiment: ``"omniglot"`` or ``"sinusoid"``.
        name: of the recipe.
        published: its record.
        row: of Omniglot, else ``None``.
        budget: ``"short"`` or ``"published"``.
        optimizer: the outer one.
        recipe: the run as plain values.
        iterations: its length.
        validations: during it.
    """

    experiment: str
    name: str
    published: Published
    row: str | None
    budget: Budget
    optimizer: str
    recipe: Recipe
    iterations: int
    validations: Validations


def plan_omniglot(row: str, name: str, **choices: Any) -> Plan:
    """The plan of a run on Omniglot; ``choices`` are those of `plan`.

    Raises:
        ValueError: for an unknown row or recipe.
    """
    if row not in ROWS:
        raise ValueError(f"row must be one of {', '.join(ROWS)}; got {row!r}.")
    ways, shots = ROWS[row]
    return plan("omniglot", name, ways=ways, shots=shots, row=row, **choices)


def plan_sinusoid(shots: int, name: str, **choices: Any) -> Plan:
    """The plan of a run on sinusoids; ``choices`` are those of `plan`.

    Raises:
        ValueError: for shots that no figure has, and an unknown recipe.
    """
    if shots not in TEST_SHOTS:
        raise ValueError(f"shots must be one of {', '.join(map(str, TEST_SHOTS))}; got {shots}.")
    return plan("sinusoid", name, ways=None, shots=shots, row=None, **choices)


def plan(
    experiment: str,
    name: str,
    *,
    ways: int | None,
    shots: int,
    row: str | None,
    budget: Budget = "short",
    optimizer: str | None = None,
    lr: float | None = None,
    seed: int = 0,
    iterations: int | None = None,
    device: str = "cpu",
) -> Plan:
    """What a run of a recipe will do.

    Args:
        experiment: ``"omniglot"`` or ``"sinusoid"``.
        name: of the recipe.
        ways: classes of a task; ``None`` for sinusoids.
        shots: support points that the network is tested with, and trained with unless the recipe says otherwise.
        row: of Omniglot.
        budget: ``"published"``, the paper's, or ``"short"``.
        optimizer: ``"adam"``, ``"sgd"`` (plain meta-SGD, β = 1) or ``"composite"`` (momentum, β = 0.1); ``None`` for
            the paper's.
        lr: its step size; ``None`` for the recipe's or, of another optimizer, that of `STEP_SIZES`.
        seed: of the weights and tasks.
        iterations: instead of the budget's.
        device: where to compute.

    Raises:
        ValueError: for an unknown name.
    """
    known = OMNIGLOT if experiment == "omniglot" else SINUSOID
    for what, given, names in (("recipe", name, known), ("budget", budget, BUDGETS)):
        if given not in names:
            near = did_you_mean([given], list(names))
            raise ValueError(f"{what} must be one of {', '.join(names)}; got {given!r}{near or '.'}")
    published = known[name]
    options = published.options(ways)
    options = {"shots": shots, **options}
    options = {"queries": options["shots"], **options}
    planned = length(published, budget, ways, options)
    total = planned.iterations if iterations is None else check_whole("iterations", iterations, 1, MOST)
    options |= {"meta_batch": planned.meta_batch, "schedule": planned.schedule}
    options |= {name: round(share.value * total) for name, share in published.shares.items()}
    chosen = optimizer or str(options["optimizer"])
    options |= _outer(experiment, chosen, options, lr)
    recipe = Recipe(task=experiment, ways=ways, seed=seed, compile="auto", device=device, **options)
    during = validations_during(published, ways, options, total, VALIDATION_TASKS)
    return Plan(experiment, name, published, row, budget, chosen, recipe, total, during)


def _outer(experiment: str, chosen: str, options: dict[str, Any], lr: float | None) -> dict[str, Any]:
    """The options of the outer optimizer."""
    if chosen not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {chosen!r}.")
    if chosen == "adam":
        return {"optimizer": "adam", "lr": options["lr"] if lr is None else lr}
    size = STEP_SIZES[experiment][chosen].value if lr is None else lr
    return {"optimizer": "momentum", "lr": size, "beta": 1.0 if chosen == "sgd" else BETA}


def reproduce(
    wanted: Plan, *, run_dir: str | Path, resume: bool = False, root: str | None = None, tasks: int = TEST_TASKS
) -> Outcome:
    """Train as planned, or go on where an interrupted run stopped, then test and write `published.json`.

    The run directory is one of ``metamom train``, which `metamom.load`, ``metamom evaluate`` and ``metamom report``
    read. A run on sinusoids also gets ``figures/published.png``, its error against adaptation steps.

    Args:
        wanted: from `plan_omniglot` or `plan_sinusoid`.
        run_dir: the run's directory.
        resume: continue the run in ``run_dir``, or start it. A finished run is only tested.
        root: where the data is; ``None`` for where it is by default.
        tasks: test tasks of each evaluation.

    Raises:
        ValueError: as `metamom.train` does.
    """
    every, validation_tasks = wanted.validations
    options = {
        "iterations": wanted.iterations,
        "run_dir": run_dir,
        "resume": resume,
        "evaluate_every": every,
        "checkpoint_every": min(every, 500),
        "evaluate_tasks": validation_tasks,
    }
    train_recipe(wanted.recipe, options, root=root)
    run = load_run(run_dir, device=wanted.recipe.device)
    recipe = wanted.recipe
    assert recipe.shots is not None
    assert recipe.lr is not None
    assert recipe.meta_batch is not None
    outcome = Outcome(
        wanted.experiment,
        wanted.name,
        wanted.row,
        recipe.shots,
        wanted.budget,
        wanted.optimizer,
        recipe.lr,
        recipe.seed,
        wanted.iterations,
        recipe.meta_batch,
        run.step,
        float(read_metrics(run_dir)[-1]["seconds"]) / 60,
        tested(run, wanted, root=root, tasks=tasks),
        wanted.published.sources(recipe.ways),
        environment(),
    )
    write(outcome, run_dir)
    if outcome.row is None:
        sinusoid_figure(Path(run_dir) / "figures" / "published.png", [outcome])
    return outcome


def tested(run: SavedRun, wanted: Plan, *, root: str | None, tasks: int) -> tuple[Measurement, ...]:
    """The evaluations on test tasks: on Omniglot with both kinds of statistics, also within an alphabet where the test
    characters allow it; on sinusoids with 5 and 10 points.
    """
    # tasks of `shots` support points, whatever the estimator trained on
    recipe = replace(run.recipe, estimator="exact", inner_batches="same")
    if wanted.row is None:
        found = []
        for shots in TEST_SHOTS:
            sampler = replace(recipe, shots=shots).sampler("test")
            found.append((f"{shots} shots", evaluate(run.learner, sampler, tasks=tasks, steps=SINUSOID_STEPS)))
        return tuple(Measurement.of(*each) for each in found)
    ways = ROWS[wanted.row].ways
    steps = tuple(sorted({0, wanted.recipe.inner_steps, wanted.published.test_steps[ways].value}))
    samplers = {"": recipe.sampler("test", root=root)}
    if Omniglot.has_alphabets("test", ways):
        samplers[WITHIN] = replace(recipe, within_alphabet=True).sampler("test", root=root)
    return tuple(
        Measurement.of(f"{norm}{within}", found)
        for within, sampler in samplers.items()
        for norm, found in evaluate_norms(run.learner, sampler, tasks=tasks, steps=steps).items()
    )
