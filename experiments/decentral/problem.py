"""Workers with different quadratics, biased gradients, and where each method must end.

Legend: n workers, d dimensions, R runs with noise of their own; weights ``[n, R, d]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.decentral import complete, ring, torus
from metamom.experiments.quadratics import Quadratics
from metamom.theory.decentral import untracked_points
from metamom.theory.fixed_points import AffineMean, fixed_point


@dataclass(frozen=True)
class DecentralFloors:
    """The config of all runs.

    Attributes:
        side: the torus has side x side workers, and the ring as many.
        d: dimensions.
        lr: the step size.
        beta: weight of the new gradient.
        noise: standard deviation of the normal noise on each entry of each worker's gradient.
        steps: of each run.
        last: the steps at its end over which its weights are averaged.
        runs: runs of each arm, with noise of their own.
        lrs: the step sizes of the figure, without noise.
        scales: the factors of the workers' distance in the figure, without noise.
        seed: of problem and noise.
    """

    side: int = 4
    d: int = 10
    lr: float = 0.1
    beta: float = 0.1
    noise: float = 0.5
    steps: int = 1200
    last: int = 600
    runs: int = 24
    lrs: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    seed: int = 0

    @property
    def n(self) -> int:
        """The number of workers."""
        return self.side**2


class Method(NamedTuple):
    """How workers exchange: all with a server, or along a graph with or without tracking."""

    name: str
    graph: str
    tracking: bool = True

    def mixing(self, config: DecentralFloors) -> Tensor:
        """W, ``[n, n]``. A server averages, as a complete graph does."""
        if self.graph == "ring":
            return ring(config.n)
        return torus(config.side, config.side) if self.graph == "torus" else complete(config.n)


METHODS = (
    Method("server", "server"),
    Method("tracking, ring", "ring"),
    Method("tracking, torus", "torus"),
    Method("averaging alone, ring", "ring", tracking=False),
    Method("averaging alone, torus", "torus", tracking=False),
)


class Gradients(NamedTuple):
    """Biased gradients that are affine in the weights, ``gains (x - minima) + offsets``, before an operator.

    Attributes:
        problem: the true ones.
        gains: ``[n, d]``.
        offsets: ``[n, d]``.
        operator: SPEC of each worker's operator.
    """

    problem: Quadratics
    gains: Tensor
    offsets: Tensor
    operator: str = "none"

    def at(self, x: Tensor) -> Tensor:
        """Each worker's gradient at its own weights, ``[n, R, d]``, before the operator."""
        return self.gains[:, None] * (x - self.problem.minima[:, None]) + self.offsets[:, None]

    def gradient(self, x: Tensor) -> Tensor:
        """The true gradient of the mean at ``[..., d]``."""
        return self.problem.curvature * (x - self.problem.optimum)

    def end(self, method: Method, config: DecentralFloors, lr: float) -> Tensor | None:
        """Where the workers end by theory, ``[n, d]``; ``None`` under an operator."""
        if self.operator != "none":
            return None
        means = [AffineMean(torch.diag(a), b) for a, b in zip(self.gains, self.offsets, strict=True)]
        if method.tracking:
            return fixed_point(means, self.problem.minima).expand_as(self.problem.minima)
        return untracked_points(means, self.problem.minima, method.mixing(config), lr)

    def floor(self, method: Method, config: DecentralFloors, lr: float) -> float | None:
        """``||grad f||^2`` at the mean of the weights where they end by theory."""
        end = self.end(method, config, lr)
        return None if end is None else float(self.gradient(end.mean(0)).square().sum())


def problem(config: DecentralFloors, scale: float = 1.0) -> Quadratics:
    """Curvatures between 1/2 and 3/2, minima normal with standard deviation ``scale``."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.n, config.d
    curvatures = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return Quadratics(curvatures, scale * torch.randn(shape, generator=generator, dtype=torch.float64))


def biases(config: DecentralFloors, scale: float = 1.0) -> dict[str, Gradients]:
    """Every kind of bias by its name in the table."""
    true = problem(config, scale)
    generator = torch.Generator().manual_seed(config.seed + 1)
    constants, factors = torch.randn(2, config.n, config.d, generator=generator, dtype=torch.float64)
    zero, constants = torch.zeros_like(constants), constants - constants.mean(0)
    common = torch.full_like(constants, 0.1)
    relative = 1 + 0.5 * factors.clamp(-1, 1)
    none = Gradients(true, true.curvatures, zero)
    return {
        "none": none,
        "constant, sum zero": none._replace(offsets=constants),
        "constant": none._replace(offsets=constants + common),
        "relative, the same for all": none._replace(gains=1.5 * true.curvatures),
        "relative": none._replace(gains=relative * true.curvatures),
        "`topk:20%`": none._replace(operator="topk:20%"),
        "`ef21:topk:20%`": none._replace(operator="ef21:topk:20%"),
    }
