"""``metamom reproduce omniglot | sinusoid``: published recipes of meta-learning, next to their papers' figures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from metamom.cli.flags import add_data_root, add_device, flag, switch
from metamom.cli.parser import Parser
from metamom.common.flag_types import long_count, number, path, point_count, seed, task_count
from metamom.experiments.published.recipes import BUDGETS, OMNIGLOT, OPTIMIZERS, ROWS, SINUSOID

if TYPE_CHECKING:
    from metamom.experiments.published.run import Plan


def add(experiments: argparse._SubParsersAction[Parser]) -> None:
    """Add the two commands to the parser."""
    omniglot = experiments.add_parser(
        "omniglot",
        help="published recipes on Omniglot",
        usage="%(prog)s --row ROW --run-dir RUN [options]",
        examples=(
            "metamom reproduce omniglot --row 5w1s --run-dir runs/5w1s",
            "metamom reproduce omniglot --row 20w1s --budget published --run-dir runs/20w1s --resume",
        ),
    )
    omniglot.set_defaults(run=run, leaf=omniglot)
    task = omniglot.add_argument_group("task")
    task.add_argument("--row", choices=ROWS, required=True, help="N-way K-shot tasks (required)")
    _add_test_tasks(task)
    add_data_root(task)
    _add_method(omniglot, list(OMNIGLOT))
    sinusoid = experiments.add_parser(
        "sinusoid",
        help="published recipes on sinusoids",
        usage="%(prog)s --run-dir RUN [options]",
        examples=(
            "metamom reproduce sinusoid --budget published --run-dir runs/sinusoid",
            "metamom reproduce sinusoid --shots 5 --recipe meta-sgd --run-dir runs/meta-sgd --resume",
        ),
    )
    sinusoid.set_defaults(run=run, leaf=sinusoid, row=None, data_root=None)
    task = sinusoid.add_argument_group("task")
    flag(
        task,
        "--shots",
        "support points: 5 or 10; maml and fomaml train one network for both, with 10",
        type=point_count,
        default=10,
    )
    _add_test_tasks(task)
    _add_method(sinusoid, list(SINUSOID))


def _add_test_tasks(group: argparse._ArgumentGroup) -> None:
    flag(group, "--tasks", "test tasks", type=task_count, default=1000)


def _add_method(leaf: Parser, recipes: list[str]) -> None:
    """The flags of a method, an optimizer and a run."""
    learner = leaf.add_argument_group("learner")
    flag(learner, "--recipe", "the method, as its paper trains it", choices=recipes, default="maml")
    outer = leaf.add_argument_group("optimizer")
    flag(
        outer,
        "--optimizer",
        "the outer one: adam; sgd, plain meta-SGD; or composite, momentum with β = 0.1",
        "the paper's",
        choices=OPTIMIZERS,
    )
    flag(outer, "--lr", "its step size γ", "the paper's, or ours for sgd and composite", type=number)
    own = leaf.add_argument_group("run")
    flag(
        own,
        "--budget",
        "published, the paper's iterations and tasks; or short, what an hour on two cores allows",
        choices=BUDGETS,
        default=BUDGETS[0],
    )
    flag(own, "--iterations", "total number, instead of the budget's", "the budget's", type=long_count)
    flag(own, "--seed", "of the initial weights and of the tasks", type=seed, default=0)
    own.add_argument("--run-dir", type=path, metavar="RUN", required=True, help="run directory (required)")
    switch(own, "--resume", "continue the run in --run-dir, or start it")
    add_device(own, default="cpu")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.cli.resuming import continued
    from metamom.common.allocator import keep_freed_memory
    from metamom.experiments.published.report import lines
    from metamom.experiments.published.run import reproduce
    from metamom.maml.implicit.solves import settings_fixed
    from metamom.training.interrupts import TrainingInterrupted

    keep_freed_memory()
    try:
        with settings_fixed(_other_proximal(arguments)):
            outcome = reproduce(
                _plan(arguments),
                run_dir=arguments.run_dir,
                resume=arguments.resume,
                root=arguments.data_root,
                tasks=arguments.tasks,
            )
    except TrainingInterrupted as interrupt:
        if interrupt.unfinished:
            print(f"continue: {continued(arguments, arguments.run_dir)}")
        raise
    print("\n".join(lines(outcome)))
    return 0


def _other_proximal(arguments: argparse.Namespace) -> str:
    """What to do about a proximal problem that the settings of the recipe do not solve."""
    return (
        "The recipe solves it as its paper does, so a few such tasks belong to it. If they are many, take a smaller "
        f"--lr, or train with other settings: metamom train {arguments.leaf.prog.split()[-1]} --recipe "
        f"{arguments.recipe} --proximal VALUE, with a larger VALUE or more iterations."
    )


def _plan(arguments: argparse.Namespace) -> Plan:
    """What the flags ask for."""
    from metamom.experiments.published.run import plan_omniglot, plan_sinusoid

    choices: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("budget", "optimizer", "lr", "seed", "iterations", "device")
    }
    if arguments.row is None:
        return plan_sinusoid(arguments.shots, arguments.recipe, **choices)
    return plan_omniglot(arguments.row, arguments.recipe, **choices)
