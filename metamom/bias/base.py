"""What every bias operator offers; the operator that does nothing, and a user's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metamom.bias.checks import all_finite, check_setting

Sizes = Sequence[int]


class NonFiniteError(ValueError):
    """A worker's gradient has an entry that is infinite or NaN, or an operator makes one of finite entries."""


class Place(NamedTuple):
    """Where rows of gradients come from: what random operators draw by.

    Attributes:
        step: number of the call, from 0.
        workers: whose gradients the rows are, a number for each.
        part: number of the parameter tensor in a layer-wise operator, else 0.
        turn: number of the operator in a composition, else 0: two of one kind draw independently.
    """

    step: int
    workers: Sequence[int]
    part: int = 0
    turn: int = 0


class Constants(NamedTuple):
    """How far the mean of biased workers' gradients is from the gradient (docs/theory.md).

    ``||bias||^2 <= B ||grad f||^2 + b2`` and ``E ||noise||^2 <= M ||grad f||^2 + sigma2``.
    """

    B: float
    b2: float
    M: float
    sigma2: float

    @property
    def floor(self) -> float:
        """``b^2 / (1 - B)``: where the squared gradient norm may stop, whatever the momentum; infinite for B >= 1."""
        return self.b2 / (1 - self.B) if self.B < 1 else float("inf")


