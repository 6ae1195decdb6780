"""The workers of the second and third experiment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamom.experiments.quadratics import Quadratics

WORKERS, DIMENSION = 10, 20
OPERATORS = ("none", "topk:10%", "clip:1")


def workers_that_differ() -> tuple[Quadratics, Tensor]:
    """Ten workers' quadratics, and the starting point of every run, ``[20]``.

    Curvatures fall from 1 to 1/20 and differ by up to 30 % between workers; so do the minima.
    """
    generator = torch.Generator().manual_seed(0)
    mean = torch.logspace(0, math.log10(0.05), DIMENSION, dtype=torch.float64)
    curvatures = mean * (0.7 + 0.6 * torch.rand(WORKERS, DIMENSION, generator=generator, dtype=torch.float64))
    minima = 0.9 * torch.randn(WORKERS, DIMENSION, generator=generator, dtype=torch.float64)
    problem = Quadratics(curvatures, minima)
    return problem, problem.optimum + 3
