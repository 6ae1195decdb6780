"""A client of Flower: it adapts to its own tasks, and sends its biased meta-gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream
from metamom.bias import Bias, BiasOperator, Layout
from metamom.bias.coordinates import place_of
from metamom.bias.state import State
from metamom.common.checks import check_number, check_whole
from metamom.common.kinds import named_type
from metamom.interop.flower_messages import DELIVERED, SPEC, from_arrays, record_of, shared_operator
from metamom.interop.flower_state import Kept, keep, recall
from metamom.interop.imports import import_flower
from metamom.judging import judged
from metamom.maml.learner import MAML
from metamom.server.aggregate import flatten, unflatten

flower = import_flower()

Tasks = Sampler | Callable[[Any], Sampler]


def client_app(
    learner_fn: Callable[[], MAML],
    tasks: Tasks,
    *,
    bias: Bias = None,
    meta_batch: int = 4,
    local_steps: int = 1,
    local_lr: float | None = None,
    evaluation_tasks: int = 20,
) -> Any:
    """Make the ``ClientApp`` of federated MAML (or Meta-SGD), for a server with `MomentumStrategy`.

    In each round, a sampled client computes ``g_i``, its meta-gradient at the server's weights, and sends ``C(g_i)``.
    With ``local_steps=K``, it makes K steps of SGD from there, and ``g_i`` is the mean of their meta-gradients, which
    is ``(w - w_K) / (K local_lr)``: a server with ``CompositeMomentum(p, lr=K * local_lr, beta=1)`` then averages the
    clients' weights, as Per-FedAvg does.

    Error feedback is kept in the client's ``Context.state``. If a reply does not reach the server, the client takes
    the step back. Tasks and random operators depend on the round and on the client's number, its ``partition-id``
    (set by simulations, and by ``flower-supernode --node-config "partition-id=3 num-partitions=20"``).

    Args:
        learner_fn: makes the learner; the weights come from the server.
        tasks: one sampler for all clients, of which client i of n draws the i-th block of the meta-batch of
            ``n * meta_batch`` tasks (so that `metamom.tasks.PerWorker` gives each client its own family); or a function
            of the ``Context`` that makes a client's own sampler.
        bias: the operator C, its SPEC (``"ef21:topk:5%"``), or a function ``[d] -> [d]``; the same as the server's.
        meta_batch: tasks a client and local step.
        local_steps: K >= 1.
        local_lr: > 0, the step size of the local steps; needed if there are several.
        evaluation_tasks: tasks from the stream ``"validation"`` a client and evaluation, which reports their mean
            ``accuracy`` or ``loss``.

    Returns:
        A ``flwr.clientapp.ClientApp``, for training and evaluation.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for a number out of range, or an operator that draws from a ``generator=``.

    Example:
        >>> app = client_app(lambda: MAML(net(), F.mse_loss), Sinusoid(), bias="ef14:topk:5%")  # doctest: +SKIP

    Reference:
        Fallah, Mokhtari, Ozdaglar, "Personalized federated learning: a meta-learning approach", 2020 (Per-FedAvg).
    """
    if not callable(learner_fn) or isinstance(learner_fn, MAML):
        raise TypeError(f"client_app needs a function that makes the learner; got {named_type(learner_fn)}.")
    if isinstance(tasks, Sampler) or not callable(tasks):
        check_sampler(tasks, "client_app needs a sampler or a function of the Context that makes one; a sampler")
    check_whole("local_steps", local_steps, 1)
    if local_lr is not None:
        check_number("local_lr", local_lr)
    if (local_lr is None and local_steps > 1) or (local_lr is not None and not local_lr > 0):
        raise ValueError(f"{local_steps} local steps need their step size, local_lr > 0; got {local_lr}.")
    client = _Client(
        learner_fn,
        tasks,
        shared_operator(bias),
        check_whole("meta_batch", meta_batch, 1),
        local_steps,
        local_lr or 0.0,
        check_whole("evaluation_tasks", evaluation_tasks, 1),
    )
    app = flower.clientapp.ClientApp()
    app.train()(client.train)
    app.evaluate()(client.evaluate)
    return app


class _Client:
    """What a client does with Flower's messages. Arguments as of `client_app`; all state is in the ``Context``."""

    def __init__(
        self,
        learner_fn: Callable[[], MAML],
        tasks: Tasks,
        operator: BiasOperator,
        meta_batch: int,
        local_steps: int,
        local_lr: float,
        evaluation_tasks: int,
    ) -> None:
        self._learner_fn, self._tasks, self._operator = learner_fn, tasks, operator
        self._meta_batch, self._local_steps, self._local_lr = meta_batch, local_steps, local_lr
        self._evaluation_tasks = evaluation_tasks

    def train(self, message: Any, context: Any) -> Any:
        """Send the meta-gradient, after the operator."""
        [config] = message.content.config_records.values()
        if config.get(SPEC) != self._operator.spec:
            raise ValueError(
                f"this client sends messages of bias={self._operator.spec}; the server expects {config.get(SPEC)}. Run "
                "metamom's MomentumStrategy there, with the same bias."
            )
        number, step = _number(context, "partition-id"), int(config["server-round"]) - 1
        learner = self._learner(message)
        row, losses = self._gradient(learner, context, step)
        before = recall(context, int(config[DELIVERED]))
        [sent], state = self._operator.transition_send(
            row,
            State(workers={number: before.tensors}),
            place_of(row, step, [number]),
            Layout(w.shape for w in learner.meta_parameters().values()),
        )
        keep(context, before, Kept(step + 1, state.workers.get(number, {})))
        content = {
            "message": record_of({"message": sent}),
            "metrics": flower.app.MetricRecord({"train_loss": float(losses.mean()), "num-examples": len(losses)}),
            "client": flower.app.ConfigRecord({"number": number, "after": before.round}),
        }
        return flower.app.Message(flower.app.RecordDict(content), reply_to=message)

    def evaluate(self, message: Any, context: Any) -> Any:
        """Adapt the server's weights to validation tasks, and report the mean loss or accuracy."""
        learner = self._learner(message)
        batch = self._draw(learner, context, 0, self._evaluation_tasks, "validation")
        [(_, [values], right)] = judged([learner], batch, (learner.inner_steps,), 0, None)
        metrics = {"accuracy" if right else "loss": float(values.mean()), "num-examples": len(values)}
        content = {"metrics": flower.app.MetricRecord(metrics)}
        return flower.app.Message(flower.app.RecordDict(content), reply_to=message)

    def _learner(self, message: Any) -> MAML:
        """A learner with the server's weights."""
        learner = self._learner_fn()
        if not isinstance(learner, MAML):
            raise TypeError(f"learner_fn() must return a learner, MAML(model, loss_fn, ...); got {learner!r:.60}.")
        if learner.memory is not None:
            raise ValueError(
                f'a client starts each round with a new learner, but estimator="{learner.estimator}" remembers each '
                "task's adapted weights. Choose another estimator."
            )
        [arrays] = message.content.array_records.values()
        from_arrays(learner, arrays)
        return learner

    def _draw(self, learner: MAML, context: Any, step: int, tasks: int, stream: str) -> TaskBatch:
        """The client's tasks of a step, where the learner is."""
        if isinstance(self._tasks, Sampler):
            n = _number(context, "num-partitions")
            batch = drawn(of_stream(self._tasks, stream), step, n * tasks, _number(context, "partition-id"), n)
        else:
            own = self._tasks(context)
            check_sampler(own, "tasks(context) must return a sampler, which")
            batch = drawn(of_stream(own, stream), step, tasks)
        return batch.to(next(iter(learner.meta_parameters().values())).device)

    def _gradient(self, learner: MAML, context: Any, step: int) -> tuple[Tensor, Tensor]:
        """The mean of the local steps' meta-gradients ``[1, d]``, and the losses of their tasks."""
        weights = learner.meta_parameters()
        rows: list[Tensor] = []
        losses: list[Tensor] = []
        for k in range(step * self._local_steps, (step + 1) * self._local_steps):
            if rows:
                with torch.no_grad():
                    for name, gradient in unflatten(rows[-1][0], weights).items():
                        weights[name].sub_(gradient, alpha=self._local_lr)
            grads, found = learner.meta_gradient(self._draw(learner, context, k, self._meta_batch, "train"))
            rows.append(flatten(grads.values()))
            losses.append(found)
        row = sum(rows[1:], rows[0])
        row = row / len(rows) if len(rows) > 1 else row
        return row.to(torch.promote_types(row.dtype, torch.float32)), torch.cat(losses)


def _number(context: Any, name: str) -> int:
    """An entry of the node's configuration."""
    if name not in context.node_config:
        raise ValueError(
            f"a client needs {name} in its node's configuration, which has {list(context.node_config) or 'nothing'}: "
            'start it with flower-supernode --node-config "partition-id=3 num-partitions=20", for client 3 of 20.'
        )
    return int(context.node_config[name])
