"""The flags of the ``metamom`` command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from metamom.common.flag_types import (
    counts,
    long_count,
    names,
    number,
    numbers,
    path,
    point_count,
    run_count,
    seed,
    step_count,
    task_count,
)
from metamom.common.numbers import shown


def parser(commands: Mapping[str, Callable[..., int]]) -> argparse.ArgumentParser:
    """The command line; each command's function is in the result's ``run``."""
    from metamom.experiments.recipes import TASKS
    from metamom.training.directory import environment

    root = argparse.ArgumentParser(
        prog="metamom",
        description="Meta-learners trained by composite momentum under biased gradients.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"metamom {environment()['metamom']}")
    kinds = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    training = kinds.add_parser("train", help="train a meta-learner").add_subparsers(required=True, metavar="TASK")
    for task in TASKS:
        train = training.add_parser(task, help=f"on {task} tasks", allow_abbrev=False, **_with_specs())
        train.set_defaults(run=commands["train"], task=task)
        _add_recipe(train, task)
        _add_method(train)
        _add_run(train, task)
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
        _add_processes(train)
        train.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into the run directory")

    evaluate = kinds.add_parser("evaluate", help="evaluate a trained meta-learner on fresh tasks", allow_abbrev=False)
    evaluate.set_defaults(run=commands["evaluate"])
    evaluate.add_argument("run_path", type=path, metavar="RUN", help="the run directory")
    evaluate.add_argument("--tasks", type=task_count, default=600, help="number of tasks (default: 600)")
    evaluate.add_argument(
        "--steps",
        type=counts(step_count),
        default=(0, 1, 5, 10),
        help="numbers of adaptation steps (default: 0,1,5,10)",
    )
    evaluate.add_argument(
        "--split", default="test", help="train, validation, test, background or evaluation (default: test)"
    )
    evaluate.add_argument(
        "--checkpoint", choices=("best", "newest"), default="best", help="which one (default: best by validation)"
    )
    evaluate.add_argument("--ways", type=task_count, help="classes a task (default: as in training)")
    evaluate.add_argument("--shots", type=point_count, help="support points, a class or task (default: as in training)")
    evaluate.add_argument("--queries", type=point_count, help="query points, a class or task (default: as in training)")
    evaluate.add_argument("--seed", type=seed, help="of the tasks (default: as in training)")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    evaluate.add_argument(
        "--data-root",
        type=path,
        metavar="DIR",
        help="where the data is (default: $METAMOM_DATA, else the user's data folder)",
    )
    _add_processes(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    comparing = kinds.add_parser("compare", help="momentum against plain meta-SGD").add_subparsers(
        required=True, metavar="TASK"
    )
    for task in TASKS:
        compare = comparing.add_parser(task, help=f"on {task} tasks", allow_abbrev=False, **_with_specs())
        compare.set_defaults(run=commands["compare"], task=task)
        _add_recipe(compare, task)
        _add_run(compare, task)
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

    _add_bias(
        kinds.add_parser("bias", help="measure a meta-gradient's bias", allow_abbrev=False, **_with_specs()), commands
    )
    _add_reproduce(kinds.add_parser("reproduce", help="the paper's experiments, run by run"), commands)

    data = kinds.add_parser("data", help="fetch or check data sets", allow_abbrev=False)
    data.set_defaults(run=commands["data"])
    data.add_argument("action", choices=("fetch", "check"))
    data.add_argument("dataset", choices=("omniglot", "mnist", "fashion"))
    data.add_argument(
        "--root",
        type=path,
        metavar="DIR",
        help="where it is, or goes (default: $METAMOM_DATA, else the user's data folder)",
    )
    return root


def parsed(root: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, or argparse's exit with status 2."""
    for argument in argv:
        name, equals, value = argument.partition("=")
        # which argparse takes for no value, or an empty list
        if name.startswith("--") and equals and value == "--":
            root.error(f"argument {name}: expected a value; got '--'")
    return root.parse_args(argv)


def _with_specs() -> dict[str, Any]:
    """Of a parser with ``--bias``: the table of SPECs below its flags, as it is."""
    from metamom.bias.spec import spec_help

    return {"epilog": spec_help(), "formatter_class": argparse.RawDescriptionHelpFormatter}


def _add_recipe(parser: argparse.ArgumentParser, task: str) -> None:
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


