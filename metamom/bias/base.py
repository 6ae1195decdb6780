"""What every bias operator offers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from metamom.bias.checks import all_finite
from metamom.bias.constants import Contraction
from metamom.bias.coordinates import Coordinates, NonFiniteError, Sizes, check_gradient, numbers
from metamom.bias.value import Value
from metamom.bias.wire import Codec


class BiasOperator(Value, Codec, Contraction):
    """An operator C on gradients that are flattened over all parameters.

    It acts on the last dimension, so that all workers' gradients ``[n, d]`` pass at once. Operators are values:
    equal if made from equal arguments, and printed as the call that makes them. What some of them carry from call to
    call (a count of calls, errors to feed back) is in their `state_dict` and no part of that value.

    An operator of your own defines `_apply` and `spec`. It is such a value if each argument of its constructor is kept
    in the attribute of the same name; otherwise it equals itself alone, and prints as ``Name(...)``.
    """

    per_tensor: bool = False  # an argument of those that can act on each parameter tensor by itself
    compresses: bool = False  # whether a message says less than all entries, so that gradients travel as messages
    names: tuple[str, ...] = ()  # of the tensors [d] that each worker keeps from call to call: error feedback's
    carries_momentum: bool = False  # whether the workers average gradients over steps, so that the server must not

    def __call__(
        self,
        gradient: Tensor,
        *,
        step: int | None = None,
        workers: Sequence[int] | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """Apply C to each gradient.

        Args:
            gradient: ``[..., d]``, one gradient for each worker.
            step: what random operators draw by, beside the worker; the number of earlier calls by default.
            workers: whose gradients these are, numbers >= 0 that differ; 0, 1, ... by default. Random operators draw
                by them, and error feedback keeps a state for each.
            sizes: the numbers of entries of the parameter tensors, which layer-wise operators need.

        Returns:
            ``[..., d]``, a new tensor or the very same one.

        Raises:
            NonFiniteError: for an infinite entry or a NaN, and where C(g) is beyond the range of the gradients' dtype.
            TypeError: for entries that are no floating-point numbers.
            ValueError: for workers that do not fit the rows, sizes that are missing or do not add up to d; and as the
                operator says. What the operator carries from call to call is then as it was.
        """
        check_gradient(gradient)
        rows = gradient.reshape(-1, gradient.shape[-1])
        at = Coordinates(self.draw_step if step is None else step, numbers(workers, len(rows)))
        out = self._pass(rows, at, sizes)
        if step is None:
            self.advance()
        return gradient if out is rows else out.view(gradient.shape)

    @abstractmethod
    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        """C of each of ``[n, d]``, for an operator on whole gradients or on one parameter tensor's part of them."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """How the command line spells this operator."""

    @property
    def feeds_back(self) -> bool:
        """Whether each worker keeps a state from call to call."""
        return bool(self.names)

    @property
    def remedy(self) -> str:
        """What lowers the bias of this operator, in words, for one who has met its floor."""
        return f"a weaker operator than {self.spec}"

    @property
    def separable(self) -> bool:
        """Whether the workers of one step may pass in several calls, and in several processes, with the same result."""
        return True

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Within, calls leave the workers' state as it is; `commit` then takes the new one, or nobody does."""
        yield

    def commit(self) -> None:
        """Take the state that the last deferred call computed."""
        return  # most operators: nothing

    def reset(self) -> None:
        """Forget what earlier calls have left."""
        return  # most operators: nothing

    def shard(self, workers: Sequence[int], *, each: bool = False) -> None:
        """Of a loaded state of all workers, keep one process's part, and what the server needs.

        Args:
            workers: of this process.
            each: as for `receive`.
        """
        return  # most operators: nothing

    @staticmethod
    def gather(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state of all workers, from each process's `state_dict`, process 0 first."""
        return states[0]  # most operators: the same on all

    def deal(self, workers: Sequence[int], *, each: bool = False) -> None:
        """`shard`, by its name in version 0.1."""
        self.shard(workers, each=each)

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`gather`, by its name in version 0.1."""
        return self.gather(states)

    def state_dict(self) -> dict[str, Any]:
        """What earlier calls have left, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        if state:
            raise ValueError(f"{self.spec} carries no state; got {', '.join(state)}.")

    def _pass(self, rows: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        """C of each of ``[n, d]``, whole or layer by layer."""
        if not self.per_tensor:
            return self._apply(rows, at)
        parts = torch.split(rows, self._parts(rows.shape[-1], sizes), -1)
        return torch.cat([self._apply(part, at._replace(tensor=i)) for i, part in enumerate(parts)], -1)

    def _in_range(self, rows: Tensor) -> Tensor:
        """What is made of finite gradients ``[n, d]``, where that may be too large for the dtype."""
        if not all_finite(rows):
            first = int((~rows.isfinite()).any(-1).nonzero()[0])
            raise NonFiniteError(
                f"{self.spec} takes the finite gradient in row {first} (rows are workers) beyond the range of "
                f"{rows.dtype}, whose largest number is {torch.finfo(rows.dtype).max:g}: pass gradients of a wider "
                "dtype, or clip them first."
            )
        return rows

    def _parts(self, d: int, sizes: Sizes | None) -> list[int]:
        """The lengths that the operator acts on, one after the other."""
        if not self.per_tensor:
            return [d]
        if sizes is None:
            raise ValueError(f"{self.spec} acts on each parameter tensor: pass sizes=, their numbers of entries.")
        if sum(sizes) != d:
            raise ValueError(f"sizes must add up to the gradient's {d} entries; got {list(sizes)}.")
        return [size for size in sizes if size > 0]

    @property
    def draw_step(self) -> int:
        """The number of earlier calls, for operators that draw by it."""
        return 0

    def advance(self) -> None:
        """Count a call that has succeeded."""
        return  # most operators: it does not matter


_MOVED = {
    "Place": "coordinates",
    "Constants": "constants",
    **dict.fromkeys(("Bias", "Function", "Identity", "as_operator", "inner_operator", "without_state"), "function"),
}


def __getattr__(name: str) -> Any:
    """What stood here in version 0.1."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"metamom.bias.{_MOVED[name]}")
    return getattr(module, "Coordinates" if name == "Place" else name)
