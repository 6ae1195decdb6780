"""The model with this machine's constants: its error on the measurements, and predictions for other networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from metamom.distributed import SERVERS, Server
from metamom.experiments.scaling import fit, model
from metamom.experiments.scaling.collectives import cost
from metamom.experiments.scaling.constants import compute_line, kind_of, median
from metamom.experiments.scaling.measuring import Measured
from metamom.experiments.scaling.model import Kind, Line, Link, Plan
from metamom.experiments.scaling.problems import ScalingPlan

LINKS = (1, 10, 100)  # Gbit/s
FASTER = 100.0  # speed of a planned worker relative to a thread of this machine
WORKERS = tuple(int(n) for n in np.unique(np.geomspace(1, 10_000, 121).round()))
SHOWN = (1, 10, 100, 1000, 10_000)


class Case(NamedTuple):
    """A case to plan: one worker per process.

    Attributes:
        name: of the case.
        entries: d.
        tasks: per worker.
        outcome: bytes that a worker reports on its tasks.
        compute: seconds by number of tasks.
        kinds: the operators, by their spelling.
        faster: a worker's speed in computing and encoding, relative to a thread of this machine.
    """

    name: str
    entries: int
    tasks: int
    outcome: int
    compute: Line
    kinds: dict[str, Kind]
    faster: float = 1.0

    def plan(self, n: int, server: Server) -> Plan:
        """A step of n workers."""
        return Plan(n, 1, self.tasks, 4 * self.entries, self.outcome, server)

    def seconds(self, n: int, spec: str, server: Server, link: Link, *, tree: bool = False) -> float:
        """The seconds of that step."""
        found = model.seconds(self.plan(n, server), self.kinds[spec], self.compute, link, tree=tree)
        return found.exchange + (found.total - found.exchange) / self.faster

    def speedup(self, n: int, spec: str, server: Server, link: Link, *, tree: bool = False) -> float:
        """The speed relative to a dense all-reduce."""
        dense = self.seconds(n, "none", "replicated", link, tree=tree)
        return dense / self.seconds(n, spec, server, link, tree=tree)


def network(gigabits: float, latency: float) -> Link:
    """A link of so many Gbit/s and seconds of latency."""
    return Link(latency, gigabits * 1e9 / 8)


def cases(measured: Measured, config: ScalingPlan) -> list[Case]:
    """The timed problems, and a large network that was not timed: its time per task scales with its parameters."""
    found = []
    for problem in config.problems:
        d = next(cell["entries"] for cell in measured["cells"] if cell["problem"] == problem.name)
        compute = compute_line(measured["compute"], problem.name)
        kinds = {spec: kind_of(measured["operators"], spec, d) for spec in config.planned}
        found.append(Case(problem.name, d, problem.weak, problem.outcomes * problem.weak, compute, kinds))
    last = found[-1]
    ratio = config.largest / last.entries
    kinds = {spec: kind_of(measured["operators"], spec, config.largest) for spec in config.planned}
    compute = Line(ratio * last.compute.fixed, ratio * last.compute.each)
    name = f"{config.largest / 1e6:g} M parameters, workers {FASTER:g} × as fast"
    return [*found, Case(name, config.largest, last.tasks, last.outcome, compute, kinds, FASTER)]


def loopback(measured: Measured, n: int) -> Link:
    """Latency and bandwidth between n processes on this machine."""
    timings = [each for each in measured["collectives"] if each["processes"] == n]
    return fit.link([(cost(each["kind"], n, each["size"]), median(each["seconds"])) for each in timings])


def loopback_errors(measured: Measured, n: int) -> dict[str, float]:
    """For each kind of collective, the median error of the predicted seconds, relative to the measured ones."""
    link, found = loopback(measured, n), {}
    for kind in dict.fromkeys(each["kind"] for each in measured["collectives"]):
        those = [each for each in measured["collectives"] if (each["processes"], each["kind"]) == (n, kind)]
        errors = [cost(kind, n, each["size"]).seconds(link) / median(each["seconds"]) - 1 for each in those]
        found[kind] = median(errors)
    return found


class Miss(NamedTuple):
    """A measured step and the model's prediction."""

    problem: str
    processes: int
    spec: str
    server: str
    scaling: str
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        """The error relative to the measurement."""
        return self.predicted / self.seconds - 1


