"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch.optim import Optimizer

from metamom.batch import Sampler, TaskBatch
from metamom.bias import Bias, BiasOperator, NonFiniteError
from metamom.common.summaries import summary
from metamom.diagnostics.while_training import TrackBias, track
from metamom.distributed import World, as_world
from metamom.evaluation import Evaluation, evaluate
from metamom.maml.checks.batch_checks import NonFiniteDataError
from metamom.maml.learner import MAML
from metamom.maml.steps.server_step import Backward
from metamom.server.down import DownBias
from metamom.server.participation import Participation
from metamom.server.robust import Aggregate
from metamom.training.begin import Checked, begin, check
from metamom.training.callbacks import Callback
from metamom.training.options import Options
from metamom.training.plan import check_momentum, federation, step_size
from metamom.training.schedulers import Schedulers
from metamom.training.session import Session
from metamom.training.stall import StallMonitor
from metamom.training.variant import following

# Steps between measurements of the bias error with several processes, which have to exchange whole gradients.
MEASURE_EVERY = 50


class TrainResult(NamedTuple):
    """The result of `train`.

    Attributes:
        metrics: one entry for each step of this call: ``step, loss, accuracy, grad_norm, bias_error, wire_bytes,
            sent_bytes, seconds, world_size``; with ``clip_grad``, also ``clip_factor``, while ``grad_norm`` is the norm
            before; with ``down_bias``, also ``wire_bytes_down``; if measured, also ``validation`` with
            ``validation_halfwidth``, and ``measured_bias`` (`metamom.diagnostics.track`).
        validation: the last validation, if any.
        resumed_from: number of steps before this call.
        stopped: the reason, if a callback has stopped the run.
        run_dir: the run directory, if any.
    """

    metrics: list[dict[str, Any]]
    validation: Evaluation | None
    resumed_from: int
    stopped: str | None = None
    run_dir: Path | None = None

    def __repr__(self) -> str:
        done = self.resumed_from + len(self.metrics)
        values: dict[str, Any] = {"steps": done, "resumed_from": self.resumed_from or None}
        if self.metrics:
            values["loss"] = self.metrics[-1]["loss"]
        if self.validation is not None:
            values[f"validation_{self.validation.metric}"] = self.validation.mean[0]
            measured = [line["validation"] for line in self.metrics if not math.isnan(line.get("validation", math.nan))]
            best = max if self.validation.metric == "accuracy" else min
            values["best"] = best(measured, default=None)
        whole = {"run_dir": None if self.run_dir is None else str(self.run_dir), "stopped": self.stopped}
        ends = [f", {name}={value!r}" for name, value in whole.items() if value is not None]
        return f"{summary(type(self).__name__, values).removesuffix(')')}{''.join(ends)})"