class BiasOperator(ABC):
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
        place = Place(self.draw_step if step is None else step, _numbers(workers, len(rows)))
        out = self._pass(rows, place, sizes)
        if step is None:
            self.advance()
        return gradient if out is rows else out.view(gradient.shape)

    @abstractmethod
    def _apply(self, rows: Tensor, place: Place) -> Tensor:
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
    def varies(self) -> bool:
        """Whether messages may be longer than `wire_bytes`."""
        return False

    @property
    def separable(self) -> bool:
        """Whether the workers of one step may pass in several calls, and in several processes, with the same result."""
        return True

    def contraction(self, d: int, sizes: Sizes | None = None) -> float | None:
        """``alpha_c`` with ``E ||C(g) - g||^2 <= (1 - alpha_c) ||g||^2`` for all g ``[d]``; None if there is none."""
        parts = [self._contraction(size) for size in self._parts(d, sizes)]
        return None if None in parts else min(part for part in parts if part is not None)

    def constants(
        self, d: int, *, workers: int = 1, zeta2: float = 0.0, bound: float | None = None, sizes: Sizes | None = None
    ) -> Constants:
        """The operator's row of the table in docs/theory.md, for full local gradients.

        Args:
            d: length of the gradients, >= 1.
            workers: n >= 1, with draws of their own.
            zeta2: heterogeneity >= 0, ``1/n sum ||grad f_i - grad f||^2 <= zeta^2``.
            bound: G >= 0 with ``||grad f_i|| <= G``, which clipping needs.
            sizes: as for a call.

        Raises:
            ValueError: where no such bound is known, and for arguments out of range.
        """
        check_setting(d, workers, zeta2, bound)
        alpha = self.contraction(d, sizes)
        if alpha is None:
            raise ValueError(f"no constants are known for {self.spec}: it is neither contractive nor unbiased.")
        return Constants(1 - alpha, (1 - alpha) * zeta2, 0.0, 0.0)

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """Bytes that one worker's message takes.

        Args:
            d: length of the gradient.
            element_size: bytes of one entry.
            sizes: as for a call.
        """
        return sum(self._wire_bytes(size, element_size) for size in self._parts(d, sizes))

    def encode(self, gradient: Tensor, *, step: int = 0, worker: int = 0, sizes: Sizes | None = None) -> Tensor:
        """One worker's message: what it sends instead of ``C(g)``.

        Args:
            gradient: ``[d]``.
            step: as for a call.
            worker: whose gradient it is.
            sizes: as for a call.

        Returns:
            ``[wire_bytes]`` uint8.
        """
        check_gradient(gradient)
        if gradient.dim() != 1:
            raise ValueError(f"encode takes one worker's gradient [d]; got shape {tuple(gradient.shape)}.")
        return self._message(gradient, Place(step, [worker]), sizes)

    def decode(self, message: Tensor, d: int, dtype: torch.dtype, *, sizes: Sizes | None = None) -> Tensor:
        """What a message says: ``C(g)`` ``[d]``, exactly.

        Raises:
            ValueError: for a message of another length, or one that no gradient has.
        """
        parts = self._parts(d, sizes)
        lengths = [self._wire_bytes(size, dtype.itemsize) for size in parts]
        if message.dtype is not torch.uint8 or message.shape != (sum(lengths),):
            raise self._misfit(message, f"{sum(lengths)} bytes", d, dtype)
        messages = torch.split(message, lengths)
        out = torch.cat([self._decode(m, size, dtype) for m, size in zip(messages, parts, strict=True)])
        if not all_finite(out):
            raise self._damaged("values that are infinite or NaN", d, dtype)
        return out

    def send(self, gradients: Tensor, *, step: int, workers: Sequence[int], sizes: Sizes | None = None) -> list[Tensor]:
        """Workers' messages, in place of a call: what each keeps from call to call moves on as by one.

        Args:
            gradients: ``[n, d]``.
            step: as for a call.
            workers: whose gradients these are.
            sizes: as for a call.

        Returns:
            n messages, each ``[bytes]`` uint8.

        Raises:
            NonFiniteError: as a call.
        """
        check_gradient(gradients)
        places = [Place(step, [worker]) for worker in _numbers(workers, len(gradients))]
        return [self._message(g, place, sizes) for g, place in zip(gradients, places, strict=True)]

    def receive(
        self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, *, sizes: Sizes | None = None, each: bool = False
    ) -> Tensor:
        """Decode the workers' messages: their sum, or each one.

        Args:
            messages: of all workers, in their order.
            d: length of the gradients.
            dtype: of the gradients.
            sizes: as for a call.
            each: give each worker's ``[n, d]`` in place of their sum ``[d]``.

        Raises:
            ValueError: for messages that no gradients have.
        """
        if each:
            return torch.stack([self.decode(message, d, dtype, sizes=sizes) for message in messages])
        total = torch.zeros(d, dtype=dtype, device=messages[0].device)
        for message in messages:
            self._add(total, message, sizes)
        return total

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

    def _pass(self, rows: Tensor, place: Place, sizes: Sizes | None) -> Tensor:
        """C of each of ``[n, d]``, whole or layer by layer."""
        if not self.per_tensor:
            return self._apply(rows, place)
        parts = torch.split(rows, self._parts(rows.shape[-1], sizes), -1)
        return torch.cat([self._apply(part, place._replace(part=i)) for i, part in enumerate(parts)], -1)

    def _message(self, gradient: Tensor, place: Place, sizes: Sizes | None) -> Tensor:
        """The message of one gradient ``[d]``, whole or layer by layer."""
        parts = torch.split(gradient, self._parts(len(gradient), sizes))
        return torch.cat([self._encode(part, place._replace(part=i)) for i, part in enumerate(parts)])

    def _add(self, total: Tensor, message: Tensor, sizes: Sizes | None) -> None:
        """Add what a message says to ``total [d]``."""
        total += self.decode(message, len(total), total.dtype, sizes=sizes)

    def _misfit(self, message: Tensor, wanted: str, d: int, dtype: torch.dtype) -> ValueError:
        return ValueError(
            f"{self.spec} sends {wanted} for {d} entries of {dtype}; got a message of {tuple(message.shape)} "
            f"{message.dtype}."
        )

    def _damaged(self, what: str, d: int, dtype: torch.dtype) -> ValueError:
        return ValueError(
            f"{self.spec} sends no such message for {d} entries of {dtype}: it holds {what}. It is damaged, or of "
            "another operator, size or dtype."
        )

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

    def _contraction(self, d: int) -> float | None:
        return None

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """Of dense entries, unless an operator sends less."""
        return d * element_size

    def _encode(self, part: Tensor, place: Place) -> Tensor:
        return self._apply(part.unsqueeze(0), place)[0].contiguous().view(torch.uint8)

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        return message.clone().view(dtype)

    def _arguments(self) -> dict[str, Any] | None:
        """The constructor's arguments by name; ``None`` where one has no attribute of its name."""
        names, kept = _parameters(type(self)), vars(self)
        return {name: kept[name] for name in names} if all(name in kept for name in names) else None

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False
        mine, others = self._arguments(), other._arguments()
        if mine is None or others is None:
            return self is other
        return all(_equal(value, others[name]) for name, value in mine.items())

    def __hash__(self) -> int:
        arguments = self._arguments()
        if arguments is None:
            return object.__hash__(self)
        plain = tuple(value for value in arguments.values() if not isinstance(value, Tensor))  # equal ones hash apart
        try:
            return hash((type(self), plain))
        except TypeError:  # an argument such as a list; equal operators have an equal hash all the same
            return hash(type(self))

    def __repr__(self) -> str:
        kept, given = vars(self), []
        for name, parameter in _parameters(type(self)).items():
            if name not in kept:
                return f"{type(self).__name__}(...)"
            if not _equal(kept[name], parameter.default):
                given.append(_BEFORE.get(parameter.kind, f"{name}=") + repr(kept[name]))
        return f"{type(self).__name__}({', '.join(given)})"


