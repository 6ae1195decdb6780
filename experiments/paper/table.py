"""Our runs of the paper's experiments next to the authors', in a table and in figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from metamom.common import tables
from metamom.common.files import write_atomically
from metamom.experiments.paper.published import SEEDS, Curve, Setting, authors_curves, mean_rows, our_curves
from metamom.experiments.paper.run import EPOCHS
from metamom.experiments.paper.training import Row
from metamom.experiments.shared.figures import COLOURS, save
from metamom.experiments.shared.numerals import shortest
from metamom.training.directory import environment

TARGET = 0.9  # test accuracy
LAST = 20  # last epochs, averaged to the final accuracy
FIRST = (5, 10)  # epochs that must agree at beta = 1, and below


class Line(NamedTuple):
    """One setting: our mean over seeds, theirs, and the difference between runs of the same seed.

    Attributes:
        setting: the settings of both.
        ours: our runs.
        theirs: the authors' runs with our seeds where they published some, or their mean of five.
        apart: the largest ``|Δ train_loss|`` over as many epochs as `FIRST` says; ``None`` without a common seed that
            both ran for so many.
    """

    setting: Setting
    ours: list[Curve]
    theirs: list[Curve]
    apart: tuple[float | None, ...]


def table(paper: str | Path, run_dir: str | Path) -> Path:
    """Compare our runs with the authors': prints the table, writes ``report.md`` and ``figures/``.

    Args:
        paper: a folder of the authors' files, at any depth.
        run_dir: a folder with runs of `reproduce`, at any depth; the report goes there.

    Returns:
        The report's path.

    Raises:
        ValueError: if either has no results, or one that cannot be read.
    """
    run_dir = Path(run_dir)
    lines = _matched(our_curves(run_dir), authors_curves(Path(paper)))
    text = _report(lines)
    drawn: list[str] = []
    for group in _groups(lines):
        if any(line.ours for line in group):
            drawn.append(name := _name(group[0].setting))
            again = f"-{drawn.count(name)}" if drawn.count(name) > 1 else ""  # operators that differ only in signs
            path = run_dir / "figures" / f"{name}{again}.png"
            _figure(path, group)
            text += f"\n![{_title(group[0].setting)}](figures/{path.name})\n"
    write_atomically(run_dir / "report.md", text.encode())
    print(text)
    return run_dir / "report.md"


def epochs_to(rows: Sequence[Row], target: float = TARGET) -> int | None:
    """The number of updates until the test accuracy reaches the target; ``None`` if it never does."""
    return next((epoch for epoch, row in enumerate(rows, 1) if row.test_acc >= target), None)


def final_accuracy(rows: Sequence[Row]) -> float:
    """The mean test accuracy of the last 20 epochs."""
    return float(np.mean([row.test_acc for row in rows[-LAST:]]))


def largest_difference(ours: Sequence[Row], theirs: Sequence[Row], epochs: int) -> float | None:
    """The largest ``|Δ train_loss|`` of the first epochs; ``None`` where one of the runs is shorter."""
    if min(len(ours), len(theirs)) < epochs:
        return None
    return max(abs(a.train_loss - b.train_loss) for a, b in zip(ours[:epochs], theirs[:epochs], strict=True))


def _matched(ours: list[Curve], theirs: list[Curve]) -> list[Line]:
    lines = []
    for setting in sorted({curve.setting for curve in [*ours, *theirs]}):
        mine = [curve for curve in ours if curve.setting == setting]
        published = [curve for curve in theirs if curve.setting == setting]
        runs = [curve for curve in published if curve.seed is not None]
        common = [(a, b) for a in mine for b in runs if a.seed == b.seed]
        pairs = [[largest_difference(a.rows, b.rows, epochs) for a, b in common] for epochs in FIRST]
        apart = tuple(max((each for each in found if each is not None), default=None) for found in pairs)
        shown = [b for _, b in common] or [curve for curve in published if curve.seed is None] or runs
        lines.append(Line(setting, mine, shown, apart))
    return lines


def _groups(lines: list[Line]) -> list[list[Line]]:
    """The lines that differ only in beta."""
    groups: dict[Setting, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.setting._replace(beta=0.0), []).append(line)
    return list(groups.values())


def _report(lines: list[Line]) -> str:
    env = environment()
    text = [
        "# The paper's experiments, ours next to the authors'",
        "",
        f"Updates until the test accuracy is {TARGET:.0%}; test accuracy, mean of the last {LAST} epochs; the largest",
        f"|Δ train_loss| of runs with the same seed, over the first {FIRST[0]} and {FIRST[1]} epochs. Curves are means",
        f"over seeds. torch {env['torch']}, {env['threads']} threads.",
        "",
        *tables.head(
            "data",
            "n",
            "γ",
            "operator",
            "β",
            *(f"to {TARGET:.0%}: ours", "authors'"),
            *("final: ours", "authors'"),
            *(f"Δ ({first})" for first in FIRST),
            *("seeds: ours", "authors'"),
        ),
    ]
    for line in lines:
        s = line.setting
        cells = [s.dataset, s.nodes, shortest(s.lr), s.bias, "1 (SGD)" if s.beta == 1 else shortest(s.beta)]
        cells += [_reached(line.ours), _reached(line.theirs), _final(line.ours), _final(line.theirs)]
        cells += ["—" if apart is None else f"{apart:.1e}" for apart in line.apart]
        cells += [_seeds(line.ours), _seeds(line.theirs)]
        text.append(tables.row(*cells))
    text += ["", *_honest(lines), ""]
    return "\n".join(text)


def _honest(lines: list[Line]) -> list[str]:
    """Where momentum does not win, by our curves and by theirs."""
    sides: tuple[tuple[str, Callable[[Line], list[Curve]]], ...] = (
        ("ours", lambda line: line.ours),
        ("the authors'", lambda line: line.theirs),
    )
    compared, found = 0, []
    for group in _groups(lines):
        for side, of in sides:
            plain = [mean_rows(of(line)) for line in group if line.setting.beta == 1 and of(line)]
            for line in group if plain else ():
                if line.setting.beta == 1 or not of(line):
                    continue
                behind = _behind(mean_rows(of(line)), plain[0], EPOCHS[line.setting.dataset])
                compared += behind is not None
                if behind:
                    found.append(
                        f"- {_title(line.setting)}, β = {shortest(line.setting.beta)} ({side}): {', '.join(behind)}."
                    )
    if found:
        return ["Where momentum does not win:", "", *found]
    return ["Momentum wins in every comparison." if compared else "There are no runs to compare momentum with SGD."]


def _behind(momentum: list[Row], sgd: list[Row], epochs: int) -> list[str] | None:
    """The respects in which momentum does not win, over the epochs that both have; ``None`` if these decide nothing."""
    common = min(len(momentum), len(sgd))
    reached, sooner = epochs_to(momentum[:common]), epochs_to(sgd[:common])
    complete = common >= epochs
    if reached is None and sooner is None and not complete:
        return None
    behind = []
    if sooner is not None and (reached is None or reached >= sooner):
        behind.append(f"it reaches {TARGET:.0%} no sooner")
    if complete and final_accuracy(momentum) < final_accuracy(sgd):
        behind.append(f"it ends {100 * (final_accuracy(sgd) - final_accuracy(momentum)):.2f} points lower")
    return behind


def _reached(curves: list[Curve]) -> str:
    if not curves:
        return "—"
    rows = mean_rows(curves)
    reached = epochs_to(rows)
    return str(reached) if reached else f"not in {len(rows)}"


def _final(curves: list[Curve]) -> str:
    if not curves:
        return "—"
    rows = mean_rows(curves)
    wanted = EPOCHS[curves[0].setting.dataset]
    return f"{final_accuracy(rows):.2%}" if len(rows) >= wanted else f"— ({len(rows)} of {wanted})"


def _seeds(curves: list[Curve]) -> str:
    if not curves:
        return "—"
    return f"mean of {SEEDS}" if curves[0].seed is None else ", ".join(str(curve.seed) for curve in curves)


def _title(setting: Setting) -> str:
    return f"{setting.dataset}, n = {setting.nodes}, γ = {shortest(setting.lr)}, {setting.bias}"


def _name(setting: Setting) -> str:
    operator = "".join(letter if letter.isalnum() else "-" for letter in setting.bias)
    return f"{setting.dataset}-n{setting.nodes}-lr{shortest(setting.lr)}-{operator}"


def _figure(path: Path, group: list[Line]) -> None:
    """Plot training loss and test accuracy: ours as lines, the authors' as dots beneath them."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for number, line in enumerate(group):
        label = "plain meta-SGD" if line.setting.beta == 1 else f"β = {shortest(line.setting.beta)}"
        for curves, style, whose in ((line.theirs, ":", "authors"), (line.ours, "-", "ours")):
            rows = mean_rows(curves) if curves else []
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "linewidth": 3 if style == ":" else 1}
            epochs = range(1, len(rows) + 1)
            if rows:
                loss.plot(epochs, [row.train_loss for row in rows], label=f"{label}, {whose}", **look)
                accuracy.plot(epochs, [row.test_acc for row in rows], **look)
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="test accuracy")
    accuracy.axhline(TARGET, color="0.5", linewidth=0.8)
    for panel in (loss, accuracy):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    loss.legend(frameon=False)
    figure.suptitle(_title(group[0].setting))
    save(figure, path)
