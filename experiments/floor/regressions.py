"""Two linear regressions of different covariance (I and I/4), where each estimator's floor is known.

One inner step of 1/2 on m points, with `MAML` and `CompositeMomentum` throughout. The limit of the mean iterate is
known exactly for the estimators that are affine in the weights (docs/theory/maml.md, "Fixed points of tasks that
differ"); for Top-K and its error feedback it is only measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from metamom.batch import Sampler
from metamom.bias.spec import parse
from metamom.common import tables
from metamom.common.intervals import normal_halfwidth, squared_norm, standard_error
from metamom.experiments.shared.figures import COLOURS, column_of_panels, save
from metamom.experiments.shared.numerals import shortest
from metamom.maml.estimators import Estimator
from metamom.maml.learner import MAML
from metamom.maml.tracking import TRACKING
from metamom.optim import CompositeMomentum
from metamom.tasks import FixedTasks, LinearRegression, PerWorker, half_squared_error
from metamom.theory import designs, regression
from metamom.theory.fixed_points import AffineMean, Floor, bias_floor

TITLE = "Linear regressions, where the floor is known"

COVARIANCES = torch.stack([torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64) / 4])
THETAS = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
DESIGNS = [designs.Gaussian(covariance) for covariance in COVARIANCES]


@dataclass(frozen=True)
class RegressionFloor:
    """One step size for all; ``tasks`` are dealt evenly to the two regressions."""

    alpha: float = 0.5
    betas: tuple[float, ...] = (1.0, 0.3, 0.1)
    lr: float = 0.5
    tasks: int = 64
    queries: int = 20
    steps: int = 2000
    last: int = 1750
    blocks: int = 20


class Arm(NamedTuple):
    """An estimator on inner batches of m points, and an operator on the two regressions' gradients."""

    estimator: Estimator
    m: int
    bias: str = "none"

    def __str__(self) -> str:
        return f"{self.estimator}, m = {self.m}" + ("" if self.bias == "none" else f", {self.bias}")


FIXED_POINTS = (*(Arm("exact", m) for m in (2, 5, 10)), Arm("first-order", 2), Arm("moml-coupled", 2))
REMEDIES = tuple(Arm(name, 2) for name in ("independent", "cross-fit", "richardson", "moml", "scsc"))
COMPRESSED = (Arm("independent", 2, "topk:1"), Arm("independent", 2, "ef21-sgdm(0.1):topk:1"))


class Ended(NamedTuple):
    """Statistics of a run's last steps.

    Attributes:
        mean: of the iterates, ``[d]``.
        error: its standard error, ``[d]``.
        floor: ``||grad f(E w)||^2``, estimated without bias, so it may be negative.
        halfwidth: of its 95 % interval.
        deviation_sq: mean of ``||v_k - grad f(w_k)||^2``.
    """

    mean: Tensor
    error: Tensor
    floor: float
    halfwidth: float
    deviation_sq: float


def predicted(arm: Arm, alpha: float) -> Floor | None:
    """The arm's limit by theory; ``None`` if there is no closed form."""
    if arm.bias != "none":
        return None
    exact = [regression.population(design, alpha) for design in DESIGNS]
    biased: list[AffineMean] = exact
    if arm.estimator == "exact":
        biased = [regression.coupled(design, alpha, arm.m) for design in DESIGNS]
    elif arm.estimator == "moml-coupled":
        biased = [regression.coupled(design, alpha, arm.m, share=TRACKING) for design in DESIGNS]
    elif arm.estimator == "first-order":
        biased = [regression.first_order(design, alpha) for design in DESIGNS]
    return bias_floor(exact, biased, THETAS)