_BEFORE: dict[Any, str] = {Parameter.POSITIONAL_ONLY: "", Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


def _parameters(kind: type[BiasOperator]) -> Mapping[str, Parameter]:
    """The constructor's parameters."""
    return signature(kind).parameters


def _equal(a: object, b: object) -> bool:
    """Whether two arguments are equal; tensors and arrays, whose ``==`` goes entry by entry, as wholes."""
    if isinstance(a, (Tensor, np.ndarray)) or isinstance(b, (Tensor, np.ndarray)):
        return a is b or (type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b)))
    return a is b or bool(a == b)


class Identity(BiasOperator):
    """``C(g) = g``: no bias."""

    def _apply(self, rows: Tensor, place: Place) -> Tensor:
        return rows

    def _contraction(self, d: int) -> float | None:
        return 1.0

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
            raise TypeError(
                'a bias is an operator, a SPEC such as "topk:5%", or a function Tensor[d] -> Tensor[d]; got '
                f"{function!r}."
            )
        self.function = function

    def _apply(self, rows: Tensor, place: Place) -> Tensor:
        return torch.stack([self._one(g) for g in rows])

    def _one(self, gradient: Tensor) -> Tensor:
        out = self.function(gradient.clone())  # which it may change in place
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.spec} must return a tensor; got {type(out).__name__}.")
        if out.shape != gradient.shape:
            raise ValueError(f"{self.spec} must keep the shape {tuple(gradient.shape)}; got {tuple(out.shape)}.")
        return out

    @property
    def spec(self) -> str:
        """The function's name."""
        return function_name(self.function)


def function_name(function: object) -> str:
    """The name of a function, or of the class of an object that is called; a lambda's says nothing of its place."""
    name = str(getattr(function, "__qualname__", type(function).__qualname__))
    return "<lambda>" if name.endswith(".<lambda>") else name


Bias = BiasOperator | Callable[[Tensor], Tensor] | str | None


def as_operator(bias: Bias) -> BiasOperator | None:
    """The operator that ``bias`` means: itself, what a SPEC such as ``"topk:5%"`` names, a function wrapped, or none.

    A SPEC makes a new operator each time.

    Raises:
        TypeError: if it is none of these.
        ValueError: for a SPEC that `metamom.bias.parse` refuses.
    """
    if isinstance(bias, type):
        raise TypeError(f"a bias is an operator, such as {bias.__name__}(...); got the class {bias.__name__} itself.")
    if isinstance(bias, str):
        from metamom.bias.spec import parse  # which imports every operator, and they this

        return parse(bias)
    return bias if bias is None or isinstance(bias, BiasOperator) else Function(bias)


def inner_operator(operator: BiasOperator | str, wanted: str) -> BiasOperator:
    """An operator that another goes around, or the one that a SPEC names.

    Raises:
        TypeError: for what is none, or feeds errors back, with what is ``wanted``.
        ValueError: as `as_operator`.
    """
    made = as_operator(operator) if isinstance(operator, str) else operator
    if not isinstance(made, BiasOperator) or made.feeds_back:
        raise TypeError(f"{wanted}; got {operator!r}.")
    return made


def without_state(bias: Bias) -> BiasOperator | None:
    """`as_operator` for a single step, where a SPEC must not name an operator that carries something to the next one.

    Raises:
        TypeError: as `as_operator`.
        ValueError: as `as_operator`, and for such a SPEC.
    """
    operator = as_operator(bias)
    if isinstance(bias, str) and operator is not None and operator.state_dict():
        raise ValueError(
            f"bias={bias!r} would be a new operator at each step, but it carries a state from step to step (errors, or "
            f"a count of draws): make it once, operator = metamom.bias.parse({bias!r}), and pass bias=operator."
        )
    return operator


def _numbers(workers: Sequence[int] | None, rows: int) -> Sequence[int]:
    """The rows' workers."""
    if workers is None:
        return range(rows)
    if len(workers) != rows or len(set(workers)) != rows or min(workers, default=0) < 0:
        raise ValueError(f"workers are {rows} numbers >= 0 that differ, one for each gradient; got {list(workers)}.")
    return workers


def check_gradient(gradient: Tensor) -> None:
    """Refuse what no operator has a meaning for."""
    if not gradient.is_floating_point():
        raise TypeError(f"a bias operator acts on floating-point gradients; got {gradient.dtype}.")
    if gradient.dim() == 0 or gradient.shape[-1] == 0:
        raise ValueError(f"a bias operator acts on gradients [..., d] with d >= 1; got shape {tuple(gradient.shape)}.")
    if not all_finite(gradient):
        bad = ~gradient.isfinite()
        first = int(bad.reshape(-1, gradient.shape[-1]).any(-1).nonzero()[0])
        raise NonFiniteError(
            f"{int(bad.sum())} entries of the gradients are infinite or NaN, the first in row {first} (rows are "
            "workers): a smaller step size, or the loss, must keep them finite; no operator can."
        )
