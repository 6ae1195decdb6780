"""Mixing before another rule: ``nnm:F>RULE`` and ``bucketing:S>RULE``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metamom.bias.checks import check_seed
from metamom.rng import DrawCoordinates, Ints, Purpose, choose, uniforms
from metamom.server.rules.base import FAULTY, START, Memory, Mixer, Rule, check_faulty, mixer, too_few
from metamom.server.rules.distances import pairwise
from metamom.server.spelling import Argument, text


@dataclass(frozen=True)
class Mixed(Rule):
    """A rule on mixed vectors.

    Args:
        mixer: mixes the vectors.
        rule: combines what is left of them.
    """

    mixer: Mixer
    rule: Rule

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        """Whether the rule does."""
        return self.rule.keeps

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return self.mixer.draws or self.rule.draws

    @property
    def spec(self) -> str:
        """``MIXER>RULE``."""
        return f"{self.mixer.spec}>{self.rule.spec}"

    def check(self, workers: int) -> None:
        """See `Rule.check`."""
        left = self.mixer.left(workers)
        try:
            self.rule.check(left)
        except ValueError as error:
            if left == workers:
                raise
            raise ValueError(f"{self.mixer.spec} leaves {left} vectors of {workers} workers: {error}") from error

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        return self.rule.combine(self.mixer.mix(rows, memory), memory)

    def kappa(self, n: int, faulty: int) -> float:
        """See `Rule.kappa`."""
        return self.mixer.kappa(n, faulty, self.rule.kappa(self.mixer.left(n), faulty))


@mixer("nnm", FAULTY)
@dataclass(frozen=True)
class NearestNeighbours(Mixer):
    """Nearest-neighbour mixing: each vector becomes the mean of its n - F nearest ones, itself among them.

    Args:
        faulty: F >= 1, the most workers that may be faulty. It needs n > 2 F workers.

    Raises:
        ValueError: for F out of range.

    Reference:
        Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, "Fixing by mixing", 2023, arXiv 2302.01772, lemma 1.
    """

    faulty: int

    def __post_init__(self) -> None:
        check_faulty("nnm", self.faulty)

    @property
    def spec(self) -> str:
        """``nnm:F``."""
        return text("nnm", self.faulty)

    def left(self, workers: int) -> int:
        """See `Mixer.left`: all n."""
        if workers <= 2 * self.faulty:
            raise too_few(f"{self.spec} (2 F + 1)", workers, 2 * self.faulty + 1)
        return workers

    def mix(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Mixer.mix`."""
        near = pairwise(rows).argsort(dim=1, stable=True)[:, : self.left(len(rows)) - self.faulty]
        return torch.stack([rows[each.sort().values].mean(0) for each in near])

    def kappa(self, n: int, faulty: int, after: float) -> float:
        """See `Mixer.kappa`: ``8 F / (n - F) (kappa + 1)``, for f <= F."""
        return 8 * self.faulty / (n - self.faulty) * (after + 1) if faulty <= self.faulty else math.inf


@mixer("bucketing", Argument("size", int, "S"), Argument("seed", int, "SEED", needed=False, named=True))
@dataclass(frozen=True)
class Bucketing(Mixer):
    """Random buckets of S vectors, drawn again in each step; each becomes its mean.

    F faulty vectors are in at most F of the ``ceil(n/S)`` buckets, so the rule after it must bear F of these. The draws
    depend on the seed, the step and n alone. The last bucket has the vectors that are left over.

    Args:
        size: 2 <= S < n.
        seed: of the draws.

    Raises:
        ValueError: for a size or seed out of range.

    Reference:
        Karimireddy, He, Jaggi, "Byzantine-robust learning on heterogeneous datasets via bucketing", 2022, arXiv
        2006.09365, algorithm 1.
    """

    size: int
    seed: int = 0
    draws = True

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"bucketing needs buckets of S >= 2 vectors; got {self.size}.")
        check_seed(self.seed)

    @property
    def spec(self) -> str:
        """``bucketing:S``, with ``:seed=SEED`` unless that is 0."""
        return text("bucketing", self.size, seed=self.seed or None)

    def left(self, workers: int) -> int:
        """See `Mixer.left`: ``ceil(n/S)``."""
        if workers <= self.size:
            raise ValueError(
                f"{self.spec} of {workers} workers leaves one bucket, which is the mean: take S < n, or more workers."
            )
        return math.ceil(workers / self.size)

    def mix(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Mixer.mix`."""
        self.left(len(rows))
        order = shuffled(self.seed, memory.step, len(rows)).tolist()
        buckets = [sorted(order[first : first + self.size]) for first in range(0, len(rows), self.size)]
        return torch.stack([rows[bucket].mean(0) for bucket in buckets])


def shuffled(seed: int, step: int, n: int) -> Ints:
    """A random order ``[n]`` of 0, ..., n - 1, all equally likely, by the counter (seed, step, n)."""
    place = DrawCoordinates(f"server bucketing {n}", step, np.array([0], dtype=np.int64))
    order: Ints = choose(uniforms(seed, place, Purpose.BIAS, n), n)[0]
    return order
