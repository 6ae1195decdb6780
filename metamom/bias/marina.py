"""MARINA: compressed changes of the gradient, and now and then the whole gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.checks import check_weight
from metamom.bias.coordinates import Coordinates, Sizes, check_gradient
from metamom.bias.feedback import EF21
from metamom.bias.feedback_base import Rows
from metamom.bias.spelling import Row, spelled_around
from metamom.bias.state import State
from metamom.common.numbers import short
from metamom.rng import DrawCoordinates, Purpose, uniforms


def sends_whole(step: int, p: float) -> bool:
    """The coin that all workers share at a step: heads, with probability p, sends whole gradients."""
    coin = DrawCoordinates("bias MARINA", step, np.zeros(1, dtype=np.int64))
    return bool(uniforms(0, coin, Purpose.BIAS, 1)[0, 0] < p)


@spelled_around(
    "marina",
    "A on changes of the gradient, whole with probability P",
    Row("`marina(0.1):A`", "`MARINA(A, p=0.1)`", "biased estimates, no floor for an unbiased A", "1 + A's, or 1 + 4d"),
    argument="P",
)
class MARINA(EF21):
    """Send the compressed change of the gradient, or, with probability p, the whole gradient.

    All workers share the coin, which depends on the step alone. With heads, and for a worker's first gradient, worker
    and server have ``h_i <- g_i``; else ``h_i <- h_i + C(g_i - g_i^-)``, where ``g_i^-`` is the gradient of the step
    before. For an unbiased C (Rand-K scaled, QSGD, MLMC) there is no floor, however much the workers differ.

    This is MARINA for exact gradients, or those of a fixed batch. The operator sees one gradient a step, so that with
    a new sample each step the change includes both samples' noise; VR-MARINA, which takes both gradients of a change
    from one sample, is not this operator.

    A message starts with a byte that says whether it is whole. A whole one has ``g_i - h_i`` in full, which moves the
    server's sum of the ``h_i`` to that of the gradients. `wire_bytes` is the size of the others.

    Args:
        operator: C, or its SPEC.
        p: probability of whole gradients, 0 < p <= 1; the expected bytes are least near the share that C sends.

    Raises:
        ValueError: for p out of range.

    Reference:
        docs/theory/operators.md; Gorbunov, Burlachenko, Li, Richtárik, "MARINA: Faster Non-Convex Distributed Learning
        with Compression", ICML 2021, arXiv 2102.07845, algorithm 1.
    """

    names = ("estimate", "previous")
    allows_absent = False  # PP-MARINA sends other messages

    def __init__(self, operator: BiasOperator | str, p: float = 0.1) -> None:
        super().__init__(operator)
        self.p = check_weight("MARINA", "p", p)
        self._calls = 0

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""
        whole, wanted, kept = self._split(rows, state, place)
        sent, state = self.operator.transition(wanted, state, place, sizes)
        kept = self._moved(rows, whole, sent, kept)
        return kept["estimate"], replace(state, workers=self._next(state, kept, place), server=None)

    def transition_send(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[list[Tensor], State]:
        """See `BiasOperator.transition_send`."""
        whole, wanted, kept = self._split(rows, state, place)
        check_gradient(wanted)
        messages, state = self.operator.transition_send(wanted, state, place, sizes)
        d, dtype = rows.shape[1], rows.dtype
        sent = torch.stack([self.operator.decode(message, d, dtype, sizes=sizes) for message in messages])
        dense = rows - kept["estimate"]
        kept = self._moved(rows, whole, sent, kept)
        marked = []
        for flag, change, message in zip(whole[:, 0].tolist(), dense, messages, strict=True):
            body = change.contiguous().view(torch.uint8) if flag else message
            marked.append(torch.cat([body.new_full((1,), int(flag)), body]))
        return marked, replace(state, workers=self._next(state, kept, place))

    def _split(self, rows: Tensor, state: State, place: Coordinates) -> tuple[Tensor, Tensor, Rows]:
        """Which workers send whole gradients ``[n, 1]``, what the others compress ``[n, d]``, and the tensors."""
        kept = self._rows_of(state, rows, place)
        coin = sends_whole(place.step, self.p)
        whole = torch.tensor([[coin or not state.workers.get(worker)] for worker in place.workers], device=rows.device)
        return whole, torch.where(whole, torch.zeros_like(rows), rows - kept["previous"]), kept

    def _moved(self, rows: Tensor, whole: Tensor, sent: Tensor, kept: Rows) -> Rows:
        """The next tensors. The server adds the same changes, so that both round alike."""
        change = torch.where(whole, rows - kept["estimate"], sent)
        return {"estimate": kept["estimate"] + change, "previous": rows}

    def _changes(
        self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, sizes: Sizes | None, each: bool
    ) -> Tensor:
        rows = torch.stack([self.decode(message, d, dtype, sizes=sizes) for message in messages])
        return rows if each else rows.sum(0)

    def decode(self, message: Tensor, d: int, dtype: torch.dtype, *, sizes: Sizes | None = None) -> Tensor:
        """Decode a message to the change of the estimate ``[d]``.

        Raises:
            ValueError: for a message that no gradient encodes to.
        """
        if message.dtype is not torch.uint8 or message.dim() != 1 or not len(message) or int(message[0]) > 1:
            raise self._damaged("no first byte 0 or 1", d, dtype)
        body = message[1:]
        if int(message[0]) == 0:
            return self.operator.decode(body, d, dtype, sizes=sizes)
        if len(body) != d * dtype.itemsize:
            raise self._misfit(message, f"{1 + d * dtype.itemsize} bytes of a whole gradient", d, dtype)
        change = body.clone().view(dtype)
        if not bool(change.isfinite().all()):
            raise self._damaged("values that are infinite or NaN", d, dtype)
        return change

    @property
    def varies(self) -> bool:
        """Always: whole gradients are longer."""
        return True

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """One byte more than the operator's; a whole gradient takes ``1 + d * element_size``."""
        return 1 + super().wire_bytes(d, element_size, sizes)

    def step_bytes(self, step: int, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """See `BiasOperator.step_bytes`."""
        if sends_whole(step, self.p) or not self._workers:
            return 1 + d * element_size
        return self.wire_bytes(d, element_size, sizes)

    @property
    def draw_step(self) -> int:
        return self._calls

    def advance(self) -> None:
        super().advance()
        self._calls += 1

    def reset(self) -> None:
        """Discard the state."""
        super().reset()
        self._calls = 0

    def state_dict(self) -> dict[str, Any]:
        """See `EF21.state_dict`, with the number of calls."""
        return {**super().state_dict(), "calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ErrorFeedback.load_state_dict`."""
        if {"workers", "operator"} <= set(state):
            calls = state.get("calls")
            if type(calls) is not int or calls < 0:
                raise ValueError(f"{self.spec} counts its calls by a whole number >= 0 as 'calls'; got {calls!r:.80}.")
        super().load_state_dict(state)
        self._calls = state["calls"]

    def __repr__(self) -> str:
        return f"MARINA({self.operator!r}, p={self.p!r})"

    @property
    def spec(self) -> str:
        """``marina(P):SPEC``."""
        return f"marina({short(self.p)}):{self.operator.spec}"
