"""Time and bytes of a step on many processes: measured on this machine, predicted for others, and simulated.

    python -m metamom.experiments.scaling [--run-dir runs/scaling] [--only measure|model|simulate]
        [--processes 1,2,4] [--latency 50] [--quick]

``report.md`` holds the results of this run and those left by earlier runs; figures are in ``figures/``, all timings in
``measured.json``, which ``--only model`` reads. It takes ten minutes on two cores; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamom.common.allocator import keep_freed_memory
from metamom.common.flag_types import count, counts, folder, number
from metamom.experiments.scaling.problems import QUICK, ScalingPlan
from metamom.experiments.scaling.report import TITLES, report

MOST_PROCESSES = 1000


def main(words: Sequence[str] | None = None) -> None:
    """Run, write and print.

    Args:
        words: the arguments of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.scaling",
        description="Measure and plan steps over many processes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--run-dir", type=folder, default=Path("runs/scaling"), help="where to write the report (default: runs/scaling)"
    )
    add("--only", choices=TITLES, help="run only this part")
    add(
        "--processes",
        type=counts(count(MOST_PROCESSES, 1)),
        default=(1, 2, 4),
        help="numbers of processes to measure, with commas (default: 1,2,4)",
    )
    add("--latency", type=number, default=50.0, help="latency of the planned links, μs (default: 50)")
    add(
        "--quick",
        action="store_true",
        help=("a short run of everything, to see that it works: its numbers mean nothing"),
    )
    arguments = parser.parse_args(words)
    if arguments.latency < 0:
        parser.error(f"--latency is a number of microseconds >= 0; got {arguments.latency}.")
    processes = sorted(set(arguments.processes))
    if processes[-1] < 2:
        parser.error(f"--processes wants numbers >= 1, and one above 1, such as 1,2,4; got {processes[-1]}.")
    keep_freed_memory()
    try:
        path = report(
            arguments.run_dir,
            [arguments.only] if arguments.only else list(TITLES),
            QUICK if arguments.quick else ScalingPlan(),
            processes,
            1e-6 * arguments.latency,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
