"""One operator after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates, Sizes
from metamom.bias.function import inner_operator
from metamom.bias.spelling import Row, spelled_between


@spelled_between(
    "+",
    "A, then B on what it leaves",
    Row("`clip:1+topk:5%`", "`Compose(Clip(1), TopK(ratio=0.05))`", "unknown", "the last one's"),
)
class Compose(BiasOperator):
    """``C(g) = C_m(... C_1(g))``: operators apply in the given order, and the last one's message is sent.

    Args:
        operators: two or more operators or SPECs, without error feedback (wrap the composition in it instead).

    Raises:
        ValueError: for fewer than two.
        TypeError: for anything but an operator, and for one with error feedback.

    Example:
        >>> from metamom import Clip, TopK
        >>> Compose(Clip(1.0), TopK(1))(torch.tensor([3.0, 4.0]))
        tensor([0.0000, 0.8000])
    """

    def __init__(self, *operators: BiasOperator | str) -> None:
        if len(operators) < 2:
            raise ValueError(f"Compose takes two operators or more; got {len(operators)}.")
        members = [inner_operator(operator, "Compose takes operators without error feedback") for operator in operators]
        # flatten nested compositions
        inner = [each.operators if isinstance(each, Compose) else (each,) for each in members]
        self.operators: tuple[BiasOperator, ...] = tuple(operator for each in inner for operator in each)

    def _pass(self, rows: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        for index, operator in enumerate(self.operators):
            rows = operator._pass(rows, at._replace(operator=index), sizes)
        return rows

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return self._pass(rows, at, None)

    @property
    def _generators(self) -> tuple[torch.Generator, ...]:
        return tuple(dict.fromkeys(each for operator in self.operators for each in operator._generators))

    @property
    def draw_step(self) -> int:
        return max(operator.draw_step for operator in self.operators)

    def advance(self) -> None:
        for operator in self.operators:
            operator.advance()

    @property
    def compresses(self) -> bool:  # type: ignore[override]
        """Whether the last one does."""
        return self.operators[-1].compresses

    @property
    def remedy(self) -> str:
        """The advice of all operators."""
        return ", or ".join(dict.fromkeys(operator.remedy for operator in self.operators))

    @property
    def varies(self) -> bool:
        """Whether the last one's messages do."""
        return self.operators[-1].varies

    @property
    def separable(self) -> bool:
        """Whether all are."""
        return all(operator.separable for operator in self.operators)

    def contraction(self, d: int, sizes: Sizes | None = None) -> float | None:
        """Unknown: a composition of two contractions need not contract as much as either."""
        return None

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """The last one's. The others check their arguments as in a call."""
        return [operator.wire_bytes(d, element_size, sizes) for operator in self.operators][-1]

    def _message(self, gradient: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        """The last one's message for the output of the others."""
        *first, last = self.operators
        rows = gradient.unsqueeze(0)
        for index, operator in enumerate(first):
            rows = operator._pass(rows, at._replace(operator=index), sizes)
        return last._message(rows[0], at._replace(operator=len(first)), sizes)

    def decode(self, message: Tensor, d: int, dtype: torch.dtype, *, sizes: Sizes | None = None) -> Tensor:
        """Decode the last one's message."""
        return self.operators[-1].decode(message, d, dtype, sizes=sizes)

    def _add(self, total: Tensor, message: Tensor, sizes: Sizes | None) -> None:
        self.operators[-1]._add(total, message, sizes)

    def reset(self) -> None:
        """Reset all of them."""
        super().reset()
        for operator in self.operators:
            operator.reset()

    def state_dict(self) -> dict[str, Any]:
        """The states of those that have one, by position."""
        return {str(i): state for i, operator in enumerate(self.operators) if (state := operator.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BiasOperator`."""
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"{self.spec} carries the state of operators {sorted(own)}; got that of {list(state)}.")
        for i, kept in state.items():
            self.operators[int(i)].load_state_dict(kept)

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.operators))})"

    @property
    def spec(self) -> str:
        """Their SPECs, joined by ``+``."""
        return "+".join(operator.spec for operator in self.operators)
