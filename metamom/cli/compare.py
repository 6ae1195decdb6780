"""``metamom compare``: momentum against plain meta-SGD."""

from __future__ import annotations

import argparse
import time

from metamom.cli.flags import add_recipe, add_run, given_flags, with_specs
from metamom.common.flag_types import counts, long_count, names, number, numbers, run_count, step_count, task_count


def add(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    from metamom.experiments.recipes import TASKS

    comparing = kinds.add_parser("compare", help="momentum against plain meta-SGD").add_subparsers(
        required=True, metavar="TASK"
    )
    for task in TASKS:
        compare = comparing.add_parser(task, help=f"on {task} tasks", allow_abbrev=False, **with_specs())
        compare.set_defaults(run=run, task=task)
        add_recipe(compare, task)
        add_run(compare, task)
        compare.add_argument("--seeds", type=run_count, default=3, help="runs of each method (default: 3)")
        compare.add_argument("--betas", type=numbers, default=(1.0, 0.1), help="1 is plain meta-SGD (default: 1,0.1)")
        compare.add_argument(
            "--first-steps", type=names, default=("zero",), help="of momentum: zero, gradient or both (default: zero)"
        )
        compare.add_argument("--lrs", type=numbers, help="the grid of step sizes, for every method")
        compare.add_argument(
            "--evaluate-every",
            type=long_count,
            default=50,
            metavar="N",
            help="iterations between points of the curves (default: 50)",
        )
        compare.add_argument("--tasks", type=task_count, default=600, help="test tasks for each run (default: 600)")
        compare.add_argument(
            "--steps",
            type=counts(step_count),
            default=(0, 1, 5, 10),
            help="numbers of adaptation steps (default: 0,1,5,10)",
        )
        compare.add_argument("--target", type=number, help="validation error (accuracy) to count iterations to")
        compare.add_argument("--jobs", type=run_count, default=1, help="runs at a time, each in a process (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.experiments.compare import DEFAULTS, Comparison, compare
    from metamom.experiments.recipes import ITERATIONS, Recipe

    task = arguments.task
    comparison = Comparison(
        base=Recipe(task=task, **given_flags(arguments)),
        betas=arguments.betas,
        first_steps=arguments.first_steps,
        lrs=arguments.lrs or DEFAULTS[task].lrs,
        seeds=arguments.seeds,
        iterations=ITERATIONS[task] if arguments.iterations is None else arguments.iterations,
        evaluate_every=arguments.evaluate_every,
        validation_tasks=arguments.evaluate_tasks,
        test_tasks=arguments.tasks,
        steps=arguments.steps,
        target=DEFAULTS[task].target if arguments.target is None else arguments.target,
    )
    run_dir = arguments.run_dir or f"runs/compare-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    report = compare(comparison, run_dir, root=arguments.data_root, resume=arguments.resume, jobs=arguments.jobs)
    print(f"report: {report}")
    return 0
