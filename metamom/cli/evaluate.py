"""``metamom evaluate``: evaluate a trained meta-learner on fresh tasks."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from metamom.cli.flags import (
    add_checkpoint,
    add_data_root,
    add_device,
    add_model,
    add_processes,
    add_steps,
    flag,
    switch,
)
from metamom.cli.parser import Parser
from metamom.common.choices import NORMS, STATISTICS_OF
from metamom.common.flag_types import path, point_count, seed, task_count
from metamom.experiments.families import FAMILIES

if TYPE_CHECKING:
    from metamom.distributed import World
    from metamom.loading import LoadedRun


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    leaf = kinds.add_parser(
        "evaluate",
        help="evaluate a trained meta-learner on fresh tasks",
        usage="%(prog)s RUN [options]",
        examples=("metamom evaluate runs/sine", "metamom evaluate runs/omni --split test --steps 0,1,5,10 --json"),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    task = leaf.add_argument_group("task")
    flag(task, "--tasks", "number of tasks", type=task_count, default=600)
    *splits, last = dict.fromkeys(split for family in FAMILIES.values() for split in family.splits)
    flag(task, "--split", f"{', '.join(splits)} or {last}", default="test")
    flag(task, "--ways", "classes a task", "as in training", type=task_count)
    flag(task, "--shots", "support points, a class or task", "as in training", type=point_count)
    flag(task, "--queries", "query points, a class or task", "as in training", type=point_count)
    flag(task, "--seed", "of the tasks", "as in training", type=seed)
    add_data_root(task)
    learner = leaf.add_argument_group("learner")
    add_steps(learner)
    flag(
        learner,
        "--norm",
        "statistics that normalise queries: of the query set (batch), of the task's support set (support), or the "
        "model's running ones (frozen)",
        "as in training",
        choices=NORMS,
    )
    own = leaf.add_argument_group("run")
    own.add_argument("run_path", type=path, metavar="RUN", help="the run directory")
    add_checkpoint(own)
    add_model(own)
    add_device(own, default="cpu")
    switch(own, "--json", "print one JSON object and nothing else")
    add_processes(leaf.add_argument_group("processes"))


def run(arguments: argparse.Namespace, world: World) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.evaluation import evaluate
    from metamom.loading import load

    run = load(arguments.run_path, arguments.checkpoint, arguments.model, device=arguments.device)
    asked = {
        name: value for name in ("ways", "shots", "queries", "seed") if (value := getattr(arguments, name)) is not None
    }
    _check(run, arguments, asked)
    result = evaluate(
        run.learner,
        run.sampler(arguments.split, root=arguments.data_root, **asked),
        tasks=arguments.tasks,
        steps=arguments.steps,
        stream=arguments.split,
        world=world,
        norm=arguments.norm,
    )
    if not world.first:
        return 0
    if arguments.json:
        answer = {"steps": result.steps, "mean": result.mean, "halfwidth": result.halfwidth, "tasks": arguments.tasks}
        print(json.dumps(answer if result.norm == "batch" else {**answer, "norm": result.norm}))
        return 0
    print(
        f"{_tasks(run, asked)}, split {arguments.split}, {arguments.tasks} tasks, trained for {run.step} iterations; "
        + STATISTICS_OF[result.norm]
    )
    print(f"{'steps':>5}  {result.metric:<8}  ± 95 %")
    for steps, mean, halfwidth in zip(result.steps, result.mean, result.halfwidth, strict=True):
        print(f"{steps:>5}  {mean:<8.4f}  {halfwidth:.4f}")
    return 0


def _check(run: LoadedRun, arguments: argparse.Namespace, asked: dict[str, Any]) -> None:
    """Refuse tasks and statistics that the learner cannot have, and warn of classes that it has seen."""
    recipe = run.recipe
    if recipe is None:
        return
    if recipe.ways is not None and asked.get("ways", recipe.ways) != recipe.ways:
        raise ValueError(
            f"the learner in {arguments.run_path} distinguishes {recipe.ways} classes; got "
            f"--ways {asked['ways']}. Train one with that many --ways."
        )
    if arguments.norm is not None:
        recipe = replace(recipe, norm=arguments.norm)  # which checks it
    classes = recipe.family.classes
    if classes is not None and arguments.split in classes.seen_in:
        unseen = " or ".join(split for split in recipe.family.splits if split not in classes.seen_in)
        warnings.warn(
            f"the learner was trained on split train, and {arguments.split} shares {classes.noun} with it: this is no "
            f"accuracy on new {classes.noun}. Use {unseen}.",
            stacklevel=1,
        )


def _tasks(run: LoadedRun, asked: dict[str, Any]) -> str:
    """The tasks of an evaluation in a few words: ``omniglot 5-way 1-shot``."""
    if run.recipe is not None:
        name, trained = run.recipe.task, run.recipe.settings()
    else:
        from metamom.experiments.python_runs import task_family

        trained = task_family(run.settings)
        name = str(trained["family"])
    ways, shots = (asked.get(each, trained.get(each)) for each in ("ways", "shots"))
    return f"{name} {ways}-way {shots}-shot" if ways else f"{name} {shots}-shot"
