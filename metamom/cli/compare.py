"""``metamom compare``: momentum against plain meta-SGD."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from metamom.cli.flags import (
    add_checkpoint,
    add_device,
    add_metric,
    add_model,
    add_options,
    add_steps,
    add_tasks,
    flag,
    given_flags,
    switch,
)
from metamom.cli.parser import Parser
from metamom.cli.resuming import continued, kept_options
from metamom.common.flag_types import long_count, names, number, numbers, path, run_count, task_count
from metamom.experiments.families import FAMILIES

RUNS = "runs"


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    comparing = kinds.add_parser("compare", help="momentum against plain meta-SGD").add_subparsers(
        required=True, metavar="TASK"
    )
    for task, family in FAMILIES.items():
        leaf = comparing.add_parser(
            task, help=family.help, usage="%(prog)s [options]", specs=True, examples=family.compare_examples
        )
        leaf.set_defaults(run=run, task=task, leaf=leaf, data_root=None)
        for title in ("task", "learner", "bias"):
            add_options(leaf.add_argument_group(title), task, "compare")
        optimizer = leaf.add_argument_group("optimizer")
        flag(optimizer, "--betas", "the methods: 1 is plain meta-SGD", "1,0.1", type=numbers, default=(1.0, 0.1))
        flag(optimizer, "--first-steps", "of momentum: zero, gradient or both", "zero", type=names, default=("zero",))
        grid = ",".join(map(str, family.comparison.lrs))
        flag(optimizer, "--lrs", "the grid of step sizes, for every method", grid, type=numbers, metavar="γ,γ,...")
        add_options(optimizer, task, "compare")
        own = leaf.add_argument_group("run")
        add_options(own, task, "compare")
        flag(own, "--seeds", "runs of each method", type=run_count, default=3)
        flag(
            own, "--evaluate-every", "iterations between points of the curves", type=long_count, default=50, metavar="N"
        )
        flag(own, "--tasks", "test tasks for each run", type=task_count, default=600)
        add_steps(own)
        goal = f"validation {family.metric.short} to count iterations to"
        flag(own, "--target", goal, family.comparison.target, type=number)
        processes = leaf.add_argument_group("processes")
        flag(processes, "--jobs", "runs at a time, each in a process", type=run_count, default=1)

    _add_runs(comparing)


def _add_runs(comparing: argparse._SubParsersAction[Parser]) -> None:
    """Add the comparison of runs that exist: `with_runs` puts its name before their paths."""
    leaf = comparing.add_parser(
        RUNS,
        help="existing runs on the same tasks: metamom compare RUN RUN ...",
        usage="metamom compare RUN RUN ... [options]",
        examples=(
            "metamom compare runs runs/a runs/b",
            "metamom compare runs runs/a runs/b --steps 1,5 --shots 5 --json",
        ),
    )
    leaf.set_defaults(run=run_existing, leaf=leaf)
    add_tasks(leaf.add_argument_group("task"))
    add_steps(leaf.add_argument_group("learner"))
    own = leaf.add_argument_group("run")
    own.add_argument("run_paths", type=path, nargs="+", metavar="RUN", help="run directories")
    add_checkpoint(own)
    add_model(own)
    add_device(own, default="cpu")
    add_metric(own)
    switch(own, "--json", "print one JSON object and nothing else")


def with_runs(words: Sequence[str]) -> Sequence[str]:
    """A command line with the name of the comparison of runs, if its first words are paths of runs.

    Raises:
        ValueError: for a mixture of tasks and runs.
    """
    if not words or words[0] != "compare":
        return words
    leading = list(takewhile(lambda word: not word.startswith("-"), words[1:]))
    others = [word for word in leading if word not in (*FAMILIES, RUNS)]
    runs = [word for word in others if Path(word).is_dir() or "/" in word]
    tasks = [word for word in leading if word in FAMILIES]
    if runs and tasks:
        raise ValueError(
            f"compare takes either a task ({', '.join(FAMILIES)}), to train on it, or existing runs; got both: "
            f"{', '.join(leading)}. Leave out {', '.join(tasks)} to compare runs."
        )
    return [words[0], RUNS, *words[1:]] if runs and leading[0] != RUNS else words


def run_existing(arguments: argparse.Namespace) -> int:
    """Compare runs that exist; the result is the command's exit status."""
    from metamom.cli.evaluate import asked_of_tasks, tasks_in_words
    from metamom.common.named_objects import named_callable
    from metamom.comparing import compare_runs

    metric = arguments.metric
    found = compare_runs(
        arguments.run_paths,
        split=arguments.split,
        checkpoint=arguments.checkpoint,
        model=arguments.model,
        device=arguments.device,
        root=arguments.data_root,
        tasks=arguments.tasks,
        steps=arguments.steps,
        metric=named_callable(metric, "the metric") if metric is not None and ":" in metric else metric,
        **asked_of_tasks(arguments),
    )
    if arguments.json:
        print(json.dumps(found.as_json()))
        return 0
    words = tasks_in_words(found.runs[0], asked_of_tasks(arguments))
    print(f"{words}, split {arguments.split}")
    print(found.compared)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.experiments.compare import Comparison, compare
    from metamom.experiments.finished import ComparisonInterrupted
    from metamom.experiments.recipes import Recipe

    task = arguments.task
    family = FAMILIES[task]
    comparison = Comparison(
        base=Recipe(task=task, **kept_options(arguments) | given_flags(arguments)).over(arguments.iterations),
        betas=arguments.betas,
        first_steps=arguments.first_steps,
        lrs=arguments.lrs or family.comparison.lrs,
        seeds=arguments.seeds,
        iterations=arguments.iterations,
        evaluate_every=arguments.evaluate_every,
        validation_tasks=arguments.evaluate_tasks,
        test_tasks=arguments.tasks,
        steps=arguments.steps,
        target=family.comparison.target if arguments.target is None else arguments.target,
    )
    run_dir = arguments.run_dir or f"runs/compare-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        report = compare(comparison, run_dir, root=arguments.data_root, resume=arguments.resume, jobs=arguments.jobs)
    except ComparisonInterrupted as interrupt:
        print("\n".join(interrupt.table))
        print(f"continue: {continued(arguments, run_dir)}")
        raise
    _show(report)
    return 0


def _show(report: Path) -> None:
    """Print each method at its best step size, write the page, and say where the reports are."""
    from metamom.cli.report import NAME
    from metamom.experiments.report import can_write_page, write_page
    from metamom.experiments.report.reading import read_page
    from metamom.experiments.report.terminal import table_lines

    page = read_page([report.parent]).page
    print(page.sections[0].title, *table_lines(page.sections[0]), "", sep="\n")
    print(f"report: {report}")
    if can_write_page():
        print(f"page: {write_page(report.parent / NAME, page)}")
    else:
        print(f"page: none without Bokeh; pip install 'metamom[report]', then metamom report {report.parent}")