def train(
    learner: MAML,
    optimizer: Optimizer,
    sampler: Sampler,
    *,
    iterations: int,
    meta_batch: int,
    workers: int = 1,
    bias: Bias = None,
    aggregate: Aggregate = "mean",
    attack: str | None = None,
    participation: Participation | float | None = None,
    worker_weights: Sequence[float] | None = None,
    local_steps: int = 1,
    local_lr: float | None = None,
    down_bias: DownBias | BiasOperator | str | None = None,
    clip_grad: float | None = None,
    schedulers: Schedulers = (),
    validation: Sampler | None = None,
    evaluate_every: int | None = None,
    evaluate_tasks: int = 100,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    keep_checkpoints: int = 3,
    settings: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    callbacks: Callback | Sequence[Callback] | None = (),
    tensorboard: bool = False,
    track_bias: TrackBias | None = None,
    world: World | None = None,
    label: str | None = "train",
) -> TrainResult:
    """Train a meta-learner: sample, composite meta-gradients, bias, aggregate, optimizer step.

    Step k uses the tasks of step k. So a run depends only on its seeds, and a resumed run ends with the same weights as
    an uninterrupted one, bit for bit. On Ctrl-C or SIGTERM the current step finishes and is saved, and an error is
    raised. If the loss stalls or oscillates, one `metamom.training.stall.StallWarning` suggests whether gamma, beta or
    bias is the cause.

    Args:
        learner: the learner to train; batches are moved to its device and dtype.
        optimizer: any torch optimizer over ``learner.parameters()``, or some of them.
        sampler: the tasks.
        iterations: total number of steps, including those done before a resume.
        meta_batch: tasks a step.
        workers: n, must divide ``meta_batch``.
        bias: the operator on each worker's gradient, its SPEC (``"topk:5%"``), or a function ``[d] -> [d]``. Its state
            is reset at the start of the run, and saved with it.
        aggregate: how the server combines the workers' gradients; see `metamom.server.robust_mean`. If it has a
            state, it starts with the run, and is saved with it.
        attack: what the last F workers send instead of their gradients, to test ``aggregate``: ``"alie:2"``; see
            `metamom.server.attacks`.
        participation: the share of workers that are present in each step, or a `Participation` with a seed of its own;
            see `MAML.backward`. Its count of steps is reset at the start of the run, and saved with it.
        worker_weights: a positive weight for each worker, scaled to sum 1; equal by default.
        local_steps: the meta-steps that each worker takes on its own tasks between two averages; see `MAML.backward`.
        local_lr: the step size of local steps; ``None`` for the optimizer's of the same step.
        down_bias: compress the server's message to the workers: a `metamom.server.DownBias`, its operator or SPEC.
            Its state is reset at the start of the run, and saved with it. Validations use the server's weights.
        clip_grad: the largest norm of the aggregated gradient; a longer one is scaled down to it before the step. (The
            operator ``"clip:..."`` clips each worker's gradient.) The metrics get ``clip_factor``, in (0, 1].
        schedulers: one or several schedulers of this optimizer; each advances after every step. `ReduceLROnPlateau`
            advances at each validation; with ``mode="min"``, an accuracy counts as ``1 - accuracy``.
        validation: tasks for validation, drawn from stream ``"validation"``.
        evaluate_every: steps between validations; only after the last step if ``None``.
        evaluate_tasks: tasks for each validation.
        run_dir: the directory for configuration, metrics and checkpoints; nothing is written if ``None``.
        resume: continue from the newest good checkpoint in ``run_dir``, or start a new run if there is none.
        checkpoint_every: steps between checkpoints; there is always one at the start and one at the end.
        keep_checkpoints: how many of the newest to keep, in addition to the best (by validation).
        settings: the settings that define the run, as JSON values; derived from the arguments if ``None``. A resumed
            run must have the same.
        free: names of settings that only affect where and how the run is computed, and so may change on resume.
        callbacks: one or several `metamom.training.Callback`, such as `metamom.training.EarlyStopping`: they see every
            step and validation, and may stop the run. Only those of process 0 are called.
        tensorboard: also write losses for TensorBoard into ``run_dir``.
        track_bias: measure the bias at intervals, at the weights of the step's gradient, and add it to the metrics as
            ``measured_bias``. Training does not change, bit for bit.
        world: the processes that train together (`metamom.distributed.start`); one by default. Each calls this with the
            same arguments. The result does not depend on their number, so a run can resume with a different number.
            The only exception is a compiled model with random draws (dropout). Only process 0 reads and writes
            ``run_dir`` and shows progress.
        label: label of the progress: a bar in a terminal; elsewhere lines on standard error, every 30 seconds, at each
            validation and at the end. ``None`` shows no progress.

    Returns:
        A `TrainResult`, the same on all processes except for the seconds.

    Raises:
        TypeError: for anything but a learner, optimizer, sampler, scheduler, operator or callback; for an optimizer
            that needs a closure or sparse gradients; for settings that are not JSON values.
        ValueError: for an argument out of range; for an optimizer over parameters that are not the learner's, or
            without its learned step sizes; for a ``run_dir`` in use, with an existing run if ``resume`` is false, with
            a run of different settings, or with a run of more iterations. A refused run does not change.
        metamom.training.checkpoints.CheckpointError: if none of its checkpoints can be used.
        DivergedError: at the first loss, gradient or weight that is not finite.
        metamom.maml.checks.batch_checks.NonFiniteDataError: instead, if the data of that step is not finite.
        TrainingInterrupted: after a signal to any process, once the state is saved.
        metamom.distributed.ProcessError: if another process has died or hangs. All processes raise any other failure
            of one process.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import MAML, CompositeMomentum, nets
        >>> from metamom.tasks import Sinusoid
        >>> learner = MAML(nets.SinusoidMLP(), F.mse_loss)
        >>> optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
        >>> result = train(learner, optimizer, Sinusoid(), iterations=3, meta_batch=4)
        >>> len(result.metrics)
        3
    """
    return run(Options.of(locals()), learner, optimizer, sampler, as_world(world))


def run(options: Options, learner: MAML, optimizer: Optimizer, sampler: Sampler, world: World) -> TrainResult:
    """`train`, with its keywords as a record."""
    with world.together(), ExitStack() as stack:
        checked = check(options, learner, optimizer, sampler, world)
        session = stack.enter_context(begin(learner, optimizer, sampler, checked, world))
        return _steps(session, learner, optimizer, sampler, checked, world)


