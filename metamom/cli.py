"""The ``metamom`` command.

Experiments and tasks are imported inside the sub-commands alone: the library does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from types import FrameType
from typing import Any

from metamom.interrupts import TrainingInterrupted
from metamom.training import DivergedError

Arguments = argparse.Namespace

TASKS = ("sinusoid", "omniglot")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (diverged), 2 (bad input), 130 or 143 (interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings(), _sigterm_as_interrupt():
            warnings.showwarning = _show_warning
            command: Callable[[Arguments], int] = arguments.run
            return command(arguments)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "signal_number", signal.SIGINT)
        print(f"\nmetamom: {str(interrupt) or 'interrupted.'}", file=sys.stderr)
        return 128 + int(number)
    except DivergedError as error:
        print(f"metamom: diverged: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("METAMOM_DEBUG"):
            raise
        print(f"metamom: error: {error}", file=sys.stderr)
        return 2


def _train(arguments: Arguments) -> int:
    from metamom.allocator import keep_freed_memory
    from metamom.experiments.recipes import ITERATIONS, Recipe
    from metamom.training import train

    keep_freed_memory()
    given = _given(arguments)
    if arguments.optimizer != "momentum" and {"beta", "first_step"} & set(given):
        raise ValueError(
            f"--beta and --first-step belong to --optimizer momentum; got --optimizer {given['optimizer']}."
        )
    recipe = Recipe(task=arguments.task, **given)
    learner = recipe.learner()
    optimizer = recipe.make_optimizer(learner)
    run_dir = arguments.run_dir or f"runs/{recipe.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    assert recipe.meta_batch is not None
    iterations = ITERATIONS[recipe.task] if arguments.iterations is None else arguments.iterations
    result = train(
        learner,
        optimizer,
        recipe.sampler(root=arguments.data_root),
        iterations=iterations,
        meta_batch=recipe.meta_batch,
        workers=recipe.workers,
        bias=recipe.operator(),
        schedulers=recipe.schedulers(optimizer),
        validation=recipe.sampler("validation", root=arguments.data_root),
        evaluate_every=arguments.evaluate_every,
        evaluate_tasks=arguments.evaluate_tasks,
        run_dir=run_dir,
        resume=arguments.resume,
        checkpoint_every=arguments.checkpoint_every,
        settings=recipe.settings(),
        tensorboard=arguments.tensorboard,
        label=f"train {recipe.task}",
    )
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


def _evaluate(arguments: Arguments) -> int:
    from metamom.evaluation import evaluate
    from metamom.experiments.saved import load_run

    saved = load_run(arguments.run_path, arguments.checkpoint, device=arguments.device)
    asked = {
        name: value for name in ("ways", "shots", "queries", "seed") if (value := getattr(arguments, name)) is not None
    }
    if saved.recipe.ways is not None and asked.get("ways", saved.recipe.ways) != saved.recipe.ways:
        raise ValueError(
            f"the learner in {arguments.run_path} tells {saved.recipe.ways} classes apart; got --ways {asked['ways']}. "
            "Train one with that many --ways."
        )
    recipe = replace(saved.recipe, **asked)
    if recipe.task == "omniglot" and arguments.split in ("train", "background", "evaluation"):
        warnings.warn(
            f"the learner was trained on split train, and {arguments.split} shares characters with it: this is no "
            "accuracy on new characters. Use validation or test.",
            stacklevel=1,
        )
    sampler = recipe.sampler(arguments.split, root=arguments.data_root)
    result = evaluate(saved.learner, sampler, tasks=arguments.tasks, steps=arguments.steps, stream=arguments.split)
    if arguments.json:
        answer = {"steps": result.steps, "mean": result.mean, "halfwidth": result.halfwidth, "tasks": arguments.tasks}
        print(json.dumps(answer))
        return 0
    kind = f"{recipe.ways}-way {recipe.shots}-shot" if recipe.ways else f"{recipe.shots}-shot"
    print(
        f"{recipe.task} {kind}, split {arguments.split}, {arguments.tasks} tasks, trained for {saved.step} iterations; "
        "statistics of the batch at hand"
    )
    print(f"{'steps':>5}  {result.metric:<8}  ± 95 %")
    for steps, mean, halfwidth in zip(result.steps, result.mean, result.halfwidth, strict=True):
        print(f"{steps:>5}  {mean:<8.4f}  {halfwidth:.4f}")
    return 0


def _compare(arguments: Arguments) -> int:
    from metamom.experiments.compare import DEFAULTS, Comparison, compare
    from metamom.experiments.recipes import ITERATIONS, Recipe

    task = arguments.task
    comparison = Comparison(
        base=Recipe(task=task, **_given(arguments)),
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


def _data(arguments: Arguments) -> int:
    from metamom.tasks.fetch import check, fetch

    if arguments.action == "fetch":
        for path in fetch(arguments.dataset, arguments.root):
            print(path)
    for part in check(arguments.dataset, arguments.root):
        print(f"{part.path}: {', '.join(f'{count:,} {what}' for what, count in part.holds.items())}, all sound")
    return 0


def _parser() -> argparse.ArgumentParser:
    from metamom.run_directory import environment

    parser = argparse.ArgumentParser(
        prog="metamom",
        description="Meta-learners trained by composite momentum under biased gradients.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"metamom {environment()['metamom']}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    training = commands.add_parser("train", help="train a meta-learner").add_subparsers(required=True, metavar="TASK")
    for task in TASKS:
        train = training.add_parser(task, help=f"on {task} tasks", allow_abbrev=False)
        train.set_defaults(run=_train, task=task)
        _add_recipe(train, task)
        _add_method(train)
        _add_run(train, task)
        train.add_argument(
            "--evaluate-every", type=int, metavar="N", help="iterations between validations (default: only at the end)"
        )
        train.add_argument(
            "--checkpoint-every",
            type=int,
            default=500,
            metavar="N",
            help="iterations between checkpoints (default: 500)",
        )
        train.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into the run directory")

    evaluate = commands.add_parser(
        "evaluate", help="evaluate a trained meta-learner on fresh tasks", allow_abbrev=False
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("run_path", metavar="RUN", help="the run directory")
    evaluate.add_argument("--tasks", type=int, default=600, help="number of tasks (default: 600)")
    evaluate.add_argument(
        "--steps", type=_integers, default=(0, 1, 5, 10), help="numbers of adaptation steps (default: 0,1,5,10)"
    )
    evaluate.add_argument(
        "--split", default="test", help="train, validation, test, background or evaluation (default: test)"
    )
    evaluate.add_argument(
        "--checkpoint", choices=("best", "newest"), default="best", help="which one (default: best by validation)"
    )
    evaluate.add_argument("--ways", type=int, help="classes a task (default: as in training)")
    evaluate.add_argument("--shots", type=int, help="support points, a class or task (default: as in training)")
    evaluate.add_argument("--queries", type=int, help="query points, a class or task (default: as in training)")
    evaluate.add_argument("--seed", type=int, help="of the tasks (default: as in training)")
    evaluate.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    evaluate.add_argument(
        "--data-root", metavar="DIR", help="where the data is (default: $METAMOM_DATA, else the user's data folder)"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    comparing = commands.add_parser("compare", help="momentum against plain meta-SGD").add_subparsers(
        required=True, metavar="TASK"
    )
    for task in TASKS:
        compare = comparing.add_parser(task, help=f"on {task} tasks", allow_abbrev=False)
        compare.set_defaults(run=_compare, task=task)
        _add_recipe(compare, task)
        _add_run(compare, task)
        compare.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)")
        compare.add_argument("--betas", type=_numbers, default=(1.0, 0.1), help="1 is plain meta-SGD (default: 1,0.1)")
        compare.add_argument(
            "--first-steps", type=_names, default=("zero",), help="of momentum: zero, gradient or both (default: zero)"
        )
        compare.add_argument("--lrs", type=_numbers, help="the grid of step sizes, for every method")
        compare.add_argument(
            "--evaluate-every",
            type=int,
            default=50,
            metavar="N",
            help="iterations between points of the curves (default: 50)",
        )
        compare.add_argument("--tasks", type=int, default=600, help="test tasks for each run (default: 600)")
        compare.add_argument(
            "--steps", type=_integers, default=(0, 1, 5, 10), help="numbers of adaptation steps (default: 0,1,5,10)"
        )
        compare.add_argument("--target", type=float, help="validation error (accuracy) to count iterations to")
        compare.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")

    data = commands.add_parser("data", help="fetch or check data sets", allow_abbrev=False)
    data.set_defaults(run=_data)
    data.add_argument("action", choices=("fetch", "check"))
    data.add_argument("dataset", choices=("omniglot",))
    data.add_argument(
        "--root", metavar="DIR", help="where it is, or goes (default: $METAMOM_DATA, else the user's data folder)"
    )
    return parser


def _add_recipe(parser: argparse.ArgumentParser, task: str) -> None:
    """Flags of the tasks and of the learner."""
    from metamom.experiments.recipes import DEFAULTS

    default = DEFAULTS[task]
    if task == "omniglot":
        parser.add_argument("--ways", type=int, help="classes a task (default: 5)")
    each = "a class" if task == "omniglot" else "a task"
    parser.add_argument("--shots", type=int, help=f"support points {each} (default: {default.shots})")
    parser.add_argument("--queries", type=int, help=f"query points {each} (default: {default.queries})")
    parser.add_argument("--meta-batch", type=int, help=f"tasks an iteration (default: {default.meta_batch})")
    parser.add_argument("--inner-lr", type=float, help=f"inner step size (default: {default.inner_lr})")
    parser.add_argument("--inner-steps", type=int, help="inner steps in training (default: 1)")
    parser.add_argument("--estimator", choices=("exact", "first-order"), help="of the meta-gradient (default: exact)")
    parser.add_argument(
        "--learn-inner-lr",
        nargs="?",
        const="entry",
        choices=("scalar", "tensor", "entry"),
        help="learn the inner step sizes, one for each entry (Meta-SGD) unless said otherwise",
    )
    parser.add_argument(
        "--adapt",
        type=_names,
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
    parser.add_argument("--workers", type=int, help="workers that the tasks are dealt to (default: 1)")
    parser.add_argument(
        "--bias",
        metavar="SPEC",
        help="operator on each worker's gradient: none, topk:K, topk:P%%, clip:TAU (default: none)",
    )
    parser.add_argument("--aggregate", choices=("mean",), help="how the server aggregates (default: mean)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16"),
        help="bfloat16 is for matrix products alone, summed in float32 (default: float32)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--data-root", metavar="DIR", help="where the data is (default: $METAMOM_DATA, else the user's data folder)"
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    """Flags of the outer optimizer."""
    parser.add_argument(
        "--optimizer", choices=("momentum", "sgd", "adam", "rmsprop"), default="momentum", help="(default: momentum)"
    )
    parser.add_argument("--lr", type=float, help="step size γ (default: by task and optimizer)")
    parser.add_argument(
        "--beta", type=float, help="weight of the new gradient, 0 < β <= 1; 1 is plain SGD (default: 0.1)"
    )
    parser.add_argument(
        "--first-step", choices=("zero", "gradient"), help="start from v_{-1} = 0 or v_0 = g_0 (default: zero)"
    )
    parser.add_argument("--seed", type=int, help="of the initial weights and of the tasks (default: 0)")


def _add_run(parser: argparse.ArgumentParser, task: str) -> None:
    """Flags of a run: how long, and where it goes."""
    from metamom.experiments.recipes import ITERATIONS

    parser.add_argument(
        "--iterations", type=int, help=f"total number, with those before a resume (default: {ITERATIONS[task]})"
    )
    parser.add_argument(
        "--schedule",
        metavar="SPEC",
        help="of γ: constant, or cosine:N, from γ to 0 in N iterations (default: constant)",
    )
    parser.add_argument("--evaluate-tasks", type=int, default=200, help="tasks for each validation (default: 200)")
    parser.add_argument("--run-dir", metavar="RUN", help="where it goes (default: a new folder in runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, or start it")


def _given(arguments: Arguments) -> dict[str, Any]:
    """The flags of a recipe that were given; the recipe knows the defaults of the others."""
    from metamom.experiments.recipes import Recipe

    names = [field.name for field in fields(Recipe) if field.name != "task"]
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"wanted whole numbers with commas between, such as 0,1,5; got {text!r}"
        ) from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted numbers with commas between, such as 1,0.1; got {text!r}") from None


def _chunk_size(text: str) -> int | str:
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number of tasks, or auto; got {text!r}") from None


def _compile_mode(text: str) -> str:
    if text != "auto":
        raise argparse.ArgumentTypeError(f"wanted auto, or nothing after --compile; got {text!r}")
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Outside the training loop, which sees to it by itself, let SIGTERM end the command as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TrainingInterrupted("stopped by SIGTERM.", number)

    if threading.current_thread() is not threading.main_thread():  # handlers can be set there alone
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"metamom: warning: {message}", file=sys.stderr)
