"""Several processes when one of them dies, hangs or fails, and when the disk does: nothing is lost, nobody waits."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from endings import assert_same, assert_same_ending, contents, newest

if sys.platform != "linux":
    pytest.skip("processes are found in /proc, and held by Linux's signals and limits", allow_module_level=True)

from forked import (
    AT,
    CONTEXT,
    FAULTS,
    PATIENCE,
    Rank,
    checkpoint,
    forked,
    metamom,
    on_a_full_disk,
    run_forked,
    train_with_faults,
    unprivileged,
    write_checkpoints,
)
from processes import environment, free_port

from metamom.training.checkpoints import Checkpoints, load
from metamom.training.directory import read_metrics

LONG = 3000  # steps, minutes: a run that a test ends before


def command(run: Path, iterations: int, *more: str, bias: str = "none") -> list[str]:
    """A run that 1, 2 or 3 processes can share, with checkpoints every 5 steps."""
    return [
        *("train", "sinusoid", "--iterations", str(iterations), "--run-dir", str(run), "--checkpoint-every", "5"),
        *("--meta-batch", "6", "--workers", "6", "--dtype", "float64", "--bias", bias),
        *("--evaluate-every", "5", "--evaluate-tasks", "10", *more),
    ]


def lines(run: Path) -> int:
    """How many steps the run has logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(happened: Callable[[], object], alive: Callable[[], bool]) -> None:
    """Wait for it; the processes that should make it happen must be alive."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert alive(), "the processes have ended before"
        assert time.monotonic() < end, "nothing happens any more"
        time.sleep(0.005)


def until_step(step: int, run: Path, ranks: list[Rank]) -> None:
    """Wait until the run has logged as many steps."""
    until(lambda: lines(run) >= step, lambda: all(rank.process.is_alive() for rank in ranks))


def assert_all_say(ended: list[tuple[int, str]], status: int, pattern: str) -> None:
    """The same, word for word, and nothing but it, besides the progress that the first one shows."""
    assert [found for found, _ in ended] == [status] * len(ended), ended
    told = {re.sub(r"^train sinusoid: \d+/\d+ it, .*\n", "", said, flags=re.MULTILINE) for _, said in ended}
    assert len(told) == 1, ended
    assert re.fullmatch(pattern, told.pop().strip()), ended


def assert_runs(arguments: list[str], folder: Path) -> None:
    """To its end, on 2 processes."""
    ended = run_forked(metamom, 2, folder, *arguments)
    assert [status for status, _ in ended] == [0, 0], ended


# killed


class Child:
    """A process that torchrun has started, as /proc tells of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        state, self.parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
        self.dead = state in "ZX"
        found = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        self.environ = dict(entry.split("=", 1) for entry in found if "=" in entry)


