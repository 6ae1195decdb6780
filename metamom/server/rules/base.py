"""What a robust mean is: a record with its options, and a pure function of the workers' vectors and a memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, TypeVar

from torch import Tensor

from metamom.common.numbers import counted
from metamom.server.spelling import Argument, Kind


class Memory(NamedTuple):
    """What a robust mean knows of earlier steps.

    Attributes:
        step: the number of earlier steps, from which random rules draw.
        previous: the last aggregate ``[d]``; ``None`` in the first step.
    """

    step: int = 0
    previous: Tensor | None = None


START = Memory()


class Rule(ABC):
    """A robust mean. Subclasses are frozen dataclasses: their fields are the options.

    Attributes:
        keeps: whether it starts from the last aggregate.
        draws: whether it draws random numbers, by the number of the step.
    """

    keeps: bool = False
    draws: bool = False

    @property
    @abstractmethod
    def spec(self) -> str:
        """Its text form, which `metamom.server.robust.parse_rule` reads."""

    @abstractmethod
    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """Combine ``[n, d]`` into ``[d]``. Nothing changes; `Memory` of the next step is up to the caller."""

    def check(self, workers: int) -> None:
        """Refuse a number of workers that it cannot combine.

        Raises:
            ValueError: with what to change.
        """
        return  # most take any number

    def kappa(self, n: int, faulty: int) -> float:
        """The kappa of its ``(f, kappa)``-robustness, for f faulty vectors among n; infinite if none is known.

        For all vectors and each set S of n - f of them with mean ``x_S``, the result y satisfies
        ``||y - x_S||^2 <= kappa / |S| sum_{i in S} ||x_i - x_S||^2``.

        Reference:
            docs/theory/sources.md; Allouah et al., "Fixing by mixing", 2023, definition 2.
        """
        return math.inf


class Mixer(ABC):
    """What mixes the vectors before another rule combines them. Subclasses are frozen dataclasses."""

    draws: bool = False

    @property
    @abstractmethod
    def spec(self) -> str:
        """Its text form."""

    @abstractmethod
    def mix(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """Mix ``[n, d]`` into ``[m, d]``."""

    @abstractmethod
    def left(self, workers: int) -> int:
        """The number m of vectors that are left of n.

        Raises:
            ValueError: for a number of workers that it cannot mix.
        """

    def kappa(self, n: int, faulty: int, after: float) -> float:
        """The kappa of the whole, given that of the rule after it; infinite if none is known."""
        return math.inf


RULES: dict[str, Kind[Rule]] = {}
MIXERS: dict[str, Kind[Mixer]] = {}
R = TypeVar("R", bound=type[Rule])
M = TypeVar("M", bound=type[Mixer])


def rule(name: str, *arguments: Argument, more: tuple[str, ...] = ()) -> Callable[[R], R]:
    """A decorator that gives a rule its name and the arguments in its text."""

    def register(kind: R) -> R:
        RULES[name] = Kind(kind, arguments, more)
        return kind

    return register


def mixer(name: str, *arguments: Argument) -> Callable[[M], M]:
    """A decorator that gives a mixer its name and the arguments in its text."""

    def register(kind: M) -> M:
        MIXERS[name] = Kind(kind, arguments)
        return kind

    return register


@cache
def load_all() -> None:
    """Import every module of rules, which registers them."""
    package = import_module("metamom.server.rules")
    for module in iter_modules(package.__path__):
        import_module(f"metamom.server.rules.{module.name}")


FAULTY = Argument("faulty", int, "F")


def check_faulty(what: str, faulty: int) -> None:
    """Check a number of faulty workers.

    Raises:
        ValueError: unless it is at least 1.
    """
    if isinstance(faulty, bool) or not isinstance(faulty, int) or faulty < 1:
        raise ValueError(f"{what} needs the number of faulty workers, F >= 1; got {faulty!r}.")


def too_few(what: str, workers: int, least: int) -> ValueError:
    """The error for too few workers."""
    return ValueError(
        f"{what} needs at least {counted(least, 'worker')}; got {workers}: take more workers (--workers), or a "
        "smaller F."
    )
