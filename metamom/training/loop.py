"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from metamom.batch import Sampler, check_sampler
from metamom.bias import Bias, BiasOperator, NonFiniteError, as_operator
from metamom.diagnostics.bias_meter import TrackBias, check_track, track
from metamom.distributed import SAME, World, as_world, digest
from metamom.evaluation import Evaluation, evaluate
from metamom.maml.batch_checks import NonFiniteDataError
from metamom.maml.learner import MAML
from metamom.server.robust import Aggregate
from metamom.training.directory import RunDirectory
from metamom.training.interrupts import Interrupts, TrainingInterrupted
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
from metamom.training.progress import DivergedError, Progress, Saved
from metamom.training.stall import Watch

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
    operator = as_operator(bias)
    with world.together(), ExitStack() as stack:
        check_plan(
            learner,
            sampler,
            iterations=iterations,
            meta_batch=meta_batch,
            workers=workers,
            bias=operator,
            aggregate=aggregate,
            evaluate_every=evaluate_every,
            evaluate_tasks=evaluate_tasks,
            checkpoint_every=checkpoint_every,
            world=world,
        )
        # numbers of NumPy are not JSON's
        iterations, meta_batch, workers = int(iterations), int(meta_batch), int(workers)
        checkpoint_every, evaluate_tasks = int(checkpoint_every), int(evaluate_tasks)
        evaluate_every = None if evaluate_every is None else int(evaluate_every)
        check_record(
            run_dir=run_dir,
            resume=resume,
            tensorboard=tensorboard,
            keep_checkpoints=keep_checkpoints,
            settings=settings,
            free=free,
            label=label,
        )
        check_optimizer(learner, optimizer)
        check_momentum(optimizer, operator)
        schedulers = as_schedulers(schedulers, optimizer)
        if validation is not None:
            check_sampler(validation, "validation is a sampler, which")
        if track_bias is not None:
            check_track(learner, operator, track_bias)
        board = _tensorboard() if tensorboard and world.first else None
        if settings is None:
            settings = describe(
                learner,
                optimizer,
                sampler,
                meta_batch=meta_batch,
                workers=workers,
                bias=operator,
                aggregate=aggregate,
                schedulers=schedulers,
                validation=validation,
            )
            free = [*free, *(() if validation is not None else ("validation",))]
        parts: dict[str, Any] = {
            "learner": learner,
            "optimizer": optimizer,
            **{f"scheduler{i}": s for i, s in enumerate(schedulers)},
        }
        if operator is not None and operator.state_dict():
            operator.reset()
            parts["bias"] = operator
        like = next(learner.model.parameters())
        metrics: list[dict[str, Any]] = []
        checked: Evaluation | None = None
        length = {
            "iterations": iterations,
            "checkpoint_every": checkpoint_every,
            "evaluate_every": evaluate_every,
            "evaluate_tasks": evaluate_tasks,
            "processes": world.size,
            "server": world.server,
            **({} if track_bias is None else {"track_bias": [int(track_bias.every), int(track_bias.draws)]}),
        }
        plan = {
            **{name: value for name, value in settings.items() if name not in free},
            **length,
            "evaluate_every": evaluate_every if validation is not None else 0,
            "run_dir": run_dir is not None,
            "resume": resume,
        }
        alike = "Start all of them by the same command."
        world.check_same("the names of their settings", sorted(plan), alike)
        for name in sorted(plan) if world.size > 1 else ():
            world.check_same(name, json.dumps(plan[name], sort_keys=True), alike)
        world.check_same("the learner's weights", lambda: digest(learner.meta_parameters().values()), SAME)
        run = None
        with world.together():
            if run_dir is not None and world.first:
                directory = RunDirectory(
                    run_dir,
                    settings,
                    free=free,
                    later=LATER,
                    length=length,
                    resume=resume,
                    keep=keep_checkpoints,
                )
                run = stack.enter_context(directory)
        saved = Saved(parts, run, world, run_dir, workers)
        progress = saved.restored(iterations) or Progress(0, 0.0, None)
        if world.size > 1:
            torch.set_rng_state(world.from_first(torch.get_rng_state))
        if world.size > 1 and operator is not None:
            carried = range(workers) if workers < world.size else world.workers(workers)
            operator.deal(carried, each=aggregate != "mean")
        resumed_from = progress.done
        learner.expect(iterations - resumed_from)
        if run is not None:  # from here on the directory changes
            run.forget_metrics_from(resumed_from, until=iterations)
            run.write_config()
        if resumed_from == 0:
            saved.save(progress)
        log = stack.enter_context(_Log(run, progress.done, board))
        watch = Watch(optimizer, operator, learner.estimator) if world.first else None
        interrupts = stack.enter_context(Interrupts())
        hidden = None if world.first else True
        bar = stack.enter_context(tqdm(total=iterations, initial=progress.done, desc=label, unit="it", disable=hidden))
        while progress.done < iterations:
            step = progress.done
            measured = _tracked(learner, operator, track_bias, step)
            began = time.perf_counter()
            check_momentum(optimizer, operator)  # a schedule may have moved beta
            batch = world.sample(sampler, step, meta_batch).to(like.device, like.dtype)
            optimizer.zero_grad()
            world.word = interrupts.caught or 0
            try:
                loss, report = learner.backward(
                    batch,
                    workers=workers,
                    bias=operator,
                    aggregate=aggregate,
                    world=world,
                    measure=world.size == 1 or step % MEASURE_EVERY == 0,
                )
            except NonFiniteDataError as error:
                raise NonFiniteDataError(f"step {step}: {error}") from error
            except NonFiniteError as error:
                raise DivergedError("a worker's gradient", step) from error
            line: dict[str, Any] = {"step": step, "loss": float(loss), **report, **measured, "world_size": world.size}
            _check_finite(line)
            optimizer.step()
            if watch is not None:
                watch.look(line["loss"], line["grad_norm"])
            for scheduler in schedulers:
                scheduler.step()
            took = time.perf_counter() - began
            progress = progress._replace(done=step + 1, seconds=progress.seconds + took)
            line["seconds"] = progress.seconds
            last, is_best = progress.done == iterations, False
            if validation is not None and (last or (evaluate_every and progress.done % evaluate_every == 0)):
                checked = evaluate(
                    learner,
                    validation,
                    tasks=evaluate_tasks,
                    steps=(learner.inner_steps,),
                    stream="validation",
                    world=world,
                )
                line.update(validation=checked.mean[0], validation_halfwidth=checked.halfwidth[0])
                is_best = _better(checked, progress.best)
                progress = progress._replace(best=checked.mean[0] if is_best else progress.best)
            metrics.append(line)
            log.write(line)
            # by a signal to any process, which the others know if it came before the gradients were exchanged
            stopped = max(world.words) if world.size > 1 else interrupts.caught or 0
            bar.set_postfix(_shown(line, meta_batch / took), refresh=False)
            bar.update()
            if last or is_best or progress.done % checkpoint_every == 0 or stopped:
                saved.save(progress, is_best)
            if stopped:
                kept = f"saved in {run_dir}; resume to go on" if run_dir else "nothing was saved, for want of a run_dir"
                raise TrainingInterrupted(f"stopped after step {progress.done} of {iterations}; {kept}.", stopped)
    return TrainResult(metrics, checked, resumed_from)


