"""Start or resume a training run: check its options, let all processes agree on them, and restore its state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from metamom.batch import Sampler, check_sampler, located
from metamom.bias import BiasOperator, as_operator
from metamom.diagnostics.while_training import check_track
from metamom.distributed import SAME, World, digest
from metamom.evaluation import Evaluation
from metamom.maml.learner import MAML
from metamom.server.down import DownBias
from metamom.server.part import normalised_weights
from metamom.server.participation import Participation
from metamom.server.robust import RobustMean
from metamom.training import board, plateau
from metamom.training.callbacks import STOP, Callback, Callbacks
from metamom.training.directory import RunDirectory
from metamom.training.early_stopping import EarlyStopping
from metamom.training.given_callbacks import as_callbacks
from metamom.training.options import Options
from metamom.training.plan import (
    LATER,
    check_momentum,
    check_optimizer,
    check_plan,
    describe,
    step_size,
)
from metamom.training.progress import Progress, Saved
from metamom.training.schedulers import Scheduler, as_schedulers
from metamom.training.session import Session
from metamom.training.variant import check_eta_schedules, check_following


@dataclass(frozen=True)
class Checked:
    """Options that have been checked.

    Attributes:
        options: as given, with NumPy's numbers converted to Python's.
        operator: the operator on the workers' gradients.
        schedulers: the schedulers as a list.
        callbacks: the callbacks as a list, on the first process; none on the others.
        robust: how the server combines the workers' gradients, with its state and the attack.
    """

    options: Options
    operator: BiasOperator | None
    schedulers: list[Scheduler | ReduceLROnPlateau]
    callbacks: list[Callback]
    robust: RobustMean

    def advance(self) -> None:
        """Advance those schedulers that do so after each step."""
        for each in self.schedulers:
            if not isinstance(each, ReduceLROnPlateau):
                each.step()

    def advance_after(self, validation: Evaluation) -> None:
        """Advance those schedulers that do so after each validation."""
        for each in self.schedulers:
            if isinstance(each, ReduceLROnPlateau):
                plateau.advance(each, validation)

    def validates_after(self, done: int) -> bool:
        """Whether to validate after ``done`` steps."""
        options = self.options
        every = options.evaluate_every
        return options.validation is not None and (done == options.iterations or bool(every and done % every == 0))

    def length(self, world: World) -> dict[str, Any]:
        """The options that may change when a run is resumed, for ``config.json``."""
        return {**self.options.recorded("length"), "processes": world.size, "server": world.server}

    def described(self, learner: MAML, optimizer: Optimizer, sampler: Sampler) -> tuple[Mapping[str, Any], list[str]]:
        """The settings that define the run, and the names of those that may still change when it is resumed."""
        options = self.options
        if options.settings is not None:
            return options.settings, [*options.free]
        decided = {**options.recorded("settings"), "bias": self.operator, "schedulers": self.schedulers}
        where = located(sampler)
        settings = {**describe(learner, optimizer, sampler, **decided), **({"location": where} if where else {})}
        return settings, [*options.free, "location", *(["validation"] if options.validation is None else [])]


def check(options: Options, learner: MAML, optimizer: Optimizer, sampler: Sampler, world: World) -> Checked:
    """Check the arguments of `metamom.train`, and convert the options for the loop.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for one out of range, or in conflict with the others.
    """
    operator = as_operator(options.bias)
    options = check_plan(learner, sampler, replace(options, bias=operator), world)
    check_optimizer(learner, optimizer)
    if options.local_steps > 1 and options.local_lr is None:
        step_size(optimizer)
    check_momentum(optimizer, operator)
    check_following(learner, optimizer, operator, options, world)
    schedulers = as_schedulers(options.schedulers, optimizer)
    check_eta_schedules(schedulers, operator)
    if options.validation is not None:
        check_sampler(options.validation, "validation needs a sampler, which")
    if options.track_bias is not None:
        check_track(learner, operator, options.track_bias)
    callbacks = as_callbacks(options.callbacks)
    during = options.validation is not None and options.evaluate_every is not None
    plateau.check_plateaus(schedulers, during)
    if any(isinstance(each, EarlyStopping) for each in callbacks) and not during:
        raise ValueError(
            "EarlyStopping (--patience) needs validations during the run: pass validation= and evaluate_every= "
            "(--evaluate-every N)."
        )
    if options.tensorboard:
        callbacks.append(board.TensorBoard())
    if world.first and any(isinstance(each, board.TensorBoard) for each in callbacks):
        board.find_writer()
    robust = RobustMean(options.aggregate, options.attack)
    return Checked(options, operator, schedulers, callbacks if world.first else [], robust)


@contextmanager
def begin(learner: MAML, optimizer: Optimizer, sampler: Sampler, checked: Checked, world: World) -> Iterator[Session]:
    """Open a run's directory, load its newest checkpoint, and yield the session for the remaining steps.

    Raises:
        ValueError: if the directory is in use or holds another run, or if processes differ.
        metamom.training.checkpoints.CheckpointError: if none of its checkpoints can be used.
    """
    options, operator = checked.options, checked.operator
    parts = _parts(learner, optimizer, checked)
    callbacks = Callbacks(checked.callbacks, world)
    if checked.callbacks:
        parts["callbacks"] = callbacks
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
                each = checked.robust.gathers or normalised_weights(options.worker_weights, n) is not None
                operator.shard(range(n) if n < world.size else world.workers(n), each=each)
        learner.expect(options.iterations - progress.done)
        if run is not None:  # from here on the directory changes
            run.forget_metrics_from(progress.logged, until=options.iterations)
            run.write_config()
        session = Session(
            progress,
            options.iterations,
            saved,
            run=run,
            path=options.run_dir,
            label=options.label or "",
            unit="it",
            hidden=None if world.first and options.label is not None else True,
            due=lambda done, seconds: done % options.checkpoint_every == 0,
            callbacks=callbacks,
        )
        if world.size > 1:  # the signal may reach any process, and is shared along with the gradients
            session.stop = lambda: max(0 if status == STOP else status for status in world.statuses)
        stack.enter_context(session)
        path = None if options.run_dir is None else Path(options.run_dir)
        seen = {"learner": learner, "optimizer": optimizer, "run_dir": path, "settings": settings}
        stack.enter_context(callbacks.starting(**seen, iterations=options.iterations, step=progress.done))
        yield session


def _parts(learner: MAML, optimizer: Optimizer, checked: Checked) -> dict[str, Any]:
    """What a run's checkpoints hold, but for its callbacks; the operator's state starts from zero."""
    options, operator = checked.options, checked.operator
    parts: dict[str, Any] = {
        "learner": learner,
        "optimizer": optimizer,
        **{f"scheduler{i}": s for i, s in enumerate(checked.schedulers)},
    }
    if operator is not None and operator.state_dict():
        operator.reset()
        parts["bias"] = operator
    if checked.robust.stateful:
        parts["aggregate"] = checked.robust
    for name, part in (("participation", options.participation), ("down_bias", options.down_bias)):
        if isinstance(part, (Participation, DownBias)):
            part.reset()
            parts[name] = part
    return parts


def _agree(learner: MAML, plan: Mapping[str, Any], checked: Checked, world: World) -> None:
    """Refuse processes that differ in their run."""
    plan = {**plan, **checked.options.compared()}
    alike = "Start all of them by the same command."
    world.check_same("the names of their settings", sorted(plan), alike)
    for name in sorted(plan) if world.size > 1 else ():
        world.check_same(name, json.dumps(plan[name], sort_keys=True), alike)
    world.check_same("the learner's weights", lambda: digest(learner.meta_parameters().values()), SAME)
