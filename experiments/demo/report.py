"""The demo's verdicts, its report, and its results as data."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from metamom.common import tables
from metamom.common.files import write_atomically
from metamom.experiments.demo.pictures import draw
from metamom.experiments.demo.search import search_table
from metamom.experiments.demo.settings import METHODS, Case, Demo, Tuned
from metamom.experiments.demo.settings import Method as MethodName
from metamom.experiments.demo.training import Arm, Ending, curve, ending, sent
from metamom.experiments.demo.verdict import Ratio, Verdict, gain, quotient
from metamom.experiments.families.family import MEAN_SQUARED_ERROR
from metamom.experiments.report import Method, Page, Section, SeedRun, can_write_page, write_page
from metamom.training.directory import environment

TITLE = "Momentum and plain meta-SGD: where momentum is faster, and where it gains little"
SAYS: dict[Verdict, str] = {
    "above": "momentum is faster",
    "below": "momentum is slower",
    "unclear": "which is faster cannot be told",
}
PREDICTED: dict[Verdict, str] = {
    "above": ", as predicted",
    "below": ", against the prediction",
    "unclear": "; the prediction stays open",
}
HEAD = ("case", "method", "γ", "β", "median", "range", "reached")


class Result(NamedTuple):
    """One case: its runs by method and seed, how they ended, and momentum's gain."""

    case: Case
    arms: dict[MethodName, list[Arm]]
    ends: dict[MethodName, list[Ending]]
    gain: Ratio


def results(demo: Demo, arms: Sequence[Arm], run_dir: Path) -> list[Result]:
    """Every case, from its finished runs."""
    found = []
    for case in demo.cases:
        of = {method: [arm for arm in arms if (arm.case, arm.method) == (case, method)] for method in METHODS}
        ends = {method: [_ended(arm, run_dir) for arm in mine] for method, mine in of.items()}
        steps = {method: [end.steps for end in each] for method, each in ends.items()}
        found.append(Result(case, of, ends, gain(steps["sgd"], steps["momentum"], case.cap)))
    return found


def verdicts(found: Sequence[Result]) -> list[str]:
    """What the runs say, a line for each case and one for each comparison of two gains."""
    by_name = {result.case.name: result for result in found}
    lines = []
    for result in found:
        says = f"({result.case.name}) {result.case.title}: {SAYS[result.gain.verdict]}"
        judged = "" if result.case.below else PREDICTED[result.gain.verdict]
        lines.append(f"{says}{judged}.\n    Ratio of steps: {result.gain}.")
    for result in found:
        if result.case.below is not None:
            more = quotient(by_name[result.case.below].gain, result.gain)
            gains = {"above": "gains less", "below": "gains more", "unclear": "may gain as much"}[more.verdict]
            lines.append(
                f"({result.case.below}) against ({result.case.name}): momentum {gains} with {result.case.title}"
                f"{PREDICTED[more.verdict]}.\n    Ratio of gains: {more}."
            )
    return lines


