"""The base class of bias operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from metamom.bias.checks import all_finite
from metamom.bias.constants import Contraction
from metamom.bias.coordinates import Coordinates, NonFiniteError, Sizes
from metamom.bias.state import State, after_draws, with_generators
from metamom.bias.stateful import Stateful
from metamom.bias.value import Value
from metamom.bias.wire import Codec


class BiasOperator(Value, Codec, Contraction, Stateful):
    """An operator C on gradients that are flattened over all parameters.

    It acts on the last dimension, so one call handles all workers' gradients ``[n, d]``. Operators are values: they are
    equal if created with equal arguments, and print as the call that creates them. The mathematics is in `transition`,
    a pure function of gradients and state. State that some of them keep between calls (a count of calls, errors to feed
    back) is in their `state_dict` and does not affect equality.

    A custom operator defines `_apply` and `spec`. It is a value if each constructor argument is stored in the attribute
    of the same name. Otherwise it equals only itself, and prints as ``Name(...)``.
    """

    per_tensor: bool = False  # whether it acts on each parameter tensor separately
    compresses: bool = False  # whether a message is shorter than all entries, so that processes send messages
    names: tuple[str, ...] = ()  # names of the tensors [d] that each worker keeps between calls (error feedback)
    carries_momentum: bool = False  # whether the workers average gradients over steps, so that the server must not
    allows_absent: bool = True  # whether some workers may be absent from a step
    remembered: str | None = None  # which of a worker's tensors the server keeps too, and averages while it is absent

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """Apply C to each row, as a pure function: neither the operator nor an argument changes.

        Args:
            rows: ``[n, d]``, finite; `place_of` checks them and returns their place.
            state: the state after the last transition; ``State()`` at the start.
            place: the step and the workers of the rows.
            sizes: as for a call.

        Returns:
            ``(C(rows) [n, d], the next state)``. They may share memory with each other and with the arguments, so copy
            one before changing it in place.

        Raises:
            NonFiniteError: as a call.
            ValueError: as a call.
        """
        place = with_generators(place, self._generators, state)
        return self._pass(rows, place, sizes), after_draws(state, place)

    def transition_send(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[list[Tensor], State]:
        """`transition` with the workers' messages, each ``[bytes]`` uint8, in place of ``C(rows)``."""
        place = with_generators(place, self._generators, state)
        return self._messages(rows, place, sizes), after_draws(state, place)

    def transition_receive(
        self,
        messages: Sequence[Tensor],
        state: State,
        d: int,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        *,
        each: bool = False,
    ) -> tuple[Tensor, State]:
        """`receive` as a pure function: the server's half of a transition.

        Returns:
            ``(the messages' sum [d], or each one's [n, d], the next state)``.
        """
        return self._decoded(messages, d, dtype, sizes, each), state

    @abstractmethod
    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        """Apply C to each row of ``[n, d]``: whole gradients, or their part for one parameter tensor."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """This operator's SPEC on the command line."""

    def step_bytes(self, step: int, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """The size of one worker's message of the next step: `wire_bytes`, unless it depends on the step."""
        return self.wire_bytes(d, element_size, sizes)

    @property
    def feeds_back(self) -> bool:
        """Whether each worker keeps a state between calls."""
        return bool(self.names)

    @property
    def kept_names(self) -> tuple[str, ...]:
        """The names of all tensors ``[d]`` that each worker keeps, those of an operator inside included."""
        return self.names

    @property
    def keeps_start(self) -> bool:
        """Whether what each worker keeps is no error feedback, but where its next search starts (PowerSGD)."""
        return False

    @property
    def remedy(self) -> str:
        """Advice on how to lower this operator's bias, for a user who has reached its floor."""
        return f"a weaker operator than {self.spec}"

    @property
    def separable(self) -> bool:
        """Whether a step's workers can be split over several calls or processes with the same result."""
        return True

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
