"""Error feedback: what an operator loses comes back in later steps, from a state that each worker keeps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator, Place, Sizes
from metamom.bias.clip import Clip


class ErrorFeedback(BiasOperator):
    """What EF14, EF21, EF21-SGDM and Clip21 share: an operator, and tensors ``[n, d]`` that stay from call to call.

    The state starts at zero and takes the shape of the first gradients. It is part of a run: `train` saves it with
    every checkpoint. Operators must contract (Top-K, Rand-K unscaled, Sign) for the theory to hold.

    Args:
        operator: C, on whole gradients or layer by layer.

    Raises:
        TypeError: for what is no operator, or feeds errors back itself.
        ValueError: when called with gradients of another shape than before.

    Attributes:
        state: the workers' tensors by name, ``[n, d]``; empty before the first call.
    """

    feeds_back = True
    names: tuple[str, ...] = ()  # of the tensors

    def __init__(self, operator: BiasOperator) -> None:
        if not isinstance(operator, BiasOperator) or operator.feeds_back:
            raise TypeError(f"error feedback goes around an operator without it; got {operator!r}.")
        self.operator = operator
        self._state: dict[str, Tensor] = {}

    @property
    def state(self) -> dict[str, Tensor]:
        """The workers' tensors by name."""
        return self._state

    @abstractmethod
    def _difference(self, rows: Tensor) -> Tensor:
        """What goes through the operator; may move the state that does not depend on its result."""

    @abstractmethod
    def _received(self, difference: Tensor, sent: Tensor) -> Tensor:
        """Update the state by what was sent; what the server reckons with, ``[n, d]``."""

    def _pass(self, rows: Tensor, place: Place, sizes: Sizes | None) -> Tensor:
        if not self._state:
            self._state = {name: torch.zeros_like(rows) for name in self.names}
        elif self._state[self.names[0]].device != rows.device:  # from a checkpoint
            self._state = {name: tensor.to(rows.device) for name, tensor in self._state.items()}
        shape = self._state[self.names[0]].shape
        if rows.shape != shape:
            raise ValueError(
                f"{self.spec} keeps the state of {shape[0]} workers with {shape[1]} entries; got gradients of shape "
                f"{tuple(rows.shape)}. Use an operator of its own for each run, or reset() it."
            )
        difference = self._difference(rows)
        return self._received(difference, self.operator._pass(difference, place, sizes))

    def _apply(self, rows: Tensor, place: Place) -> Tensor:
        return self._pass(rows, place, None)

    def _next_step(self, step: int | None) -> int:
        return self.operator._next_step(step)

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """The operator's: what is fed back never leaves the worker."""
        return self.operator.wire_bytes(d, element_size, sizes)

    def encode(self, gradient: Tensor, *, step: int = 0, worker: int = 0, sizes: Sizes | None = None) -> Tensor:
        """Refused: a message depends on the state, which a call moves on."""
        raise ValueError(f"{self.spec} has a state: encode what its operator {self.operator.spec} is given.")

    def reset(self) -> None:
        """Forget the state."""
        self._state = {}
        self.operator.reset()

    def state_dict(self) -> dict[str, Any]:
        """The workers' tensors and the operator's own."""
        return {"workers": dict(self._state), "operator": self.operator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BiasOperator`."""
        if state["workers"] and set(state["workers"]) != set(self.names):
            raise ValueError(f"{self.spec} keeps {', '.join(self.names)}; got {', '.join(state['workers'])}.")
        self._state = {name: tensor.clone() for name, tensor in state["workers"].items()}
        self.operator.load_state_dict(state["operator"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.operator!r})"


class EF14(ErrorFeedback):
    """Classic error feedback: send ``C(g_i + e_i)`` and keep ``e_i <- g_i + e_i - C(g_i + e_i)``.

    The error is kept in units of the gradient, where the literature keeps that of ``gamma g``: the same for a constant
    step size and an operator with ``C(a g) = a C(g)`` for a > 0.

    Reference:
        docs/theory.md; Seide et al., 2014; Karimireddy et al., 2019.
    """

    names = ("error",)

    def _difference(self, rows: Tensor) -> Tensor:
        return rows + self._state["error"]

    def _received(self, difference: Tensor, sent: Tensor) -> Tensor:
        self._state["error"] = difference - sent
        return sent

    @property
    def spec(self) -> str:
        """``ef14:SPEC``."""
        return f"ef14:{self.operator.spec}"


class EF21(ErrorFeedback):
    """Send the change: ``c_i = C(g_i - h_i)``; worker and server keep ``h_i <- h_i + c_i``, which stands for g_i.

    No floor from compression remains, whatever the workers' differences.

    Reference:
        docs/theory.md; Richtárik, Sokolov, Fatkhullin, "EF21", 2021.
    """

    names: tuple[str, ...] = ("estimate",)

    def _difference(self, rows: Tensor) -> Tensor:
        return rows - self._state["estimate"]

    def _received(self, difference: Tensor, sent: Tensor) -> Tensor:
        self._state["estimate"] = self._state["estimate"] + sent
        return self._state["estimate"].clone()  # the caller's to change

    @property
    def spec(self) -> str:
        """``ef21:SPEC``."""
        return f"ef21:{self.operator.spec}"


class EF21SGDM(EF21):
    """EF21 of each worker's own momentum: ``v_i <- (1 - eta) v_i + eta g_i``, ``c_i = C(v_i - h_i)``.

    Momentum before compression takes the noise of gradients away, which momentum after it cannot: the server then has
    none, ``beta = 1`` (`train` insists on it).

    Args:
        operator: C.
        eta: weight of the new gradient in the workers' momentum, 0 < eta <= 1; 1 is EF21.

    Raises:
        ValueError: for eta out of range.

    Reference:
        docs/theory.md; Fatkhullin, Tyurin, Richtárik, "Momentum provably improves error feedback!", 2023.
    """

    names = ("estimate", "momentum")
    carries_momentum = True

    def __init__(self, operator: BiasOperator, eta: float = 0.1) -> None:
        super().__init__(operator)
        if not 0 < eta <= 1:
            raise ValueError(f"EF21SGDM needs the weight of the new gradient, 0 < eta <= 1; got {eta}.")
        self.eta = float(eta)

    def _difference(self, rows: Tensor) -> Tensor:
        # at eta = 1 the past has no say, were it infinite
        moved = self._state["momentum"].mul(1 - self.eta).add_(rows, alpha=self.eta) if self.eta < 1 else rows.clone()
        self._state["momentum"] = moved
        return moved - self._state["estimate"]

    def __repr__(self) -> str:
        return f"EF21SGDM({self.operator!r}, eta={self.eta!r})"

    @property
    def spec(self) -> str:
        """``ef21-sgdm(ETA):SPEC``."""
        return f"ef21-sgdm({repr(self.eta).removesuffix('.0')}):{self.operator.spec}"


class Clip21(EF21):
    """EF21 with clipping: ``h_i <- h_i + clip_tau(g_i - h_i)``; after finitely many steps nothing is clipped.

    Args:
        max_norm: tau > 0.

    Reference:
        docs/theory.md; Khirirat et al., "Clip21", 2023.
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__(Clip(max_norm))
        self._tau = max_norm

    def __repr__(self) -> str:
        return f"Clip21({self._tau!r})"

    @property
    def spec(self) -> str:
        """``clip21:TAU``."""
        return f"clip21:{self.operator.spec.partition(':')[2]}"
