"""Momentum against plain meta-SGD: the same tasks and seeds, a grid of step sizes for both.

    metamom compare sinusoid --seeds 3 --betas 1,0.1 --lrs 0.01,0.03 --run-dir RUN

Every run is stored in ``RUN/runs/ARM_lr_seed``; ``RUN/report.md`` sums them up. Continue an interrupted comparison with
``--resume``; finished runs are not repeated.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from metamom.common.allocator import keep_freed_memory
from metamom.common.checks import MOST, RUNS, check_whole
from metamom.common.files import write_atomically
from metamom.common.schema import read_record
from metamom.common.watching import watched
from metamom.evaluation import evaluate
from metamom.experiments.finished import ComparisonInterrupted, finished_table
from metamom.experiments.recipes import Recipe
from metamom.experiments.report import best_learners, write_report
from metamom.experiments.shared.numerals import shortest
from metamom.experiments.shared.overall import Overall, ShowRun
from metamom.experiments.shared.processes import run_in_processes
from metamom.optim import FirstStep
from metamom.training.directory import RunDirectory, read_log
from metamom.training.loop import train
from metamom.training.options import Options
from metamom.training.plan import check_momentum, check_plan
from metamom.training.progress import DivergedError


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how it is judged.

    Attributes:
        base: the settings that all runs share; its lr, beta, first step and seed are replaced.
        betas: 1 is plain meta-SGD.
        first_steps: for each beta below 1.
        lrs: the grid of step sizes, the same for every arm.
        seeds: 0, 1, ..., seeds - 1.
        iterations: steps of every run.
        evaluate_every: steps between points of the learning curves.
        validation_tasks: for each point.
        test_tasks: for the final evaluation of each run.
        steps: numbers of adaptation steps in the final evaluation.
        target: error to reach on validation (an accuracy for classification).
    """

    base: Recipe
    betas: tuple[float, ...]
    first_steps: tuple[FirstStep, ...]
    lrs: tuple[float, ...]
    seeds: int
    iterations: int
    evaluate_every: int
    validation_tasks: int
    test_tasks: int
    steps: tuple[int, ...]
    target: float

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.betas or not self.lrs or not self.first_steps:
            raise ValueError("a comparison needs at least one seed, one beta, one first step and one lr.")
        for name, values in (("betas", self.betas), ("first_steps", self.first_steps), ("lrs", self.lrs)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other; got {values}.")
        check_whole("seeds", self.seeds, 1, RUNS)
        check_whole("iterations", self.iterations, 1, MOST)
        if self.test_tasks < 2:
            raise ValueError(f"an interval needs at least 2 test tasks; got {self.test_tasks}.")
        if not self.steps or min(self.steps) < 0:
            raise ValueError(f"steps must be one or more numbers of inner steps >= 0; got {self.steps}.")
        for arm in self.arms():  # so that a bad value is an error before the first run, not after hours
            arm.make_optimizer(arm.learner())

    def arms(self) -> Iterator[Recipe]:
        """The recipes to compare, without seeds: every beta with every first step and every step size."""
        for beta in self.betas:
            for first_step in self.first_steps if beta < 1 else ("zero",):
                for lr in self.lrs:
                    yield replace(self.base, optimizer="momentum", beta=beta, first_step=first_step, lr=lr)


class Outcome(NamedTuple):
    """The result of one run.

    Attributes:
        recipe: the run's settings.
        curve: validation ``[(steps done, mean)]``.
        steps: numbers of adaptation steps of the final evaluation.
        test: mean over the test tasks after each of them; ``None`` if the run diverged.
        halfwidth: of the 95 % interval over the test tasks; ``None`` if the run diverged.
        diverged: the step at which it diverged, if it did.
        path: the run directory.
    """

    recipe: Recipe
    curve: list[tuple[int, float]]
    steps: tuple[int, ...]
    test: tuple[float, ...] | None
    halfwidth: tuple[float, ...] | None
    diverged: int | None
    path: Path


@dataclass(frozen=True)
class Ending:
    """The contents of a finished run's ``outcome.json``: see `Outcome`."""

    diverged: int | None
    test: tuple[float, ...] | None
    halfwidth: tuple[float, ...] | None

    def check(self, comparison: Comparison, path: Path) -> None:
        """Refuse values that no run of the comparison can have.

        Raises:
            ValueError: naming the file.
        """
        last = comparison.iterations
        if self.diverged is not None and not 0 <= self.diverged <= last:
            raise ValueError(
                f"{path} is damaged: a run of {last} iterations diverges at a step from 0 to {last}; got "
                f"{self.diverged!r:.80}. Remove it, and the run continues."
            )
        if not _finite(self.test, self.halfwidth) or min(self.halfwidth or (), default=0.0) < 0:
            raise ValueError(
                f"{path} is damaged: test results are finite numbers, and their intervals' half-widths >= 0; got "
                f"{self.test!r:.80} and {self.halfwidth!r:.80}. Remove it, and the run is evaluated again."
            )
        sizes = [0 if each is None else len(each) for each in (self.test, self.halfwidth)]
        if sizes != [len(comparison.steps) if self.diverged is None else 0] * 2:
            raise ValueError(
                f"{path} is damaged: it should hold a test result after each of {comparison.steps} steps, or where "
                "the run diverged. Remove it, and the run is evaluated again."
            )


def compare(
    comparison: Comparison, run_dir: str | Path, *, root: str | None = None, resume: bool = False, jobs: int = 1
) -> Path:
    """Run every arm from every seed, then write the report.

    Args:
        comparison: what to compare.
        run_dir: where runs and report go.
        root: the folder of the data; ``None`` to look where `Omniglot` does.
        resume: continue an interrupted comparison.
        jobs: runs at a time, each in its own process with its share of the threads.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: for a ``run_dir`` that holds something else; see `RunDirectory`.
        ComparisonInterrupted: after a signal, once the state of each run is saved.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be a number of processes >= 1; got {jobs}.")
    base = comparison.base
    for split in ("train", "validation", "test"):  # before anything is written: the data exists and is large enough
        sampler = base.sampler(split, root=root)
        if split == "train":
            base.check_outputs(base.learner(), sampler)
        check_plan(
            base.learner(),
            sampler,
            Options(**_options(comparison, base)),
        )
    for arm in comparison.arms():
        check_momentum(arm.make_optimizer(arm.learner()), arm.operator())
    free = tuple(f"base.{name}" for name in Recipe.free())
    with RunDirectory(run_dir, asdict(comparison), free=free, resume=resume) as run:
        recipes = [replace(arm, seed=seed) for seed in range(comparison.seeds) for arm in comparison.arms()]
        finished = [recipe for recipe in recipes if (_place(recipe, run.path) / "outcome.json").exists()]
        ended = [_ended(comparison, recipe, run.path) for recipe in finished]  # refused before anything is written
        if len(finished) == len(recipes):
            best_learners(comparison, ended)
        run.write_config()
        left = [recipe for recipe in recipes if recipe not in finished]
        try:
            _run_all(comparison, left, run.path, root, jobs, len(finished))
            outcomes = [_ended(comparison, recipe, run.path) for recipe in recipes]
            return write_report(comparison, outcomes, run.path, len(finished))
        except KeyboardInterrupt as interrupt:
            there = [recipe for recipe in recipes if (_place(recipe, run.path) / "outcome.json").exists()]
            table = finished_table(comparison, [_ended(comparison, each, run.path) for each in there], len(recipes))
            number = getattr(interrupt, "signal_number", signal.SIGINT)
            raise ComparisonInterrupted(str(interrupt) or "interrupted.", number, table) from interrupt


def _options(comparison: Comparison, recipe: Recipe) -> dict[str, Any]:
    """The options of `metamom.train` for a run of the comparison."""
    return {
        "iterations": comparison.iterations,
        "meta_batch": recipe.meta_batch or 1,
        "workers": recipe.workers,
        "bias": recipe.operator(),
        "aggregate": recipe.aggregate,
        "attack": recipe.attack,
        **recipe.federation(),
        "clip_grad": recipe.clip_grad,
        "evaluate_every": comparison.evaluate_every,
        "evaluate_tasks": comparison.validation_tasks,
    }


def _run_all(
    comparison: Comparison, recipes: Sequence[Recipe], run_dir: Path, root: str | None, jobs: int, finished: int
) -> None:
    """Do the runs that are not finished, in this process or in others."""
    calls = [(comparison, recipe, run_dir, root) for recipe in recipes]
    if jobs > 1:
        run_in_processes(_run, calls, jobs, "compare", ended=finished)
        return
    with Overall("compare", finished + len(calls), finished) as overall:
        for call in calls:
            _run(*call, overall=overall)
            overall.end(_place(call[1], run_dir).name)


def _place(recipe: Recipe, run_dir: Path) -> Path:
    assert recipe.lr is not None
    name = f"beta{shortest(recipe.beta)}-{recipe.first_step}_lr{shortest(recipe.lr)}_seed{recipe.seed}"
    return run_dir / "runs" / name


def _run(
    comparison: Comparison, recipe: Recipe, run_dir: Path, root: str | None, overall: Overall | None = None
) -> Outcome:
    """Do one run and its final evaluation, or read it from disk if it is finished."""
    keep_freed_memory()
    path = _place(recipe, run_dir)
    ending = path / "outcome.json"
    if ending.exists():
        return _ended(comparison, recipe, run_dir)

    def watch(done: int, tasks: int) -> None:
        if overall is not None:
            overall.now(f"{path.name} evaluated on {done}/{tasks} tasks")

    with watched(None, watch):
        learner = recipe.learner()
        optimizer = recipe.make_optimizer(learner)
        sampler, validation = (recipe.sampler(split, root=root) for split in ("train", "validation"))
        try:
            train(
                learner,
                optimizer,
                sampler,
                **_options(comparison, recipe),
                schedulers=recipe.schedulers(optimizer),
                validation=validation,
                run_dir=path,
                resume=True,
                checkpoint_every=comparison.evaluate_every,
                keep_checkpoints=1,
                settings=recipe.with_kept(sampler, validation).settings(),
                free=recipe.free(),
                callbacks=None if overall is None else ShowRun(overall, path.name),
                label=None,
            )
        except DivergedError as error:
            end = Ending(error.step, None, None)
        else:
            test = evaluate(
                learner, recipe.sampler("test", root=root), tasks=comparison.test_tasks, steps=comparison.steps
            )
            end = Ending(None, test.mean, test.halfwidth)
            if not _finite(test.mean, test.halfwidth):  # on test tasks: the loss has no mean
                end = Ending(comparison.iterations, None, None)
    write_atomically(ending, json.dumps(asdict(end)).encode())
    return _ended(comparison, recipe, run_dir)


def _ended(comparison: Comparison, recipe: Recipe, run_dir: Path) -> Outcome:
    """Read the result of a finished run.

    Raises:
        ValueError: naming the damaged file, and what to do.
    """
    path = _place(recipe, run_dir)
    ending = path / "outcome.json"
    ended = read_record(Ending, ending)
    ended.check(comparison, ending)
    curve = _curve(path)
    if ended.diverged is None and (not curve or curve[-1][0] != comparison.iterations):
        raise ValueError(
            f"the run in {path} is finished, but its metrics.jsonl has no last validation: it is damaged. Restore it "
            "from a copy, or remove the run's folder to repeat the run."
        )
    return Outcome(recipe, curve, comparison.steps, ended.test, ended.halfwidth, ended.diverged, path)


def _finite(*groups: tuple[float, ...] | None) -> bool:
    return all(math.isfinite(each) for group in groups for each in group or ())


def _curve(path: Path) -> list[tuple[int, float]]:
    """A run's validations ``[(steps done, mean)]``."""
    curve = []
    log = read_log(path)
    if log.damaged:  # the run is finished, so no resume will repair them
        raise ValueError(
            f"{path / 'metrics.jsonl'}, line {log.damaged[0]} is not a JSON object with a step above the earlier "
            "ones. Delete the line, or remove the run's folder to repeat the run."
        )
    for line in log.lines:
        if "validation" in line:
            if not isinstance(line["validation"], float):
                raise ValueError(
                    f"{path / 'metrics.jsonl'} is damaged: the validation of step {line['step']} should be a number; "
                    f"got {line['validation']!r:.80}."
                )
            curve.append((line["step"] + 1, line["validation"]))
    return curve
