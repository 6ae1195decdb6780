"""One step of an operator on the server's side: its transitions, and the state that they lead to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metamom.bias import BiasOperator
from metamom.bias.coordinates import Sizes, place_of
from metamom.bias.feedback import EF21SGDM
from metamom.bias.state import EMPTY


class PendingStep:
    """Owns an operator's next state until the step has succeeded. The operator changes only in `commit`.

    Args:
        operator: the operator.
        sizes: the numbers of entries of the parameter tensors.
    """

    def __init__(self, operator: BiasOperator, sizes: Sizes | None) -> None:
        self.operator = operator
        self.sizes = sizes
        self._step = operator.draw_step
        self._state = operator.current_state()

    def apply(self, rows: Tensor, workers: Sequence[int]) -> Tensor:
        """``C(rows) [n, d]``. It may share memory with the rows and with the next state."""
        place = place_of(rows, self._step, workers)
        out, self._state = self.operator.transition(rows, self._state, place, self.sizes)
        return out

    def transport(self, changes: Tensor, workers: Sequence[int]) -> None:
        """Change the momenta that the workers carry, ``[n, d]``.

        Raises:
            ValueError: for an operator without any that can.
        """
        if not isinstance(self.operator, EF21SGDM):
            raise ValueError(f"{self.operator.spec} carries no momentum that could change: use ef21-sgdm(ETA):A.")
        self._state = self.operator.transport(changes, self._state, place_of(changes, self._step, workers))

    def send(self, rows: Tensor, workers: Sequence[int]) -> list[Tensor]:
        """The workers' messages."""
        place = place_of(rows, self._step, workers)
        messages, self._state = self.operator.transition_send(rows, self._state, place, self.sizes)
        return messages

    def receive(self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, *, each: bool) -> Tensor:
        """What the server has after all workers' messages: the sum ``[d]``, or ``each`` worker's ``[n, d]``."""
        out, self._state = self.operator.transition_receive(messages, self._state, d, dtype, self.sizes, each=each)
        return out

    def wire_bytes(self, d: int, element_size: int) -> int:
        """The size of one worker's message in bytes."""
        return self.operator.step_bytes(self._step, d, element_size, self.sizes)

    def commit(self) -> None:
        """Store the next state in the operator, and count the step."""
        state, self._state = self._state, EMPTY  # its memory is not needed any longer
        self.operator.store(state)
        self.operator.advance()
