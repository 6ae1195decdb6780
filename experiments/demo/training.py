"""One run of the demo: train until the validation error is at the target."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metamom.common.allocator import keep_freed_memory
from metamom.common.files import write_atomically
from metamom.common.schema import read_record
from metamom.experiments.demo.settings import Case, Demo, Method, recipe
from metamom.training.callbacks import Callback, RunState
from metamom.training.directory import read_metrics
from metamom.training.loop import train
from metamom.training.progress import DivergedError
from metamom.training.stall import StallWarning

SAVE_EVERY = 200  # steps


class StopAtTarget(Callback):
    """Stops a run at the first validation error at or below the target."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.reached: int | None = None

    def on_start(self, state: RunState) -> None:
        if state.step == 0:
            self.reached = None
        self._stop_if_reached(state)

    def on_validation(self, state: RunState) -> None:
        assert state.validation is not None
        if self.reached is None and state.validation.mean[0] <= self.target:
            self.reached = state.step
        self._stop_if_reached(state)

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached = state["reached"]

    def _stop_if_reached(self, state: RunState) -> None:
        if self.reached is not None:
            state.stop(f"the error is at most {self.target:g} after {self.reached} steps")


class Arm(NamedTuple):
    """One run of the demo.

    Attributes:
        case: the comparison.
        method: of the two.
        lr: gamma.
        beta: 1 is plain meta-SGD.
        seed: of tasks and initial weights.
        expected: its steps, as the search had them.
    """

    case: Case
    method: Method
    lr: float
    beta: float
    seed: int
    expected: int

    def folder(self, run_dir: Path) -> Path:
        """The run's directory."""
        return run_dir / "runs" / f"{self.case.name}-{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Ending:
    """The contents of a finished run's ``outcome.json``.

    Attributes:
        steps: to the target; ``None`` if the run gave up or diverged.
        diverged: the step at which it diverged, if it did.
    """

    steps: int | None
    diverged: int | None


def finish(demo: Demo, arms: Sequence[Arm], run_dir: Path, threads: int) -> None:
    """Train some runs to their ends, or go on with them, and write each one's ``outcome.json``; skip those with one."""
    torch.set_num_threads(threads)
    for arm in arms:
        path = arm.folder(run_dir)
        if (path / "outcome.json").exists():
            continue
        end = train_to_target(demo, arm.case, arm.lr, arm.beta, arm.seed, arm.case.cap, path)
        write_atomically(path / "outcome.json", json.dumps(asdict(end)).encode())


def train_to_target(
    demo: Demo,
    case: Case,
    lr: float,
    beta: float,
    seed: int,
    cap: int,
    run_dir: Path | None = None,
) -> Ending:
    """Train to the target, for at most ``cap`` steps."""
    keep_freed_memory()
    plan = recipe(demo, case, lr, beta, seed)
    learner = plan.learner()
    at_target = StopAtTarget(demo.target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StallWarning)  # a run that stalls is an outcome here
        try:
            train(
                learner,
                plan.make_optimizer(learner),
                plan.sampler(),
                iterations=cap,
                meta_batch=case.tasks,
                workers=case.workers,
                bias=plan.operator(),
                validation=plan.sampler("validation"),
                evaluate_every=demo.every,
                evaluate_tasks=demo.validation,
                run_dir=run_dir,
                resume=run_dir is not None,
                checkpoint_every=SAVE_EVERY,
                keep_checkpoints=1,
                settings=plan.settings(),
                free=plan.free(),
                callbacks=at_target,
                label=None,
            )
        except DivergedError as error:
            return Ending(None, error.step)
    return Ending(at_target.reached, None)


def ending(arm: Arm, run_dir: Path) -> Ending | None:
    """How a run ended; ``None`` if it has not."""
    path = arm.folder(run_dir) / "outcome.json"
    if not path.exists():
        return None
    end = read_record(Ending, path)
    if end.steps is not None and not 0 < end.steps <= arm.case.cap:
        raise ValueError(
            f"{path} is damaged: a run reaches the target after 1 to {arm.case.cap} steps; got {end.steps}. Remove the "
            "run's folder, and it is repeated."
        )
    return end


def curve(arm: Arm, run_dir: Path) -> list[tuple[int, float]]:
    """A run's validation errors ``[(steps done, error)]``."""
    lines = read_metrics(arm.folder(run_dir))
    values = [(line["step"] + 1, float(line["validation"])) for line in lines if "validation" in line]
    return [(step, value) for step, value in values if math.isfinite(value)]


def sent(arm: Arm, run_dir: Path) -> int | None:
    """The bytes that a run's workers sent in all; ``None`` if there is nothing to send."""
    found = [line["wire_bytes"] for line in read_metrics(arm.folder(run_dir)) if line.get("wire_bytes")]
    return sum(found) if found else None


def steps_done(arm: Arm, run_dir: Path) -> int:
    """A run's steps so far, in units of the expected ones: all of them once it has ended, and never all before."""
    folder = arm.folder(run_dir)
    if (folder / "outcome.json").exists():
        return arm.expected
    return min(_last_step(folder / "metrics.jsonl"), int(0.95 * arm.expected))


def _last_step(path: Path) -> int:
    """Of a log that is being written."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 4096))
            whole = log.read().split(b"\n")[:-1]
        return int(json.loads(whole[-1])["step"]) + 1
    except (OSError, ValueError, IndexError, KeyError):
        return 0
