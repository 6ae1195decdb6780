"""``metamom train``: train a meta-learner."""

from __future__ import annotations

import argparse
import os
import re
import time
import warnings
from typing import TYPE_CHECKING, Any

from metamom.cli.flags import add_options, add_processes, flag, given_flags, run_options
from metamom.cli.parser import Parser
from metamom.cli.resuming import continued, kept_options
from metamom.common.numbers import plural
from metamom.experiments.families import FAMILIES
from metamom.experiments.options import task_defaults
from metamom.experiments.published.methods import METHODS, method

if TYPE_CHECKING:
    from metamom.distributed import World
    from metamom.training.loop import TrainResult


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    training = kinds.add_parser("train", help="train a meta-learner").add_subparsers(required=True, metavar="TASK")
    for task, family in FAMILIES.items():
        leaf = training.add_parser(
            task, help=family.help, usage="%(prog)s [options]", specs=True, examples=family.train_examples
        )
        leaf.set_defaults(run=run, task=task, leaf=leaf, data_root=None)
        for title in ("task", "learner", "bias", "optimizer", "run"):
            group = leaf.add_argument_group(title)
            if title == "learner" and task in METHODS:
                flag(
                    group,
                    "--recipe",
                    "train as a published method does: its settings are the defaults of the other flags",
                    "none",
                    choices=list(METHODS[task]),
                )
            add_options(group, task, "train")
        add_processes(leaf.add_argument_group("processes"))


def run(arguments: argparse.Namespace, world: World) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.common.allocator import keep_freed_memory

    keep_freed_memory()
    options = run_options(arguments)
    given = world.broadcast_object(lambda: kept_options(arguments)) | given_flags(arguments)
    published: dict[str, Any] = {}
    if getattr(arguments, "recipe", None) is not None:
        ways = given.get("ways", task_defaults(arguments.task)["ways"])
        of_method = method(arguments.task, arguments.recipe, ways, options["iterations"])
        published = {name: value for name, value in of_method.items() if name not in given}
    try:
        return _train(arguments, world, published | given, options)
    except ValueError as error:
        note = _set_by_recipe(arguments, published, str(error))
        if type(error) is not ValueError or not note:
            raise
        raise ValueError(f"{error} {note}") from error


def _set_by_recipe(arguments: argparse.Namespace, published: dict[str, Any], message: str) -> str:
    """What ``--recipe`` sets of the options that an error names; empty if nothing."""
    named = {
        name: value
        for name, value in published.items()
        if re.search(rf"(?<![\w-]){re.sub('_', '[ _-]', name)}(?![\w-])", message.replace("--", " "))
    }
    if not named:
        return ""
    flags = [f"--{name.replace('_', '-')}" for name in named]
    values = [flag if value is True else f"{flag} {value}" for flag, value in zip(flags, named.values(), strict=True)]
    return f"--recipe {arguments.recipe} sets {', '.join(values)}: give {', '.join(flags)} to choose another value."


def _train(arguments: argparse.Namespace, world: World, given: dict[str, Any], options: dict[str, Any]) -> int:
    """Train with these options of a recipe and of the run."""
    from metamom.experiments.recipe_training import train_recipe
    from metamom.experiments.recipes import Recipe
    from metamom.training.interrupts import TrainingInterrupted

    if given.get("optimizer", "momentum") != "momentum" and {"beta", "first_step", "normalize"} & set(given):
        raise ValueError(
            "--beta, --first-step and --normalize belong to --optimizer momentum; got --optimizer "
            f"{given['optimizer']}."
        )
    recipe = Recipe(task=arguments.task, **given)
    track_bias = options.pop("track_bias")
    options["run_dir"] = arguments.run_dir or world.broadcast_object(
        lambda: f"runs/{recipe.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    _warn_of_restarts(arguments, world)
    try:
        result = train_recipe(recipe, options, root=arguments.data_root, track_bias=track_bias, world=world)
    except TrainingInterrupted as interrupt:
        if world.size == 1 and interrupt.unfinished:
            print(f"continue: {continued(arguments, str(options['run_dir']))}")
        raise
    if world.first:
        _print(result, options)
    return 0


def _print(result: TrainResult, options: dict[str, Any]) -> None:
    """Print what was done, and what to do next."""
    run_dir, checked = options["run_dir"], result.validation
    if result.stopped is not None:
        done = result.resumed_from + len(result.metrics)
        print(f"stopped after {done} of {_iterations(options['iterations'])}, in {run_dir}: {result.stopped}")
    elif not result.metrics:
        print(f"{run_dir} is trained for {_iterations(result.resumed_from)} already; pass more --iterations to go on.")
        return
    else:
        print(f"trained for {_iterations(options['iterations'])}, in {run_dir}")
    if checked is not None:
        print(
            f"validation {checked.metric} after {checked.steps[0]} step(s): {checked.mean[0]:.4f} "
            f"± {checked.halfwidth[0]:.4f} ({checked.values.shape[1]} tasks)"
        )
    print(f"next: metamom evaluate {run_dir}")


def _iterations(n: int) -> str:
    return f"{n} {plural(n, 'iteration')}"


def _warn_of_restarts(arguments: argparse.Namespace, world: World) -> None:
    """Warn if torchrun would restart this command without it resuming where it stopped."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if world.size > 1 and restarts != "0" and not (arguments.resume and arguments.run_dir):
        warnings.warn(
            f"torchrun may start this again {restarts} time(s), but it will not resume where it stopped: give "
            "--run-dir and --resume.",
            stacklevel=1,
        )
