"""Federated meta-learning with Flower: clients send biased meta-gradients, and the server steps with momentum.

    app = client_app(make_learner, tasks, bias="ef21:topk:5%")                     # a flwr.clientapp.ClientApp
    strategy = MomentumStrategy(lambda p: CompositeMomentum(p, lr=0.1), bias="ef21:topk:5%")
    result = strategy.start(grid, to_arrays(learner), num_rounds=100)              # in Flower's ServerApp

A client is a worker. Importing this module imports Flower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream
from metamom.bias import Bias, BiasOperator, Identity, Layout, as_operator
from metamom.bias.coordinates import place_of
from metamom.bias.state import EMPTY, State
from metamom.common.checks import check_number, check_whole
from metamom.common.kinds import named_type
from metamom.interop.flower_state import Kept, keep, recall
from metamom.interop.imports import import_flower
from metamom.judging import judged
from metamom.maml.learner import MAML
from metamom.server.aggregate import Aggregation, deliver, flatten, unflatten
from metamom.server.robust import Aggregate, check_aggregate

__all__ = ["MomentumStrategy", "client_app", "from_arrays", "to_arrays"]

flower = import_flower()

Tasks = Sampler | Callable[[Any], Sampler]

SPEC, DELIVERED = "metamom.bias", "metamom.delivered"  # what the server tells a client besides the round


def to_arrays(learner: MAML) -> Any:
    """The meta-parameters of a learner as Flower's ``ArrayRecord``, with which a strategy starts.

    Learned inner step sizes (Meta-SGD) are among them. Parameters in bfloat16, which NumPy lacks, travel as float32.
    """
    weights = {name: p.detach() for name, p in learner.meta_parameters().items()}
    return _record({name: w.float() if w.dtype == torch.bfloat16 else w for name, w in weights.items()})


@torch.no_grad()
def from_arrays(learner: MAML, arrays: Any) -> None:
    """Set the meta-parameters of a learner to those of an ``ArrayRecord``, such as ``result.arrays``.

    Raises:
        ValueError: for arrays of other names, in another order, or of other shapes.
    """
    weights = learner.meta_parameters()
    if list(arrays) != list(weights):
        odd = sorted(set(arrays) ^ set(weights)) or ["their order"]
        raise ValueError(
            f"the arrays are not the learner's meta-parameters: {', '.join(odd)} differs. Start the strategy from "
            "to_arrays(learner), with the same learner on all sides."
        )
    for name, weight in weights.items():
        array = torch.from_numpy(arrays[name].numpy())
        if array.shape != weight.shape:
            raise ValueError(f"{name} has shape {list(weight.shape)}; got an array of {list(array.shape)}.")
        weight.copy_(array)


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
        _operator(bias),
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
            "message": _record({"message": sent}),
            "metrics": flower.app.MetricRecord({"train_loss": float(losses.mean()), "num-examples": len(losses)}),
            "client": flower.app.ConfigRecord({"number": number, "after": before.round}),
        }
        return flower.app.Message(flower.app.RecordDict(content), reply_to=message)

    def evaluate(self, message: Any, context: Any) -> Any:
        """Adapt the server's weights to validation tasks, and report the mean loss or accuracy."""
        learner = self._learner(message)
        batch = self._draw(learner, context, 0, self._evaluation_tasks, "validation")
        [(_, values, right)] = judged(learner, batch, (learner.inner_steps,), 0, None)
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