def children(of: int) -> Iterator[Child]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                child = Child(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # has ended, or is another user's
                continue
            if child.parent == str(of) and not child.dead and "RANK" in child.environ:
                yield child


def rank_of(launcher: int, rank: int, restarts: int) -> Child | None:
    wanted = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    return next((child for child in children(launcher) if wanted.items() <= child.environ.items()), None)


@contextmanager
def restarted_by_torchrun(arguments: list[str], times: int, said: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``torchrun --max-restarts TIMES -m metamom ARGUMENTS`` on 2 processes; all killed on leaving."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(times)]
    launcher += ["--master-port", str(free_port()), "-m", "metamom"]
    with said.open("wb") as output:
        process = subprocess.Popen(
            [*launcher, *arguments], env=environment(), stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        left = list(children(process.pid))
        process.kill()
        process.wait()
        for child in left:
            os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["ef21:topk:5%", "none"])
def test_killed_twice_under_torchrun_ends_as_undisturbed(bias, tmp_path):
    draw = random.Random(bias)
    run, said = tmp_path / "run", tmp_path / "said.txt"
    arguments = command(run, 60, "--resume", bias=bias)
    with restarted_by_torchrun(arguments, 2, said) as launcher:
        for restarts, steps in enumerate((range(6, 25), range(31, 50))):
            at = draw.choice(steps)
            until(lambda at=at: lines(run) >= at, lambda: launcher.poll() is None)
            victim = rank_of(launcher.pid, draw.randrange(2), restarts)
            assert victim is not None, f"killed {restarts} time(s), torchrun has not restarted as often"
            os.kill(victim.pid, signal.SIGKILL)
        launcher.wait(timeout=PATIENCE)
    assert launcher.returncode == 0, said.read_text()
    assert "trained for 60 iterations" in said.read_text()
    assert_runs(command(tmp_path / "whole", 60, bias=bias), tmp_path)
    assert_same_ending(run, tmp_path / "whole", generators=False)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(tmp_path):
    """All processes stop after the same step, saved, before torchrun has lost its patience."""
    run, said = tmp_path / "run", tmp_path / "said.txt"
    with restarted_by_torchrun(command(run, LONG, "--checkpoint-every", str(LONG)), 0, said) as launcher:
        until(lambda: lines(run) >= 7, lambda: launcher.poll() is None)
        os.killpg(launcher.pid, signal.SIGINT)
        launcher.wait(timeout=PATIENCE)
    done = lines(run)
    assert 7 <= done < LONG
    assert said.read_text().count(f"stopped after step {done} of {LONG}") == 2, said.read_text()
    assert load(run / "checkpoints" / f"step-{done:08d}.pt")["step"] == done


def test_killed_again_and_again_ends_as_undisturbed_on_any_number_of_processes(tmp_path):
    """Without torchrun, which would start as many again. Who is left says so, and does not wait for the time-out."""
    draw, run = random.Random(7), tmp_path / "run"
    bias = "ef21-sgdm(0.2):topk:20%"
    for at, size in ((draw.randrange(2, 9), 2), (draw.randrange(12, 19), 3)):
        arguments = command(run, 30, "--resume", "--beta", "1", bias=bias)
        with forked(metamom, size, tmp_path / "said", *arguments) as ranks:
            until_step(at, run, ranks)
            victim = draw.choice(ranks)
            os.kill(victim.pid, signal.SIGKILL)
            for rank in ranks:
                status, said = rank.ended()
                assert status == (-signal.SIGKILL if rank is victim else 3), said
                assert rank is victim or re.search(r"could not exchange .*: one of them has exited", said), said
    whole = tmp_path / "whole"
    for folder in (run, whole):
        arguments = command(folder, 30, "--resume", "--beta", "1", bias=bias)
        assert_runs(arguments, tmp_path / "said")
    # sums of floats in another order on another number of processes
    for (name, got), wanted in zip(newest(run)["learner"].items(), newest(whole)["learner"].values(), strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=1e-12, atol=1e-12, msg=lambda message, name=name: f"{name}: {message}"
        )


# hung


def test_hung_rank_is_an_error_within_the_time_out(tmp_path):
    """Process 0 of one run and process 1 of another, at once: the tests wait for one time-out."""
    runs = [tmp_path / "run 0", tmp_path / "run 1"]
    with (
        forked(metamom, 3, tmp_path / "said 0", *command(runs[0], LONG, "--timeout", "5")) as first,
        forked(metamom, 3, tmp_path / "said 1", *command(runs[1], LONG, "--timeout", "5")) as second,
    ):
        both = list(enumerate((first, second)))
        for hung, ranks in both:
            until_step(3, runs[hung], ranks)
        for hung, ranks in both:
            os.kill(ranks[hung].pid, signal.SIGSTOP)
        began = time.monotonic()
        for hung, ranks in both:
            for rank in ranks[:hung] + ranks[hung + 1 :]:
                status, said = rank.ended(timeout=5 + PATIENCE)
                assert status == 3, said
                assert "has exited, or did not arrive within the time-out of 5 s (timeout=, --timeout)" in said
                assert "Traceback" not in said
        assert time.monotonic() - began < 5 + 10, "they took their time"
        for hung, ranks in both:
            os.kill(ranks[hung].pid, signal.SIGCONT)  # and it finds itself alone
            status, said = ranks[hung].ended()
            assert status == 3, said
    for run in runs:
        assert newest(run)["step"] <= lines(run)


def test_rank_that_waits_for_another_that_never_comes(tmp_path):
    """Process 0 of one run and process 1 of another, at once."""
    arguments = [command(tmp_path / f"run {rank}", 5, "--timeout", "2") for rank in (0, 1)]
    with (
        forked(metamom, 2, tmp_path, *arguments[0], only=0) as (first,),
        forked(metamom, 2, tmp_path, *arguments[1], only=1) as (second,),
    ):
        ended = [first.ended(), second.ended()]
    for rank, (status, said) in enumerate(ended):
        assert status == 3
        assert f"metamom: error: process {rank} of 2 could not join the others at 127.0.0.1:" in said
        assert " within 2 s: " in said
        assert "Traceback" not in said
        assert not (tmp_path / f"run {rank}").exists()


# killed while writing


def save_until_killed(folder: Path, after: float) -> int:
    """The last checkpoint that a process had reported when it was killed, some seconds after its first."""
    heard, reporting = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=write_checkpoints, args=(folder, reporting))
    process.start()
    reporting.close()
    try:
        assert heard.poll(PATIENCE), "no checkpoint was written"
        written = int(heard.recv())
        process.join(after)
    finally:
        process.kill()
        process.join()
    try:
        while True:
            written = int(heard.recv())
    except EOFError:
        return written


def test_killed_at_any_moment_of_writing_a_checkpoint(tmp_path):
    draw, strays = random.Random(3), 0
    kept = Checkpoints(tmp_path, keep=2)
    for _ in range(15):
        written = save_until_killed(tmp_path, after=draw.uniform(0, 0.1))
        state = kept.load_newest()  # a warning of a damaged one would be an error
        assert state is not None
        assert state["step"] in (written, written + 1), "the newest that was whole is gone"
        assert len(kept.steps()) >= min(2, written), "the newest but one is gone"
        for step in kept.steps():
            assert_same(load(kept.path(step)), {"format": 1, "step": step, **checkpoint(step)})
        if kept.best.exists():
            best = load(kept.best)
            assert best["step"] % 3 == 0
            assert_same(best, {"format": 1, "step": best["step"], **checkpoint(best["step"])})
        strays += len(list(tmp_path.glob("*.tmp")))
        kept.sweep()
        assert set(tmp_path.iterdir()) - {kept.best} == set(map(kept.path, kept.steps()))
    assert strays > 2, "hardly any was killed while it wrote"


# a disk that is full, a directory that cannot be written to


def test_full_disk_while_a_checkpoint_is_written(tmp_path):
    run, bias = tmp_path / "run", "ef21:topk:5%"
    arguments = command(run, 20, "--resume", bias=bias)
    # room for the first checkpoint, and not for the next: the operator has a state of each worker then
    ended = run_forked(on_a_full_disk, 2, tmp_path, 50_000, *arguments)
    assert_all_say(ended, 2, r"metamom: error: \[Errno 27\] File too large")
    assert newest(run)["step"] == 0
    assert not list(run.rglob("*.tmp"))
    assert_goes_on(run, 20, tmp_path, bias=bias)


def test_full_disk_while_metrics_are_written(tmp_path):
    run = tmp_path / "run"
    room = 17_000  # for the first checkpoint, and some 40 lines
    rarely = ["--checkpoint-every", "1000", "--evaluate-every", "1000", "--dtype", "float32"]
    ended = run_forked(on_a_full_disk, 2, tmp_path, room, *command(run, LONG, *rarely))
    assert_all_say(ended, 2, r"metamom: error: \[Errno 27\] File too large")
    assert (run / "metrics.jsonl").stat().st_size == room
    done = len(read_metrics(run))  # without the last line, which is cut short
    assert newest(run)["step"] == 0 < done
    assert_goes_on(run, done + 5, tmp_path, *rarely)


def assert_goes_on(run: Path, iterations: int, folder: Path, *more: str, bias: str = "none") -> None:
    """To the end of a run that nothing has disturbed."""
    for there in (run, folder / "whole"):
        assert_runs(command(there, iterations, "--resume", *more, bias=bias), folder)
    assert_same_ending(run, folder / "whole")


def test_directory_that_turns_read_only_during_a_run(tmp_path):
    run = tmp_path / "run"
    folder = run / "checkpoints"
    with forked(unprivileged, 2, tmp_path, *command(run, LONG)) as ranks:
        until_step(6, run, ranks)
        folder.chmod(0o555)
        try:
            ended = [rank.ended() for rank in ranks]
        finally:
            folder.chmod(0o755)
    assert_all_say(ended, 2, rf"metamom: error: \[Errno 13\] Permission denied: '{re.escape(str(folder))}/[^']+'")
    assert_goes_on(run, lines(run) + 3, tmp_path)


def test_directory_that_is_read_only(tmp_path):
    run = tmp_path / "run"
    assert_runs(command(run, 5), tmp_path)
    before = contents(run)
    folders = [run, run / "checkpoints"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        ended = run_forked(unprivileged, 2, tmp_path, *command(run, 10, "--resume"))
        assert_all_say(ended, 2, rf"metamom: error: \[Errno 13\] Permission denied: '{re.escape(str(run))}.*'")
        assert contents(run) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert_goes_on(run, 10, tmp_path)


def test_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    ended = run_forked(metamom, 2, tmp_path, *command(tmp_path / "file" / "run", 5))
    assert_all_say(ended, 2, r"metamom: error: .*Not a directory: .*")


# two runs on one directory, and a signal to one rank of the first


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow)]
)
def test_second_run_is_refused_and_a_signal_to_one_rank_stops_all(number, rank, tmp_path):
    run = tmp_path / "run"
    with forked(metamom, 2, tmp_path / "first", *command(run, LONG)) as ranks:
        until_step(3, run, ranks)
        more = ["--resume"] if number == signal.SIGTERM else []
        refused = run_forked(metamom, 2, tmp_path / "second", *command(run, LONG, *more))
        assert_all_say(refused, 2, rf"metamom: error: another process is writing to the run directory {run}; wait .*")
        until_step(lines(run) + 3, run, ranks)  # the first goes on
        os.kill(ranks[rank].pid, number)
        ended = [one.ended() for one in ranks]
    done = newest(run)["step"]
    for status, said in ended:
        assert status == 128 + number, said
        assert f"metamom: stopped after step {done} of {LONG}; saved in {run}; resume to go on." in said
        assert "Traceback" not in said
    whole = tmp_path / "whole"
    assert_runs(command(whole, done), tmp_path)
    last = newest(whole)
    for name in ("learner", "optimizer"):
        assert_same(newest(run)[name], last[name], name)
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(whole)]