def _add_method(parser: argparse.ArgumentParser) -> None:
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


def _add_run(parser: argparse.ArgumentParser, task: str) -> None:
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


def _add_processes(parser: argparse.ArgumentParser) -> None:
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


def _add_bias(parser: argparse.ArgumentParser, commands: Mapping[str, Callable[..., int]]) -> None:
    """Flags of the bias meter."""
    from metamom.maml.estimators import memoryless_estimators

    parser.set_defaults(run=commands["bias"])
    parser.add_argument(
        "what",
        type=path,
        metavar="RUN|sinusoid|omniglot",
        help="a run directory, or tasks, with a learner as training starts with",
    )
    parser.add_argument(
        "--inner-batch",
        type=counts(point_count),
        metavar="M,M,...",
        help="inner batch sizes in shots (default: 1,2,5,10,20; of Omniglot, which has 20 drawings a class, 1,2,4)",
    )
    parser.add_argument(
        "--estimator",
        choices=memoryless_estimators(),
        metavar="NAME",
        help=f"{', '.join(memoryless_estimators())} (default: as in training, exact)",
    )
    parser.add_argument("--bias", metavar="SPEC", help="operator, see below (default: as in training, none)")
    parser.add_argument("--inner-lr", type=number, help="of a learner that is no RUN's (default: by task)")
    parser.add_argument("--inner-steps", type=step_count, help="of a learner that is no RUN's (default: 1)")
    parser.add_argument("--tasks", type=task_count, help="in all (default: 300; of Omniglot 60)")
    parser.add_argument("--seed", type=seed, help="of tasks, and of weights that are no RUN's (default: 0, or RUN's)")
    parser.add_argument(
        "--checkpoint", choices=("best", "newest"), default="best", help="which one (default: best by validation)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--data-root",
        type=path,
        metavar="DIR",
        help="where the data is (default: $METAMOM_DATA, else the user's data folder)",
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="where bias.md and figures/bias.png go (default: RUN, or a new folder in runs/)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else; write nothing without --out"
    )


def _add_reproduce(parser: argparse.ArgumentParser, commands: Mapping[str, Callable[..., int]]) -> None:
    """The paper's two experiments, and ours beside the authors'."""
    from metamom.experiments.paper.run import EPOCHS

    experiments = parser.add_subparsers(required=True, metavar="EXPERIMENT")
    for dataset, epochs in EPOCHS.items():
        run = experiments.add_parser(dataset, help=f"on {dataset}", allow_abbrev=False, **_with_specs())
        run.set_defaults(run=commands["reproduce"], dataset=dataset)
        run.add_argument(
            "--nodes", type=task_count, default=100, help="workers, each with a part of the images (default: 100)"
        )
        run.add_argument("--lr", type=number, default=0.5, help="step size γ (default: 0.5)")
        run.add_argument(
            "--beta", type=number, default=0.1, help="weight of the new gradient, 1 for SGD (default: 0.1)"
        )
        run.add_argument(
            "--bias", default="none", metavar="SPEC", help="operator on each gradient, see below (default: none)"
        )
        run.add_argument("--seed", type=seed, default=0, help="of the initial weights (default: 0)")
        run.add_argument("--epochs", type=long_count, help=f"total number of updates (default: {epochs})")
        run.add_argument(
            "--chunk", type=task_count, metavar="N", help="nodes at a time (default: what fits into 2 GB in all)"
        )
        run.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
        run.add_argument(
            "--data-root",
            type=path,
            metavar="DIR",
            help="where the data is (default: $METAMOM_DATA, else the user's data folder)",
        )
        run.add_argument("--run-dir", type=path, metavar="RUN", required=True, help="where it goes")
        run.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, or start it")
    table = experiments.add_parser("table", help="our runs beside the authors'", allow_abbrev=False)
    table.set_defaults(run=commands["table"])
    table.add_argument("--paper", type=path, metavar="RESULTS_DIR", required=True, help="the authors' results")
    table.add_argument(
        "--run-dir", type=path, metavar="RUN", required=True, help="with our runs; the report goes there"
    )


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


def _every(text: str) -> int:
    name, _, number = text.partition("=")
    if name != "every" or long_count(number) < 1:
        raise argparse.ArgumentTypeError(f"wanted every=N with N iterations >= 1, such as every=200; got {shown(text)}")
    return long_count(number)
