"""Calls side by side: failures, interrupts, and a parent that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
import stoppable
from forked import CONTEXT
from processes import with_support

from metamom.experiments.shared import processes
from metamom.experiments.shared.overall import Steps
from metamom.experiments.shared.processes import run_in_processes

PATIENCE = 120.0  # seconds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def runs(process: int) -> bool:
    """Whether a process exists and has not ended; it stays in the table until its parent has read its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Three calls, two at a time, once the first two have begun."""
    command = [sys.executable, stoppable.__file__, str(tmp_path)]
    with subprocess.Popen(command, env=with_support(), stderr=subprocess.PIPE, text=True) as parent:
        try:
            wait_until(lambda: parent.poll() is not None or len(list(tmp_path.glob("*.begun"))) == 2)
            assert parent.poll() is None, parent.communicate()
            yield parent
        finally:
            parent.kill()
            for file in tmp_path.glob("*.begun"):
                if runs(int(file.read_text())):
                    os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that cost no import of torch; the other tests here start them in the usual way."""
    monkeypatch.setattr(processes, "get_context", lambda start_method: CONTEXT)


def test_a_failed_call_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError, match="calls: a run ended with status 1, see above"):
        run_in_processes(int, [("word",)], 2, "calls")
    assert "metamom: invalid literal for int() with base 10: 'word'" in capfd.readouterr().err


@pytest.mark.usefixtures("forked")
def test_progress_by_steps(capfd: pytest.CaptureFixture[str]) -> None:
    run_in_processes(int, [("1",)], 1, "calls", steps=Steps(7, lambda: 3, "thing"))
    assert "calls:" not in capfd.readouterr().err  # a line only every 30 seconds, and at the end of all
    counts = chain([3], repeat(7))
    run_in_processes(time.sleep, [(1.5,)], 1, "calls", steps=Steps(7, lambda: next(counts), "thing"))
    assert capfd.readouterr().err.count("calls: 7/7 things") == 1


@pytest.mark.usefixtures("forked")
def test_a_killed_call_is_not_waited_for() -> None:
    with pytest.raises(ChildProcessError, match="ended with status -9"):
        run_in_processes(signal.raise_signal, [(signal.SIGKILL,)], 1, "calls")


def test_an_interrupt_reaches_all_calls_and_waits_for_them(pool: subprocess.Popen[str], tmp_path: Path) -> None:
    pool.send_signal(signal.SIGINT)
    _, said = pool.communicate(timeout=PATIENCE)
    assert pool.returncode != 0
    begun = sorted(file.stem for file in tmp_path.glob("*.begun"))
    assert begun == sorted(file.stem for file in tmp_path.glob("*.saved"))
    assert len(begun) == 2, "the third has begun after the interrupt"
    assert all(f"metamom: saved {number}" in said for number in begun)


def test_calls_end_with_a_killed_parent(pool: subprocess.Popen[str], tmp_path: Path) -> None:
    calls = [int(file.read_text()) for file in tmp_path.glob("*.begun")]
    assert all(map(runs, calls))
    pool.kill()
    wait_until(lambda: not any(map(runs, calls)))
    assert not list(tmp_path.glob("*.saved"))