class _Log:
    """Metrics to the run directory and, where asked for, to TensorBoard."""

    def __init__(self, run: RunDirectory | None, done: int, board: Callable[..., Any] | None) -> None:
        self.run = run
        self.board = None if board is None or run is None else board(str(run.path / "tensorboard"), purge_step=done)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, line: Mapping[str, Any]) -> None:
        if self.run is not None:
            self.run.log(line)
        if self.board is not None:
            for name in ("loss", "accuracy", "grad_norm", "bias_error", "validation"):
                if line.get(name) is not None:
                    self.board.add_scalar(name, line[name], line["step"])


def _tensorboard() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard=True needs TensorBoard: pip install 'metamom[tensorboard]'.") from error
    return SummaryWriter


def _tracked(
    learner: MAML, operator: BiasOperator | None, plan: TrackBias | None, step: int
) -> dict[str, dict[str, float]]:
    """The measured bias, at the steps when it is due."""
    if plan is None or step % plan.every:
        return {}
    try:
        return {"measured_bias": track(learner, operator, plan)}
    except NonFiniteError as error:
        raise DivergedError("a worker's gradient", step) from error


def _check_finite(line: Mapping[str, Any]) -> None:
    for name, what in (("loss", "the loss"), ("grad_norm", "the gradient")):
        if not math.isfinite(line[name]):
            raise DivergedError(what, line["step"])


def _better(checked: Evaluation, best: float | None) -> bool:
    if math.isnan(checked.mean[0]):
        return False
    if best is None:
        return True
    return checked.mean[0] > best if checked.metric == "accuracy" else checked.mean[0] < best


def _shown(line: Mapping[str, Any], rate: float) -> dict[str, str]:
    right = {} if line["accuracy"] is None else {"accuracy": f"{line['accuracy']:.3f}"}
    return {"loss": f"{line['loss']:.4f}", **right, "tasks/s": f"{rate:.0f}"}
