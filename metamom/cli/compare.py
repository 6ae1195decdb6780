"""``metamom compare``: momentum against plain meta-SGD."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from metamom.cli.flags import (
    add_adaptation,
    add_checkpoint,
    add_device,
    add_metric,
    add_model,
    add_options,
    add_results,
    add_steps,
    add_tasks,
    flag,
    given_flags,
    trained_with,
)
from metamom.cli.parser import Parser
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
    baselines = "evaluate one run with its baselines: metamom evaluate RUN --baselines"
    leaf.elsewhere.update(trained_with() | dict.fromkeys(("--baselines", "--baseline-steps"), baselines))
    add_tasks(leaf.add_argument_group("task"))
    add_adaptation(leaf.add_argument_group("learner"))
    own = leaf.add_argument_group("run")
    own.add_argument("run_paths", type=path, nargs="+", metavar="RUN", help="run directories")
    add_checkpoint(own)
    add_model(own)
    add_device(own, default="cpu")
    add_metric(own)
    add_results(own)


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
    from metamom.cli.evaluate import asked_of_tasks, check_results, check_run, chosen_metric, tasks_in_words
    from metamom.cli.results import evaluated, write_csv, write_record
    from metamom.comparing import compare_runs
    from metamom.loading import load

    check_results(arguments)
    asked = asked_of_tasks(arguments)
    runs = {}
    for each in arguments.run_paths:
        runs[each] = load(each, arguments.checkpoint, arguments.model, device=arguments.device)
        check_run(runs[each], arguments, asked)
    found = compare_runs(
        runs,
        split=arguments.split,
        root=arguments.data_root,
        tasks=arguments.tasks,
        steps=arguments.steps,
        norm=arguments.norm,
        inner_lr=arguments.inner_lr,
        metric=chosen_metric(arguments),
        **asked,
    )
    words = tasks_in_words(found.runs[0], asked)
    if arguments.csv is not None:
        write_csv(arguments.csv, found.compared.evaluations)
    if arguments.record is not None:
        first = next(iter(found.compared.evaluations.values()))
        compared = dict(zip(found.compared.evaluations, found.runs, strict=True))
        write_record(arguments.record, found.as_json(), evaluated(compared, first, words, arguments))
    if arguments.json:
        print(json.dumps(found.as_json(per_task=arguments.per_task)))
        return 0
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
        base=Recipe(task=task, **given_flags(arguments)).over(arguments.iterations),
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
        print(f"continue: {_continued(arguments, run_dir)}")
        raise
    try:
        _show(report)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            "interrupted before the page was written; all runs are finished. To write it: "
            f"{shlex.join(['metamom', 'report', str(report.parent)])}"
        ) from interrupt
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


def _continued(arguments: argparse.Namespace, run_dir: str) -> str:
    """The command line that continues an interrupted comparison."""
    words = ["metamom", *arguments.words]
    words += [] if arguments.run_dir else ["--run-dir", run_dir]
    return shlex.join([*words, *([] if arguments.resume else ["--resume"])])
