"""``metamom compare``: momentum against plain meta-SGD."""

from __future__ import annotations

import argparse
import time

from metamom.cli.flags import add_options, add_steps, flag, given_flags
from metamom.cli.parser import Parser
from metamom.common.flag_types import long_count, names, number, numbers, run_count, task_count
from metamom.experiments.families import FAMILIES


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    comparing = kinds.add_parser("compare", help="momentum against plain meta-SGD").add_subparsers(
        required=True, metavar="TASK"
    )
    for task, family in FAMILIES.items():
        leaf = comparing.add_parser(
            task, help=family.help, usage="%(prog)s [options]", specs=True, examples=family.compare_examples
        )
        leaf.set_defaults(run=run, task=task, leaf=leaf)
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


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.experiments.compare import Comparison, compare
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
    report = compare(comparison, run_dir, root=arguments.data_root, resume=arguments.resume, jobs=arguments.jobs)
    print(f"report: {report}")
    return 0