def misses(measured: Measured, config: ScalingPlan) -> list[Miss]:
    """Every measured step with the model's prediction; the model was not fitted to any of them."""
    problems = {problem.name: problem for problem in config.problems}
    links = {n: loopback(measured, n) for n in measured["processes"] if n > 1}
    found = []
    for cell in measured["cells"]:
        n, problem = cell["processes"], problems[cell["problem"]]
        plan = Plan(
            n,
            cell["workers"] // n,
            cell["tasks"],
            4 * cell["entries"],
            problem.outcomes * cell["tasks"],
            cell["server"],
        )
        said = model.seconds(
            plan,
            kind_of(measured["operators"], cell["operator"], cell["entries"]),
            compute_line(measured["compute"], problem.name),
            links.get(n, Link(0.0, 1.0)),
            cores=measured["cores"],
        )
        names = (cell["operator"], cell["server"], cell["scaling"])
        found.append(Miss(problem.name, n, *names, median(cell["seconds"]), said.total))
    return found


def ranges(numbers: Sequence[int], holds: Callable[[int], bool]) -> list[tuple[int, int]]:
    """The ranges of ascending numbers where a condition holds."""
    runs = [(yes, list(run)) for yes, run in groupby(numbers, holds)]
    return [(run[0], run[-1]) for yes, run in runs if yes]


def pays(case: Case, spec: str, server: Server, link: Link, *, tree: bool = False, gain: float = 1.0) -> str:
    """The numbers of workers for which a step is more than ``gain`` times as fast as a dense one."""
    found = ranges(WORKERS[1:], lambda n: case.speedup(n, spec, server, link, tree=tree) > gain)
    return ", ".join(f"{a:,} to {b:,}" if a < b else f"{a:,}" for a, b in found) or "never"


def rows_of_rates(case: Case, link: Link, *, tree: bool = False) -> list[list[str]]:
    """Steps per second: a row for each operator and server, a column for each of `SHOWN`."""
    return [
        [f"{spec}, {server}", *(_rate(1 / case.seconds(n, spec, server, link, tree=tree)) for n in SHOWN)]
        for spec in case.kinds
        for server in SERVERS
    ]


def rows_of_bytes(case: Case) -> list[list[str]]:
    """A worker's message, and bytes that a process sends in a step, on average, by the number of processes."""
    rows: list[list[str]] = []
    for spec, kind in case.kinds.items():
        for server in SERVERS:
            sent = [model.bytes_of_a_process(case.plan(n, server), kind) for n in SHOWN]
            rows.append([f"{spec}, {server}", f"{kind.message:,}", *(_size(value) for value in sent)])
    return rows


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def rows_of_constants(measured: Measured, case: Case) -> list[list[str]]:
    """Milliseconds of each operator on the case's gradients."""
    return [
        [spec, *(f"{1e3 * value:.3g}" for value in (kind.apply, kind.encode, kind.decode(1), kind.decode.each))]
        for spec, kind in case.kinds.items()
        if not kind.dense
    ]


def summary(found: Sequence[Miss]) -> list[list[Any]]:
    """For each problem and number of processes: the median error, the median absolute error, and the worst."""
    rows: list[list[Any]] = []
    for problem, n in dict.fromkeys((miss.problem, miss.processes) for miss in found):
        those = [miss for miss in found if (miss.problem, miss.processes) == (problem, n)]
        worst = max(those, key=lambda miss: abs(miss.error))
        errors = np.array([miss.error for miss in those])
        name = f"{worst.spec}, {worst.server}, {worst.scaling}"
        rows.append([problem, n, float(np.median(errors)), float(np.median(abs(errors))), worst.error, name])
    return rows
