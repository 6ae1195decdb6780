"""``metamom train``: train a meta-learner."""

from __future__ import annotations

import argparse
import os
import time
import warnings

from metamom.cli.flags import add_method, add_processes, add_recipe, add_run, given_flags, with_specs
from metamom.common.allocator import keep_freed_memory
from metamom.common.flag_types import long_count
from metamom.common.numbers import shown
from metamom.distributed import World


def add(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    from metamom.experiments.recipes import TASKS

    training = kinds.add_parser("train", help="train a meta-learner").add_subparsers(required=True, metavar="TASK")
    for task in TASKS:
        train = training.add_parser(task, help=f"on {task} tasks", allow_abbrev=False, **with_specs())
        train.set_defaults(run=run, task=task)
        add_recipe(train, task)
        add_method(train)
        add_run(train, task)
        train.add_argument(
            "--evaluate-every",
            type=long_count,
            metavar="N",
            help="iterations between validations (default: only at the end)",
        )
        train.add_argument(
            "--checkpoint-every",
            type=long_count,
            default=500,
            metavar="N",
            help="iterations between checkpoints (default: 500)",
        )
        train.add_argument(
            "--track-bias",
            type=_every,
            metavar="every=N",
            help="measure the bias every N iterations, into metrics.jsonl; training itself goes as without",
        )
        add_processes(train)
        train.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into the run directory")


def run(arguments: argparse.Namespace, world: World) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.experiments.recipes import ITERATIONS, Recipe
    from metamom.training.loop import train

    keep_freed_memory()
    given = given_flags(arguments)
    if arguments.optimizer != "momentum" and {"beta", "first_step", "normalize"} & set(given):
        raise ValueError(
            "--beta, --first-step and --normalize belong to --optimizer momentum; got --optimizer "
            f"{given['optimizer']}."
        )
    recipe = Recipe(task=arguments.task, **given)
    learner = recipe.learner()
    optimizer = recipe.make_optimizer(learner)
    run_dir = arguments.run_dir or world.broadcast_object(
        lambda: f"runs/{recipe.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    _warn_of_restarts(arguments, world)
    assert recipe.meta_batch is not None
    iterations = ITERATIONS[recipe.task] if arguments.iterations is None else arguments.iterations
    tracking = None
    if arguments.track_bias is not None:
        from metamom.experiments.bias_report import tracking as tracking_of

        tracking = tracking_of(recipe, arguments.track_bias, root=arguments.data_root)
    result = train(
        learner,
        optimizer,
        recipe.sampler(root=arguments.data_root),
        iterations=iterations,
        meta_batch=recipe.meta_batch,
        workers=recipe.workers,
        bias=recipe.operator(),
        aggregate=recipe.aggregate,
        schedulers=recipe.schedulers(optimizer),
        validation=recipe.sampler("validation", root=arguments.data_root),
        evaluate_every=arguments.evaluate_every,
        evaluate_tasks=arguments.evaluate_tasks,
        run_dir=run_dir,
        resume=arguments.resume,
        checkpoint_every=arguments.checkpoint_every,
        settings=recipe.settings(),
        free=recipe.free(),
        tensorboard=arguments.tensorboard,
        track_bias=tracking,
        world=world,
        label=f"train {recipe.task}",
    )
    if not world.first:
        return 0
    if not result.metrics:
        print(f"{run_dir} is trained for {result.resumed_from} iterations already; pass more --iterations to go on.")
        return 0
    print(f"trained for {iterations} iterations, in {run_dir}")
    if result.validation is not None:
        checked = result.validation
        print(
            f"validation {checked.metric} after {checked.steps[0]} step(s): {checked.mean[0]:.4f} "
            f"± {checked.halfwidth[0]:.4f} ({checked.values.shape[1]} tasks)"
        )
    print(f"next: metamom evaluate {run_dir}")
    return 0


def _warn_of_restarts(arguments: argparse.Namespace, world: World) -> None:
    """Where torchrun would start this command again, which could not go on where it stood."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if world.size > 1 and restarts != "0" and not (arguments.resume and arguments.run_dir):
        warnings.warn(
            f"torchrun may start this again {restarts} time(s), but it will not go on where it stood: give --run-dir "
            "and --resume.",
            stacklevel=1,
        )


def _every(text: str) -> int:
    name, _, number = text.partition("=")
    if name != "every" or long_count(number) < 1:
        raise argparse.ArgumentTypeError(f"wanted every=N with N iterations >= 1, such as every=200; got {shown(text)}")
    return long_count(number)
