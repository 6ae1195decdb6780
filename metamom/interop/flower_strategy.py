"""Flower's server with momentum: it aggregates the clients' biased meta-gradients, and steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metamom.bias import Bias, Layout
from metamom.bias.state import EMPTY, State
from metamom.interop.flower_messages import DELIVERED, SPEC, record_of, shared_operator
from metamom.interop.imports import import_flower
from metamom.server.aggregate import Aggregation, deliver, unflatten
from metamom.server.robust import Aggregate, RobustMean

flower = import_flower()


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
        aggregate: ``"mean"`` or a robust mean, see `metamom.server.robust_mean`.
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
        robust = RobustMean(aggregate)
        super().__init__(**options)
        self.optimizer: Optimizer | None = None
        self.participants: dict[int, list[int]] = {}
        self._make_optimizer, self._operator, self._robust = optimizer, shared_operator(bias), robust
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
            more = {SPEC: self._operator.spec, DELIVERED: self._delivered.get(message.metadata.dst_node_id, 0)}
            record = flower.app.ConfigRecord({**config, **more})
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
        return record_of(self._weights), metrics

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
        server = Aggregation(len(rows), None, self._robust, measure=False)
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
