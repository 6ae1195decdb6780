"""Bias and floor of a robust mean, and of reshuffled tasks, for several beta.

    python -m metamom.experiments.two_biases [--run-dir DIR]

Five workers' quadratics ``1/2 (x - c_i)^T A_i (x - c_i)`` of different curvature in two dimensions, float64, exact
gradients. For each robust mean: the bias at the optimum, its bound (docs/theory/sources.md), and the floor of the
squared gradient norm. For one task per step: the bias of a step given the steps before it, at the optimum, and the
floor of the norm averaged over rounds, at two step sizes.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from metamom.common import tables
from metamom.common.files import write_atomically
from metamom.common.flag_types import folder
from metamom.experiments.quadratics import Quadratics
from metamom.experiments.shared.numerals import shortest
from metamom.optim import CompositeMomentum
from metamom.server.robust import robust_mean

BETAS = (1.0, 0.3, 0.1)
AGGREGATES = ("mean", "median", "trimmed:0.2", "geomedian")
ORDERS = ("replacement", "reshuffle")
AGGREGATE_STEPS = 1000
ORDER_STEPS, LAST = 6000, 2000  # the floors of the orders are means over the last steps
ORDER_LRS = (0.05, 0.025)


def workers(n: int = 5, d: int = 2) -> Quadratics:
    """Curvatures between 1/2 and 1, minima at random."""
    generator = torch.Generator().manual_seed(0)
    curvatures = 0.5 + 0.5 * torch.rand(n, d, generator=generator, dtype=torch.float64)
    return Quadratics(curvatures, torch.randn(n, d, generator=generator, dtype=torch.float64))


def floor_of_aggregate(problem: Quadratics, how: str, beta: float) -> float:
    """``||grad f||^2`` after many steps with a robust mean of exact gradients."""
    x = torch.nn.Parameter(torch.zeros(problem.minima.shape[1], dtype=torch.float64))
    optimizer = CompositeMomentum([x], lr=beta / (2 - beta), beta=beta)
    for _ in range(AGGREGATE_STEPS):
        x.grad = robust_mean(problem.gradients(x.detach()), how)
        optimizer.step()
    return float(problem.gradients(x.detach()).mean(0).square().sum())


def bias_of_order(problem: Quadratics, order: str) -> float:
    """Mean of ``||E[g | the steps before] - grad f||^2`` over a round at the optimum, by enumeration."""
    gradients = problem.gradients(problem.optimum)  # their mean is zero
    n = len(gradients)
    if order == "replacement":
        return float(gradients.mean(0).square().sum())
    squares = [
        torch.stack([gradients[list(rest)].mean(0).square().sum() for rest in itertools.combinations(range(n), left)])
        for left in range(1, n + 1)
    ]
    return float(torch.stack([each.mean() for each in squares]).mean())


def floor_of_order(problem: Quadratics, order: str, beta: float, lr: float) -> float:
    """Mean of ``||grad f||^2`` over the last steps, one worker's gradient at a time."""
    generator = torch.Generator().manual_seed(1)
    n = len(problem.minima)
    x = torch.nn.Parameter(problem.optimum.clone())
    optimizer = CompositeMomentum([x], lr=lr, beta=beta)
    norms: list[float] = []
    remaining: list[int] = []
    for _ in range(ORDER_STEPS):
        if order == "reshuffle":
            remaining = remaining or torch.randperm(n, generator=generator).tolist()
            worker = remaining.pop()
        else:
            worker = int(torch.randint(n, (), generator=generator))
        gradients = problem.gradients(x.detach())
        norms.append(float(gradients.mean(0).square().sum()))
        x.grad = gradients[worker]
        optimizer.step()
    return sum(norms[-LAST:]) / LAST


def report() -> str:
    """Both tables, in Markdown."""
    problem = workers()
    zeta2 = problem.heterogeneity
    bounds = {"mean": 0.0, "median": zeta2, "trimmed:0.2": 0.4 / 0.6 * zeta2, "geomedian": zeta2}
    betas = [f"floor, β = {shortest(beta)}" for beta in BETAS]
    lines = [
        f"Five quadratics, heterogeneity ζ² = {zeta2:.3f} at the optimum, exact gradients.",
        "",
        *tables.head("aggregate", "squared bias at the optimum", "its bound", *betas),
    ]
    for how in AGGREGATES:
        bias = float(robust_mean(problem.gradients(problem.optimum), how).square().sum())
        floors = [f"{floor_of_aggregate(problem, how, beta):.3g}" for beta in BETAS]
        lines.append(tables.row(how, f"{bias:.3g}", f"{bounds[how]:.3g}", *floors))
    lines += ["", *tables.head("order of the tasks", "squared bias of a step", "γ", *betas)]
    for order in ORDERS:
        for lr in ORDER_LRS:
            floors = [f"{floor_of_order(problem, order, beta, lr):.3g}" for beta in BETAS]
            lines.append(tables.row(order, f"{bias_of_order(problem, order):.3g}", shortest(lr), *floors))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.two_biases",
        description="Bias of robust means and of reshuffling.",
        allow_abbrev=False,
    )
    parser.add_argument("--run-dir", type=folder, default=Path("runs/two-biases"), help="where to write the report")
    arguments = parser.parse_args()
    text = report()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.run_dir / "report.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
