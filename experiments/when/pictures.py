"""The map's two figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metamom.experiments.shared.figures import COLOURS, DASHES, column_of_panels, heat_map, save
from metamom.experiments.shared.numerals import distinguishable, shortest
from metamom.experiments.when.law import Compared, Point
from metamom.experiments.when.relative import Compressed, Turned
from metamom.experiments.when.rule import WINS, Case, Flat, Rule

LENGTHS = ((0, 8), (8, 16), (16, 64), (64, 1e9))  # bins of T


def draw_map(
    path: Path,
    grid: Case,
    shares: Sequence[float],
    rooms: Sequence[float],
    random: Flat,
    rule: Rule,
    workers: Sequence[int],
    by_share: dict[float, Case],
) -> None:
    """Plot the speed-up by bias and noise, and by R on random quadratics, and the steps by number of workers."""
    figure, (heat, scatter, steps) = column_of_panels(3)
    values = grid.found.speedup.reshape(len(shares), len(rooms)).numpy()
    heat_map(heat, shares, rooms, values, best=[])
    heat.grid(visible=False)
    needed = [rule.room / (1 - share) for share in shares]  # R without bias at the rule's threshold
    border = np.interp(np.log(needed), np.log(rooms), range(len(rooms)))
    heat.plot(border, range(len(shares)), color="#D55E00", linewidth=2)
    heat.set(xlabel="2Lεn / Σλσ²  (less noise →)", ylabel="fraction of the target that bias takes, b²/ε")
    heat.set(title=f"plain meta-SGD's steps / momentum's (line: R = {rule.room:.1f})", xlim=(-0.5, len(rooms) - 0.5))
    for number, (low, high) in enumerate(LENGTHS):
        chosen = (random.length >= low) & (random.length < high)
        label = f"T ≥ {low}" if high > 1e6 else f"T < {high:g}" if low == 0 else f"{low} ≤ T < {high}"
        x, y = random.room[chosen], random.speedup[chosen]
        scatter.plot(x, y, "os^D"[number], color=COLOURS[number], markersize=3, alpha=0.7, linewidth=0, label=label)
    scatter.axhline(WINS, color="0.4", linewidth=0.8)
    scatter.axvline(rule.room, color="#D55E00", linewidth=2)
    scatter.set(xscale="log", yscale="log", xlabel="R = 2L(ε − b²)n / Σλσ²", title="random quadratics")
    ticks = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
    scatter.set_yticks(ticks, distinguishable(ticks))
    scatter.set_yticks([], minor=True)
    scatter.set_ylabel("plain meta-SGD's steps / momentum's")
    scatter.set_ylim(None, 12)
    scatter.legend(framealpha=0.9, edgecolor="none", markerscale=1.6, loc="upper left")
    for number, (share, case) in enumerate(by_share.items()):
        for dash, (method, side) in zip(DASHES, case.found._asdict().items(), strict=False):
            name = "plain meta-SGD" if method == "sgd" else "momentum"
            steps.plot(
                workers, side.steps, dash, color=COLOURS[number], marker="o", markersize=3,
                label=f"{name}, b² = {shortest(share)} ε" if share else f"{name}, no bias",
            )  # fmt: skip
    steps.set(
        xscale="log",
        yscale="log",
        xlabel="workers n",
        ylabel="steps to the target",
        title="more workers, κ and ε as above",
    )
    steps.legend(frameon=False)
    save(figure, path)


def draw_bias(path: Path, points: Sequence[Point], turned: Sequence[Turned], compressed: Sequence[Compressed]) -> None:
    """Plot runs against the law, the turning bias with its bound, and Top-K."""
    figure, (law, turning, top) = column_of_panels(3)
    kinds: dict[str, list[Compared]] = {
        "E‖∇f‖², in the end": [point.grad_sq for point in points],
        "E‖v − ∇f‖², in the end": [point.deviation_sq for point in points],
        "E‖∇f‖², along the trajectory": [value for point in points for value in point.trajectory],
    }
    for number, (label, values) in enumerate(kinds.items()):
        exact, mean = [value.exact for value in values], [value.mean for value in values]
        law.plot(exact, mean, "os^"[number], color=COLOURS[number], markersize=3, linewidth=0, label=label)
    ends = law.get_xlim()
    law.plot(ends, ends, color="0.4", linewidth=0.8)
    law.set(xscale="log", yscale="log", xlabel="exact", ylabel="mean over runs", title="runs against the exact law")
    law.legend(frameon=False)
    with_bias = [at for at in turned if at.B > 0]
    turning.plot([at.B for at in with_bias], [at.bound for at in with_bias], "--", color="0.4", label="(1 + B) / (2√B)")
    turning.plot(
        [at.B for at in with_bias], [float(at.found.speedup) for at in with_bias], "o-", color=COLOURS[0],
        markersize=4, label="exact search, no noise",
    )  # fmt: skip
    turning.axhline(1, color="0.4", linewidth=0.8)
    turning.set(
        xscale="log", xlabel="B of a bias that turns the gradient", ylabel="plain meta-SGD's steps / momentum's"
    )
    turning.set(title="a bias that turns", ylim=(0, None))
    turning.legend(frameon=False)
    for number, operator in enumerate(dict.fromkeys(at.operator for at in compressed)):
        rows = [at for at in compressed if at.operator == operator]
        top.plot(
            [at.room for at in rows], [float(at.found.speedup) for at in rows], "os"[number] + "-",
            color=COLOURS[number], markersize=4, label=operator,
        )  # fmt: skip
    top.axhline(1, color="0.4", linewidth=0.8)
    top.set(
        xscale="log",
        xlabel="R",
        ylabel="plain meta-SGD's steps / momentum's",
        title="Top-K, heterogeneous workers",
        ylim=(0, None),
    )
    top.legend(frameon=False)
    save(figure, path)
