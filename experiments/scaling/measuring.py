"""Time steps, collectives and operators on this machine, as JSON values and as tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from metamom.common import tables
from metamom.experiments.scaling import constants
from metamom.experiments.scaling.loopback import QUIET
from metamom.experiments.scaling.problems import ScalingPlan
from metamom.experiments.shared.torchrun import on_processes
from metamom.training.directory import environment

Measured = dict[str, Any]  # the JSON values that `measure` returns
TITLE = "Measured on this machine"
PARTS = ("compute", "encode", "exchange", "decode", "wait")


def measure(config: ScalingPlan, processes: Sequence[int]) -> Measured:
    """All timings behind the tables and the model.

    Returns:
        ``cells`` and ``collectives`` from processes started by torchrun; ``compute`` and ``operators`` from this one.

    Raises:
        ChildProcessError: if the processes fail.
    """
    found: Measured = {
        "environment": environment(),
        "cores": os.cpu_count() or 1,
        "busy": os.getloadavg()[0],
        "processes": list(processes),
        "compute": [timing for problem in config.problems for timing in constants.of_compute(problem, config)],
        "operators": constants.of_operators(config),
        "cells": [],
        "collectives": [],
    }
    plan = {**config.settings(), "processes": list(processes)}
    for n in tqdm(processes, desc="processes", disable=None):
        for name, timings in on_processes("metamom.experiments.scaling.step", n, plan).items():
            found[name] += timings
    return found


def summary(measured: Measured) -> str:
    """The measurements as Markdown: steps by number of processes, their parts, and bytes by the kernel's counter."""
    cores = measured["cores"]
    many = [str(n) for n in measured["processes"] if n > cores]
    lines = [
        f"Processes of one thread each, started by torchrun, on {cores} cores"
        + (f": {' and '.join(many)} of them take turns, and cannot be faster than {cores}." if many else ".")
        + f" {measured['busy']:.1f} other processes were running in the minute before."
        + " A step is `MAML.backward(measure=False)`, eager, and an optimizer step; ms, medians and quartiles. "
        "Strong scaling has the same tasks and workers for all numbers of processes, weak scaling a worker with "
        "its tasks in each process. `none` is a dense all-reduce.",
    ]
    names = dict.fromkeys(cell["problem"] for cell in measured["cells"])
    for name in names:
        for scaling in ("strong", "weak"):
            lines += ["", *_steps([c for c in measured["cells"] if (c["problem"], c["scaling"]) == (name, scaling)])]
    lines += ["", *_parts(measured), "", *_kernel(measured)]
    return "\n".join(lines)


def _steps(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Milliseconds of a step by number of processes: a row for each operator and server."""
    first = cells[0]
    processes = list(dict.fromkeys(cell["processes"] for cell in cells))
    tasks = (
        f"{first['tasks'] * first['processes']} tasks of {first['workers']} workers"
        if first["scaling"] == "strong"
        else f"{first['tasks']} tasks in each process"
    )
    by_place = {(cell["operator"], cell["server"], cell["processes"]): cell for cell in cells}
    lines = [
        f"**{first['problem']}** (d = {first['entries']:,}), {first['scaling']} scaling: {tasks}.",
        "",
        *tables.head("operator, server", *(f"{n} process{'es' if n > 1 else ''}" for n in processes)),
    ]
    for spec, server in dict.fromkeys((cell["operator"], cell["server"]) for cell in cells):
        found = [by_place.get((spec, server if n > 1 else "replicated", n)) for n in processes]
        cells_of = ("—" if cell is None else _spread(cell["seconds"]) for cell in found)
        lines.append(tables.row(f"{spec}, {server}", *cells_of))

    return lines


def _parts(measured: Measured) -> list[str]:
    """The parts of a step's time, on the largest number of processes with one core each."""
    n = max((n for n in measured["processes"] if 1 < n <= measured["cores"]), default=max(measured["processes"]))
    lines = [
        f"Where the time goes: medians of the parts of a step on process 0 of {n}, weak scaling, ms. Waiting is for "
        "the slower processes (and, with a server, for what it does).",
        "",
        *tables.head("problem, operator, server", *PARTS),
    ]
    for cell in measured["cells"]:
        if (cell["processes"], cell["scaling"]) == (n, "weak"):
            parts = [1e3 * float(np.median([step.get(part, 0.0) for step in cell["parts"]])) for part in PARTS]
            name = f"{cell['problem']}, {cell['operator']}, {cell['server']}"
            lines.append(tables.row(name, *(f"{part:.2f}" for part in parts)))
    return lines


def _kernel(measured: Measured) -> list[str]:
    """`World.sent` against the kernel's counter."""
    counted = [cell for cell in measured["cells"] if cell["kernel"] is not None]
    if not counted:
        return ["This kernel has no counter of loopback bytes."]
    lines = [
        "Bytes of a step by `sent_bytes`, and by the kernel's counter of the loopback interface over some steps, "
        f"headers and all. In brackets other traffic in an equal time, where that is over {QUIET:.0%} of it:",
        "",
        *tables.head("problem, processes, operator, server", "sent_bytes", "kernel", "ratio"),
    ]
    for cell in counted:
        seen = cell["kernel"]
        ratio = seen["kernel"] / seen["counted"]
        others = f" ({seen['idle'] / seen['kernel']:.0%} by others)" if seen["idle"] > QUIET * seen["kernel"] else ""
        name = f"{cell['problem']}, {cell['processes']}, {cell['operator']}, {cell['server']}"
        sent = cell["sent_bytes"]
        lines.append(tables.row(name, f"{sent:,}", f"{ratio * sent:,.0f}", f"{ratio:.2f}{others}"))
    return lines


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = (f"{1e3 * value:.3g}" for value in np.percentile(seconds, [25, 50, 75]))
    return f"{middle} ({low} to {high})"
