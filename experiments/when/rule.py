"""The rule: when momentum beats SGD, by two numbers that are known before any search, and its accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.experiments.when.search import Found, Quadratics, Spectrum, best, search

WINS = 1.5  # momentum beats SGD if it is this many times as fast


@dataclass(frozen=True)
class WhenRule:
    """Random spectra with random targets, biases and noise; half of the spectra fit the rule, the others test it."""

    spectra: int = 40
    each: int = 24
    dimension: int = 12
    conditions: tuple[float, float] = (3.0, 300.0)
    targets: tuple[float, float] = (1e-4, 0.2)
    rooms: tuple[float, float] = (0.3, 3000.0)
    seed: int = 0


class Rule(NamedTuple):
    """Momentum wins if R, and the steps T of noiseless SGD at 1/L, are above these."""

    room: float
    length: float

    def __call__(self, room: Tensor, length: Tensor) -> Tensor:
        """The rule's prediction, ``[M]``."""
        return (room > self.room) & (length > self.length)


class Case(NamedTuple):
    """The quadratics of one spectrum and their results; all fields except the spectrum are ``[M]``."""

    spectrum: Spectrum
    quadratics: Quadratics
    room: Tensor
    length: Tensor
    found: Found


def length(spectrum: Spectrum, left: Tensor, cap: int = 100_000) -> Tensor:
    """T: steps of SGD at gamma = 1/L, without noise, until ``||grad f||^2`` of the start is at ``left [M]``."""
    values, factor = spectrum.start.clone(), (1 - spectrum.curvatures).square()
    steps = torch.full_like(left, float(cap))
    for k in range(cap):
        here = values.sum() <= left
        steps = torch.where(here & (steps == cap), float(k), steps)
        if bool(here.all()):
            break
        values *= factor
    return steps


def spectrum(condition: float, dimension: int, shape: str = "even", start: float = 1.0, noise: float = 0.0) -> Spectrum:
    """Curvatures from 1 to 1/condition.

    Args:
        condition: kappa.
        dimension: number of axes, >= 3.
        shape: "even" in the logarithm, "uniform", or "few" large ones (two, the others in the lowest tenth).
        start: squared entries of the first gradient go with this power of the curvature: 2 if all axes start as far
            from the minimum.
        noise: so do its variances.
    """
    low = -math.log10(condition)
    lam = torch.logspace(0, low, dimension, dtype=torch.float64)
    if shape == "uniform":
        lam = torch.linspace(1, 1 / condition, dimension, dtype=torch.float64)
    elif shape == "few":
        slow = torch.logspace(max(low, low * 0.9), low, dimension - 2, dtype=torch.float64)
        lam = torch.cat([torch.ones(2, dtype=torch.float64), slow])
    return Spectrum(lam, lam**start / (lam**start).sum(), lam**noise / (lam**noise).sum())


def cases(config: WhenRule) -> list[Case]:
    """Draw and search all quadratics."""
    draws = torch.Generator().manual_seed(config.seed)

    def log_uniform(low: float, high: float, count: int) -> Tensor:
        return low * (high / low) ** torch.rand(count, generator=draws, dtype=torch.float64)

    def one_of(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=draws))]

    found = []
    for _ in tqdm(range(config.spectra), desc="random quadratics", disable=None):
        shape = ("even", "uniform", "few")[int(one_of(0, 1, 2))]
        condition = float(log_uniform(*config.conditions, 1))
        axes = spectrum(condition, config.dimension, shape, one_of(0, 1, 2), one_of(0, 1))
        target = log_uniform(*config.targets, config.each)
        share = 0.98 * torch.rand(config.each, generator=draws, dtype=torch.float64)
        share[: config.each // 4] = 0
        room = log_uniform(*config.rooms, config.each)
        noise = 2 * target * (1 - share) / (room * axes.noise_curvature)
        quadratics = Quadratics(target, target * share, noise)
        found.append(case(axes, quadratics))
    return found


def case(axes: Spectrum, quadratics: Quadratics) -> Case:
    """Search the quadratics of one spectrum."""
    left = quadratics.target - quadratics.bias
    return Case(axes, quadratics, quadratics.room(axes), length(axes, left), best(search(axes, quadratics)))


class Flat(NamedTuple):
    """The numbers of many quadratics, ``[N]`` each."""

    room: Tensor
    length: Tensor
    speedup: Tensor
    lr: Tensor  # gamma L of SGD's best


def flat(found: list[Case]) -> Flat:
    """The quadratics on which SGD reaches the target."""
    columns = [(c.room, c.length, c.found.speedup, c.found.sgd.lr) for c in found]
    joined = [torch.cat(column) for column in zip(*columns, strict=True)]
    arrives = joined[2].isfinite()
    return Flat(*(column[arrives] for column in joined))


def accuracy(rule: Rule, of: Flat, wins: float = WINS) -> float:
    """The fraction of quadratics on which the rule is right."""
    return float((rule(of.room, of.length) == (of.speedup >= wins)).double().mean())


def fit(of: Flat, wins: float = WINS) -> Rule:
    """The thresholds of a grid that are right most often."""
    grid = [Rule(float(room), float(long)) for room in torch.logspace(0, 2, 41) for long in torch.logspace(0, 2, 41)]
    return max(grid, key=lambda rule: accuracy(rule, of, wins))


def clear_of(rule: Rule, of: Flat, factor: float = 2.0) -> Flat:
    """The quadratics with both R and T at least this factor away from the thresholds."""
    chosen = (of.room / rule.room).log().abs() >= math.log(factor)
    chosen &= (of.length / rule.length).clamp(min=1e-9).log().abs() >= math.log(factor)
    return Flat(*(column[chosen] for column in of))
