"""What every bias operator offers, and the operator that does nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
