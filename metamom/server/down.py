"""The server's message to the workers, compressed: EF21-P, error feedback on the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metamom.bias import BiasOperator, Identity
from metamom.bias.coordinates import Coordinates, Sizes, check_gradient
from metamom.bias.function import inner_operator
from metamom.bias.state import State


def down_update(
    seen: Tensor, weights: Tensor, operator: BiasOperator, state: State, step: int, sizes: Sizes | None = None
) -> tuple[Tensor, State]:
    """The workers' weights after the server's message: ``x <- x + C(w - x)``, as a pure function.

    Args:
        seen: x ``[d]``, the weights that all workers have.
        weights: w ``[d]``, the server's weights.
        operator: C.
        state: C's state.
        step: number of the message, from which a random operator draws.
        sizes: the numbers of entries of the parameter tensors, for operators that act on each by itself.

    Returns:
        ``(x [d], C's next state)``.

    Example:
        >>> import torch
        >>> from metamom import TopK
        >>> down_update(torch.zeros(3), torch.tensor([1.0, -3.0, 2.0]), TopK(1), State(), 0)[0]
        tensor([ 0., -3.,  0.])

    Reference:
        Gruntkowska, Tyurin, Richtárik, "EF21-P and Friends", 2022, arXiv 2209.15218.
    """
    rows = (weights - seen).unsqueeze(0)
    check_gradient(rows)
    sent, state = operator.transition(rows, state, Coordinates(step, [0]), sizes)
    return seen + sent[0], state


class Seen(NamedTuple):
    """What the workers see after a message.

    Attributes:
        weights: x ``[d]``.
        state: the operator's next state; ``None`` before the first message.
        bytes: of the message to one worker.
    """

    weights: Tensor
    state: State | None
    bytes: int


class DownBias:
    """Compresses the server's message to the workers (EF21-P): workers compute gradients at x, not at w.

    The server keeps the weights w, which the optimizer moves. The workers have x, from the same initial weights, and
    the server sends ``C(w - x)`` before each step: ``x <- x + C(w - x)``. All workers receive every message, absent
    ones too. The first step needs none.

    Args:
        operator: C, contractive, without error feedback of its own, or its SPEC.

    Attributes:
        seen: x ``[d]``, flattened; ``None`` before the first step.
        messages: the number of messages so far.

    Raises:
        TypeError: for anything but such an operator.
        ValueError: for a SPEC that does not name an operator.

    Example:
        >>> import torch
        >>> down = DownBias("topk:1")
        >>> down.commit(down.next(torch.zeros(2)))
        >>> down.next(torch.tensor([1.0, 2.0])).weights
        tensor([0., 2.])

    Reference:
        Gruntkowska, Tyurin, Richtárik, "EF21-P and Friends: Improved Theoretical Communication Complexity for
        Distributed Optimization with Bidirectional Compression", 2022, arXiv 2209.15218.
    """

    def __init__(self, operator: BiasOperator | str) -> None:
        self.operator = inner_operator(
            operator, "down_bias is an operator without error feedback, such as topk:1%, since x is the feedback"
        )
        self.seen: Tensor | None = None
        self.messages = 0

    def next(self, weights: Tensor, sizes: Sizes | None = None) -> Seen:
        """What the workers see in the next step. Nothing changes until `commit`.

        Args:
            weights: w ``[d]``.
            sizes: as of `down_update`.

        Raises:
            ValueError: for weights of another length than before.
            metamom.bias.NonFiniteError: for weights that are not finite.
        """
        if self.seen is None:
            return Seen(weights.clone(), None, 0)
        if self.seen.shape != weights.shape:
            raise ValueError(
                f"down_bias keeps {len(self.seen)} weights that workers see; got {len(weights)}. Use a DownBias of its "
                "own for each run, or reset() it."
            )
        step = self.operator.draw_step
        size = self.operator.step_bytes(step, len(weights), weights.element_size(), sizes)
        before = self.seen.to(weights)
        seen, state = down_update(before, weights, self.operator, self.operator.current_state(), step, sizes)
        return Seen(seen, state, size)

    def commit(self, seen: Seen) -> None:
        """Store what `next` has returned, once the step has succeeded."""
        self.seen = seen.weights
        if seen.state is not None:
            self.operator.store(seen.state)
            self.operator.advance()
            self.messages += 1

    def reset(self) -> None:
        """Forget what the workers have seen."""
        self.seen, self.messages = None, 0
        self.operator.reset()

    def state_dict(self) -> dict[str, Any]:
        """What the workers see, the number of messages and the operator's state, for a checkpoint."""
        return {"seen": self.seen, "messages": self.messages, "operator": self.operator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: for anything but the state of such an object.
        """
        if not {"seen", "messages", "operator"} <= set(state):
            got = ", ".join(map(repr, state)) or "nothing"
            raise ValueError(f"down_bias resumes from its own state: 'seen', 'messages' and 'operator'; got {got}.")
        seen, messages = state["seen"], state["messages"]
        fits = seen is None or (isinstance(seen, Tensor) and seen.dim() == 1 and seen.is_floating_point())
        if not fits or (seen is not None and not bool(seen.isfinite().all())):
            raise ValueError(f"down_bias keeps finite weights [d] as 'seen'; got {seen!r:.80}.")
        if type(messages) is not int or messages < 0:
            raise ValueError(f"down_bias counts its messages by a whole number >= 0; got {messages!r:.80}.")
        self.operator.load_state_dict(state["operator"])
        self.seen, self.messages = None if seen is None else seen.clone(), messages

    def __repr__(self) -> str:
        return f"DownBias({self.operator!r})"


def as_down_bias(down: DownBias | BiasOperator | str | None) -> DownBias | None:
    """Convert ``down_bias=``: an operator or its SPEC, or nothing. ``"none"`` is nothing.

    Raises:
        TypeError: for anything else.
        ValueError: for a SPEC that does not name an operator.
    """
    made = down if down is None or isinstance(down, DownBias) else DownBias(down)
    return None if made is None or isinstance(made.operator, Identity) else made


def compared(down: DownBias | None) -> str:
    """Its SPEC, ``"none"`` for none."""
    return "none" if down is None else down.operator.spec
