"""Robust means under attack: where momentum stops when two of ten workers send something else.

    python -m metamom.experiments.attacks [--run-dir DIR] [--seeds N]

Ten workers' quadratics ``1/2 (x - c_i)^T diag(a_i) (x - c_i)`` in ten dimensions, float64, with normal noise on each
gradient; the last two workers are faulty. Entries are the squared gradient norm of the mean of the *honest* workers'
functions, averaged over the last steps, as a mean over seeds with a 95 % interval. Three methods with one step size:
plain SGD (beta = 1), momentum on the server, and Byz-EF21-SGDM, which has it on the workers, before Top-K.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from metamom.bias import parse
from metamom.common import tables
from metamom.common.files import write_atomically
from metamom.common.flag_types import folder, task_count
from metamom.common.intervals import student_halfwidth
from metamom.experiments.quadratics import Quadratics
from metamom.optim import momentum_update
from metamom.server.robust import RobustMean

N, FAULTY, D = 10, 2, 10
LR, STEPS, LAST = 0.1, 300, 150
NOISE, APART = 1.0, 0.1  # standard deviations: of a gradient's entries, and of the entries of the workers' minima
RULES = (
    "mean",
    "median",
    "trimmed:0.2",
    "geomedian",
    "krum:2",
    "multi-krum:2",
    "centred-clip:1",
    "nnm:2>median",
    "bucketing:2>trimmed:0.4",
)
ATTACKS = (None, "sign-flip:2", "ipm:2:eps=4", "alie:2:z=1.5", "mimic:2", "gaussian:2:std=10")


class Method(NamedTuple):
    """Momentum of the server, and the operator on the workers."""

    name: str
    beta: float
    bias: str


METHODS = (
    Method("plain SGD, β = 1", 1.0, "none"),
    Method("server momentum, β = 0.1", 0.1, "none"),
    Method("Byz-EF21-SGDM, η = 0.1, Top-30 %", 1.0, "ef21-sgdm(0.1):topk:30%"),
)


class Entry(NamedTuple):
    """A cell: the mean of ``||grad f||^2`` over seeds, and half its 95 % interval."""

    method: str
    rule: str
    attack: str | None
    mean: float
    halfwidth: float


def workers(seed: int = 0) -> Quadratics:
    """Curvatures between 1/2 and 1, minima around (1, ..., 1)."""
    generator = torch.Generator().manual_seed(seed)
    curvatures = 0.5 + 0.5 * torch.rand(N, D, generator=generator, dtype=torch.float64)
    return Quadratics(curvatures, 1 + APART * torch.randn(N, D, generator=generator, dtype=torch.float64))


def stops_at(method: Method, rule: str, attack: str | None, seed: int, steps: int = STEPS, last: int = LAST) -> float:
    """``||grad f||^2`` of the honest workers' f, averaged over the last steps of a run from zero."""
    problem, robust, operator = workers(), RobustMean(rule, attack), parse(method.bias)
    honest = Quadratics(problem.curvatures[:-FAULTY], problem.minima[:-FAULTY])
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(D, dtype=torch.float64)
    v, norms = torch.zeros_like(x), []
    for _ in range(steps):
        noise = NOISE * torch.randn(N, D, generator=generator, dtype=torch.float64)
        total = robust.combine(operator(problem.gradients(x) + noise))
        robust.commit(total)
        v = momentum_update(v, total, method.beta)
        x = x - LR * v
        norms.append(float(honest.gradients(x).mean(0).square().sum()))
    return sum(norms[-last:]) / last


def measured(seeds: int, methods: Sequence[Method] = METHODS) -> list[Entry]:
    """All cells."""
    found = []
    for method, rule, attack in itertools.product(methods, RULES, ATTACKS):
        values = [stops_at(method, rule, attack, seed) for seed in range(seeds)]
        found.append(Entry(method.name, rule, attack, sum(values) / seeds, student_halfwidth(values)))
    return found


def report(entries: Sequence[Entry]) -> str:
    """A table for each method, in Markdown."""
    lines = [
        f"Ten quadratics, two of them faulty; ζ² = {workers().heterogeneity:.2f} at the optimum, noise of variance "
        f"{D * NOISE**2:.3g} on each gradient."
    ]
    for method in dict.fromkeys(each.method for each in entries):
        lines += ["", f"**{method}**", "", *tables.head("aggregate", *(attack or "honest" for attack in ATTACKS))]
        for rule in RULES:
            cells = [each for each in entries if (each.method, each.rule) == (method, rule)]
            lines.append(tables.row(f"`{rule}`", *(f"{each.mean:.2g} ± {each.halfwidth:.1g}" for each in cells)))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.attacks", description="Robust means under attack.", allow_abbrev=False
    )
    parser.add_argument("--run-dir", type=folder, default=Path("runs/attacks"), help="where to write the report")
    parser.add_argument("--seeds", type=task_count, default=3, help="runs of each (default: 3)")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds needs 2 or more, for an interval; got {arguments.seeds}.")
    entries = measured(arguments.seeds)
    text = report(entries)
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    values = json.dumps([entry._asdict() for entry in entries], indent=1)
    write_atomically(arguments.run_dir / "floors.json", values.encode())
    write_atomically(arguments.run_dir / "report.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
