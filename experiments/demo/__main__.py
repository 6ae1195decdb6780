"""Momentum against plain meta-SGD, each at its own best step size: many tasks a step, Top-K, and few tasks.

    python -m metamom.experiments.demo [--run-dir runs/demo] [--seeds N] [--jobs N] [--resume]
    python -m metamom.experiments.demo --search

The first takes about two minutes of two cores, and writes ``RUN/report.html`` and ``RUN/report.md``. The second
searches γ and β on other seeds and writes ``RUN/tuned.json``; the demo's own copy is ``tuned.json`` in this folder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from metamom.common.checks import RUNS
from metamom.common.flag_types import count, folder
from metamom.experiments.demo.report import results, table, verdicts, write_report
from metamom.experiments.demo.search import Search, search, search_table
from metamom.experiments.demo.settings import METHODS, Demo, Tuned, tuned
from metamom.experiments.demo.training import Arm, ending, finish, steps_done
from metamom.experiments.shared.overall import Steps
from metamom.experiments.shared.processes import run_in_processes
from metamom.training.directory import RunDirectory, read_config

RUN_DIRS = {False: Path("runs/demo"), True: Path("runs/demo-search")}


def main() -> None:
    """Run or resume, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.demo",
        description="Momentum against plain meta-SGD, each at its own best step size.",
        allow_abbrev=False,
    )
    at_least_one = count(RUNS, 1)
    parser.add_argument("--search", action="store_true", help="search γ and β on other seeds, and run no demo")
    parser.add_argument(
        "--run-dir",
        type=folder,
        metavar="DIR",
        help="where to write (default: runs/demo; of a search, runs/demo-search)",
    )
    parser.add_argument(
        "--seeds",
        type=at_least_one,
        metavar="N",
        default=Demo.seeds,
        help="seeds of each method (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=at_least_one,
        metavar="N",
        default=_cores(),
        help="runs at a time (default: the cores, at most 8)",
    )
    parser.add_argument(
        "--threads",
        type=at_least_one,
        metavar="N",
        default=1,
        help="threads of each run (default: 1, fastest on so small a network)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default=Demo.dtype, help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the runs in the folder; finished ones stay")
    given = parser.parse_args()
    run_dir: Path = RUN_DIRS[given.search] if given.run_dir is None else given.run_dir
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        demo = Demo(seeds=given.seeds, dtype=given.dtype)
        if given.search:
            result = search(demo, Search(), run_dir, given.jobs, given.resume)
            print("\n".join(search_table(demo, result)))
            print(f"\nResults: {run_dir / 'tuned.json'}")
        else:
            run(demo, tuned(), run_dir, jobs=given.jobs, threads=given.threads, resume=given.resume)
    except KeyboardInterrupt as interrupt:
        again = [word for word in sys.argv[1:] if word != "--resume"]
        command = shlex.join(["python", "-m", "metamom.experiments.demo", *again, "--resume"])
        kept = str(interrupt) or f"what is finished is kept in {run_dir}"
        print(f"\nInterrupted: {kept}. To continue: {command}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"metamom: error: {error}")


def pairs(demo: Demo, found: Tuned) -> list[tuple[Arm, ...]]:
    """All runs, both methods of a case and seed together, seed by seed, so that the time left can be judged early."""
    return [
        tuple(
            Arm(case, method, at.lr, at.beta, seed, round(at.steps or case.cap))
            for method in METHODS
            for at in [found.best[case.name][method]]
        )
        for seed in range(demo.seeds)
        for case in reversed(demo.cases)  # the longest first, so that the cores finish together
    ]


def run(demo: Demo, found: Tuned, run_dir: Path, *, jobs: int, threads: int, resume: bool) -> Path:
    """Do the runs that are not finished, write the report, and print it; returns its path.

    Raises:
        ValueError: for a folder that holds something else, or a demo if ``resume`` is false.
    """
    began = time.monotonic()
    plan = {
        "demo": asdict(demo),
        "best": {name: {m: asdict(at) for m, at in both.items()} for name, both in found.best.items()},
    }
    together = pairs(demo, found)
    todo = [arm for pair in together for arm in pair]
    _refuse_others(run_dir)
    with RunDirectory(run_dir, plan, free=("demo.seeds",), resume=resume) as folder:
        folder.write_config()
        kept = [arm for arm in todo if ending(arm, run_dir) is not None]
        missing = [pair for pair in together if not set(pair) <= set(kept)]
        if missing:
            steps = Steps(sum(arm.expected for arm in todo), lambda: sum(steps_done(arm, run_dir) for arm in todo))
            try:
                run_in_processes(
                    finish, [(demo, pair, run_dir, threads) for pair in missing], jobs, "demo", steps=steps
                )
            except KeyboardInterrupt as interrupt:
                done = sum(ending(arm, run_dir) is not None for arm in todo)
                raise KeyboardInterrupt(
                    f"{done} of {len(todo)} runs are finished, and kept in {run_dir}"
                ) from interrupt
        cases = results(demo, todo, run_dir)
        report = write_report(demo, found, cases, run_dir, {"this call": time.monotonic() - began})
    print(f"\nSteps to a validation error of {demo.target:g}, {demo.seeds} seeds\n\n{table(cases)}\n")
    print("\n".join(verdicts(cases)))
    if kept:
        print(f"\n{len(kept)} of {len(todo)} runs were finished before, and not repeated.")
    print(f"\nReport: {report}")
    return report


def _refuse_others(run_dir: Path) -> None:
    """Refuse a folder that another command wrote, such as the comparison that `make demo` used to be.

    Raises:
        ValueError: naming the folder.
    """
    if (run_dir / "config.json").exists() and "best" not in read_config(run_dir)["settings"]:
        raise ValueError(
            f"{run_dir} holds the runs of another command. Move it away, or choose another folder (--run-dir DIR)."
        )


def _cores() -> int:
    """The cores of this process, up to 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
