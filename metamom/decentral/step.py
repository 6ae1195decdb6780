"""One step of decentralised momentum, as pure functions.

Legend: n workers, each with weights of its own; rows ``[n, ...]`` hold one worker each. W is a mixing matrix (`graph`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metamom.decentral.graph import check_sums
from metamom.optim import momentum_update_
from metamom.optim.checks import check_beta

Number = float | Tensor


class DecentralizedState(NamedTuple):
    """What the workers keep between steps.

    Attributes:
        momentum: ``m_k``, each worker's moving average of its own gradients, ``[n, ...]``.
        tracker: ``W y_k``, each worker's average of its own and its neighbours' estimates of the mean momentum,
            ``[n, ...]``. Its mean over the workers is that of ``momentum``.
    """

    momentum: Tensor
    tracker: Tensor


def initial_state(x: Tensor) -> DecentralizedState:
    """The state before the first step: ``m_{-1} = y_{-1} = 0``, for weights ``[n, ...]``."""
    return DecentralizedState(torch.zeros_like(x), torch.zeros_like(x))


def decentralized_step(
    x: Tensor,
    grads: Tensor,
    state: DecentralizedState,
    mixing: Tensor,
    *,
    lr: Number,
    beta: Number,
    tracking: bool = True,
) -> tuple[Tensor, DecentralizedState]:
    """Momentum tracking: each worker averages with its neighbours, and follows an estimate of all workers' momentum.

    ``m_i <- (1 - beta) m_i + beta g_i``, ``y_i <- sum_j W_ij y_j + m_i - m_i^-``, ``x_i <- sum_j W_ij (x_j - lr y_j)``.

    The mean of the ``y_i`` is that of the ``m_i`` in every step. So at a fixed point all weights are equal, and the
    mean of the g_i is zero there: that workers differ does no harm, and neither do constant errors of their gradients
    that sum to zero. Without tracking (``x_i <- sum_j W_ij (x_j - lr m_j)``), workers that differ end apart, and their
    mean off the optimum, by an amount that grows with lr.

    Args:
        x: weights, ``[n, ...]``.
        grads: each worker's gradient at its own weights, after its bias operator, ``[n, ...]``.
        state: of the last step; `initial_state` at the start.
        mixing: W, ``[n, n]``.
        lr: the step size, >= 0; a number, or one per worker as a tensor ``[n, 1, ...]``.
        beta: weight of the new gradient, 0 < beta <= 1; a number, or one per worker likewise.
        tracking: False for momentum with averaging alone, which sends half as much.

    Returns:
        The next weights and state; new tensors.

    Raises:
        ValueError: if rows or columns of the mixing matrix do not sum to one, for shapes that differ, or for a beta
            out of range.

    Example:
        >>> from metamom.decentral import complete
        >>> x = torch.zeros(2, 1)
        >>> x, state = decentralized_step(
        ...     x, torch.tensor([[1.0], [3.0]]), initial_state(x), complete(2), lr=0.5, beta=1.0
        ... )
        >>> x
        tensor([[-1.],
                [-1.]])

    Reference:
        Takezawa, Bao, Niwa, Sato, Yamada (2022), Momentum Tracking, arXiv 2209.15505, with the momentum as a moving
        average. Under biased gradients: Xu, Liao, Fan, You, Dian (2026), Biased-DMT, arXiv 2604.08236. Of the latter we
        could read the abstract only. That its order of updates is this one is an assumption.
    """
    weights = check_sums(mixing)
    for name, tensor in (("grads", grads), ("state.momentum", state.momentum), ("state.tracker", state.tracker)):
        if tensor.shape != x.shape or len(x) != len(weights):
            raise ValueError(
                f"x and {name} have a row for each of the {len(weights)} workers; got shapes {tuple(x.shape)} and "
                f"{tuple(tensor.shape)}."
            )
    if not isinstance(beta, Tensor):
        check_beta(beta)
    messages, momentum = outgoing(x, grads, state, lr=lr, beta=beta, tracking=tracking)
    mixed = mix(messages, slots_of(weights))
    tracker = mixed[:, 1] if tracking else state.tracker
    return mixed[:, 0], DecentralizedState(momentum, tracker)


def outgoing(
    x: Tensor, grads: Tensor, state: DecentralizedState, *, lr: Number, beta: Number, tracking: bool
) -> tuple[Tensor, Tensor]:
    """What each worker sends to its neighbours, and its new momentum: the half of a step before the exchange.

    Returns:
        ``x - lr y`` and y, ``[n, 2, ...]``, or without tracking ``x - lr m`` alone, ``[n, 1, ...]``; ``m [n, ...]``.
    """
    if not isinstance(beta, Tensor) and beta != 1:
        # as a tensor, torch rounds products and sums apart, however many rows there are
        beta = torch.tensor(beta, dtype=x.dtype, device=x.device)
    momentum = momentum_update_(state.momentum.clone(), grads, beta)
    if not tracking:
        return (x - lr * momentum).unsqueeze(1), momentum
    y = state.tracker + (momentum - state.momentum)
    return torch.stack([x - lr * y, y], 1), momentum


class Slots(NamedTuple):
    """For each of some workers, whom it takes messages from, in order, and with which weights.

    Attributes:
        positions: ``[own, K]``, where K is the largest number of non-zero weights in a row.
        weights: ``[own, K]`` float64; zero in the slots that a worker does not need.
    """

    positions: Tensor
    weights: Tensor


def slots_of(mixing: Tensor) -> Slots:
    """The slots of all workers of a mixing matrix ``[n, n]``."""
    absent = mixing == 0
    positions = absent.int().argsort(dim=1, stable=True)[:, : int((~absent).sum(1).max())]
    weights = mixing.gather(1, positions)
    return Slots(torch.where(weights == 0, positions[:, :1], positions), weights)


def mix(messages: Tensor, slots: Slots) -> Tensor:
    """``sum_j W_ij messages_j``: ``[m, ...] -> [own, ...]``.

    The sum runs over the slots in order, entry by entry, so that its bits do not depend on who computes it.
    """
    weights = slots.weights.to(messages).view(*slots.weights.shape, *[1] * (messages.dim() - 1))
    total = messages[slots.positions[:, 0]] * weights[:, 0]
    for slot in range(1, weights.shape[1]):
        total += messages[slots.positions[:, slot]] * weights[:, slot]
    return total
