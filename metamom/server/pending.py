"""One step of an operator on the server's side: its transitions, and the state that they lead to.

Legend: n workers, m of them present; gradients of length d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metamom.bias import BiasOperator
from metamom.bias.coordinates import Sizes, place_of
from metamom.bias.feedback import EF21SGDM
from metamom.bias.state import EMPTY
from metamom.server.part import Part


class PendingStep:
    """Owns an operator's next state until the step has succeeded. The operator changes only in `commit`.

    Args:
        operator: the operator.
        sizes: the numbers of entries of the parameter tensors.
        part: the present workers; all by default. What is kept of absent ones does not change.
        mine: the workers of this process, for ``part``.
    """

    def __init__(
        self, operator: BiasOperator, sizes: Sizes | None, part: Part | None = None, mine: Sequence[int] = ()
    ) -> None:
        self.operator = operator
        self.sizes = sizes
        self._part = part
        self._absent = [] if part is None else part.absent(mine)
        self._step = operator.draw_step
        self._state = operator.current_state()

    def apply(self, rows: Tensor, workers: Sequence[int]) -> Tensor:
        """``C(rows) [m, d]``. It may share memory with the rows and with the next state."""
        out = rows
        if len(rows):
            place = place_of(rows, self._step, workers)
            out, self._state = self.operator.transition(rows, self._state, place, self.sizes)
        self._start_absent(rows)
        return out

    def transport(self, changes: Tensor, workers: Sequence[int]) -> None:
        """Change the momenta that the workers carry, ``[m, d]``.

        Raises:
            ValueError: for an operator without any that can.
        """
        if not isinstance(self.operator, EF21SGDM):
            raise ValueError(f"{self.operator.spec} carries no momentum that could change: use ef21-sgdm(ETA):A.")
        self._state = self.operator.transport(changes, self._state, place_of(changes, self._step, workers))

    def send(self, rows: Tensor, workers: Sequence[int]) -> list[Tensor]:
        """The workers' messages."""
        messages: list[Tensor] = []
        if len(rows):
            place = place_of(rows, self._step, workers)
            messages, self._state = self.operator.transition_send(rows, self._state, place, self.sizes)
        self._start_absent(rows)
        return messages

    def _start_absent(self, rows: Tensor) -> None:
        """Keep zeros of this process's workers that were never present, as before their first gradient."""
        names, state = self.operator.kept_names, self._state
        new = [worker for worker in self._absent if worker not in state.workers] if names else []
        if new:
            zeros = {worker: dict.fromkeys(names, rows.new_zeros(rows.shape[1])) for worker in new}
            self._state = replace(state, workers=dict(sorted({**state.workers, **zeros}.items())))

    def estimates(self, absent: Sequence[int], like: Tensor) -> Tensor:
        """What the server averages of absent workers of this process ``[k, d]``: their estimates, or zeros without.

        Args:
            absent: these workers.
            like: gradients ``[..., d]`` of this step.
        """
        name = self.operator.remembered
        if name is None:
            return like.new_zeros(len(absent), like.shape[-1])
        return torch.stack([self._state.workers[worker][name].to(like) for worker in absent])

    def receive(self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, *, each: bool) -> Tensor:
        """What the server has after the present workers' messages: the sum ``[d]``, or ``each`` worker's ``[m, d]``.

        If it keeps estimates, they are those of all workers, ``[n, d]``.
        """
        part, state = self._part, self._state
        if part is None or not each or part.averaged(self.operator) == part.present:
            out, self._state = self.operator.transition_receive(messages, state, d, dtype, self.sizes, each=each)
            return out
        present = list(part.present)
        estimates = torch.zeros(part.n, d, dtype=dtype, device=messages[0].device)
        if state.server is not None:
            estimates = state.server.to(estimates, copy=True)
        state = replace(state, server=estimates[present])
        estimates[present], after = self.operator.transition_receive(messages, state, d, dtype, self.sizes, each=True)
        self._state = replace(after, server=estimates)
        return estimates

    def wire_bytes(self, d: int, element_size: int) -> int:
        """The size of one worker's message in bytes."""
        return self.operator.step_bytes(self._step, d, element_size, self.sizes)

    def commit(self) -> None:
        """Store the next state in the operator, and count the step."""
        state, self._state = self._state, EMPTY  # its memory is not needed any longer
        self.operator.store(state)
        self.operator.advance()
