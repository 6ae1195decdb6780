"""Top-K and clipping on heterogeneous workers: the speed and the floor, for every beta and with error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from metamom.bias.spec import parse
from metamom.common import tables
from metamom.experiments.first.workers import OPERATORS, workers_that_differ
from metamom.experiments.quadratics import Measured, descend, measured, steps_to
from metamom.experiments.shared.figures import COLOURS, row_of_panels, save
from metamom.experiments.shared.numerals import shortest

TITLE = "Momentum and bias"
REMEDIES = {"topk:10%": "ef21:topk:10%", "clip:1": "clip21:1"}


@dataclass(frozen=True)
class OperatorFloors:
    """One step size for every operator and beta; noise is the standard deviation on each entry."""

    betas: tuple[float, ...] = (1.0, 0.3, 0.1)
    lr: float = 0.3
    noise: float = 0.05
    steps: int = 2000
    last: int = 500
    runs: int = 20
    share: float = 0.05  # the target, as a fraction of the first squared gradient norm


class Outcome(NamedTuple):
    """The results of one operator and beta: mean ``||grad f||^2`` at every step, steps to the target, and the floor."""

    trajectory: Tensor
    steps: int | None
    floor: Measured


def measure(config: OperatorFloors, spec: str, beta: float) -> Outcome:
    """Run one operator and beta many times."""
    problem, start = workers_that_differ()
    values = descend(
        problem, start, lr=config.lr, beta=beta, steps=config.steps, bias=parse(spec), noise=config.noise,
        runs=config.runs,
    ).grad_sq  # fmt: skip
    trajectory = values.mean(1)
    return Outcome(
        trajectory, steps_to(trajectory, config.share * float(trajectory[0])), measured(values[-config.last :].mean(0))
    )


def show(figure_path: Path, config: OperatorFloors = OperatorFloors()) -> str:
    """Measure everything, draw the figure, and return the table in Markdown."""
    problem, _ = workers_that_differ()
    n, d = problem.minima.shape
    lines = [
        f"{n} workers' quadratics in {d} dimensions, ζ² = {problem.heterogeneity:.2f} at the optimum.",
        f"γ = {config.lr}, noise of standard deviation {config.noise} on each entry, {config.runs} runs. Steps",
        f"until the mean ‖∇f‖² is at {config.share:.0%} of its first value; floor: its mean over the last",
        f"{config.last} of {config.steps} steps.",
        "",
        *tables.head("operator", "β", "steps", "floor of ‖∇f‖²"),
    ]
    figure, panels = row_of_panels(len(OPERATORS))
    for panel, spec in zip(panels, tqdm(OPERATORS, desc="floors", disable=None), strict=True):
        names = [spec, REMEDIES[spec]] if spec in REMEDIES else [spec]
        for name in names:
            for colour, beta in zip(COLOURS, config.betas, strict=False):
                outcome = measure(config, name, beta)
                reached = "never" if outcome.steps is None else outcome.steps
                lines.append(tables.row(name, shortest(beta), reached, outcome.floor))
                style, label = ("-", f"β = {shortest(beta)}") if name == spec else (":", None)
                panel.plot(range(1, config.steps + 1), outcome.trajectory, color=colour, linestyle=style, label=label)
        panel.set(xscale="log", yscale="log", xlabel="step k", title="; dotted: ".join(names))
    panels[0].set_ylabel("mean ‖∇f(x)‖²")
    panels[0].legend(frameon=False)
    save(figure, figure_path)
    return "\n".join(lines)
