"""Two biases proportional to the gradient: an exact rotation, and simulated Top-K on heterogeneous workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.bias.coordinates import NonFiniteError
from metamom.bias.spec import parse
from metamom.experiments import quadratics
from metamom.experiments.when.rule import spectrum
from metamom.experiments.when.search import Found, Quadratics, best, search


@dataclass(frozen=True)
class RelativeBias:
    """Rotations without noise; Top-K at one target and several noise levels."""

    condition: float = 100.0
    dimension: int = 12
    turns: tuple[float, ...] = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)  # B
    target: float = 1e-4
    operators: tuple[str, ...] = ("none", "topk:10%")
    workers: int = 5
    spread: float = 0.1  # standard deviation of the workers' minima
    rooms: tuple[float, ...] = (1.0, 10.0, 100.0)  # R without an operator
    lrs: tuple[float, ...] = tuple(1.9 * 2.0**power for power in range(-5, 5))
    betas: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)
    share: float = 0.02  # the target under Top-K, as a fraction of the first squared gradient norm
    steps: int = 400
    runs: int = 4


class Turned(NamedTuple):
    """Momentum's speed-up at one B, and the bound on how much longer its steps can be."""

    B: float
    found: Found

    @property
    def bound(self) -> float:
        """``(1 + B) / (2 sqrt(B))``."""
        return (1 + self.B) / (2 * math.sqrt(self.B)) if self.B else math.inf


def turned(config: RelativeBias) -> list[Turned]:
    """Search every B."""
    axes = spectrum(config.condition, config.dimension, start=0.0)
    one = Quadratics(*(torch.tensor([value], dtype=torch.float64) for value in (config.target, 0.0, 0.0)))
    bar = tqdm(config.turns, desc="turning bias", disable=None)
    return [Turned(B, best(search(axes, one, turn=math.sqrt(B)))) for B in bar]


class Compressed(NamedTuple):
    """Top-K or none at one noise level: the fraction of the target that the bias takes, R, and both sides' steps."""

    operator: str
    share: float
    room: float
    found: Found


def stays_below(trajectory: Tensor, target: float) -> float:
    """The first step after which a trajectory stays at or below the target; infinite if it ends above."""
    above = (~(trajectory <= target)).nonzero()
    first = 0 if len(above) == 0 else int(above[-1]) + 1
    return math.inf if first >= len(trajectory) else float(first)


def differing(config: RelativeBias) -> tuple[quadratics.Quadratics, Tensor]:
    """Workers whose curvatures (1 to 1/kappa) differ by up to 30 %, and whose minima differ; and the start, ``[d]``."""
    draws = torch.Generator().manual_seed(0)
    lam = spectrum(config.condition, config.dimension).curvatures
    factors = 0.7 + 0.6 * torch.rand(config.workers, config.dimension, generator=draws, dtype=torch.float64)
    minima = torch.randn(config.workers, config.dimension, generator=draws, dtype=torch.float64)
    problem = quadratics.Quadratics(lam * factors, config.spread * minima)
    return problem, problem.optimum + problem.curvature.rsqrt()


def compressed(config: RelativeBias) -> list[Compressed]:
    """Search every operator and noise; R with the floor of exact gradients at a small step as b^2."""
    problem, start = differing(config)
    lam = problem.curvature
    L = float(lam.max())
    target = config.share * float(problem.gradients(start).mean(0).square().sum())
    rows = []
    for operator in config.operators:
        floor = quadratics.descend(problem, start, lr=0.2 / L, beta=1.0, steps=2000, bias=parse(operator)).grad_sq
        bias = float(floor[-500:].mean())
        for room in tqdm(config.rooms, desc=operator, disable=None):
            variance = 2 * L * target / (room * float(lam.sum()))  # of each entry of the workers' mean
            noise = math.sqrt(variance * config.workers)
            steps = torch.full((1, len(config.lrs), len(config.betas)), math.inf, dtype=torch.float64)
            for i, lr in enumerate(config.lrs):
                for j, beta in enumerate(config.betas):
                    try:
                        trajectory = quadratics.descend(
                            problem, start, lr=lr / L, beta=beta, steps=config.steps, bias=parse(operator), noise=noise,
                            runs=config.runs,
                        ).grad_sq.mean(1)  # fmt: skip
                    except NonFiniteError:
                        continue
                    steps[0, i, j] = stays_below(trajectory, target)
            rows.append(
                Compressed(operator, bias / target, room * (1 - bias / target), best(steps, config.lrs, config.betas))
            )
    return rows
