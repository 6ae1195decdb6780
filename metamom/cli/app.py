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
from pathlib import Path
from types import FrameType
from typing import Any

from metamom.cli.flags import parsed, parser
from metamom.common.allocator import keep_freed_memory, out_of_memory
from metamom.distributed import ProcessError, World, start
from metamom.training.interrupts import TrainingInterrupted
from metamom.training.progress import DivergedError

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit status: 0, 1 (diverged), 2 (bad input), 3 (another process is gone or hangs), 130, 143 (interrupted).
    """
    arguments = parsed(parser(COMMANDS), sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings(), _sigterm_as_interrupt():
            warnings.showwarning = _show_warning
            if arguments.run in (_train, _evaluate):
                with start(server=arguments.server, timeout=arguments.timeout) as world:
                    return int(arguments.run(arguments, world))
            _refuse_processes()
            command: Callable[[Arguments], int] = arguments.run
            return command(arguments)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "signal_number", signal.SIGINT)
        print(f"\nmetamom: {str(interrupt) or 'interrupted.'}", file=sys.stderr)
        return 128 + int(number)
    except DivergedError as error:
        print(f"metamom: diverged: {error}", file=sys.stderr)
        return 1
    except ProcessError as error:
        print(f"metamom: error: {error}", file=sys.stderr)
        return 3
    except (MemoryError, RuntimeError) as error:
        if (why := out_of_memory(error)) is None:
            raise
        print(f"metamom: error: not enough memory: {why}. Take smaller batches.", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("METAMOM_DEBUG"):
            raise
        print(f"metamom: error: {error}", file=sys.stderr)
        return 2


def _train(arguments: Arguments, world: World) -> int:
    from metamom.experiments.recipes import ITERATIONS, Recipe
    from metamom.training.loop import train

    keep_freed_memory()
    given = _given(arguments)
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
    iterations = ITERATIONS[recipe.task] if arguments.iterations is None else arguments.iterations
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


def _evaluate(arguments: Arguments, world: World) -> int:
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
    # tasks of --shots support points, whatever the estimator trained on
    recipe = replace(saved.recipe, **asked, estimator="exact", inner_batches="same")
    if recipe.task == "omniglot" and arguments.split in ("train", "background", "evaluation"):
        warnings.warn(
            f"the learner was trained on split train, and {arguments.split} shares characters with it: this is no "
            "accuracy on new characters. Use validation or test.",
            stacklevel=1,
        )
    sampler = recipe.sampler(arguments.split, root=arguments.data_root)
    result = evaluate(
        saved.learner, sampler, tasks=arguments.tasks, steps=arguments.steps, stream=arguments.split, world=world
    )
    if not world.first:
        return 0
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


def _bias(arguments: Arguments) -> int:
    from metamom.experiments import bias_report
    from metamom.experiments.recipes import TASKS, Recipe
    from metamom.experiments.saved import load_run

    keep_freed_memory()
    what = arguments.what
    if what in TASKS:
        recipe = Recipe(task=what, **_given(arguments))
        learner = recipe.learner()
        title = f"{what}, weights as drawn"
    else:
        fixed = [name for name in ("inner_lr", "inner_steps") if getattr(arguments, name) is not None]
        if fixed:
            raise ValueError(
                f"--{fixed[0].replace('_', '-')} belongs to the learner that the run trained; give it with a task "
                f"({', '.join(TASKS)}) in place of a run."
            )
        saved = load_run(what, arguments.checkpoint, device=arguments.device or "cpu")
        asked = {
            name: value for name in ("estimator", "bias", "seed") if (value := getattr(arguments, name)) is not None
        }
        recipe = replace(saved.recipe, **asked)
        learner = saved.learner.like(estimator=recipe.estimator)
        title = f"{recipe.task}, after {saved.step} iterations"
    where = arguments.out
    if where is None and not arguments.json:
        where = f"runs/bias-{what}-{time.strftime('%Y%m%d-%H%M%S')}" if what in TASKS else what
    if where is not None and Path(where).exists() and not Path(where).is_dir():
        raise ValueError(f"{where} is a file; the report needs a directory (--out).")
    found = bias_report.measure_recipe(
        recipe, learner, inner_batches=arguments.inner_batch, tasks=arguments.tasks, root=arguments.data_root
    )
    report = None if where is None else bias_report.write(found, Path(where), title)
    if arguments.json:
        print(json.dumps(bias_report.as_json(found)))
        return 0
    print("\n".join([title, *bias_report.summary(found), "", bias_report.table(found), "", *bias_report.slopes(found)]))
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


def _reproduce(arguments: Arguments) -> int:
    from metamom.experiments.paper.run import reproduce

    keep_freed_memory()
    rows = reproduce(
        arguments.dataset,
        run_dir=arguments.run_dir,
        nodes=arguments.nodes,
        lr=arguments.lr,
        beta=arguments.beta,
        bias=arguments.bias,
        seed=arguments.seed,
        epochs=arguments.epochs,
        chunk=arguments.chunk,
        device=arguments.device,
        root=arguments.data_root,
        resume=arguments.resume,
    )
    last = rows[-1]
    print(f"after epoch {len(rows)}: train loss {last.train_loss:.4f}, test accuracy {last.test_acc:.4f}")
    print(f"next: metamom reproduce table --paper RESULTS_DIR --run-dir {arguments.run_dir}")
    return 0


def _table(arguments: Arguments) -> int:
    from metamom.experiments.paper.table import table

    print(f"report: {table(arguments.paper, arguments.run_dir)}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "bias": _bias,
    "reproduce": _reproduce,
    "table": _table,
    "data": _data,
}


def _given(arguments: Arguments) -> dict[str, Any]:
    """The flags of a recipe that were given; the recipe knows the defaults of the others."""
    from metamom.experiments.recipes import Recipe

    names = [field.name for field in fields(Recipe) if field.name != "task"]
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def _refuse_processes() -> None:
    """Of commands that do not share their work with other processes.

    Raises:
        ValueError: where torchrun has started several.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        raise ValueError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, each of which would do all of this: start the "
            "command without it. train and evaluate share their work."
        )


def _warn_of_restarts(arguments: Arguments, world: World) -> None:
    """Where torchrun would start this command again, which could not go on where it stood."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if world.size > 1 and restarts != "0" and not (arguments.resume and arguments.run_dir):
        warnings.warn(
            f"torchrun may start this again {restarts} time(s), but it will not go on where it stood: give --run-dir "
            "and --resume.",
            stacklevel=1,
        )


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
    if os.environ.get("RANK", "0") == "0":  # of several processes, which say the same, the first
        print(f"metamom: warning: {message}", file=sys.stderr)