def _steps(
    session: Session, learner: MAML, optimizer: Optimizer, sampler: Sampler, checked: Checked, world: World
) -> TrainResult:
    """The algorithm (sample, meta-gradient, bias and aggregate, momentum), with checks and measurements."""
    options, operator, like = checked.options, checked.operator, next(learner.model.parameters())
    monitor = StallMonitor(optimizer, operator, learner.estimator) if world.first else None
    resumed_from, metrics = session.progress.logged, []
    validation: Evaluation | None = None
    if (line := session.progress.unvalidated) is not None:
        validation = _finished(session, learner, line, checked, world)
        metrics.append(line)
    for step in session:
        measured = _tracked(learner, operator, options.track_bias, step, session)
        check_momentum(optimizer, operator)  # a schedule may have changed beta

        batch = world.sample(sampler, step, options.meta_batch).to(like.device, like.dtype)
        optimizer.zero_grad()
        loss, report = _gradient(learner, optimizer, batch, step, checked, world, session)
        report |= _clipped(learner, report, options.clip_grad)
        optimizer.step()
        checked.advance()

        line = {"step": step, "loss": float(loss), **report, **measured, "world_size": world.size}
        if monitor is not None:
            monitor.update(line["loss"], line["grad_norm"] * line.get("clip_factor", 1.0))
        rate = options.meta_batch / session.stepped()
        validation = _finished(session, learner, line, checked, world, rate) or validation
        metrics.append(line)
    run_dir = None if options.run_dir is None else Path(options.run_dir)
    return TrainResult(metrics, validation, resumed_from, session.stopped, run_dir)


def _finished(
    session: Session, learner: MAML, line: dict[str, Any], checked: Checked, world: World, rate: float | None = None
) -> Evaluation | None:
    """Finish a step: validate if that is due, log and save.

    Args:
        session: of the run.
        learner: to validate.
        line: the step's metrics; gets the validation.
        checked: the options.
        world: the processes.
        rate: tasks a second, to show.
    """
    best = validation = None
    if checked.validates_after(line["step"] + 1):
        validation = _validated(session, learner, line, checked.options, world)
        line.update(validation=validation.mean[0], validation_halfwidth=validation.halfwidth[0])
        checked.advance_after(validation)
        best = validation.mean[0] if _better(validation, session.progress.best) else None
    session.finish(line, _shown(line, rate), best, validation)
    return validation


def _gradient(
    learner: MAML,
    optimizer: Optimizer,
    batch: TaskBatch,
    step: int,
    checked: Checked,
    world: World,
    session: Session,
) -> Backward:
    """Write the server's gradient to ``.grad``, and share a signal with all processes along with it.

    Raises:
        DivergedError: for a loss or gradient that is not finite.
        NonFiniteDataError: if the batch is not finite.
    """
    world.status = session.interrupts.caught or 0
    options = checked.options
    local_lr = step_size(optimizer) if options.local_steps > 1 and options.local_lr is None else options.local_lr
    plan = federation(options, local_lr)
    try:
        found = learner.backward(
            batch,
            workers=options.workers,
            bias=checked.operator,
            aggregate=checked.robust,
            participation=plan.participation,
            worker_weights=plan.worker_weights,
            local_steps=plan.local_steps,
            local_lr=plan.local_lr,
            down_bias=plan.down,
            world=world,
            measure=world.size == 1 or step % MEASURE_EVERY == 0,
            check_finite=False,  # checked below, where the step is known
            momentum=following(optimizer),
        )
    except NonFiniteDataError as error:
        raise NonFiniteDataError(f"step {step}: {error}") from error
    except NonFiniteError as error:
        raise session.diverged("a worker's gradient") from error
    norm = found.metrics["grad_norm"]
    session.check_finite({"the loss": float(found.loss), "the gradient": math.nan if norm is None else norm})
    return found


def _clipped(learner: MAML, report: Mapping[str, Any], most: float | None) -> dict[str, float]:
    """Scale the server's gradient to a norm of at most ``most``, and report the factor."""
    if most is None:
        return {}
    norm = report["grad_norm"]
    factor = 1.0 if norm <= most else most / norm
    if factor < 1:
        for parameter in learner.meta_parameters().values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
    return {"clip_factor": factor}


def _validated(session: Session, learner: MAML, line: dict[str, Any], options: Options, world: World) -> Evaluation:
    assert options.validation is not None

    def heed() -> None:  # share a signal with all processes
        world.status = session.interrupts.caught or 0
        world.agree()

    with session.validating(line, heed):
        return evaluate(
            learner,
            options.validation,
            tasks=options.evaluate_tasks,
            steps=(learner.inner_steps,),
            stream="validation",
            world=world,
        )


def _tracked(
    learner: MAML, operator: BiasOperator | None, plan: TrackBias | None, step: int, session: Session
) -> dict[str, dict[str, float]]:
    """The measured bias, at steps when it is due. Its time does not count towards the step."""
    if plan is None or step % plan.every:
        return {}
    try:
        return {"measured_bias": track(learner, operator, plan)}
    except NonFiniteError as error:
        raise session.diverged("a worker's gradient") from error
    finally:
        session.restart_clock()


def _better(checked: Evaluation, best: float | None) -> bool:
    if math.isnan(checked.mean[0]):
        return False
    if best is None:
        return True
    return checked.mean[0] > best if checked.metric == "accuracy" else checked.mean[0] < best


def _shown(line: Mapping[str, Any], rate: float | None) -> dict[str, str]:
    right = {} if line["accuracy"] is None else {"accuracy": f"{line['accuracy']:.3f}"}
    return {"loss": f"{line['loss']:.4f}", **right, **({} if rate is None else {"tasks/s": f"{rate:.0f}"})}
