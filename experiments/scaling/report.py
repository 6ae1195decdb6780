"""The report: parts that are run one at a time and stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from metamom.common import tables
from metamom.common.files import write_atomically
from metamom.distributed import SERVERS
from metamom.experiments.scaling import measuring, pictures, planning, simulate
from metamom.experiments.scaling.measuring import Measured
from metamom.experiments.scaling.planning import LINKS, SHOWN, Case, network
from metamom.experiments.scaling.problems import ScalingPlan
from metamom.experiments.shared.parts import assembled, keep_part

HEADING = "Scaling, measured and planned"
TITLES = {"measure": measuring.TITLE, "model": "Planned: up to 10,000 workers", "simulate": simulate.TITLE}


def report(run_dir: Path, parts: Sequence[str], config: ScalingPlan, processes: Sequence[int], latency: float) -> Path:
    """Run some parts; ``report.md`` holds them and those that earlier runs left in ``parts/``.

    Raises:
        FileNotFoundError: for the model without measurements.
        ValueError: if the measurements belong to another config.
        ChildProcessError: if processes fail.
    """
    kept = run_dir / "measured.json"
    for part in parts:
        if part == "measure":
            measured = measuring.measure(config, processes)
            run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(measured).encode())
            pictures.measured(run_dir / "figures" / "measured.png", measured["cells"])
            text = f"{measuring.summary(measured)}\n\n![ms a step against processes](figures/measured.png)"
        elif part == "model":
            text = planned(run_dir, _read(kept, config), config, latency)
        else:
            text = simulate.answer(config)
        keep_part(run_dir, part, text)
    return assembled(run_dir, HEADING, TITLES)


def _read(kept: Path, config: ScalingPlan) -> Measured:
    if not kept.exists():
        raise FileNotFoundError(f"the model is fitted to measurements, and {kept} does not exist: run --only measure.")
    try:
        measured: Measured = json.loads(kept.read_text(encoding="utf-8"))
        there = {timing["problem"] for timing in measured["compute"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{kept} is damaged ({error!r}): run --only measure again.") from error
    if there != {problem.name for problem in config.problems}:
        raise ValueError(
            f"{kept} holds measurements of {', '.join(sorted(there))}, which do not match this run: check --quick."
        )
    return measured


def planned(run_dir: Path, measured: Measured, config: ScalingPlan, latency: float) -> str:
    """Draw the model's figures, and return its part in Markdown."""
    cases = planning.cases(measured, config)
    lines = [*_constants(measured, cases), "", *_errors(measured, config)]
    for number, case in enumerate(cases):
        name = f"pays-{number}.png"
        pictures.pays(run_dir / "figures" / name, case, latency)
        lines += ["", f"### {case.name}", "", *_where(case, latency), "", *_rates(case, latency), "", *_bytes(case)]
        lines += ["", f"![where compression pays: {case.name}](figures/{name})"]
    return "\n".join(lines)


def _constants(measured: Measured, cases: Sequence[Case]) -> list[str]:
    lines = ["Constants, each from its own timings:", ""]
    lines += [
        f"- compute, {case.name}: {1e3 * case.compute.fixed:.3g} ms and {1e3 * case.compute.each:.3g} ms a task"
        for case in cases
    ]
    for n in (n for n in measured["processes"] if n > 1):
        link = planning.loopback(measured, n)
        gigabits = 8e-9 * link.bandwidth
        errors = planning.loopback_errors(measured, n)
        said = ", ".join(f"{kind} {error:+.0%}" for kind, error in errors.items())
        lines.append(
            f"- loopback between {n} processes: {1e6 * link.latency:.0f} µs a hop, {gigabits:.3g} Gbit/s; predicted "
            f"against measured collectives, median over sizes: {said}"
        )
    head = ["operator", "no message", "encode", "decode one", "each more"]
    for case in cases:
        lines += ["", f"Operators on d = {case.entries:,}, ms of this machine:", ""]
        lines += _table(head, planning.rows_of_constants(measured, case))
    return lines


def _errors(measured: Measured, config: ScalingPlan) -> list[str]:
    rows = [
        [problem, str(n), f"{middle:+.0%}", f"{size:.0%}", f"{worst:+.0%} ({name})"]
        for problem, n, middle, size, worst, name in planning.summary(planning.misses(measured, config))
    ]
    return [
        "The model against the measured steps, to which it was not fitted: predicted / measured − 1.",
        "",
        *_table(["problem", "processes", "median", "median size", "worst"], rows),
    ]


def _where(case: Case, latency: float) -> list[str]:
    rows = []
    for spec in case.kinds:
        for server in SERVERS:
            if (spec, server) != ("none", "replicated"):
                for tree in (False, True):
                    found = [planning.pays(case, spec, server, network(g, latency), tree=tree) for g in LINKS]
                    rows.append([f"{spec}, {server}", "tree" if tree else "ring", *found])
    head = ["operator, server", "collectives", *(f"{g} Gbit/s" for g in LINKS)]
    return [
        "Numbers of workers with which a step is faster than a dense one (`none, replicated`):",
        "",
        *_table(head, rows),
    ]


def _rates(case: Case, latency: float) -> list[str]:
    lines = []
    for gigabits in LINKS:
        lines += [f"Steps per second, {gigabits} Gbit/s, latency {1e6 * latency:g} µs, by the number of workers:", ""]
        head = ["operator, server", *(f"{n:,}" for n in SHOWN)]
        lines += [*_table(head, planning.rows_of_rates(case, network(gigabits, latency))), ""]
    return lines[:-1]


def _bytes(case: Case) -> list[str]:
    head = ["operator, server", "message", *(f"{n:,}" for n in SHOWN)]
    return [
        "Bytes: a worker's message, and what a process sends in a step, on average, by the number of workers:",
        "",
        *_table(head, planning.rows_of_bytes(case)),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*tables.head(*head), *(tables.row(*row) for row in rows)]
