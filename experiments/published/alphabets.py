"""The 20-way one-shot task of Omniglot's publishers: train on their background alphabets, test within new ones.

    python -m metamom.experiments.published.alphabets --run-dir RUN [--recipe maml] [--resume]

Trains a published recipe on 20-way tasks within the 30 background alphabets, and tests it within the 20 evaluation
alphabets: on random tasks, and on the 20 published runs, on which people were measured. Each with the statistics of the
batch (transductive) and of the support set (inductive; as people, who saw one drawing at a time). No checkpoint is
chosen: the newest weights are tested. `FILE` in the run directory has the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from metamom.common.files import write_atomically
from metamom.common.flag_types import folder, long_count, seed, task_count
from metamom.common.numbers import counted
from metamom.evaluation import Evaluation, evaluate_norms
from metamom.experiments.published.budgets import TEST_TASKS
from metamom.experiments.published.recipes import BUDGETS, OMNIGLOT, OPTIMIZERS, ROWS
from metamom.experiments.published.run import Plan, plan_omniglot
from metamom.tasks import Omniglot, OmniglotRuns
from metamom.tasks.family import TaskFamily
from metamom.training.directory import environment
from metamom.training.interrupts import TrainingInterrupted
from metamom.training.loop import train

FILE = "alphabets.json"
ROW = "20w1s"
PEOPLE = 95.5  # %, of the published runs: Lake, Salakhutdinov and Tenenbaum (2015)


def run(
    wanted: Plan, *, run_dir: str | Path, resume: bool = False, root: str | None = None, tasks: int = TEST_TASKS
) -> dict[str, Evaluation]:
    """Train as planned, on tasks within background alphabets, and test within evaluation alphabets.

    Args:
        wanted: from `metamom.experiments.published.run.plan_omniglot`, of the row `ROW`.
        run_dir: the run's directory.
        resume: continue the run in ``run_dir``, or start it.
        root: where the data is; ``None`` for where it is by default.
        tasks: random test tasks.

    Returns:
        The evaluations, by ``"random tasks, batch"``, ``"published runs, support"`` and so on.

    Raises:
        ValueError: as `metamom.train` does.
    """
    recipe = wanted.recipe.over(wanted.iterations)
    assert recipe.queries is not None
    assert recipe.meta_batch is not None
    ways, shots = ROWS[ROW]
    within = partial(Omniglot, root, ways=ways, shots=shots, within_alphabet=True, seed=recipe.seed)
    learner = recipe.learner()
    optimizer = recipe.make_optimizer(learner)
    train(
        learner,
        optimizer,
        within(split="background", queries=recipe.queries),
        iterations=wanted.iterations,
        meta_batch=recipe.meta_batch,
        schedulers=recipe.schedulers(optimizer),
        run_dir=run_dir,
        resume=resume,
        label="train within alphabets",
    )
    steps = (0, wanted.published.test_steps[ways].value)
    samplers: dict[str, tuple[TaskFamily, int]] = {
        "random tasks": (within(split="evaluation", queries=1), tasks),
        "published runs": (OmniglotRuns(root), 20),
    }
    return {
        f"{name}, {norm}": found
        for name, (sampler, number) in samplers.items()
        for norm, found in evaluate_norms(learner, sampler, tasks=number, steps=steps).items()
    }


def record(wanted: Plan, tested: Mapping[str, Evaluation]) -> dict[str, object]:
    """The run and its evaluations, as JSON values: accuracies in [0, 1] and half-widths of 95 % intervals."""
    return {
        "recipe": wanted.name,
        "optimizer": wanted.optimizer,
        "lr": wanted.recipe.lr,
        "seed": wanted.recipe.seed,
        "iterations": wanted.iterations,
        "meta_batch": wanted.recipe.meta_batch,
        "tested": {
            name: {
                "steps": list(each.steps),
                "mean": list(each.mean),
                "halfwidth": list(each.halfwidth),
                "tasks": each.values.shape[1],
            }
            for name, each in tested.items()
        },
        "environment": environment(),
    }


def main() -> None:
    """Train, test, print and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.published.alphabets",
        description="20-way one-shot tasks within new alphabets.",
        allow_abbrev=False,
    )
    parser.add_argument("--run-dir", type=folder, required=True, help="the run's directory")
    parser.add_argument("--recipe", choices=list(OMNIGLOT), default="maml", help="the method (default: maml)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="the outer one (default: the paper's)")
    parser.add_argument("--budget", choices=BUDGETS, default="short", help="iterations and tasks (default: short)")
    parser.add_argument("--iterations", type=long_count, help="instead of the budget's")
    parser.add_argument("--tasks", type=task_count, default=TEST_TASKS, help="random test tasks (default: 1000)")
    parser.add_argument("--seed", type=seed, default=0, help="of the initial weights and of the tasks (default: 0)")
    parser.add_argument("--data-root", help="where the data is")
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir, or start it")
    given = parser.parse_args()
    try:
        choices = {name: getattr(given, name) for name in ("budget", "optimizer", "iterations", "seed")}
        wanted = plan_omniglot(ROW, given.recipe, **choices)
        tested = run(wanted, run_dir=given.run_dir, resume=given.resume, root=given.data_root, tasks=given.tasks)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except TrainingInterrupted as interrupt:
        raise SystemExit(f"{interrupt} Continue with --resume.") from None
    write_atomically(given.run_dir / FILE, (json.dumps(record(wanted, tested), indent=2) + "\n").encode())
    print(f"{wanted.published.title}, {counted(wanted.iterations, 'iteration')} of {wanted.recipe.meta_batch} tasks")
    for name, each in tested.items():
        shown = f"{100 * each.mean[-1]:.1f} ± {100 * each.halfwidth[-1]:.1f} %"
        print(f"{name:<24} {shown} after {counted(each.steps[-1], 'step')}, {counted(each.values.shape[1], 'task')}")
    print(f"people, published runs:  {PEOPLE:g} %")


if __name__ == "__main__":
    main()
