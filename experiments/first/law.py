"""Momentum with unbiased gradients on a convex quadratic, against the exact law (docs/theory/quadratics.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.bias import Identity
from metamom.common import tables
from metamom.experiments.quadratics import Measured, Quadratics, descend, measured
from metamom.experiments.shared.figures import COLOURS, DASHES, row_of_panels, save
from metamom.theory import Stationary, stationary

TITLE = "Momentum and noise"


@dataclass(frozen=True)
class StationaryLaw:
    """Curvatures fall from 1 to 0.1; all runs start at (1, ..., 1)."""

    dimension: int = 10
    noise: float = 0.3
    betas: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.05)
    lr: float = 0.2
    steps: int = 3000
    last: int = 1000
    runs: int = 200

    @property
    def curvatures(self) -> Tensor:
        """``[d]``."""
        return torch.logspace(0, -1, self.dimension, dtype=torch.float64)

    @property
    def step_rules(self) -> dict[str, Callable[[float], float]]:
        """The step size for each beta: the same, or the largest that the worst-case theory allows."""
        return {f"γ = {self.lr:g}": lambda beta: self.lr, "γ = β/(2 − β)": lambda beta: beta / (2 - beta)}


class Point(NamedTuple):
    """The results of one step size and beta: means over the last steps, and the mean ``||grad f||^2`` at every step."""

    grad_sq: Measured
    deviation_sq: Measured
    trajectory: Tensor


def exact(config: StationaryLaw, lr: float, beta: float) -> Stationary:
    """The law's prediction."""
    return stationary(config.curvatures, config.noise**2, 0.0, beta, lr)


def measure(config: StationaryLaw, lr: float, beta: float) -> Point:
    """Run one step size and beta many times."""
    lam = config.curvatures
    problem = Quadratics(lam[None], torch.zeros_like(lam)[None])
    trajectory = descend(
        problem, torch.ones_like(lam), lr=lr, beta=beta, steps=config.steps, bias=Identity(), noise=config.noise,
        runs=config.runs,
    )  # fmt: skip
    grad_sq, deviation_sq = (measured(of[-config.last :].mean(0)) for of in trajectory)
    return Point(grad_sq, deviation_sq, trajectory.grad_sq.mean(1))


def show(figure_path: Path, config: StationaryLaw = StationaryLaw()) -> str:
    """Measure everything, draw the figure, and return the table in Markdown."""
    lines = [
        f"A quadratic in {config.dimension} dimensions, curvatures 1 to 0.1, noise of variance",
        f"{config.noise**2:.2g} on each entry. {config.runs} runs of {config.steps} steps, means of the last",
        f"{config.last}; in brackets the law.",
        "",
        *tables.head("γ", "β", "E‖∇f(x)‖²", "E‖v − ∇f(x)‖²"),
    ]
    figure, (curves, gradient, deviation) = row_of_panels(3, sharey=False)
    grid = torch.logspace(math.log10(min(config.betas)), 0, 60, dtype=torch.float64).tolist()
    for number, (name, rule) in enumerate(config.step_rules.items()):
        bar = tqdm(config.betas, desc=f"law, {name}", disable=None)
        points = {beta: measure(config, rule(beta), beta) for beta in bar}
        laws = {beta: exact(config, rule(beta), beta) for beta in [*config.betas, *grid]}
        for colour, (beta, point) in zip(COLOURS, points.items(), strict=False):
            cells = (
                f"{point.grad_sq} ({laws[beta].grad_sq:.3g})",
                f"{point.deviation_sq} ({laws[beta].deviation_sq:.3g})",
            )
            lines.append(tables.row(f"{rule(beta):.3g}", f"{beta:g}", *cells))
            if number == 0:
                curves.plot(range(1, config.steps + 1), point.trajectory, color=colour, label=f"β = {beta:g}")
                curves.axhline(laws[beta].grad_sq, color=colour, linewidth=0.8, linestyle=":")
        for panel, of_law, of_points in (
            (gradient, [laws[beta].grad_sq for beta in grid], [point.grad_sq for point in points.values()]),
            (deviation, [laws[beta].deviation_sq for beta in grid], [point.deviation_sq for point in points.values()]),
        ):
            panel.plot(grid, of_law, color=COLOURS[number], linestyle=DASHES[number], label=f"law, {name}")
            panel.errorbar(
                config.betas, [value.mean for value in of_points], [value.halfwidth for value in of_points], fmt="o",
                color=COLOURS[number], markersize=4, label=f"measured, {name}",
            )  # fmt: skip
    curves.set(xscale="log", yscale="log", xlabel="step k", ylabel="mean ‖∇f(x)‖²")
    curves.set_title(f"γ = {config.lr:g} (dotted: the law)")
    gradient.set(xscale="log", yscale="log", xlabel="β", title="stationary E‖∇f(x)‖²")
    deviation.set(xscale="log", yscale="log", xlabel="β", title="stationary E‖v − ∇f(x)‖²")
    curves.legend(frameon=False)
    gradient.legend(frameon=False, fontsize=8)
    save(figure, figure_path)
    return "\n".join(lines)
