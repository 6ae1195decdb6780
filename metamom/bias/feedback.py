"""Error feedback: each worker keeps what its operator has lost, and adds it back in later steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.checks import check_weight
from metamom.bias.clip import Clip
from metamom.bias.coordinates import Coordinates, Sizes
from metamom.bias.feedback_base import ErrorFeedback, Rows
from metamom.bias.kept import stored
from metamom.bias.spelling import Row, spelled, spelled_around
from metamom.bias.state import EMPTY, State
from metamom.common.numbers import short
from metamom.optim import momentum_update_

__all__ = ["EF14", "EF21", "EF21SGDM", "Clip21", "ErrorFeedback"]


@spelled_around(
    "ef14",
    "error feedback around A: its losses are sent later",
    Row("`ef14:A`", "`EF14(A)`", "lowers the floor of a contractive A to one proportional to γ", "A's"),
)
class EF14(ErrorFeedback):
    """Classic error feedback: send ``C(g_i + e_i)`` and keep ``e_i <- g_i + e_i - C(g_i + e_i)``.

    The error is in units of the gradient; the literature uses those of ``gamma g``. Both are the same for a constant
    step size and an operator with ``C(a g) = a C(g)`` for a > 0.

    Reference:
        docs/theory/operators.md; Seide et al., 2014; Karimireddy et al., 2019.
    """

    names = ("error",)

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        return rows + kept["error"], {}

    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        return sent, {"error": wanted - sent}

    @property
    def spec(self) -> str:
        """``ef14:SPEC``."""
        return f"ef14:{self.operator.spec}"


@spelled_around(
    "ef21",
    "error feedback: A on the change from what was sent before",
    Row("`ef21:A`", "`EF21(A)`", "removes the floor of a contractive A", "A's"),
)
class EF21(ErrorFeedback):
    """Send the change ``c_i = C(g_i - h_i)``; worker and server keep the estimate ``h_i <- h_i + c_i`` of g_i.

    Compression leaves no floor, however much the workers differ.

    Reference:
        docs/theory/operators.md; Richtárik, Sokolov, Fatkhullin, "EF21", 2021.
    """

    names: tuple[str, ...] = ("estimate",)

    def __init__(self, operator: BiasOperator | str) -> None:
        super().__init__(operator)
        self._received: Tensor | None = None  # the server's estimates (sum or each), if messages are sent

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""
        out, state = super().transition(rows, state, place, sizes)
        return out, replace(state, server=None)  # without messages, the estimates are the workers' own

    def transition_receive(
        self,
        messages: Sequence[Tensor],
        state: State,
        d: int,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        *,
        each: bool = False,
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition_receive`: the estimates, updated by the messages."""
        change = self._changes(messages, d, dtype, sizes, each)
        # the checkpoint's estimates may have another device or dtype than the current gradients
        before = torch.zeros_like(change) if state.server is None else state.server.to(change)
        out, estimates = self._updated(before, change)
        return out, replace(state, server=estimates)

    def _updated(self, before: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """What the server has after the messages' ``change``, and its next estimates. Sums ``[d]``, or ``[n, d]``."""
        estimates = before + change
        return estimates, estimates

    def _changes(
        self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, sizes: Sizes | None, each: bool
    ) -> Tensor:
        """Decode the messages: their sum ``[d]``, or ``each`` one, ``[n, d]``."""
        return super().transition_receive(messages, EMPTY, d, dtype, sizes, each=each)[0]

    def current_state(self) -> State:
        """See `BiasOperator.current_state`."""
        return replace(super().current_state(), server=self._received)

    def store(self, state: State) -> None:
        """See `BiasOperator.store`."""
        super().store(state)
        self._received = None if state.server is None else stored(self._received, state.server)

    def reset(self) -> None:
        """Discard the state."""
        super().reset()
        self._received = None

    def shard(self, workers: Sequence[int], *, each: bool = False) -> None:
        """See `BiasOperator.shard`."""
        if self._received is None and self._workers:
            estimates = self.state[self._at_server]
            self._received = estimates if each else estimates.sum(0)
        super().shard(workers, each=each)

    def state_dict(self) -> dict[str, Any]:
        """See `ErrorFeedback.state_dict`. If messages are sent, it includes the server's estimates."""
        return {**super().state_dict(), **({} if self._received is None else {"received": self._received})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ErrorFeedback.load_state_dict`."""
        received = state.get("received")
        if received is not None and not isinstance(received, Tensor):
            raise ValueError(f"{self.spec} keeps a tensor as 'received'; got {received!r:.80}.")
        super().load_state_dict(state)
        self._received = None if received is None else received.clone()

    @property
    def _at_server(self) -> str:
        """Which of the workers' tensors the server has too."""
        return "estimate"

    @property
    def remembered(self) -> str | None:  # type: ignore[override]
        """See `BiasOperator.remembered`: the server's estimate (EF21-PP)."""
        return self._at_server

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        return rows - kept["estimate"], kept

    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        estimate = kept["estimate"].add_(sent)
        return estimate, {**kept, "estimate": estimate}

    @property
    def spec(self) -> str:
        """``ef21:SPEC``."""
        return f"ef21:{self.operator.spec}"


@spelled_around(
    "ef21-sgdm",
    "EF21 of the workers' own momentum, with beta = 1 at the server",
    Row(
        "`ef21-sgdm(0.1):A`",
        "`EF21SGDM(A, eta=0.1)`",
        "with momentum on the workers; a server with β < 1 is an error",
        "A's",
    ),
    argument="ETA",
)
class EF21SGDM(EF21):
    """EF21 on each worker's own momentum: ``v_i <- (1 - eta) v_i + eta g_i``, ``c_i = C(v_i - h_i)``.

    Momentum before compression reduces gradient noise, which momentum after compression cannot. The server then has no
    momentum, ``beta = 1`` (`train` requires it).

    Args:
        operator: C, or its SPEC.
        eta: weight of the new gradient in the workers' momentum, 0 < eta <= 1; 1 is EF21.

    Raises:
        ValueError: for eta out of range.

    Reference:
        docs/theory/operators.md; Fatkhullin, Tyurin, Richtárik, "Momentum provably improves error feedback!", 2023.
    """

    names: tuple[str, ...] = ("estimate", "momentum")
    carries_momentum = True

    def __init__(self, operator: BiasOperator | str, eta: float = 0.1) -> None:
        super().__init__(operator)
        self.eta = check_weight("EF21SGDM", "eta", eta, "the weight of the new gradient,")

    def transport(self, changes: Tensor, state: State, place: Coordinates) -> State:
        """Add a change ``[n, d]`` to the momenta of workers that have one: ``v_i <- v_i + c_i``.

        With the next `transition`, it is ``v_i <- (1 - eta)(v_i + c_i) + eta g_i`` (`metamom.optim.variants`).
        """
        moved = {
            worker: {**state.workers[worker], "momentum": state.workers[worker]["momentum"].to(change) + change}
            for worker, change in zip(place.workers, changes, strict=True)
            if worker in state.workers
        }
        return replace(state, workers={**state.workers, **moved})

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        momentum = momentum_update_(kept["momentum"], rows, self.eta)
        return super()._before(momentum, {**kept, "momentum": momentum})

    def __repr__(self) -> str:
        return f"EF21SGDM({self.operator!r}, eta={self.eta!r})"

    @property
    def spec(self) -> str:
        """``ef21-sgdm(ETA):SPEC``."""
        return f"ef21-sgdm({short(self.eta)}):{self.operator.spec}"


@spelled(
    "clip21",
    "error feedback around clipping",
    Row("`clip21:1`", "`Clip21(1.0)`", "removes the floor of clipping", "4d"),
    argument="TAU",
    number=float,
)
class Clip21(EF21):
    """EF21 with clipping: ``h_i <- h_i + clip_tau(g_i - h_i)``. After finitely many steps nothing is clipped.

    Args:
        max_norm: tau > 0.

    Reference:
        docs/theory/operators.md; Khirirat et al., "Clip21", 2023.
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__(Clip(max_norm))
        self.max_norm = float(max_norm)

    def __repr__(self) -> str:
        return f"Clip21({self.max_norm!r})"

    @property
    def spec(self) -> str:
        """``clip21:TAU``."""
        return f"clip21:{self.operator.spec.partition(':')[2]}"
