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
from metamom.diagnostics.bias_meter import TrackBias, track
from metamom.distributed import World, as_world
from metamom.evaluation import Evaluation, evaluate
from metamom.maml.batch_checks import NonFiniteDataError
from metamom.maml.learner import MAML
from metamom.maml.server_step import Backward
from metamom.server.robust import Aggregate
from metamom.training.begin import Checked, Options, begin
from metamom.training.plan import Scheduler, check_momentum
from metamom.training.session import Session
from metamom.training.stall import StallMonitor

# Steps between measurements of the bias error over several processes, which exchange whole gradients for it.
MEASURE_EVERY = 50


class TrainResult(NamedTuple):
    """What `train` returns.

    Attributes:
        metrics: one entry for each step that this call did: ``step, loss, accuracy, grad_norm, bias_error,
            wire_bytes, sent_bytes, seconds, world_size``, and ``validation`` with ``validation_halfwidth``, and
            ``measured_bias`` (`metamom.diagnostics.track`), where they were measured.
        validation: the last validation, if any.
        resumed_from: number of steps that were done before this call.
    """

    metrics: list[dict[str, Any]]
    validation: Evaluation | None
    resumed_from: int


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
    schedulers: Scheduler | Sequence[Scheduler] = (),
    validation: Sampler | None = None,
    evaluate_every: int | None = None,
    evaluate_tasks: int = 100,
    run_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
    keep_checkpoints: int = 3,
    settings: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
    tensorboard: bool = False,
    track_bias: TrackBias | None = None,
    world: World | None = None,
    label: str = "train",
) -> TrainResult:
    """Train a meta-learner: sample, composite meta-gradients, bias, aggregate, optimizer step.

    Step k draws the tasks of step k, so a run depends on its seeds alone, and a resumed one ends with the same
    weights as one never interrupted, bit for bit. Ctrl-C and SIGTERM finish the step at hand, save and raise. A loss
    that stalls or swings draws one `metamom.training.stall.StallWarning`, which guesses whether gamma, beta or bias is
    at fault.

    Args:
        learner: whose ``.grad`` each step sets; batches go to its device and dtype.
        optimizer: any torch optimizer over ``learner.parameters()``, or some of them.
        sampler: the tasks.
        iterations: total number of steps, including those done before a resume.
        meta_batch: tasks a step.
        workers: n, must divide ``meta_batch``.
        bias: the operator on each worker's gradient, its SPEC (``"topk:5%"``), or a function ``[d] -> [d]``. What it
            carries from step to step starts afresh with the run, and is saved with it.
        aggregate: what the server takes of the workers' gradients: `metamom.server.robust.robust_mean`.
        schedulers: one or several, of this optimizer; each goes on by one after every step.
        validation: tasks for validation, drawn from stream ``"validation"``.
        evaluate_every: steps between validations; only after the last step if ``None``.
        evaluate_tasks: tasks for each validation.
        run_dir: where configuration, metrics and checkpoints go; nothing is written if ``None``.
        resume: go on from the newest good checkpoint in ``run_dir``, or start afresh where there is none.
        checkpoint_every: steps between checkpoints; there is always one at the start and one at the end.
        keep_checkpoints: how many of the newest to keep, beside the best (by validation).
        settings: what defines the run, as JSON values; made from the arguments if ``None``. A resumed run must have
            the same.
        free: names of those settings that say only where and how the run is computed: another value may go on with it.
        tensorboard: write losses for TensorBoard into ``run_dir`` too.
        track_bias: measure the bias every so many steps, at the weights that the step's gradient is taken at, into the
            metrics' ``measured_bias``. Training goes as without it, bit for bit.
        world: the processes that train together (`metamom.distributed.start`), each of which calls this with the same
            arguments; one alone by default. What is trained does not depend on how many they are, so a run may go on
            with another number of them; only a compiled model that draws at random (dropout) draws otherwise. Process
            0 alone reads and writes ``run_dir``, and shows progress.
        label: what the progress bar says.

    Returns:
        A `TrainResult`, the same on all processes but for the seconds.

    Raises:
        TypeError: for what is no learner, optimizer, sampler, scheduler or operator; for an optimizer that needs a
            closure or sparse gradients; for settings that are no JSON values.
        ValueError: for an argument out of range; for an optimizer over other parameters than the learner's, or without
            its learned step sizes; for a ``run_dir`` in use, with a run in it while ``resume`` is false, with a run of
            other settings, or with one that has done more iterations already. A run that is refused is left as it was.
        metamom.training.checkpoints.CheckpointError: if none of its checkpoints can be used.
        DivergedError: at the first loss, gradient or weight that is not finite.
        metamom.maml.batch_checks.NonFiniteDataError: instead of it, where the data of that step is not finite.
        TrainingInterrupted: by a signal to any process, after saving.
        metamom.distributed.ProcessError: if another process is gone, or hangs. Any other failure of one process is
            raised by all.

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
    world = as_world(world)
    options = Options(
        iterations=iterations,
        meta_batch=meta_batch,
        workers=workers,
        bias=bias,
        aggregate=aggregate,
        schedulers=schedulers,
        validation=validation,
        evaluate_every=evaluate_every,
        evaluate_tasks=evaluate_tasks,
        run_dir=run_dir,
        resume=resume,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        settings=settings,
        free=free,
        tensorboard=tensorboard,
        track_bias=track_bias,
        label=label,
    )
    with world.together(), ExitStack() as stack:
        checked = options.checked(learner, optimizer, sampler, world)
        session = stack.enter_context(begin(learner, optimizer, sampler, checked, world))
        return _steps(session, learner, optimizer, sampler, checked, world)


def _steps(
    session: Session, learner: MAML, optimizer: Optimizer, sampler: Sampler, checked: Checked, world: World
) -> TrainResult:
    """The algorithm: sample, meta-gradient, bias and aggregate, momentum; and what is looked at on the way."""
    options, operator, like = checked.options, checked.operator, next(learner.model.parameters())
    monitor = StallMonitor(optimizer, operator, learner.estimator) if world.first else None
    resumed_from, metrics = session.progress.done, []
    validation: Evaluation | None = None
    for step in session:
        measured = _tracked(learner, operator, options.track_bias, step, session)
        check_momentum(optimizer, operator)  # a schedule may have moved beta

        batch = world.sample(sampler, step, options.meta_batch).to(like.device, like.dtype)
        optimizer.zero_grad()
        loss, report = _gradient(learner, batch, step, checked, world, session)
        optimizer.step()
        for scheduler in checked.schedulers:
            scheduler.step()

        line: dict[str, Any] = {"step": step, "loss": float(loss), **report, **measured, "world_size": world.size}
        if monitor is not None:
            monitor.update(line["loss"], line["grad_norm"])
        rate = options.meta_batch / session.stepped()
        best = None
        if checked.validates_after(step + 1):
            validation = _validated(learner, options, world)
            line.update(validation=validation.mean[0], validation_halfwidth=validation.halfwidth[0])
            best = validation.mean[0] if _better(validation, session.progress.best) else None
        metrics.append(line)
        session.finish(line, _shown(line, rate), best)
    return TrainResult(metrics, validation, resumed_from)


def _gradient(learner: MAML, batch: TaskBatch, step: int, checked: Checked, world: World, session: Session) -> Backward:
    """The server's gradient in ``.grad``; a signal goes to all processes with it.

    Raises:
        DivergedError: for a loss or a gradient that is not finite.
        NonFiniteDataError: where the batch is not.
    """
    world.status = session.interrupts.caught or 0
    try:
        found = learner.backward(
            batch,
            workers=checked.options.workers,
            bias=checked.operator,
            aggregate=checked.options.aggregate,
            world=world,
            measure=world.size == 1 or step % MEASURE_EVERY == 0,
        )
    except NonFiniteDataError as error:
        raise NonFiniteDataError(f"step {step}: {error}") from error
    except NonFiniteError as error:
        raise session.diverged("a worker's gradient") from error
    norm = found.metrics["grad_norm"]
    session.check_finite({"the loss": float(found.loss), "the gradient": math.nan if norm is None else norm})
    return found


def _validated(learner: MAML, options: Options, world: World) -> Evaluation:
    assert options.validation is not None
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
    """The measured bias, at the steps when it is due; the time that it takes is not the step's."""
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


def _shown(line: Mapping[str, Any], rate: float) -> dict[str, str]:
    right = {} if line["accuracy"] is None else {"accuracy": f"{line['accuracy']:.3f}"}
    return {"loss": f"{line['loss']:.4f}", **right, "tasks/s": f"{rate:.0f}"}
