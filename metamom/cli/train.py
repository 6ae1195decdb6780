"""``metamom train``: train a meta-learner."""

from __future__ import annotations

import argparse
import os
import time
import warnings
from typing import TYPE_CHECKING

from metamom.cli.flags import (
    add_learner,
    add_operators,
    add_optimizer,
    add_processes,
    add_run,
    add_seed,
    add_task,
    flag,
    given_flags,
    switch,
)
from metamom.cli.parser import Parser
from metamom.common.flag_types import long_count
from metamom.common.numbers import shown
from metamom.experiments.families import FAMILIES

if TYPE_CHECKING:
    from metamom.distributed import World


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    training = kinds.add_parser("train", help="train a meta-learner").add_subparsers(required=True, metavar="TASK")
    for task, family in FAMILIES.items():
        leaf = training.add_parser(
            task, help=family.help, usage="%(prog)s [options]", specs=True, examples=family.train_examples
        )
        leaf.set_defaults(run=run, task=task, leaf=leaf)
        add_task(leaf.add_argument_group("task"), task)
        add_learner(leaf.add_argument_group("learner"), task)
        bias = leaf.add_argument_group("bias")
        add_operators(bias)
        flag(
            bias,
            "--track-bias",
            "measure the bias every N iterations, into metrics.jsonl; training itself does not change",
            "off",
            type=_every,
            metavar="every=N",
        )
        add_optimizer(leaf.add_argument_group("optimizer"), task)
        own = leaf.add_argument_group("run")
        add_run(own, task)
        add_seed(own)
        flag(own, "--evaluate-every", "iterations between validations", "only at the end", type=long_count, metavar="N")
        flag(own, "--checkpoint-every", "iterations between checkpoints", type=long_count, default=500, metavar="N")
        switch(own, "--tensorboard", "write TensorBoard files into the run directory")
        add_processes(leaf.add_argument_group("processes"))


def run(arguments: argparse.Namespace, world: World) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.common.allocator import keep_freed_memory
    from metamom.experiments.recipes import Recipe
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
    iterations = recipe.family.iterations if arguments.iterations is None else arguments.iterations
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
