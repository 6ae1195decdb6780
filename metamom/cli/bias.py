"""``metamom bias``: measure the bias of a meta-gradient."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from metamom.cli.flags import add_checkpoint, add_data_root, add_device, add_own_options, flag, given_flags, switch
from metamom.cli.parser import Parser
from metamom.common.flag_types import counts, number, path, point_count, seed, step_count, task_count
from metamom.common.numbers import plural
from metamom.experiments.families import FAMILIES
from metamom.experiments.families.family import USUAL_BIAS_PLAN
from metamom.experiments.options import options_of_some_families
from metamom.maml.estimators import memoryless_estimators, proximal_estimators

if TYPE_CHECKING:
    from metamom.batch import Sampler
    from metamom.experiments.recipes import Recipe
    from metamom.maml.learner import MAML


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    what = "|".join(["RUN", *FAMILIES])
    leaf = kinds.add_parser(
        "bias",
        help="measure a meta-gradient's bias",
        usage=f"%(prog)s {what} [options]",
        specs=True,
        examples=(
            "metamom bias sinusoid --inner-batch 1,2,5,10,20 --out runs/bias",
            "metamom bias runs/sine --bias topk:5% --json",
        ),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    leaf.elsewhere["--shots"] = "the sizes of the inner batches are in shots: --inner-batch M,M,..."
    leaf.elsewhere["--split"] = "bias is measured on the training tasks"
    task = leaf.add_argument_group("task")
    task.add_argument(
        "what",
        type=path,
        metavar=what,
        help="a run directory, or tasks, with a learner as training starts with",
    )
    flag(
        task,
        "--inner-batch",
        "inner batch sizes in shots",
        _sizes(),
        type=counts(point_count),
        metavar="M,M,...",
    )
    ways = "; ".join(f"{each.defaults.ways} for {name}" for name, each in FAMILIES.items() if each.classes is not None)
    flag(task, "--ways", "classes a task, without a RUN", ways, type=task_count)
    flag(task, "--queries", "query points, a class or task", _queries(), type=point_count)
    flag(task, "--tasks", "number of tasks in all", _tasks(), type=task_count)
    add_data_root(task)
    add_own_options(task, FAMILIES, but="model")
    _add_learner(leaf.add_argument_group("learner"))
    operators = leaf.add_argument_group("bias")
    flag(operators, "--bias", "operator, see below", "as in training, none", metavar="SPEC")
    own = leaf.add_argument_group("run")
    flag(own, "--seed", "of the tasks and, without a RUN, of the weights", "0, or RUN's", type=seed)
    add_device(own)
    flag(
        own,
        "--out",
        "where bias.md and figures/bias.png go",
        "RUN, or a new folder in runs/",
        type=path,
        metavar="DIR",
    )
    switch(own, "--json", "print one JSON object and nothing else; write nothing without --out")


def _add_learner(learner: argparse._ArgumentGroup) -> None:
    flag(
        learner,
        "--estimator",
        ", ".join(memoryless_estimators()),
        "as in training, exact",
        choices=memoryless_estimators(),
        metavar="NAME",
    )
    flag(
        learner,
        "--proximal",
        f"strength λ, or more settings, of {' and '.join(proximal_estimators())}",
        "as in training, 2",
        metavar="SPEC",
    )
    inner = "; ".join(f"{family.defaults.inner_lr} for {name}" for name, family in FAMILIES.items())
    flag(learner, "--inner-lr", "inner step size, without a RUN", inner, type=number)
    flag(learner, "--inner-steps", "inner steps, without a RUN", 1, type=step_count)
    flag(
        learner,
        "--model",
        "the network: for images, conv4, conv4-64, resnet12 or PACKAGE.MODULE:CALLABLE; for a RUN from Python, the "
        "callable that makes it",
        "conv4; for a RUN, its own",
        metavar="NAME",
    )
    add_checkpoint(learner)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.common.allocator import keep_freed_memory
    from metamom.experiments import bias_report
    from metamom.experiments.recipes import Recipe

    keep_freed_memory()
    what, root = arguments.what, arguments.data_root or arguments.root
    sampler = None
    if what in FAMILIES:
        recipe = _with_few_queries(Recipe(task=what, **given_flags(arguments)), arguments.queries)
        learner = recipe.learner()
        title = f"{what}, weights as drawn"
    else:
        recipe, learner, title, sampler = _of_run(arguments, root)
    where = arguments.out
    if where is None and not arguments.json:
        where = f"runs/bias-{what}-{time.strftime('%Y%m%d-%H%M%S')}" if what in FAMILIES else what
    if where is not None and Path(where).exists() and not Path(where).is_dir():
        raise ValueError(f"{where} is a file; the report needs a directory (--out).")
    found = bias_report.measure_recipe(
        recipe,
        learner,
        inner_batches=arguments.inner_batch,
        tasks=arguments.tasks,
        root=root,
        sampler=sampler,
    )
    report = None if where is None else bias_report.write(found, Path(where), title)
    if arguments.json:
        print(json.dumps(bias_report.as_json(found)))
        return 0
    print("\n".join([title, *bias_report.summary(found), "", bias_report.table(found), "", *bias_report.slopes(found)]))
    print(f"report: {report}")
    return 0


def _of_run(
    arguments: argparse.Namespace, root: str | None
) -> tuple[Recipe, MAML, str, Callable[[Recipe, str | None], Sampler] | None]:
    """The recipe and the learner of a run, a title, and what makes its tasks if it is from Python."""
    from metamom.experiments.python_tasks import recipe_of_tasks, tasks_of
    from metamom.loading import load
    from metamom.maml.implicit.proximal import check_proximal

    what = arguments.what
    decided = {"ways", "inner_lr", "inner_steps", *options_of_some_families()} - {"root", "model", "on_broken"}
    fixed = sorted(name for name in decided if getattr(arguments, name, None) is not None)
    if fixed:
        raise ValueError(
            f"--{fixed[0].replace('_', '-')} belongs to the learner that the run trained; give it with a task "
            f"({', '.join(FAMILIES)}) in place of a run."
        )
    run = load(what, arguments.checkpoint, arguments.model, device=arguments.device or "cpu")
    trained = recipe_of_tasks(run.settings, root=root) if run.recipe is None else run.recipe
    if trained is None:
        raise ValueError(
            f"the run in {what} was made in Python with tasks that are none of {', '.join(FAMILIES)}: measure it "
            "there, metamom.diagnostics.measure(run.learner, sampler), with run = metamom.load(RUN)."
        )
    asked = {
        name: value
        for name in ("estimator", "proximal", "bias", "seed", "queries", "on_broken")
        if (value := getattr(arguments, name)) is not None
    }
    recipe = _with_few_queries(replace(trained, **asked), arguments.queries)
    learner = run.learner.like(estimator=recipe.estimator)
    if arguments.proximal is not None:
        check_proximal(recipe.estimator, arguments.proximal, learner.inner_steps, learned=False)
        learner.proximal = arguments.proximal
    sampler = partial(tasks_of, run.settings) if run.recipe is None else None
    return recipe, learner, f"{recipe.task}, after {run.step} {plural(run.step, 'iteration')}", sampler


def _with_few_queries(recipe: Recipe, asked: int | None) -> Recipe:
    """The recipe with at most the plan's queries of a class, unless some were asked for: a class may have 20 images."""
    if asked is not None or recipe.family.classes is None or recipe.queries is None:
        return recipe
    return replace(recipe, queries=min(recipe.queries, recipe.family.bias.queries))


def _queries() -> str:
    """The number of query points where none is given, for the help."""
    most = max(family.bias.queries for family in FAMILIES.values() if family.classes is not None)
    return f"as in training; of a class, {most} at most"


def _sizes() -> str:
    """The inner batches where none are given, for the help."""
    usual = USUAL_BIAS_PLAN.inner_batches
    parts = [",".join(map(str, usual))]
    for name, family in FAMILIES.items():
        plan = family.bias
        if plan.inner_batches != usual:
            reason = f", {plan.reason}," if plan.reason else ""
            parts.append(f"for {name}{reason} {','.join(map(str, plan.inner_batches))}")
    return "; ".join(parts)


def _tasks() -> str:
    """The number of tasks where none is given, for the help."""
    usual = USUAL_BIAS_PLAN.tasks
    others = [f"for {name} {each.bias.tasks}" for name, each in FAMILIES.items() if each.bias.tasks != usual]
    return "; ".join([str(usual), *others])
