"""Start or resume a training run: check its options, let all processes agree on them, and restore its state."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from metamom.batch import Sampler, check_sampler
from metamom.bias import Bias, BiasOperator, as_operator
from metamom.diagnostics.while_training import TrackBias, check_track
from metamom.distributed import SAME, World, digest
from metamom.maml.learner import MAML
from metamom.server.robust import Aggregate
from metamom.training import board
from metamom.training.directory import RunDirectory
from metamom.training.plan import (
    LATER,
    Scheduler,
    as_schedulers,
    check_momentum,
    check_optimizer,
    check_plan,
    check_record,
    describe,
)
from metamom.training.progress import Progress, Saved
from metamom.training.session import Session


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keywords of `metamom.train`, which documents them. ``world`` is a separate argument here."""

    iterations: int
    meta_batch: int
    workers: int
    bias: Bias
    aggregate: Aggregate
    schedulers: Scheduler | Sequence[Scheduler]
    validation: Sampler | None
    evaluate_every: int | None
    evaluate_tasks: int
    run_dir: str | Path | None
    resume: bool
    checkpoint_every: int
    keep_checkpoints: int
    settings: Mapping[str, Any] | None
    free: Collection[str]
    tensorboard: bool
    track_bias: TrackBias | None
    label: str

    def checked(self, learner: MAML, optimizer: Optimizer, sampler: Sampler, world: World) -> Checked:
        """Check every option, and convert it for the loop.

        Raises:
            TypeError: for an argument of the wrong type.
            ValueError: for one out of range, or in conflict with the others.
        """
        operator = as_operator(self.bias)
        check_plan(
            learner,
            sampler,
            iterations=self.iterations,
            meta_batch=self.meta_batch,
            workers=self.workers,
            bias=operator,
            aggregate=self.aggregate,
            evaluate_every=self.evaluate_every,
            evaluate_tasks=self.evaluate_tasks,
            checkpoint_every=self.checkpoint_every,
            world=world,
        )
        check_record(
            run_dir=self.run_dir,
            resume=self.resume,
            tensorboard=self.tensorboard,
            keep_checkpoints=self.keep_checkpoints,
            settings=self.settings,
            free=self.free,
            label=self.label,
        )
        check_optimizer(learner, optimizer)
        check_momentum(optimizer, operator)
        schedulers = as_schedulers(self.schedulers, optimizer)
        if self.validation is not None:
            check_sampler(self.validation, "validation is a sampler, which")
        if self.track_bias is not None:
            check_track(learner, operator, self.track_bias)
        if self.tensorboard and world.first:
            board.find_writer()
        whole = {  # JSON does not accept NumPy's numbers
            name: int(getattr(self, name))
            for name in ("iterations", "meta_batch", "workers", "checkpoint_every", "evaluate_tasks")
        }
        every = None if self.evaluate_every is None else int(self.evaluate_every)
        plain = replace(self, **whole, evaluate_every=every)  # type: ignore[arg-type]  # a dict of one kind
        return Checked(plain, operator, schedulers)


@dataclass(frozen=True)
class Checked:
    """Options that have been checked.

    Attributes:
        options: as given, with whole numbers converted to Python's.
        operator: the operator on the workers' gradients.
        schedulers: the schedulers as a list.
    """

    options: Options
    operator: BiasOperator | None
    schedulers: list[Scheduler]

    def validates_after(self, done: int) -> bool:
        """Whether to validate after ``done`` steps."""
        options = self.options
        every = options.evaluate_every
        return options.validation is not None and (done == options.iterations or bool(every and done % every == 0))

    def length(self, world: World) -> dict[str, Any]:
        """The options that may change when a run is resumed, for ``config.json``."""
        options = self.options
        tracked = options.track_bias
        return {
            "iterations": options.iterations,
            "checkpoint_every": options.checkpoint_every,
            "evaluate_every": options.evaluate_every,
            "evaluate_tasks": options.evaluate_tasks,
            "processes": world.size,
            "server": world.server,
            **({} if tracked is None else {"track_bias": [int(tracked.every), int(tracked.draws)]}),
        }

    def described(self, learner: MAML, optimizer: Optimizer, sampler: Sampler) -> tuple[Mapping[str, Any], list[str]]:
        """The settings that define the run, and the names of those that may still change when it is resumed."""
        options = self.options
        if options.settings is not None:
            return options.settings, [*options.free]
        settings = describe(
            learner,
            optimizer,
            sampler,
            meta_batch=options.meta_batch,
            workers=options.workers,
            bias=self.operator,
            aggregate=options.aggregate,
            schedulers=self.schedulers,
            validation=options.validation,
        )
        return settings, [*options.free, *(["validation"] if options.validation is None else [])]