class MomentumStrategy(flower.serverapp.strategy.FedAvg):  # type: ignore[misc, name-defined]  # Flower is not always there
    """A Flower strategy that aggregates the clients' biased meta-gradients, and steps with any optimizer.

    In each round, ``g~ = 1/m sum_i C(g_i)`` over the m clients that replied; with a robust ``aggregate``, that of their
    ``C(g_i)``. With EF21 (and EF21-SGDM, Clip21), the server keeps the estimate ``h_i`` of each client. A client's
    message moves its own, and the aggregate is that of all n clients' estimates, present or not: ``1/n sum_i h_i``,
    where n is the largest number of nodes seen so far. Estimates start at zero, and take ``[n, d]`` of memory.

    A client whose reply fails or does not arrive counts as absent, and its error feedback stays as it was. If a node
    has lost its state, its client starts at zero again, on both sides.

    Sampling of clients, federated evaluation and the records' names are those of Flower's ``FedAvg``. Training metrics
    of a round are ``train_loss``, ``grad_norm`` (of the aggregate) and ``wire_bytes`` (of the clients' messages).

    Args:
        optimizer: makes the server's optimizer from the parameters: ``lambda p: CompositeMomentum(p, lr=0.1)``.
        bias: the operator C, as of `client_app`, for its messages.
        aggregate: ``"mean"`` or a robust mean, see `metamom.server.robust.robust_mean`.
        **options: of ``flwr.serverapp.strategy.FedAvg``, such as ``fraction_train=0.25``.

    Attributes:
        optimizer: the server's optimizer; ``None`` before the first round.
        participants: the numbers of the clients that took part in each round, by round.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for another aggregate, or an operator that draws from a ``generator=``.
        RuntimeError: from a round in which clients replied, all with errors.

    Example:
        >>> strategy = MomentumStrategy(lambda p: CompositeMomentum(p, lr=0.1), fraction_train=0.25)  # doctest: +SKIP
        >>> result = strategy.start(grid, to_arrays(learner), num_rounds=100)  # doctest: +SKIP
        >>> from_arrays(learner, result.arrays)  # doctest: +SKIP

    Reference:
        arXiv 2403.00853; EF21 with partial participation: Fatkhullin, Sokolov, Gorbunov, Li, Richtárik, "EF21 with
        bells & whistles", 2021.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        *,
        bias: Bias = None,
        aggregate: Aggregate = "mean",
        **options: Any,
    ) -> None:
        if not callable(optimizer) or isinstance(optimizer, Optimizer):
            raise TypeError(
                "MomentumStrategy needs a function that makes the optimizer from the parameters, such as "
                f"lambda p: CompositeMomentum(p, lr=0.1); got {optimizer!r:.60}."
            )
        check_aggregate(aggregate)
        super().__init__(**options)
        self.optimizer: Optimizer | None = None
        self.participants: dict[int, list[int]] = {}
        self._make_optimizer, self._operator, self._aggregate = optimizer, _operator(bias), aggregate
        self._weights: dict[str, nn.Parameter] = {}
        self._estimates: dict[int, Tensor] = {}  # the server's [d] of each client, by number (EF21)
        self._delivered: dict[int, int] = {}  # the last round of which the message of a node arrived
        self._nodes = 0  # the most that there have been

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Send the weights to the sampled clients, each with the last round of which its message arrived."""
        self._set_weights(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._nodes = max(self._nodes, len(list(grid.get_node_ids())))
        for message in messages:
            told = {SPEC: self._operator.spec, DELIVERED: self._delivered.get(message.metadata.dst_node_id, 0)}
            record = flower.app.ConfigRecord({**config, **told})
            message.content = flower.app.RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: record})
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """Aggregate the clients' messages, and make the optimizer's step.

        Raises:
            ValueError: for two nodes with the same number.
            RuntimeError: if all clients that replied failed.
        """
        arrived, failed = self._check_and_log_replies(list(replies), is_train=True)
        if failed and not arrived:
            raise RuntimeError(f"no client could train in round {server_round}; one says: {failed[0].error.reason}")
        if not arrived:
            return None, None
        contents = [reply.content for reply in arrived]
        messages = [content["message"]["message"].numpy() for content in contents]
        total, report = self._aggregated(server_round, arrived)
        assert self.optimizer is not None
        for name, gradient in unflatten(total, self._weights).items():
            deliver(self._weights[name], gradient, self._operator)
        self.optimizer.step()
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        metrics["grad_norm"], metrics["wire_bytes"] = report["grad_norm"], sum(map(len, messages))
        return _record(self._weights), metrics

    def _set_weights(self, arrays: Any) -> None:
        """Take over the weights of this round, and in the first round make their optimizer."""
        given = arrays.to_torch_state_dict()
        if self.optimizer is None:
            self._weights = {name: nn.Parameter(tensor) for name, tensor in given.items()}
            self.optimizer = self._make_optimizer(list(self._weights.values()))
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(given[name])

    def _aggregated(self, server_round: int, replies: Iterable[Any]) -> tuple[Tensor, dict[str, float | int | None]]:
        """The aggregate ``[d]`` of the clients, in the order of their numbers, and its report."""
        present: dict[int, Tensor] = {}
        for reply in sorted(replies, key=lambda reply: int(reply.content["client"]["number"])):
            number = int(reply.content["client"]["number"])
            if number in present:
                raise ValueError(f"two nodes are client {number}: give each its own partition-id.")
            present[number] = self._received(number, reply)
            self._delivered[reply.metadata.src_node_id] = server_round
        self.participants[server_round] = list(present)
        rows = list(present.values())
        if self._estimates:
            # what arrived now may be more than what the server keeps of it (DIANA)
            rows = [present.get(number, self._estimates[number]) for number in sorted(self._estimates)]
            rows += [torch.zeros_like(rows[0])] * (self._nodes - len(rows))
        server = Aggregation(len(rows), None, self._aggregate, measure=False)
        server.add(torch.stack(rows), range(len(rows)))
        return server.finish()

    def _received(self, number: int, reply: Any) -> Tensor:
        """What the server has of a client after its message: the decoded one ``[d]``, or its estimate."""
        before = EMPTY
        if int(reply.content["client"]["after"]):
            before = State(server=self._estimates.get(number))
        elif self._delivered.get(reply.metadata.src_node_id):
            logging.getLogger("flwr").warning("client %d has lost its state, and starts at zero again", number)
        sizes = Layout(weight.shape for weight in self._weights.values())
        dtype = reduce(torch.promote_types, (weight.dtype for weight in self._weights.values()), torch.float32)
        message = torch.from_numpy(reply.content["message"]["message"].numpy())
        out, state = self._operator.transition_receive([message], before, sum(sizes), dtype, sizes)
        if state.server is not None:
            self._estimates[number] = state.server
        return out


def _operator(bias: Bias) -> BiasOperator:
    """The operator, if clients can share it."""
    operator = as_operator(bias) or Identity()
    if not operator.separable:
        raise ValueError(
            f"{operator.spec} draws from a generator in the order of calls, which clients do not share: make it with "
            "seed= in place of generator=."
        )
    return operator


def _number(context: Any, name: str) -> int:
    """An entry of the node's configuration."""
    if name not in context.node_config:
        raise ValueError(
            f"a client needs {name} in its node's configuration, which has {list(context.node_config) or 'nothing'}: "
            'start it with flower-supernode --node-config "partition-id=3 num-partitions=20", for client 3 of 20.'
        )
    return int(context.node_config[name])


def _record(tensors: dict[str, Any]) -> Any:
    """Tensors as an ``ArrayRecord``."""
    return flower.app.ArrayRecord({name: flower.app.Array(tensor.detach().cpu()) for name, tensor in tensors.items()})
