"""What every bias operator offers, and the operator that does nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class BiasOperator(ABC):
    """An operator C on gradients that are flattened over all parameters.

    It acts on the last dimension, so that all workers' gradients ``[n, d]`` pass at once. Operators are values:
    equal if made from equal arguments, and printed as the call that makes them.
    """

    @abstractmethod
    def __call__(self, gradient: Tensor) -> Tensor:
        """Apply C to each gradient: ``[..., d] -> [..., d]``, as a new tensor or the very same one."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """How the command line spells this operator."""

    def wire_bytes(self, d: int, element_size: int = 4) -> int:
        """Bytes that one worker's message takes: dense unless an operator sends less.

        Args:
            d: length of the gradient.
            element_size: bytes of one entry.
        """
        return d * element_size

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), tuple(vars(self).items())))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({arguments})"


class Identity(BiasOperator):
    """``C(g) = g``: no bias."""

    def __call__(self, gradient: Tensor) -> Tensor:
        """See `BiasOperator`."""
        return gradient

    @property
    def spec(self) -> str:
        """``none``."""
        return "none"


class Function(BiasOperator):
    """A user's own operator on one gradient.

    Args:
        function: ``[d] -> [d]``; called for each worker's gradient by itself.

    Raises:
        TypeError: if it is not callable; when called, if the function returns no tensor.
        ValueError: when called, if the function returns another shape.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        if not callable(function):
            raise TypeError(f"a bias is an operator or a function Tensor[d] -> Tensor[d]; got {function!r}.")
        self.function = function

    def __call__(self, gradient: Tensor) -> Tensor:
        """See `BiasOperator`."""
        return torch.stack([self._one(g) for g in gradient.reshape(-1, gradient.shape[-1])]).view_as(gradient)

    def _one(self, gradient: Tensor) -> Tensor:
        out = self.function(gradient)
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.spec} must return a tensor; got {type(out).__name__}.")
        if out.shape != gradient.shape:
            raise ValueError(f"{self.spec} must keep the shape {tuple(gradient.shape)}; got {tuple(out.shape)}.")
        return out

    @property
    def spec(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__qualname__", repr(self.function)))


Bias = BiasOperator | Callable[[Tensor], Tensor] | None


def as_operator(bias: Bias) -> BiasOperator | None:
    """The operator that ``bias`` means: itself, a user's function wrapped, or none.

    Raises:
        TypeError: if it is neither an operator nor a function.
    """
    if isinstance(bias, type):
        raise TypeError(f"a bias is an operator, such as {bias.__name__}(...); got the class {bias.__name__} itself.")
    return bias if bias is None or isinstance(bias, BiasOperator) else Function(bias)
