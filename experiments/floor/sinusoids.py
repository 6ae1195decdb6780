"""Sinusoids, where nothing has a closed form: which estimators stay near a solution of the true objective.

The true objective F is the loss after an inner step on the whole population of a task's points, here 1,000 of them. All
arms start from the same weights, trained on inner batches of 100. On batches of m points, each then drifts as far as
its own bias takes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from metamom.common import tables
from metamom.common.intervals import normal_halfwidth, squared_norm
from metamom.experiments.shared.figures import COLOURS, DASHES, row_of_panels, save
from metamom.experiments.shared.numerals import shortest
from metamom.maml.estimators import Estimator
from metamom.maml.learner import MAML
from metamom.nets.models import SinusoidMLP
from metamom.optim import CompositeMomentum
from metamom.tasks import FixedTasks, Sinusoid

TITLE = "Sinusoids, where nothing has a closed form"


@dataclass(frozen=True)
class SinusoidFloor:
    """One inner step of alpha on fixed tasks, all of them in each step; one step size for all arms."""

    alpha: float = 0.05
    tasks: int = 10
    m: int = 5
    queries: int = 20
    betas: tuple[float, ...] = (1.0, 0.1)
    lr: float = 0.0005
    steps: int = 2000
    every: int = 250  # steps between evaluations of F
    last: int = 500  # last steps, for the mean iterate
    warm_steps: int = 2000
    warm_lr: float = 0.02
    warm_m: int = 100
    population: int = 1000  # points per task that stand for its whole population
    draws: int = 16  # draws of the population


class Arm(NamedTuple):
    """An estimator, and the factor by which its inner batch is larger than m."""

    estimator: Estimator
    times: int = 1

    def named(self, config: SinusoidFloor) -> str:
        """Its inner points, with those for the Hessian shown separately."""
        m = self.times * config.m
        whole = self.estimator in ("exact", "first-order", "moml-coupled")
        return f"{self.estimator}, m = {m}" + ("" if whole else f" + {m}")


ARMS = (
    Arm("exact"), Arm("exact", 2), Arm("first-order"), Arm("independent"), Arm("cross-fit"), Arm("richardson"),
    Arm("moml"), Arm("scsc"),
)  # fmt: skip


class Ended(NamedTuple):
    """The result of an arm.

    Attributes:
        trajectory: F along the run, every few steps from the start; ends where the run diverged.
        floor: ``||grad F||^2`` at the mean of the last iterates, estimated without bias; NaN if it diverged.
        halfwidth: of its 95 % interval.
        value: F there.
    """

    trajectory: list[float]
    floor: float
    halfwidth: float
    value: float


def start(config: SinusoidFloor) -> Tensor:
    """The weights ``[d]`` that all arms start from: trained on large inner batches."""
    learner = _learner(config, "exact")
    optimizer = CompositeMomentum(learner.parameters(), lr=config.warm_lr, beta=0.1)
    sampler = _tasks(config, config.warm_m)
    for k in tqdm(range(config.warm_steps), desc="start", leave=False, disable=None):
        optimizer.zero_grad()
        learner.backward(sampler.sample(k, config.tasks))
        optimizer.step()
    return parameters_to_vector(learner.model.parameters()).detach()


def true_gradients(config: SinusoidFloor, weights: Tensor, draws: int) -> tuple[Tensor, float]:
    """Independent estimates ``[draws, d]`` of grad F in float64, and F."""
    learner = _learner(config, "exact", weights)
    sampler = _tasks(config, config.population, queries=config.population).with_stream("population")
    gradients, losses = [], []
    for draw in range(draws):
        grads, loss = learner.meta_gradient(sampler.sample(draw, config.tasks))
        gradients.append(torch.cat([g.flatten() for g in grads.values()]).double())
        losses.append(float(loss.mean()))
    return torch.stack(gradients), sum(losses) / draws


def run(config: SinusoidFloor, arm: Arm, beta: float, weights: Tensor) -> Ended:
    """Train one arm from these weights and measure where it ends."""
    learner = _learner(config, arm.estimator, weights)
    optimizer = CompositeMomentum(learner.parameters(), lr=config.lr, beta=beta)
    sampler = _tasks(config, arm.times * config.m * learner.support_parts)
    trajectory, total = [true_gradients(config, weights, 2)[1]], torch.zeros(weights.shape, dtype=torch.float64)
    for k in tqdm(range(config.steps), desc=f"{arm.named(config)}, beta = {shortest(beta)}", leave=False, disable=None):
        optimizer.zero_grad()
        learner.backward(sampler.sample(k, config.tasks), check_finite=False)  # an arm may diverge: see below
        optimizer.step()
        now = parameters_to_vector(learner.model.parameters()).detach()
        if (k + 1) % config.every == 0:
            value = true_gradients(config, now, 2)[1]
            if not value < 100 * trajectory[0]:  # also true for a NaN
                return Ended(trajectory, math.nan, math.nan, math.nan)
            trajectory.append(value)
        if k >= config.steps - config.last:
            total += now
    gradients, value = true_gradients(config, (total / config.last).to(weights.dtype), config.draws)
    floor = squared_norm(gradients)
    return Ended(trajectory, floor.value, normal_halfwidth(floor.error), value)


def show(figure_path: Path, config: SinusoidFloor = SinusoidFloor()) -> str:
    """Run every arm with every beta, draw the figure, and return the table in Markdown."""
    weights = start(config)
    gradients, value = true_gradients(config, weights, config.draws)
    floor = squared_norm(gradients)
    at_start = f"{floor.value:.2g} ± {normal_halfwidth(floor.error):.1g}"
    lines = [
        f"{config.tasks} fixed sinusoids, one inner step of {config.alpha}, γ = {config.lr}, {config.steps} steps",
        f"from weights where F = {value:.3f} and ‖∇F‖² = {at_start}. At the mean of the last",
        f"{config.last} iterates; 95 % intervals over {config.draws} draws of {config.population} points a task; one",
        "seed.",
        "",
        *tables.head("estimator, inner batch", "β", "F", "‖∇F‖²"),
    ]
    figure, panels = row_of_panels(len(config.betas))
    for panel, beta in zip(panels, config.betas, strict=True):
        for number, arm in enumerate(ARMS):
            end, name = run(config, arm, beta, weights), arm.named(config)
            diverged = math.isnan(end.value)
            said = ["diverged", ""] if diverged else [f"{end.value:.3f}", f"{end.floor:.2g} ± {end.halfwidth:.1g}"]
            lines.append(tables.row(name, shortest(beta), *said))
            steps = [config.every * i for i in range(len(end.trajectory))]
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS)]
            panel.plot(steps, end.trajectory, label=name, color=colour, linestyle=dash)
            if diverged:
                panel.plot(steps[-1], end.trajectory[-1], "x", color=colour)
        panel.set(yscale="log", xlabel="step", title=f"β = {shortest(beta)}")
    panels[0].set_ylabel("F, the loss after a step on the population")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, figure_path)
    return "\n".join(lines)


def _learner(config: SinusoidFloor, estimator: Estimator, weights: Tensor | None = None) -> MAML:
    model = SinusoidMLP(generator=torch.Generator().manual_seed(0))
    if weights is not None:
        vector_to_parameters(weights.clone(), model.parameters())
    return MAML(model, F.mse_loss, inner_lr=config.alpha, estimator=estimator)


def _tasks(config: SinusoidFloor, shots: int, *, queries: int | None = None) -> FixedTasks:
    return FixedTasks(Sinusoid(shots, config.queries if queries is None else queries), config.tasks)
