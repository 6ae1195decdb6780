"""``metamom evaluate``: evaluate a trained meta-learner on fresh tasks."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace

from metamom.cli.flags import add_processes
from metamom.common.flag_types import counts, path, point_count, seed, step_count, task_count
from metamom.distributed import World


def add(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    evaluate = kinds.add_parser("evaluate", help="evaluate a trained meta-learner on fresh tasks", allow_abbrev=False)
    evaluate.set_defaults(run=run)
    evaluate.add_argument("run_path", type=path, metavar="RUN", help="the run directory")
    evaluate.add_argument("--tasks", type=task_count, default=600, help="number of tasks (default: 600)")
    evaluate.add_argument(
        "--steps",
        type=counts(step_count),
        default=(0, 1, 5, 10),
        help="numbers of adaptation steps (default: 0,1,5,10)",
    )
    evaluate.add_argument(
        "--split", default="test", help="train, validation, test, background or evaluation (default: test)"
    )
    evaluate.add_argument(
        "--checkpoint", choices=("best", "newest"), default="best", help="which one (default: best by validation)"
    )
    evaluate.add_argument("--ways", type=task_count, help="classes a task (default: as in training)")
    evaluate.add_argument("--shots", type=point_count, help="support points, a class or task (default: as in training)")
    evaluate.add_argument("--queries", type=point_count, help="query points, a class or task (default: as in training)")
    evaluate.add_argument("--seed", type=seed, help="of the tasks (default: as in training)")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    evaluate.add_argument(
        "--data-root",
        type=path,
        metavar="DIR",
        help="where the data is (default: $METAMOM_DATA, else the user's data folder)",
    )
    add_processes(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace, world: World) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.evaluation import evaluate
    from metamom.experiments.saved import load_run

    saved = load_run(arguments.run_path, arguments.checkpoint, device=arguments.device)
    asked = {
        name: value for name in ("ways", "shots", "queries", "seed") if (value := getattr(arguments, name)) is not None
    }
    if saved.recipe.ways is not None and asked.get("ways", saved.recipe.ways) != saved.recipe.ways:
        raise ValueError(
            f"the learner in {arguments.run_path} tells {saved.recipe.ways} classes apart; got --ways {asked['ways']}. "
            "Train one with that many --ways."
        )
    # tasks of --shots support points, whatever the estimator trained on
    recipe = replace(saved.recipe, **asked, estimator="exact", inner_batches="same")
    if recipe.task == "omniglot" and arguments.split in ("train", "background", "evaluation"):
        warnings.warn(
            f"the learner was trained on split train, and {arguments.split} shares characters with it: this is no "
            "accuracy on new characters. Use validation or test.",
            stacklevel=1,
        )
    sampler = recipe.sampler(arguments.split, root=arguments.data_root)
    result = evaluate(
        saved.learner, sampler, tasks=arguments.tasks, steps=arguments.steps, stream=arguments.split, world=world
    )
    if not world.first:
        return 0
    if arguments.json:
        answer = {"steps": result.steps, "mean": result.mean, "halfwidth": result.halfwidth, "tasks": arguments.tasks}
        print(json.dumps(answer))
        return 0
    kind = f"{recipe.ways}-way {recipe.shots}-shot" if recipe.ways else f"{recipe.shots}-shot"
    print(
        f"{recipe.task} {kind}, split {arguments.split}, {arguments.tasks} tasks, trained for {saved.step} iterations; "
        "statistics of the batch at hand"
    )
    print(f"{'steps':>5}  {result.metric:<8}  ± 95 %")
    for steps, mean, halfwidth in zip(result.steps, result.mean, result.halfwidth, strict=True):
        print(f"{steps:>5}  {mean:<8.4f}  {halfwidth:.4f}")
    return 0
