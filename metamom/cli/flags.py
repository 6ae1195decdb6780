"""Flags that several commands have, in the groups of the help: task, learner, bias, optimizer, run, processes."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, Protocol

from metamom.cli.facts import FIRST_STEPS, ORDERS, SERVERS, TIMEOUT
from metamom.common.flag_types import counts, long_count, names, number, path, point_count, seed, step_count, task_count
from metamom.common.numbers import shown
from metamom.experiments.defaults import ADAPTIVE_LR, DTYPE_NAMES, OPTIMIZERS
from metamom.experiments.families import FAMILIES
from metamom.maml.estimators import (
    ESTIMATORS,
    INNER_BATCHES,
    memoryless_estimators,
    support_parts,
    tracked_estimators,
)


class Group(Protocol):
    """A parser, or a group of its flags."""

    def add_argument(self, *name_or_flags: str, **settings: Any) -> argparse.Action:
        """As argparse's."""


def flag(group: Group, name: str, meaning: str, shows: object = None, **settings: Any) -> None:
    """Add a flag; its help ends with the default: ``shows``, or else the ``default`` itself."""
    default = settings.get("default") if shows is None else shows
    assert default is not None, name
    group.add_argument(name, help=f"{meaning} (default: {default})", **settings)


def switch(group: Group, name: str, meaning: str, **settings: Any) -> None:
    """Add a flag without a value, off by default."""
    flag(group, name, meaning, "off", action="store_true", **settings)


def add_task(group: Group, task: str) -> None:
    """Flags of the tasks."""
    default, each = FAMILIES[task].defaults, FAMILIES[task].unit
    if default.ways is not None:
        flag(group, "--ways", "classes a task", default.ways, type=task_count)
    flag(group, "--shots", f"support points {each}, in each inner batch", default.shots, type=point_count)
    flag(group, "--queries", f"query points {each}", default.queries, type=point_count)
    flag(group, "--meta-batch", "tasks an iteration", default.meta_batch, type=task_count)
    flag(
        group, "--fixed-tasks", "train on the same N tasks", "new tasks in each iteration", type=task_count, metavar="N"
    )
    flag(
        group,
        "--order",
        "with --fixed-tasks: sample tasks independently, or reshuffle every epoch",
        ORDERS[0],
        choices=ORDERS,
    )
    add_data_root(group)


def add_data_root(group: Group, name: str = "--data-root") -> None:
    """Where the data is."""
    flag(group, name, "where the data is", "$METAMOM_DATA, else the user's data folder", type=path, metavar="DIR")


def add_learner(group: Group, task: str) -> None:
    """Flags of the learner."""
    flag(group, "--inner-lr", "inner step size", FAMILIES[task].defaults.inner_lr, type=number)
    flag(group, "--inner-steps", "inner steps in training", 1, type=step_count)
    alone = [name for name in memoryless_estimators() if support_parts(name, 1) == 1]
    halved = [name for name in memoryless_estimators() if name not in alone]
    flag(
        group,
        "--estimator",
        f"of the meta-gradient. On support sets of --shots: {', '.join(alone)}. On support sets of twice the --shots, "
        f"in two halves: {', '.join(halved)}. With --fixed-tasks, with a moving average for each task: "
        f"{', '.join(tracked_estimators())}",
        "exact",
        choices=list(ESTIMATORS),
        metavar="NAME",
    )
    flag(
        group,
        "--tracking",
        "weight of a new inner step in the moving averages of moml, moml-coupled and scsc, 0 < B <= 1",
        0.2,
        type=number,
        metavar="B",
    )
    flag(
        group,
        "--inner-batches",
        "same or fresh support points for each inner step in training; fresh takes --shots for each",
        INNER_BATCHES[0],
        choices=INNER_BATCHES,
    )
    flag(
        group,
        "--learn-inner-lr",
        "learn the inner step sizes: one for each entry (Meta-SGD) if no value follows",
        "off",
        nargs="?",
        const="entry",
        choices=("scalar", "tensor", "entry"),
    )
    flag(
        group,
        "--adapt",
        "parameters or modules that adapt, such as head for ANIL",
        "all",
        type=names,
        metavar="NAMES",
    )
    flag(
        group,
        "--chunk-size",
        "tasks computed at a time, or auto: as many as fit into 512 MiB",
        "all",
        type=_chunk_size,
        metavar="N",
    )
    flag(
        group,
        "--compile",
        "compile the meta-gradient; with auto, only in runs long enough to gain time",
        "off",
        nargs="?",
        const=True,
        type=_compile_mode,
        metavar="auto",
    )
    flag(
        group,
        "--dtype",
        "bfloat16 is for matrix products only, summed in float32",
        DTYPE_NAMES[0],
        choices=DTYPE_NAMES,
    )