@contextmanager
def begin(learner: MAML, optimizer: Optimizer, sampler: Sampler, checked: Checked, world: World) -> Iterator[Session]:
    """Open a run's directory, load its newest checkpoint, and yield the session for the remaining steps.

    Raises:
        ValueError: if the directory is in use or holds another run, or if processes differ.
        metamom.training.checkpoints.CheckpointError: if none of its checkpoints can be used.
    """
    options, operator = checked.options, checked.operator
    parts: dict[str, Any] = {
        "learner": learner,
        "optimizer": optimizer,
        **{f"scheduler{i}": s for i, s in enumerate(checked.schedulers)},
    }
    if operator is not None and operator.state_dict():
        operator.reset()
        parts["bias"] = operator
    settings, free = checked.described(learner, optimizer, sampler)
    length = checked.length(world)
    _agree(learner, {name: value for name, value in settings.items() if name not in free} | length, checked, world)
    with ExitStack() as stack:
        run = None
        with world.together():
            if options.run_dir is not None and world.first:
                directory = RunDirectory(
                    options.run_dir,
                    settings,
                    free=free,
                    later=LATER,
                    length=length,
                    resume=options.resume,
                    keep=options.keep_checkpoints,
                )
                run = stack.enter_context(directory)
        saved = Saved(parts, run, world, options.run_dir, options.workers)
        progress = saved.restored(options.iterations) or Progress(0, 0.0, None)
        if world.size > 1:
            torch.set_rng_state(world.broadcast_object(torch.get_rng_state))
            if operator is not None:
                n = options.workers
                operator.shard(range(n) if n < world.size else world.workers(n), each=options.aggregate != "mean")
        learner.expect(options.iterations - progress.done)
        if run is not None:  # from here on the directory changes
            run.forget_metrics_from(progress.done, until=options.iterations)
            run.write_config()
        session = Session(
            progress,
            options.iterations,
            saved,
            run=run,
            path=options.run_dir,
            label=options.label,
            unit="it",
            hidden=None if world.first else True,
            due=lambda done, seconds: done % options.checkpoint_every == 0,
        )
        if options.tensorboard and run is not None:
            session.log_to(stack.enter_context(board.writing_to(run.path / "tensorboard", progress.done)))
        if world.size > 1:  # the signal may reach any process, and is shared along with the gradients
            session.stop = lambda: max(world.statuses)
        yield stack.enter_context(session)


def _agree(learner: MAML, plan: Mapping[str, Any], checked: Checked, world: World) -> None:
    """Refuse processes that differ in their run."""
    options = checked.options
    plan = {
        **plan,
        "evaluate_every": options.evaluate_every if options.validation is not None else 0,
        "run_dir": options.run_dir is not None,
        "resume": options.resume,
    }
    alike = "Start all of them by the same command."
    world.check_same("the names of their settings", sorted(plan), alike)
    for name in sorted(plan) if world.size > 1 else ():
        world.check_same(name, json.dumps(plan[name], sort_keys=True), alike)
    world.check_same("the learner's weights", lambda: digest(learner.meta_parameters().values()), SAME)