# one rank fails


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Where the runs are, and what each of 3 processes said of each fault."""
    folder = tmp_path_factory.mktemp("faults")
    ended = run_forked(train_with_faults, 3, folder, folder)
    assert [status for status, _ in ended] == [0, 0, 0], ended
    return folder, [dict(line.split(": ", 1) for line in said.splitlines()) for _, said in ended]


SAID = {
    "NaN": f"NonFiniteDataError: step {AT}: the result is not finite, and neither is the data. NaN",
    "NaN, compressed": f"NonFiniteDataError: step {AT}: the result is not finite, and neither is the data. NaN",
    "NaN, fed back": f"NonFiniteDataError: step {AT}: the result is not finite, and neither is the data. NaN",
    "value": "ValueError: no such task",
    "value on process 0": "ValueError: no such task",
    "key": "KeyError: 'letter'",
    "file": "FileNotFoundError: [Errno 2] No such file or directory: 'letters.npy'",
    "text": "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff",
    "memory": "MemoryError: of one rank",
    "own": "OddError: task 5 is odd: it has no letters",
    "optimizer": "RuntimeError: no update",
    "validation": "ValueError: nothing to validate on",
    "nothing": "done",
}
ELSEWHERE = {  # of types that the others cannot raise
    "end": ("StopIteration: ", "RuntimeError: StopIteration: "),
    "local": ("LocalError: known on one rank alone", "RuntimeError: LocalError: known on one rank alone"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_on_one_rank_stops_all_with_the_same_message(name, outcomes):
    folder, said = outcomes
    messages = [of_rank[name] for of_rank in said]
    if name in ELSEWHERE:
        own, others = ELSEWHERE[name]
        assert messages == [own if rank == FAULTS[name].rank else others for rank in range(3)]
    else:
        assert len(set(messages)) == 1, messages
        assert messages[0].startswith(SAID[name]), messages
    done = AT + 2 if name == "nothing" else AT
    last = newest(folder / name)
    assert last["step"] == done
    assert len(read_metrics(folder / name)) == done
    assert all(bool(weight.isfinite().all()) for weight in last["learner"].values())
