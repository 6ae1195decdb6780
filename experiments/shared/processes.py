"""Call one function in parallel, each call in its own process.

This uses multiprocessing's processes and not a pool. An interrupted run has to save before it ends:
`ProcessPoolExecutor` cannot signal its workers before Python 3.14, and joblib kills them. `multiprocessing.Pool` waits
forever for a worker that the system has killed, for lack of memory say.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

import torch

from metamom.experiments.shared.overall import Overall, OverallSteps, Steps


def run_in_processes(
    function: Callable[..., object],
    calls: Sequence[tuple[Any, ...]],
    jobs: int,
    label: str,
    *,
    ended: int = 0,
    steps: Steps | None = None,
) -> None:
    """Call ``function(*call)`` for each call, ``jobs`` at a time, sharing torch's threads between them.

    Nothing is returned: calls must write their results to disk. When this process is interrupted, Ctrl-C or SIGTERM
    reaches the running calls too, and they are waited for; when it is killed, they end with it.

    Args:
        function: a function that can be imported by name.
        calls: its arguments for each call; must be picklable.
        jobs: number of processes at a time, >= 1.
        label: of the progress: a bar in a terminal; elsewhere a line on standard error for each call that ends, and
            one every 30 seconds.
        ended: the number of calls that had ended before, for the progress.
        steps: shows progress by steps and not by calls.

    Raises:
        ChildProcessError: if a call failed; the reason is on stderr. The others are stopped.
    """
    context = get_context("spawn")  # a forked copy of torch's thread pool hangs
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = [context.Process(target=_child, args=(function, call, threads)) for call in calls]
    working: list[BaseProcess] = []
    try:
        progress = Overall(label, ended + len(calls), ended) if steps is None else OverallSteps(label, steps)
        with progress as overall:
            while waiting or working:
                while waiting and len(working) < jobs:
                    working.append(waiting.pop(0))
                    working[-1].start()
                connection.wait([process.sentinel for process in working], timeout=1.0)
                overall.now(f"{len(working)} running")
                for process in [p for p in working if not p.is_alive()]:
                    working.remove(process)
                    if process.exitcode:
                        raise ChildProcessError(f"{label}: a run ended with status {process.exitcode}, see above.")
                    overall.end()
    finally:
        for process in working:
            if process.is_alive():
                process.terminate()
        for process in working:
            process.join()


def _child(function: Callable[..., object], call: tuple[Any, ...], threads: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends Ctrl-C to all processes; the parent passes it on, once
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        function(*call)
    except (KeyboardInterrupt, ValueError, TypeError, OSError) as error:
        sys.exit(f"metamom: {error}")


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