def rows(found: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """The cells of the table, a row for each case and method."""
    for result in found:
        for method, label in METHODS.items():
            arm = result.arms[method][0]
            ends = result.ends[method]
            steps = sorted(result.case.cap + 1 if end.steps is None else end.steps for end in ends)
            shown = [f"over {result.case.cap}" if n > result.case.cap else f"{n}" for n in (steps[0], steps[-1])]
            middle = median(steps)
            at = f"over {result.case.cap}" if middle > result.case.cap else f"{middle:g}"
            reached = f"{sum(end.steps is not None for end in ends)} of {len(ends)}"
            beta = "1" if method == "sgd" else f"{arm.beta:g}"
            case = f"({result.case.name}) {result.case.title}"
            yield case, label, f"{arm.lr:.3g}", beta, at, " to ".join(shown), reached


def table(found: Sequence[Result]) -> str:
    """The table for a terminal, at most 100 columns wide."""
    lines = [HEAD, *rows(found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = []
    before = ""
    for line in lines:
        case, *rest = ("", *line[1:]) if line[0] == before else line
        before = line[0]
        text.append("  ".join(cell.ljust(width) for cell, width in zip((case, *rest), widths, strict=True)).rstrip())
    text.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def write_report(
    demo: Demo, tuned: Tuned, found: Sequence[Result], run_dir: Path, seconds: Mapping[str, float]
) -> Path:
    """Write ``report.md``, ``figures/demo.png``, ``results.json`` and, where Bokeh is installed, ``report.html``.

    Args:
        demo: what was run.
        tuned: the search that chose gamma and beta.
        found: of `results`.
        run_dir: where to write.
        seconds: times to record.

    Returns:
        The path of the page, or of ``report.md`` where there is no page.
    """
    draw(
        run_dir / "figures" / "demo.png",
        demo,
        [arm for result in found for mine in result.arms.values() for arm in mine],
        run_dir,
    )
    write_atomically(run_dir / "results.json", (json.dumps(as_data(demo, found, seconds), indent=1) + "\n").encode())
    path = run_dir / "report.md"
    write_atomically(path, ("\n".join(text(demo, tuned, found)) + "\n").encode())
    return write_page(run_dir / "report.html", page(demo, tuned, found, run_dir)) if can_write_page() else path


def text(demo: Demo, tuned: Tuned, found: Sequence[Result]) -> list[str]:
    """The report in Markdown."""
    env = environment()
    caps = _listed([f"{case.cap:,} ({case.name})" for case in demo.cases])
    tried = {cell.beta for cells in tuned.cells.values() for cell in cells if cell.beta < 1}
    betas = ", ".join(f"{beta:g}" for beta in sorted(tried, reverse=True))
    seeds = ", ".join(map(str, tuned.search["seeds"]))
    return [
        f"# {TITLE}",
        "",
        *(f"- {line}".replace("\n    ", " ") for line in verdicts(found)),
        "",
        f"Ratio of steps: plain meta-SGD's steps to an error of {demo.target:g} divided by momentum's, seed by seed on "
        f"the same tasks and initial weights: geometric mean over {demo.seeds} seeds and its 95 % interval (Student's "
        "t on the logarithms). A run that does not reach the target counts as its most steps. The verdicts come from "
        "these intervals.",
        "",
        "## What theory predicts",
        "",
        "The step size of plain meta-SGD is limited in two ways: by stability (γ < 2/L) and by noise. Momentum with β "
        "< 1 is stable at larger γ. So it is faster where noise is small, which is with many tasks a step, and there "
        "is little to gain with few. `python -m metamom.experiments.when` has the rule and how well it predicts.",
        "",
        f"## Steps to an error of {demo.target:g}",
        "",
        *tables.head(*HEAD),
        *(tables.row(*cells) for cells in rows(found)),
        "",
        "![Validation error against steps, both methods, a panel for each case](figures/demo.png)",
        "",
        f"Median and range over {demo.seeds} seeds, drawn until the first of them arrives; a mark for each seed's "
        "arrival.",
        "",
        "## What was run",
        "",
        f"Sinusoids, 10 shots and 10 queries, an MLP of 1,761 weights, one inner step of {demo.inner_lr:g}, v₋₁ = 0. "
        f"Validation error: mean squared error on {demo.validation} tasks after the inner step, every {demo.every} "
        f"steps. A run ends at the target, and gives up after {caps} "
        "steps. Each run is in `runs/`, as `metamom train` would have left it.",
        "",
        "## How γ and β were chosen",
        "",
        f"By a search on other seeds ({seeds}), the same γ for both methods, a factor of √2 apart, and for momentum "
        f"β ∈ {{{betas}}}: the fewest steps to the same target in the mean over those seeds, all of which must reach "
        "it. Momentum has more to choose from, since "
        f"plain meta-SGD is β = 1. Repeat the search with `{tuned.command}` ({tuned.environment['platform']}, torch "
        f"{tuned.environment['torch']}). The best γ of each β, and its neighbours: bold is what the demo runs, "
        f"and a dash is where a seed took over {tuned.search['patience']:g} times the best, or did not arrive.",
        "",
        *search_table(demo, tuned),
        "",
        f"`{shlex.join(_words(env))}`: metamom {env['metamom']}, torch {env['torch']}, Python {env['python']}, "
        f"{env['platform']}, seeds 0 to {demo.seeds - 1}, {demo.dtype}.",
    ]  # fmt: skip


def page(demo: Demo, tuned: Tuned, found: Sequence[Result], run_dir: Path) -> Page:
    """The report as a page that can be looked into: curves, steps, bytes, and each seed's ratio."""
    env = environment()
    words = [line.replace("\n    ", " ") for line in verdicts(found)]
    sections = []
    for result, line in zip(found, words, strict=False):
        methods = []
        for method, label in METHODS.items():
            runs = [
                SeedRun(arm.seed, curve=tuple(curve(arm, run_dir)), diverged=end.diverged, sent=sent(arm, run_dir))
                for arm, end in zip(result.arms[method], result.ends[method], strict=True)
            ]
            arm = result.arms[method][0]
            methods.append(Method(f"{label}, γ = {arm.lr:.3g}" + f", β = {arm.beta:g}" * (arm.beta < 1), tuple(runs)))
        title = f"({result.case.name}) {result.case.title}"
        each = ", ".join("none" if math.isnan(log) else f"{math.exp(log):.2f}" for log in result.gain.logs)
        text = f"{line} By seed: {each}."
        sections.append(Section(title, MEAN_SQUARED_ERROR, tuple(methods), demo.target, text))
    note = f"A run ends once its error is at most {demo.target:g}: compare the iterations to the target."
    return Page(TITLE, tuple(sections), (*words, note, _chosen(tuned)), ({**env, "command": _words(env)},))


def _chosen(tuned: Tuned) -> str:
    """How γ and β were chosen, in two sentences."""
    tried = {cell.beta for cells in tuned.cells.values() for cell in cells if cell.beta < 1}
    betas = ", ".join(f"{beta:g}" for beta in sorted(tried, reverse=True))
    seeds = ", ".join(map(str, tuned.search["seeds"]))
    return (
        f"Each method has the best γ of one grid, a factor of √2 apart, and momentum the best β ∈ {{{betas}}}, by a "
        f"search on other seeds ({seeds}). report.md, next to this page, has its table."
    )


def as_data(demo: Demo, found: Sequence[Result], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The contents of ``results.json``."""
    cases = {}
    for result in found:
        methods: dict[str, Any] = {
            method: {
                "lr": result.arms[method][0].lr,
                "beta": result.arms[method][0].beta,
                "seeds": [arm.seed for arm in result.arms[method]],
                "steps": [end.steps for end in result.ends[method]],
                "diverged": [end.diverged for end in result.ends[method]],
            }
            for method in METHODS
        }
        mean = result.gain.mean
        known = {"value": mean.value, "low": mean.low, "high": mean.high}
        ratio = {name: None if math.isnan(value) else value for name, value in known.items()}
        cases[result.case.name] = {**methods, "ratio": ratio, "verdict": SAYS[result.gain.verdict]}
    return {
        "demo": asdict(demo),
        "cases": cases,
        "verdicts": [line.replace("\n    ", " ") for line in verdicts(found)],
        "seconds": dict(seconds),
        "environment": environment(),
    }


def _ended(arm: Arm, run_dir: Path) -> Ending:
    end = ending(arm, run_dir)
    if end is None:
        raise ValueError(f"{arm.folder(run_dir)} holds no finished run. Run the demo again with --resume.")
    return end


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _words(env: Mapping[str, Any]) -> list[str]:
    """The command as it was typed."""
    program, *arguments = env["command"]
    start = ["python", "-m", "metamom.experiments.demo"] if str(program).endswith("__main__.py") else [program]
    return [*start, *arguments]
