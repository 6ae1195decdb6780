"""Attacks to test robust means with: what faulty workers send instead of their vectors.

The last F of n workers are faulty. They know what the honest ones send, and all but ``gaussian`` send F equal vectors
(``sign-flip``: each its own). An attack acts on what the server has after the operator: decoded messages, or the
estimates of error feedback.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from metamom.bias.checks import all_finite, check_seed
from metamom.common.checks import check_number
from metamom.rng import DrawCoordinates, Floats, Purpose, normals, uniforms
from metamom.server.rules.base import FAULTY, check_faulty
from metamom.server.rules.distances import widened
from metamom.server.spelling import Argument, Kind, made, text


class Attack(ABC):
    """What faulty workers send. Subclasses are frozen dataclasses: their fields are the options.

    Attributes:
        faulty: F >= 1, the number of faulty workers.
        draws: whether it draws random numbers, by the number of the step.
    """

    faulty: int
    draws: ClassVar[bool] = False
    least: ClassVar[int] = 1  # honest workers

    @property
    @abstractmethod
    def spec(self) -> str:
        """Its text form, which `parse_attack` reads."""

    @abstractmethod
    def sent(self, honest: Tensor, own: Tensor, step: int) -> Tensor:
        """What the faulty workers send.

        Args:
            honest: ``[n - F, d]``, what the honest ones send, in at least float32.
            own: ``[F, d]``, what the faulty ones would send.
            step: the number of earlier steps.

        Returns:
            ``[F, d]``, or one vector ``[d]`` for all.
        """

    def __call__(self, rows: Tensor, step: int = 0) -> Tensor:
        """The vectors ``[n, d]`` with the last F replaced; ``rows`` do not change.

        Raises:
            ValueError: as `check`, and if what they send is beyond the range of the vectors' dtype.
        """
        self.check(len(rows))
        x = widened(rows)
        honest = len(rows) - self.faulty
        sent = self.sent(x[:honest], x[honest:], step).to(rows.dtype)
        if not all_finite(sent):
            raise ValueError(f"attack {self.spec} sends numbers beyond the range of {rows.dtype}: weaken it.")
        return torch.cat([rows[:honest], sent.expand(self.faulty, -1)])

    def check(self, workers: int) -> None:
        """Check the number of workers.

        Raises:
            ValueError: unless enough of them are honest.
        """
        if workers < self.faulty + self.least:
            raise ValueError(
                f"attack {self.spec} needs {self.faulty} faulty workers and at least {self.least} honest; got "
                f"{workers} in all: take more workers (--workers), or a smaller F."
            )


ATTACKS: dict[str, Kind[Attack]] = {}
A = TypeVar("A", bound=type[Attack])


def attack(name: str, *arguments: Argument) -> Callable[[A], A]:
    """A decorator that gives an attack its name and the arguments in its text."""

    def register(kind: A) -> A:
        ATTACKS[name] = Kind(kind, arguments)
        return kind

    return register


def parse_attack(spec: str) -> Attack:
    """Parse an attack, such as ``alie:2``.

    Raises:
        TypeError: for anything but a string.
        ValueError: for an unknown one, or arguments that are missing or out of range.

    Example:
        >>> parse_attack("ipm:2:eps=0.5")
        InnerProduct(faulty=2, eps=0.5)
    """
    if not isinstance(spec, str):
        raise TypeError(f"attack is a name with the number of faulty workers, such as alie:2; got {spec!r}.")
    return made(ATTACKS, spec, "attack")


@attack("sign-flip", FAULTY)
@dataclass(frozen=True)
class SignFlip(Attack):
    """Each faulty worker sends minus its own vector."""

    faulty: int

    def __post_init__(self) -> None:
        check_faulty("sign-flip", self.faulty)

    @property
    def spec(self) -> str:
        """``sign-flip:F``."""
        return text("sign-flip", self.faulty)

    def sent(self, honest: Tensor, own: Tensor, step: int) -> Tensor:
        """See `Attack.sent`."""
        return -own


@attack("ipm", FAULTY, Argument("eps", float, "EPS", needed=False, named=True))
@dataclass(frozen=True)
class InnerProduct(Attack):
    """Inner product manipulation: ``-eps`` times the mean of the honest vectors.

    Args:
        faulty: F.
        eps: > 0. A small one passes distance-based rules; the mean turns around for ``eps > (n - F)/F``.

    Raises:
        ValueError: for eps out of range.

    Reference:
        Xie, Koyejo, Gupta, "Fall of empires: breaking Byzantine-tolerant SGD by inner product manipulation", 2019.
    """

    faulty: int
    eps: float = 0.1

    def __post_init__(self) -> None:
        check_faulty("ipm", self.faulty)
        check_number("ipm's eps", self.eps)
        if not 0 < self.eps < math.inf:
            raise ValueError(f"ipm needs a finite eps > 0; got {self.eps}.")

    @property
    def spec(self) -> str:
        """``ipm:F``, with ``:eps=EPS`` unless that is 0.1."""
        return text("ipm", self.faulty, eps=None if self.eps == 0.1 else self.eps)

    def sent(self, honest: Tensor, own: Tensor, step: int) -> Tensor:
        """See `Attack.sent`."""
        return -self.eps * honest.mean(0)


@attack("alie", FAULTY, Argument("z", float, "Z", needed=False, named=True))
@dataclass(frozen=True)
class LittleIsEnough(Attack):
    """A little is enough: ``mean - z std`` of the honest vectors, entry by entry.

    The standard deviation divides by the number of honest vectors. With z = 0, as by default for few workers, they send
    the honest mean: pass z, such as 1.5.

    Args:
        faulty: F.
        z: by default `alie_z`, which depends on n.

    Raises:
        ValueError: for z that is not finite.

    Reference:
        Baruch, Baruch, Goldberg, "A little is enough: circumventing defenses for distributed learning", 2019,
        algorithm 3.
    """

    faulty: int
    z: float | None = None
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_faulty("alie", self.faulty)
        if self.z is not None:
            check_number("alie's z", self.z)
            if not math.isfinite(self.z):
                raise ValueError(f"alie needs a finite z; got {self.z}.")

    @property
    def spec(self) -> str:
        """``alie:F`` or ``alie:F:z=Z``."""
        return text("alie", self.faulty, z=self.z)

    def sent(self, honest: Tensor, own: Tensor, step: int) -> Tensor:
        """See `Attack.sent`."""
        z = alie_z(len(honest) + self.faulty, self.faulty) if self.z is None else self.z
        return honest.mean(0) - z * honest.std(0, correction=0)


def alie_z(n: int, faulty: int) -> float:
    """The z of ``alie``: ``Phi(z) = (n - F - s) / (n - F)`` with ``s = floor(n/2 + 1) - F``.

    With s honest workers further out, the faulty ones seem to be a majority. z is at least 0, which it is for few
    faulty workers among few: 1 of 5, or 2 of 10. It is also 0 if they are a majority by themselves.

    Args:
        n: number of workers.
        faulty: F, with 1 <= F < n.

    Example:
        >>> round(alie_z(50, 24), 2)
        1.43
    """
    honest = n - faulty
    supporters = n // 2 + 1 - faulty
    share = (honest - supporters) / honest
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0


@attack("mimic", FAULTY, Argument("worker", int, "I", needed=False, named=True))
@dataclass(frozen=True)
class Mimic(Attack):
    """All faulty workers send what honest worker I sends, so that it counts for F + 1.

    It moves no vector out of the crowd, and harms if the workers' data differ. The paper chooses the worker from the
    first steps; here it is given.

    Args:
        faulty: F.
        worker: I, one of the honest workers 0, ..., n - F - 1.

    Raises:
        ValueError: for a worker below 0; later, for one that is not honest.

    Reference:
        Karimireddy, He, Jaggi, "Byzantine-robust learning on heterogeneous datasets via bucketing", 2022, section 4.
    """

    faulty: int
    worker: int = 0

    def __post_init__(self) -> None:
        check_faulty("mimic", self.faulty)
        if self.worker < 0:
            raise ValueError(f"mimic copies a worker I >= 0; got {self.worker}.")

    @property
    def spec(self) -> str:
        """``mimic:F``, with ``:worker=I`` unless that is 0."""
        return text("mimic", self.faulty, worker=self.worker or None)

    def check(self, workers: int) -> None:
        """See `Attack.check`; the copied worker is honest."""
        super().check(workers)
        if self.worker >= workers - self.faulty:
            raise ValueError(
                f"attack {self.spec} copies an honest worker, 0 to {workers - self.faulty - 1} of {workers}; got "
                f"{self.worker}."
            )

    def sent(self, honest: Tensor, own: Tensor, step: int) -> Tensor:
        """See `Attack.sent`."""
        return honest[self.worker]


@attack(
    "gaussian",
    FAULTY,
    Argument("std", float, "STD", needed=False, named=True),
    Argument("seed", int, "SEED", needed=False, named=True),
)
@dataclass(frozen=True)
class Gaussian(Attack):
    """Each faulty worker sends independent normal numbers of mean zero, by the counter (seed, step, worker).

    Args:
        faulty: F.
        std: their standard deviation, > 0; 200 as in the paper.
        seed: of the draws.

    Raises:
        ValueError: for std or seed out of range.

    Reference:
        Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries", 2017, section 5.
    """

    faulty: int
    std: float = 200.0
    seed: int = 0
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_faulty("gaussian", self.faulty)
        check_number("gaussian's std", self.std)
        if not 0 < self.std < math.inf:
            raise ValueError(f"gaussian needs a finite std > 0; got {self.std}.")
        check_seed(self.seed)

    @property
    def spec(self) -> str:
        """``gaussian:F``, with ``:std=STD`` unless that is 200 and ``:seed=SEED`` unless that is 0."""
        return text("gaussian", self.faulty, std=None if self.std == 200 else self.std, seed=self.seed or None)

    def sent(self, honest: Tensor, own: Tensor, step: int) -> Tensor:
        """See `Attack.sent`."""
        n, d = len(honest) + self.faulty, own.shape[1]
        drawn = np.concatenate([self._normal(step, worker, d) for worker in range(n - self.faulty, n)])
        return torch.from_numpy(drawn).to(own) * self.std

    def _normal(self, step: int, worker: int, d: int) -> Floats:
        """Standard normal numbers ``[1, d]`` of one worker."""
        place = DrawCoordinates("server attack gaussian", step, np.array([worker], dtype=np.int64))
        drawn: Floats = normals(uniforms(self.seed, place, Purpose.BIAS, d + d % 2))[:, :d]
        return drawn