def add_operators(group: Group) -> None:
    """Flags of the workers, of their bias and of the server's aggregation."""
    flag(group, "--workers", "workers that share the tasks", 1, type=task_count)
    flag(group, "--bias", "operator on each worker's gradient, see below", "none", metavar="SPEC")
    flag(
        group,
        "--aggregate",
        "how the server aggregates the workers' gradients: mean, median, trimmed:SHARE, geomedian",
        "mean",
        metavar="SPEC",
    )


def add_optimizer(group: Group, task: str) -> None:
    """Flags of the outer optimizer."""
    flag(group, "--optimizer", "outer optimizer", choices=OPTIMIZERS, default=OPTIMIZERS[0])
    flag(
        group,
        "--lr",
        "step size γ",
        f"{FAMILIES[task].defaults.lr}; {ADAPTIVE_LR} with adam and rmsprop",
        type=number,
    )
    flag(group, "--beta", "weight of the new gradient, 0 < β <= 1; 1 is plain SGD", 0.1, type=number)
    flag(group, "--first-step", "start from v_{-1} = 0 or v_0 = g_0", FIRST_STEPS[0], choices=FIRST_STEPS)
    switch(group, "--normalize", "move by γ v/‖v‖, so that every step has length γ", default=None)
    add_schedule(group)


def add_schedule(group: Group) -> None:
    """The schedule of the step size."""
    flag(group, "--schedule", "of γ: constant, or cosine:N, from γ to 0 in N iterations", "constant", metavar="SPEC")


def add_run(group: Group, task: str) -> None:
    """Flags of a run: how long it is, where it is computed, and where it goes."""
    flag(
        group,
        "--iterations",
        "total number, including those before a resume",
        FAMILIES[task].iterations,
        type=long_count,
    )
    flag(group, "--evaluate-tasks", "tasks for each validation", type=task_count, default=200)
    add_device(group)
    flag(group, "--run-dir", "where the run goes", "a new folder in runs/", type=path, metavar="RUN")
    switch(group, "--resume", "continue the run in --run-dir, or start it")
    flag(
        group,
        "--config",
        "read flags from a YAML or JSON file, or a run's config.json; the command line overrides them",
        "none",
        type=path,
        metavar="FILE",
    )


def add_device(group: Group, **settings: Any) -> None:
    """The device."""
    flag(group, "--device", "cpu or cuda", "cpu", **settings)


def add_checkpoint(group: Group) -> None:
    """Which of a run's checkpoints to load."""
    flag(group, "--checkpoint", "best by validation, or newest", choices=("best", "newest"), default="best")


def add_steps(group: Group) -> None:
    """How long to adapt in an evaluation."""
    flag(
        group,
        "--steps",
        "numbers of adaptation steps",
        "0,1,5,10",
        type=counts(step_count),
        default=(0, 1, 5, 10),
        metavar="J,J,...",
    )


def add_seed(group: Group, meaning: str = "of the initial weights and of the tasks") -> None:
    """The seed."""
    flag(group, "--seed", meaning, 0, type=seed)


def add_processes(group: Group) -> None:
    """Flags of commands that torchrun may start on several processes."""
    flag(
        group,
        "--server",
        "under torchrun, who aggregates: every process (replicated), or process 0 for all (rank0)",
        choices=SERVERS,
        default=SERVERS[0],
    )
    flag(
        group,
        "--timeout",
        "under torchrun, seconds to wait for another process before it is an error",
        f"{TIMEOUT:g}",
        type=number,
        default=TIMEOUT,
        metavar="SECONDS",
    )


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of a recipe that were given; the recipe knows the defaults of the others."""
    from metamom.experiments.recipes import Recipe

    known = [field.name for field in fields(Recipe) if field.name != "task"]
    return {name: value for name in known if (value := getattr(arguments, name, None)) is not None}


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
