"""Run the leaderboard, or finish it, and write its tables and picture.

    python -m metamom.experiments.leaderboard [--out runs/leaderboard] [--quick] [--seeds 10] [--resume] [--processes 2]

``report.md`` and ``leaderboard.json`` hold the cells that are finished, also of a run that was stopped: ``--resume``
goes on with the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from metamom.common.flag_types import folder, run_count
from metamom.experiments.leaderboard.finishing import finish
from metamom.experiments.leaderboard.report import report
from metamom.experiments.leaderboard.suite import FULL, QUICK
from metamom.experiments.shared.processes import run_in_processes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.leaderboard",
        description="Every method on every problem.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=folder, default=Path("runs/leaderboard"), help="where to write the results")
    parser.add_argument("--quick", action="store_true", help="few step sizes, seeds and steps, in a minute or two")
    parser.add_argument("--seeds", type=run_count, help="how many seeds measure, 2 or more")
    parser.add_argument("--resume", action="store_true", help="keep the finished cells of --out")
    parser.add_argument("--processes", type=run_count, default=1, help="how many processes share the cells")
    parser.add_argument("--report-only", action="store_true", help="write the tables of what is finished")
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else FULL
    if given.seeds is not None:
        if given.seeds < 2:
            parser.error(f"--seeds needs 2 or more, for an interval; got {given.seeds}.")
        plan = replace(plan, seeds=given.seeds)
    if given.processes < 1:
        parser.error(f"--processes needs 1 or more; got {given.processes}.")
    if (given.out / "cells").exists() and not (given.resume or given.report_only):
        parser.error(f"{given.out} holds a leaderboard: pass --resume to go on with it, or another --out.")
    if given.report_only and not (given.out / "cells").exists():
        parser.error(f"{given.out} holds no leaderboard yet: run without --report-only first, or pass another --out.")
    torch.set_num_threads(1)  # small tensors; processes are faster than threads
    if given.report_only:
        pass
    elif given.processes == 1:
        finish(given.out, plan, 0, 1)
    else:
        calls = [(given.out, plan, share, given.processes) for share in range(given.processes)]
        run_in_processes(finish, calls, given.processes, "leaderboard")
    print(report(given.out, plan).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
