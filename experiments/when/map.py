"""The map: SGD's steps relative to momentum's, over bias, noise, workers and conditioning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.common import tables
from metamom.experiments.shared.numerals import shortest
from metamom.experiments.when import law, relative, rule
from metamom.experiments.when.law import Point
from metamom.experiments.when.pictures import draw_bias, draw_map
from metamom.experiments.when.relative import Compressed, Turned
from metamom.experiments.when.rule import WINS, Flat, Rule
from metamom.experiments.when.search import BETAS, STEPS, Best, Quadratics

TITLE = "The map on quadratics"
ROOM_BINS = (0.0, 1.0, 3.0, 10.0, 100.0, math.inf)
LENGTH_BINS = (0.0, 8.0, 16.0, 32.0, 128.0, math.inf)


@dataclass(frozen=True)
class QuadraticMap:
    """The ranges of each part of the map; curvatures go from 1 to 1/kappa, evenly in the logarithm."""

    law: law.LawCheck = field(default_factory=law.LawCheck)
    rule: rule.WhenRule = field(default_factory=rule.WhenRule)
    relative: relative.RelativeBias = field(default_factory=relative.RelativeBias)
    conditions: tuple[float, ...] = (10.0, 100.0)
    dimension: int = 12
    target: float = 1e-3  # target, as a fraction of the first ||grad f||^2
    shares: tuple[float, ...] = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98)  # fractions of the target that the bias takes
    rooms: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # R without bias
    workers: tuple[int, ...] = tuple(2**power for power in range(13))
    one_worker: float = 0.3  # R of a single worker without bias


def speedups(config: QuadraticMap, condition: float) -> rule.Case:
    """Every fraction of bias with every noise level, row by row."""
    axes = rule.spectrum(condition, config.dimension)
    pairs = torch.tensor([(share, room) for share in config.shares for room in config.rooms], dtype=torch.float64)
    target = torch.full((len(pairs),), config.target, dtype=torch.float64)
    return rule.case(axes, Quadratics(target, pairs[:, 0] * target, 2 * target / (pairs[:, 1] * axes.noise_curvature)))


def with_workers(config: QuadraticMap, share: float) -> rule.Case:
    """The largest condition number with increasing numbers of workers."""
    axes = rule.spectrum(config.conditions[-1], config.dimension)
    target = torch.full((len(config.workers),), config.target, dtype=torch.float64)
    n = torch.tensor(config.workers, dtype=torch.float64)
    noise = 2 * config.target / (config.one_worker * axes.noise_curvature) / n
    return rule.case(axes, Quadratics(target, share * target, noise))


class Answer(NamedTuple):
    """The text, and the numbers behind it."""

    text: str
    rule: Rule
    accuracy: float
    clear: float  # accuracy where R and T are both a factor of two away from the rule's thresholds
    noisy: float  # median speed-up where R is below its threshold and T above
    short: float  # the same where T < 8


def answer(figures: Path, config: QuadraticMap = QuadraticMap()) -> Answer:
    """Measure everything, draw ``when-map.png`` and ``when-bias.png``, and return the text in Markdown."""
    points = law.points(config.law)
    cases = rule.cases(config.rule)
    half = len(cases) // 2
    fitted, judged = rule.flat(cases[:half]), rule.flat(cases[half:])
    best_rule = rule.fit(fitted)
    turned, compressed = relative.turned(config.relative), relative.compressed(config.relative)
    grids = {condition: speedups(config, condition) for condition in config.conditions}
    workers = {share: with_workers(config, share) for share in (0.0, 0.9)}
    draw_map(
        figures / "when-map.png", grids[config.conditions[-1]], config.shares, config.rooms, rule.flat(cases),
        best_rule, config.workers, workers,
    )  # fmt: skip
    draw_bias(figures / "when-bias.png", points, turned, compressed)
    clear = rule.clear_of(best_rule, judged)
    everything = rule.flat(cases)
    found = Answer(
        "",
        best_rule,
        accuracy=rule.accuracy(best_rule, judged),
        clear=rule.accuracy(best_rule, clear),
        noisy=_median(everything, (everything.room <= best_rule.room) & (everything.length > best_rule.length)),
        short=_median(everything, everything.length < 8),
    )
    text = [
        "### Against the exact law",
        *_on_the_law(config.law, points),
        "### Constant bias, noise and workers",
        *_on_the_grid(config, grids),
        *_on_the_workers(config, workers),
        "![Speed-up on the map](figures/when-map.png)",
        "### The rule on random quadratics",
        *_on_the_rule(config.rule, found, fitted, judged),
        "### Bias proportional to the gradient",
        *_on_turns(config.relative, turned),
        *_on_compression(config.relative, compressed),
        "![The law; biases proportional to the gradient](figures/when-bias.png)",
    ]
    return found._replace(text="\n\n".join(text))


def _on_the_law(config: law.LawCheck, points: Sequence[Point]) -> list[str]:
    groups = {
        "E‖∇f‖² in the end": [point.grad_sq for point in points],
        "E‖v − ∇f‖² in the end": [point.deviation_sq for point in points],
        "E‖∇f‖² along the trajectory": [value for point in points for value in point.trajectory],
    }
    rows = []
    for name, values in groups.items():
        worst = max(values, key=lambda value: value.z)
        relative_error = abs(worst.mean / worst.exact - 1)
        root = f"{math.sqrt(_mean_sq(values)):.2f}"
        rows.append(tables.row(name, len(values), f"{worst.z:.1f}", f"{relative_error:.1%}", root))
    return [
        f"{config.designs} draws of (γ, β, b, σ, n) through `CompositeMomentum`, {config.runs} runs each; deviations "
        "from the exact value in standard errors.",
        "\n".join([*tables.head("what", "comparisons", "largest", "which is", "root mean square"), *rows]),
    ]


def _mean_sq(values: Sequence[law.Compared]) -> float:
    return sum(value.z**2 for value in values) / len(values)


def _on_the_grid(config: QuadraticMap, grids: dict[float, rule.Case]) -> list[str]:
    parts = [
        f"Exact search, no simulation: γL ∈ 1.9 · 2^(i/3) from {min(STEPS):.2g} to {max(STEPS):.3g} for both sides, "
        f"β ∈ {{{', '.join(f'{beta:g}' for beta in BETAS)}}}; steps until E‖∇f‖² is at ε = {config.target:g} of its "
        "first value and stays there. Steps of SGD by steps of momentum:",
    ]
    for condition, case in grids.items():
        values = case.found.speedup.reshape(len(config.shares), -1)
        first, *rooms = map(shortest, config.rooms)
        lines = tables.head(f"κ = {shortest(condition)}: b²/ε", f"R without bias: {first}", *rooms)
        lines += [
            tables.row(shortest(share), *(f"{float(value):.2f}" for value in row))
            for share, row in zip(config.shares, values, strict=True)
        ]
        parts.append("\n".join(lines))
    return parts


def _on_the_workers(config: QuadraticMap, by_share: dict[float, rule.Case]) -> list[str]:
    sides = [cell for share in by_share for cell in (f"SGD, b² = {shortest(share)} ε", "momentum (γL, β)")]
    lines = tables.head("n", *sides)
    for i, n in enumerate(config.workers):
        cells = []
        for case in by_share.values():
            sgd, momentum = case.found
            cells += [f"{float(sgd.steps[i]):g} (γL = {float(sgd.lr[i]):.2g})", _steps(momentum, i)]
        lines.append(tables.row(n, *cells))
    return [f"Steps by the number of workers, κ = {config.conditions[-1]:g}:", "\n".join(lines)]


def _steps(best: Best, i: int) -> str:
    return f"{float(best.steps[i]):g} ({float(best.lr[i]):.2g}, {float(best.beta[i]):g})"


def _on_the_rule(config: rule.WhenRule, found: Answer, fitted: Flat, judged: Flat) -> list[str]:
    wins = float((judged.speedup >= WINS).double().mean())
    clear = rule.clear_of(found.rule, judged)
    everything = Flat(*(torch.cat(pair) for pair in zip(fitted, judged, strict=True)))
    lines = tables.head("R", *(f"T {_span(*span)}" for span in _spans(LENGTH_BINS)))
    for low, high in _spans(ROOM_BINS):
        cells = []
        for short, long in _spans(LENGTH_BINS):
            chosen = (everything.room >= low) & (everything.room < high)
            chosen &= (everything.length >= short) & (everything.length < long)
            values = everything.speedup[chosen]
            cells.append(f"{float(values.median()):.2f} ({len(values)})" if len(values) else "–")
        lines.append(tables.row(_span(low, high), *cells))
    ahead = everything.lr[everything.speedup >= WINS] >= 1
    return [
        f"{len(everything.room)} quadratics of {config.spectra} random spectra (κ {config.conditions[0]:g} to "
        f"{config.conditions[1]:g}; noise and start in different directions). T: steps of SGD at γ = 1/L to ε − b² "
        f"without noise. Median of SGD's steps by momentum's, and how many:",
        "\n".join(lines),
        f"Fitted on half of the spectra: momentum takes at most 1/{WINS:g} of SGD's steps where "
        f"R > {found.rule.room:.1f} and T > {found.rule.length:.0f}. On the other half that is right for "
        f"{found.accuracy:.0%} of {len(judged.room)} (momentum wins in {wins:.0%} of them), and for {found.clear:.0%} "
        f"of the {len(clear.room)} where neither R nor T is within a factor of two of its threshold. Where momentum "
        f"wins, SGD's own best step is at least half of its limit of stability 2/L in {_share(ahead)}. "
        f"Momentum (β < 1) is slower than SGD in {_share(everything.speedup < 1)} of all, nearly always with T < 16.",
    ]


def _median(of: Flat, which: Tensor) -> float:
    return float(of.speedup[which].median()) if bool(which.any()) else math.nan


def _share(which: Tensor) -> str:
    return f"{float(which.double().mean()):.0%}"


def _spans(edges: Sequence[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(edges))


def _span(low: float, high: float) -> str:
    return f"< {high:g}" if low == 0 else f"≥ {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def _on_turns(config: relative.RelativeBias, turned: Sequence[Turned]) -> list[str]:
    lines = tables.head("B", "SGD's steps (γL)", "momentum's (γL, β)", "ratio", "(1 + B) / (2√B)")
    for at in turned:
        sgd, momentum = at.found
        plain, ratio = f"{float(sgd.steps):g} ({float(sgd.lr):.2g})", f"{float(at.found.speedup):.2f}"
        lines.append(tables.row(shortest(at.B), plain, _steps(momentum, 0), ratio, f"{at.bound:.3g}"))
    return [
        f"b = √B J∇f, with J a quarter turn in planes of equal curvature; κ = {config.condition:g}, no noise, "
        f"ε = {config.target:g}. The longest stable step is 2(2 − β)β / (β² + (2 − β)²B) / L, over β at most 1/(√B L), "
        "against 2/(1 + B)/L for SGD: exact.",
        "\n".join(lines),
    ]


def _on_compression(config: relative.RelativeBias, compressed: Sequence[Compressed]) -> list[str]:
    lines = tables.head("operator", "b²/ε", "R", "SGD's steps (γL)", "momentum's (γL, β)", "ratio")
    for at in compressed:
        sgd, momentum = at.found
        plain, ratio = f"{float(sgd.steps):g} ({float(sgd.lr):.2g})", f"{float(at.found.speedup):.2f}"
        share, room = f"{at.share:.2f}", f"{at.room:.3g}"
        lines.append(tables.row(at.operator, share, room, plain, _steps(momentum, 0), ratio))
    return [
        f"{config.workers} heterogeneous workers, curvatures 1 to 1/{config.condition:g}; steps until the mean ‖∇f‖² "
        f"of {config.runs} runs is at {config.share:.0%} of its first value and stays there; b² is the floor of exact "
        "gradients at a small step.",
        "\n".join(lines),
    ]