def run(config: RegressionFloor, arm: Arm, beta: float, *, seed: int = 0) -> Ended:
    """Train one arm and measure where it ends."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    learner = MAML(model, half_squared_error, inner_lr=config.alpha, estimator=arm.estimator)
    operator = parse(arm.bias)
    optimizer = CompositeMomentum(learner.parameters(), lr=config.lr, beta=1.0 if operator.carries_momentum else beta)
    shots = arm.m * learner.support_parts

    def family(covariance: Tensor, theta: Tensor) -> LinearRegression:
        return LinearRegression(
            2, shots, config.queries, covariance=covariance, theta=theta, seed=seed, dtype=torch.float64
        )

    sampler: Sampler = FixedTasks(family(COVARIANCES, THETAS), config.tasks)
    workers = 1
    if arm.bias != "none":
        sampler, workers = PerWorker([family(*each) for each in zip(COVARIANCES, THETAS, strict=True)]), 2
    exact = [regression.population(design, config.alpha) for design in DESIGNS]
    slope = torch.stack([mean.gain for mean in exact]).mean(0)
    optimum = bias_floor(exact, exact, THETAS).optimum
    iterates, deviations = torch.empty(config.steps, 2, dtype=torch.float64), torch.empty(config.steps)
    for k in tqdm(range(config.steps), desc=f"{arm}, beta = {shortest(beta)}", leave=False, disable=None):
        optimizer.zero_grad()
        learner.backward(sampler.sample(k, config.tasks), workers=workers, bias=operator)
        iterates[k] = model.weight.detach()[0]
        optimizer.step()
        v = optimizer.state[model.weight]["momentum"][0]
        deviations[k] = (v - slope @ (iterates[k] - optimum)).square().sum()
    blocks = torch.stack([block.mean(0) for block in iterates[-config.last :].tensor_split(config.blocks)])
    floor = squared_norm((blocks - optimum) @ slope.T)
    return Ended(
        blocks.mean(0),
        standard_error(blocks),
        floor.value,
        normal_halfwidth(floor.error),
        float(deviations[-config.last :].mean()),
    )


def show(figure_path: Path, config: RegressionFloor = RegressionFloor()) -> str:
    """Run every arm with every beta, draw the figure, and return the table in Markdown."""
    figure, (plane, floors, errors) = column_of_panels(3)
    lines = [
        f"Two regressions, {config.tasks} tasks a step, γ = {config.lr}, {config.steps} steps, means of the last",
        f"{config.last}; 95 % intervals. Predicted are the limit of the mean iterate and the squared gradient there.",
        "",
        *tables.head(
            "estimator, inner batch, operator",
            "β",
            "mean iterate",
            "predicted",
            "‖∇f‖² there",
            "predicted",
            "E‖v − ∇f‖²",
        ),
    ]
    for number, arm in enumerate((*FIXED_POINTS, *REMEDIES, *COMPRESSED)):
        truth, colour = predicted(arm, config.alpha), COLOURS[number % len(COLOURS)]
        marker = "os^D"[number // len(COLOURS)]
        betas = config.betas if "sgdm" not in arm.bias else (1.0,)
        ended = {beta: run(config, arm, beta) for beta in betas}
        for beta, end in ended.items():
            at = f"{_point(end.mean)} ± {normal_halfwidth(float(end.error.max())):.4f}"
            said = ("—", "—") if truth is None else (_point(truth.end), f"{truth.floor:.2e}")
            floor = f"{end.floor:.1e} ± {end.halfwidth:.0e}"
            lines.append(tables.row(arm, shortest(beta), at, said[0], floor, said[1], f"{end.deviation_sq:.2e}"))
        first = ended[betas[0]]
        x, y = first.mean.tolist()
        right, up = (normal_halfwidth(1.0) * first.error).tolist()
        plane.errorbar(x, y, up, right, color=colour, fmt=marker, markersize=5, label=str(arm))
        if truth is not None:
            plane.plot(*truth.end, "x", color="black", markersize=8)
            if truth.floor > 1e-12:
                floors.axhline(truth.floor, color=colour, linewidth=0.8, linestyle=":")
        values = [end.floor for end in ended.values()]
        floors.errorbar(
            betas, values, [end.halfwidth for end in ended.values()], color=colour, fmt=f"{marker}-", markersize=4
        )
        errors.plot(betas, [end.deviation_sq for end in ended.values()], f"{marker}-", color=colour, markersize=4)
    plane.set(xlabel="w₁", ylabel="w₂", title="mean iterate (crosses: predicted)")
    floors.set(xscale="log", xlabel="β", title="‖∇f‖² there (dotted: predicted)")
    floors.set_yscale("symlog", linthresh=1e-4)
    errors.set(xscale="log", yscale="log", xlabel="β", title="E‖v − ∇f(w)‖²")
    figure.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, figure_path)
    return "\n".join(lines)


def _point(w: Tensor) -> str:
    return f"({float(w[0]):.4f}, {float(w[1]):.4f})"
