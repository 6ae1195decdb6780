"""Flags that several commands have."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args

from metamom.common.flag_types import long_count, names, number, path, point_count, seed, step_count, task_count
from metamom.common.numbers import shown


def with_specs() -> dict[str, Any]:
    """Of a parser with ``--bias``: the table of SPECs below its flags, as it is."""
    from metamom.bias.spec import spec_help

    return {"epilog": spec_help(), "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_recipe(parser: argparse.ArgumentParser, task: str) -> None:
    """Flags of the tasks and of the learner."""
    from metamom.experiments.recipes import DEFAULTS, DTYPES
    from metamom.maml.estimators import (
        ESTIMATORS,
        INNER_BATCHES,
        memoryless_estimators,
        support_parts,
        tracked_estimators,
    )
    from metamom.tasks.fixed import ORDERS

    default = DEFAULTS[task]
    if task == "omniglot":
        parser.add_argument("--ways", type=task_count, help="classes a task (default: 5)")
    each = "a class" if task == "omniglot" else "a task"
    parser.add_argument(
        "--shots", type=point_count, help=f"support points {each}, in each inner batch (default: {default.shots})"
    )
    parser.add_argument("--queries", type=point_count, help=f"query points {each} (default: {default.queries})")
    parser.add_argument("--meta-batch", type=task_count, help=f"tasks an iteration (default: {default.meta_batch})")
    parser.add_argument("--inner-lr", type=number, help=f"inner step size (default: {default.inner_lr})")
    parser.add_argument("--inner-steps", type=step_count, help="inner steps in training (default: 1)")
    tracked = tracked_estimators()
    alone = [name for name in memoryless_estimators() if support_parts(name, 1) == 1]
    halved = [name for name in memoryless_estimators() if name not in alone]
    parser.add_argument(
        "--estimator",
        choices=list(ESTIMATORS),
        metavar="NAME",
        help="of the meta-gradient (default: exact). By itself: " + ", ".join(alone) + ". On support sets of twice the "
        "--shots, in two halves: "
        + ", ".join(halved)
        + ". With --fixed-tasks, of each of which they keep an average: "
        + ", ".join(tracked),
    )
    parser.add_argument(
        "--tracking",
        type=number,
        metavar="B",
        help="weight of a new inner step in the averages of moml, moml-coupled and scsc, 0 < B <= 1 (default: 0.2)",
    )
    parser.add_argument(
        "--inner-batches",
        choices=INNER_BATCHES,
        help="same or fresh support points for each inner step in training; fresh takes --shots for each (default: "
        "same)",
    )
    parser.add_argument(
        "--learn-inner-lr",
        nargs="?",
        const="entry",
        choices=("scalar", "tensor", "entry"),
        help="learn the inner step sizes, one for each entry (Meta-SGD) unless said otherwise",
    )
    parser.add_argument(
        "--adapt",
        type=names,
        metavar="NAMES",
        help="parameters or modules that adapt, such as head for ANIL (default: all)",
    )
    parser.add_argument(
        "--chunk-size",
        type=_chunk_size,
        metavar="N",
        help="tasks computed at a time, or auto: as many as fit into 512 MiB (default: all)",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const=True,
        type=_compile_mode,
        metavar="auto",
        help="compile the meta-gradient; with auto only in runs long enough to win the time back",
    )
    parser.add_argument("--workers", type=task_count, help="workers that the tasks are dealt to (default: 1)")
    parser.add_argument("--bias", metavar="SPEC", help="operator on each worker's gradient, see below (default: none)")
    parser.add_argument(
        "--aggregate",
        metavar="SPEC",
        help="what the server takes of the workers' gradients: mean, median, trimmed:SHARE, geomedian (default: mean)",
    )
    parser.add_argument(
        "--fixed-tasks",
        type=task_count,
        metavar="N",
        help="train on N tasks that stay (default: new ones at each iteration)",
    )
    parser.add_argument(
        "--order",
        choices=ORDERS,
        help="how meta-batches are chosen of --fixed-tasks: each by itself, or all tasks in turn, shuffled anew each "
        "time around (default: replacement)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="bfloat16 is for matrix products alone, summed in float32 (default: float32)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--data-root",
        type=path,
        metavar="DIR",
        help="where the data is (default: $METAMOM_DATA, else the user's data folder)",
    )


def add_method(parser: argparse.ArgumentParser) -> None:
    """Flags of the outer optimizer."""
    from metamom.experiments.recipes import OPTIMIZERS
    from metamom.optim import FirstStep

    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="momentum", help="(default: momentum)")
    parser.add_argument("--lr", type=number, help="step size γ (default: by task and optimizer)")
    parser.add_argument(
        "--beta", type=number, help="weight of the new gradient, 0 < β <= 1; 1 is plain SGD (default: 0.1)"
    )
    parser.add_argument(
        "--first-step", choices=get_args(FirstStep), help="start from v_{-1} = 0 or v_0 = g_0 (default: zero)"
    )
    parser.add_argument(
        "--normalize", action="store_true", default=None, help="move by γ v/‖v‖: every step as long as γ"
    )
    parser.add_argument("--seed", type=seed, help="of the initial weights and of the tasks (default: 0)")


def add_run(parser: argparse.ArgumentParser, task: str) -> None:
    """Flags of a run: how long, and where it goes."""
    from metamom.experiments.recipes import ITERATIONS

    parser.add_argument(
        "--iterations", type=long_count, help=f"total number, with those before a resume (default: {ITERATIONS[task]})"
    )
    parser.add_argument(
        "--schedule",
        metavar="SPEC",
        help="of γ: constant, or cosine:N, from γ to 0 in N iterations (default: constant)",
    )
    parser.add_argument(
        "--evaluate-tasks", type=task_count, default=200, help="tasks for each validation (default: 200)"
    )
    parser.add_argument("--run-dir", type=path, metavar="RUN", help="where it goes (default: a new folder in runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, or start it")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Flags of commands that torchrun may start on several processes."""
    from metamom.distributed import SERVERS, TIMEOUT

    parser.add_argument(
        "--server",
        choices=SERVERS,
        default=SERVERS[0],
        help="under torchrun, who aggregates: every process, or process 0 for all (default: replicated)",
    )
    parser.add_argument(
        "--timeout",
        type=number,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"under torchrun, wait so long for another process before it is an error (default: {TIMEOUT:g})",
    )


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of a recipe that were given; the recipe knows the defaults of the others."""
    from metamom.experiments.recipes import Recipe

    names = [field.name for field in fields(Recipe) if field.name != "task"]
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def _chunk_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return task_count(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"wanted a number of tasks, or auto: {error}") from None


def _compile_mode(text: str) -> str:
    if text != "auto":
        raise argparse.ArgumentTypeError(f"wanted auto, or nothing after --compile; got {shown(text)}")
    return text
