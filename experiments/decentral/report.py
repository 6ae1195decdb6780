"""The table, the figure and the JSON of the floors without a server."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from tqdm import tqdm

from metamom.common import tables
from metamom.common.files import write_atomically
from metamom.decentral import ring_gap, torus_gap
from metamom.experiments.decentral.problem import METHODS, DecentralFloors, biases
from metamom.experiments.decentral.runs import exact_floor, noisy_floor, run
from metamom.experiments.shared.figures import COLOURS, DASHES, column_of_panels, save

ZERO = 1e-12  # squared norms below this count as zero: rounding, and what the slowest runs have left to go
MEASURED = "‖∇f‖² at the mean of the weights"


def report(config: DecentralFloors, run_dir: Path) -> Path:
    """Run everything; ``floors.json``, ``figures/decentral.png`` and ``report.md`` hold the results."""
    floors = measured(config)
    along_lr = sweep_lr(config)
    along_scale = sweep_scale(config)
    found = {"config": asdict(config), "floors": floors, "step sizes": along_lr, "heterogeneity": along_scale}
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "floors.json", (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    draw(config, found, run_dir / "figures" / "decentral.png")
    text = "\n".join([*table(config, floors), "", "![Floors without a server](figures/decentral.png)", ""])
    write_atomically(run_dir / "report.md", text.encode())
    return run_dir / "report.md"


def measured(config: DecentralFloors) -> list[dict[str, Any]]:
    """Every bias with every method, with noise: the floor and its prediction."""
    rows = []
    for bias, gradients in tqdm(biases(config).items(), desc="biases", leave=False, disable=None):
        for method in METHODS:
            floor = noisy_floor(config, gradients, method)
            law = gradients.floor(method, config, config.lr)
            rows.append({"bias": bias, "method": method.name, **floor._asdict(), "predicted": law})
    return rows


def sweep_lr(config: DecentralFloors) -> list[dict[str, Any]]:
    """The floor without bias and without noise at several step sizes."""
    gradients = biases(config)["none"]
    return [
        {
            "method": method.name,
            "lr": lr,
            "value": exact_floor(config, gradients, method, lr),
            "predicted": gradients.floor(method, config, lr),
        }
        for method in METHODS
        for lr in config.lrs
    ]


def sweep_scale(config: DecentralFloors) -> list[dict[str, Any]]:
    """The floor of tracking on the ring without noise, for workers that differ more and more."""
    method, rows = METHODS[1], []
    for scale in config.scales:
        for bias in ("constant, sum zero", "constant", "relative"):
            gradients = biases(config, scale)[bias]
            rows.append(
                {
                    "bias": bias,
                    "zeta2": gradients.problem.heterogeneity,
                    "value": exact_floor(config, gradients, method, config.lr),
                    "predicted": gradients.floor(method, config, config.lr),
                }
            )
    return rows


def table(config: DecentralFloors, floors: list[dict[str, Any]]) -> list[str]:
    """One line for each bias and method, in Markdown."""
    zeta2 = biases(config)["none"].problem.heterogeneity
    lines = [
        f"{config.n} quadratics in {config.d} dimensions, ζ² = {zeta2:.3g}, γ = {config.lr:g}, β = {config.beta:g}, "
        f"noise {config.noise:g}, {config.runs} runs of {config.steps} steps, means of the last {config.last}; 95 % "
        f"intervals. Spectral gaps: ring {ring_gap(config.n):.3g}, torus {torus_gap(config.side, config.side):.3g}.",
        "",
        *tables.head("bias", "method", "‖∇f‖² at the mean weights", "predicted", "1/n Σ‖xᵢ − x̄‖²"),
    ]
    for row in floors:
        law = "" if row["predicted"] is None else number(row["predicted"])
        value = f"{row['value']:.2e} ± {row['halfwidth']:.0e}"
        lines.append(tables.row(row["bias"], row["method"], value, law, f"{row['apart']:.2e}"))
    return lines


def number(value: float) -> str:
    """A squared norm; below `ZERO`, zero."""
    return "0" if value < ZERO else f"{value:.2e}"


def draw(config: DecentralFloors, found: dict[str, Any], path: Path) -> None:
    """Curves without noise, the floor against the step size, and against how much workers differ."""
    figure, (curves, along_lr, along_scale) = column_of_panels(3)
    gradients = biases(config)["constant, sum zero"]
    steps = config.steps // 2
    for number_, method in enumerate(METHODS):
        colour = COLOURS[number_]
        values = run(config, gradients, method, lr=config.lr, noise=0.0, runs=1, steps=steps).grad_sq
        curves.plot(values.clamp(min=ZERO), color=colour, linestyle=DASHES[number_ % 4], label=method.name)
        rows = [row for row in found["step sizes"] if row["method"] == method.name]
        _with_law(along_lr, [row["lr"] for row in rows], rows, colour, "osD^v"[number_])
    curves.set(yscale="log", xlabel="step", ylabel=MEASURED, title="constant bias of sum zero, without noise")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    along_lr.set(xscale="log", xlabel="γ", ylabel=MEASURED, title="where it ends without bias (lines: predicted)")
    for number_, bias in enumerate(dict.fromkeys(row["bias"] for row in found["heterogeneity"])):
        rows = [row for row in found["heterogeneity"] if row["bias"] == bias]
        _with_law(along_scale, [row["zeta2"] for row in rows], rows, COLOURS[number_], "osD"[number_], label=bias)
    along_scale.set(
        xscale="log",
        xlabel="ζ², how much workers differ",
        ylabel=MEASURED,
        title="where tracking on a ring ends (lines: predicted)",
    )
    along_scale.legend(frameon=False)
    save(figure, path)


def _with_law(
    panel: Axes, x: list[float], rows: list[dict[str, Any]], colour: str, marker: str, *, label: str | None = None
) -> None:
    """Measured floors as markers, and predicted ones as a line; what counts as zero lies at the bottom."""
    panel.plot(x, [max(row["predicted"], ZERO) for row in rows], color=colour, linewidth=0.8, linestyle=":")
    panel.plot(x, [max(row["value"], ZERO) for row in rows], marker, color=colour, markersize=5, label=label)
    panel.set_yscale("log")
