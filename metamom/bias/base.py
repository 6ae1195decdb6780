"""The base class of bias operators."""

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

    It acts on the last dimension, so one call handles all workers' gradients ``[n, d]``. Operators are values: they are
    equal if created with equal arguments, and print as the call that creates them. State that some of them keep between
    calls (a count of calls, errors to feed back) is in their `state_dict` and does not affect equality.

    A custom operator defines `_apply` and `spec`. It is a value if each constructor argument is stored in the attribute
    of the same name. Otherwise it equals only itself, and prints as ``Name(...)``.
    """

    per_tensor: bool = False  # whether it acts on each parameter tensor separately
    compresses: bool = False  # whether a message is shorter than all entries, so that processes send messages
    names: tuple[str, ...] = ()  # names of the tensors [d] that each worker keeps between calls (error feedback)
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
            step: seeds random operators, together with the worker; the number of earlier calls by default.
            workers: the workers' numbers, >= 0 and distinct; 0, 1, ... by default. They seed random operators, and
                error feedback keeps a state for each.
            sizes: the numbers of entries of the parameter tensors, which layer-wise operators need.

        Returns:
            ``[..., d]``, a new tensor or the same one.

        Raises:
            NonFiniteError: for an infinite or NaN entry, or if C(g) is beyond the range of the gradients' dtype.
            TypeError: for entries that are not floating-point numbers.
            ValueError: for workers that do not match the rows, for sizes that are missing or do not add up to d; and as
                the operator says. The operator's state does not change then.
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
        """Apply C to each row of ``[n, d]``: whole gradients, or their part for one parameter tensor."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """This operator's SPEC on the command line."""

    @property
    def feeds_back(self) -> bool:
        """Whether each worker keeps a state between calls."""
        return bool(self.names)

    @property
    def remedy(self) -> str:
        """Advice on how to lower this operator's bias, for a user who has reached its floor."""
        return f"a weaker operator than {self.spec}"

    @property
    def separable(self) -> bool:
        """Whether a step's workers can be split over several calls or processes with the same result."""
        return True

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Inside this context, calls do not update the workers' state; `commit` applies the update later."""
        yield

    def commit(self) -> None:
        """Apply the state update of the last deferred call."""
        return  # most operators have no state

    def reset(self) -> None:
        """Discard the state from earlier calls."""
        return  # most operators have no state

    def shard(self, workers: Sequence[int], *, each: bool = False) -> None:
        """Keep one process's part of a loaded state of all workers, and what the server needs.

        Args:
            workers: the workers of this process.
            each: as for `receive`.
        """
        return  # most operators have no state

    @staticmethod
    def gather(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Combine the processes' `state_dict`s, process 0 first, into one state of all workers."""
        return states[0]  # for most operators, all processes have the same state

    def deal(self, workers: Sequence[int], *, each: bool = False) -> None:
        """`shard` under its name in version 0.1."""
        self.shard(workers, each=each)

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`gather` under its name in version 0.1."""
        return self.gather(states)

    def state_dict(self) -> dict[str, Any]:
        """The state from earlier calls, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        if state:
            raise ValueError(f"{self.spec} carries no state; got {', '.join(state)}.")

    def _pass(self, rows: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        """Apply C to each row of ``[n, d]``, whole or layer by layer."""
        if not self.per_tensor:
            return self._apply(rows, at)
        parts = torch.split(rows, self._parts(rows.shape[-1], sizes), -1)
        return torch.cat([self._apply(part, at._replace(tensor=i)) for i, part in enumerate(parts)], -1)

    def _in_range(self, rows: Tensor) -> Tensor:
        """Return the output for finite gradients ``[n, d]`` after checking that it fits the dtype."""
        if not all_finite(rows):
            first = int((~rows.isfinite()).any(-1).nonzero()[0])
            raise NonFiniteError(
                f"{self.spec} takes the finite gradient in row {first} (rows are workers) beyond the range of "
                f"{rows.dtype}, whose largest number is {torch.finfo(rows.dtype).max:g}: pass gradients of a wider "
                "dtype, or clip them first."
            )
        return rows

    def _parts(self, d: int, sizes: Sizes | None) -> list[int]:
        """The lengths of the consecutive parts that the operator acts on."""
        if not self.per_tensor:
            return [d]
        if sizes is None:
            raise ValueError(f"{self.spec} acts on each parameter tensor: pass sizes=, their numbers of entries.")
        if sum(sizes) != d:
            raise ValueError(f"sizes must add up to the gradient's {d} entries; got {list(sizes)}.")
        return [size for size in sizes if size > 0]

    @property
    def draw_step(self) -> int:
        """The number of earlier calls, for operators that use it to draw."""
        return 0

    def advance(self) -> None:
        """Count a successful call."""
        return  # most operators do not count calls


_MOVED = {
    "Place": "coordinates",
    "Constants": "constants",
    **dict.fromkeys(("Bias", "Function", "Identity", "as_operator", "inner_operator", "without_state"), "function"),
}


def __getattr__(name: str) -> Any:
    """Names that were here in version 0.1."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"metamom.bias.{_MOVED[name]}")
    return getattr(module, "Coordinates" if name == "Place" else name)
