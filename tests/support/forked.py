"""Ranks that cost no import of torch: forked from a process that has it, as torchrun would have started them."""

from __future__ import annotations

import ctypes
import errno
import math
import multiprocessing
import os
import resource
import runpy
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import free_port
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, train
from metamom.batch import TaskBatch
from metamom.bias import parse
from metamom.cli.app import main
from metamom.distributed import start
from metamom.experiments.demo import __main__ as demo_command
from metamom.experiments.shared import processes
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid
from metamom.training.checkpoints import Checkpoints

CONTEXT = multiprocessing.get_context("forkserver")
# What each forked process would otherwise import, which takes longer than most of what it does: pytest, since what is
# forked looks at the module that was started; torch._dynamo, since every optimizer imports it; and what this file and
# the commands import.
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "hypothesis",
        "torch._dynamo",
        "metamom.cli.app",
        "metamom.cli.running",
        "metamom.decentral",
        "metamom.experiments.demo.__main__",
        "metamom.experiments.paper.run",
        "metamom.experiments.recipe_training",
        "metamom.experiments.recipes",
        "metamom.experiments.scaling.__main__",
    ]
)
PATIENCE = 120.0  # seconds until a process that should have ended has hung


class Rank(NamedTuple):
    """One process, and where it writes what it has to say."""

    process: ForkServerProcess
    output: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def until_it_says(self, words: str) -> None:
        """Wait for these words."""
        until = time.monotonic() + PATIENCE
        while not self.output.exists() or words not in self.output.read_text():
            assert self.process.is_alive(), self.ended()
            assert time.monotonic() < until
            time.sleep(0.02)

    def ended(self, timeout: float = PATIENCE) -> tuple[int, str]:
        """Its exit status, minus the signal that killed it, and what it said."""
        self.process.join(timeout)
        said = self.output.read_text()
        assert self.process.exitcode is not None, f"{self.output.name} has hung; it said: {said}"
        return self.process.exitcode, said


@contextmanager
def forked(
    target: Callable[..., object], size: int, folder: Path, *arguments: Any, only: int | None = None
) -> Iterator[list[Rank]]:
    """``target(*arguments)`` on ``size`` ranks, or ``only`` on one of them; killed on leaving."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    try:
        for rank in range(size) if only is None else [only]:
            output = folder / f"rank {rank}.txt"
            place = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = CONTEXT.Process(target=_begin, args=(place, output, target, *arguments))
            process.start()
            started.append(Rank(process, output))
        yield started
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def run_forked(target: Callable[..., object], size: int, folder: Path, *arguments: Any) -> list[tuple[int, str]]:
    """Run them to their end: exit status and output of each."""
    with forked(target, size, folder, *arguments) as ranks:
        return [rank.ended() for rank in ranks]


def run_script(text: str, folder: Path, *arguments: str) -> str:
    """Run a script in a process of its own, and return what it says. Its imports of metamom cost nothing."""
    with started_script(text, folder, *arguments) as rank:
        status, said = rank.ended()
    assert status == 0, said
    return said


@contextmanager
def started_script(text: str, folder: Path, *arguments: str) -> Iterator[Rank]:
    """A script in a process of its own, which is killed on leaving."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    with forked(script, 1, folder, path, *arguments) as (rank,):
        yield rank


def _begin(place: dict[str, str], output: Path, target: Callable[..., object], *arguments: Any) -> None:
    os.environ.update(place)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    sys.exit(target(*arguments))


# what the ranks do


def metamom(*arguments: str) -> int:
    """The command."""
    return main(arguments)


def without_ranks(*arguments: str) -> int:
    """The command, as it is where no torchrun has started it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return main(arguments)


def demo(*arguments: str) -> None:
    """The demo, with its runs forked as well: started in the usual way, they would import all of this again."""
    sys.argv = ["demo", *arguments]
    processes.get_context = lambda method: multiprocessing.get_context("fork")  # type: ignore[assignment]
    demo_command.main()


def in_folder(folder: Path, *arguments: str) -> int:
    """The command as `without_ranks`, in another folder."""
    os.chdir(folder)
    return without_ranks(*arguments)


def script(path: Path, *arguments: str) -> None:
    """A script of somebody's."""
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def on_a_full_disk(size: int, *arguments: str) -> int:
    """The command, no file of which can grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return main(arguments)


def unprivileged(*arguments: str) -> int:
    """The command, held to files' permissions even if it is root's: without root's capabilities."""
    if os.geteuid() == 0:
        version_3, this_process, none = 0x20080522, 0, (ctypes.c_uint32 * 6)()
        header = (ctypes.c_uint32 * 2)(version_3, this_process)
        if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")
    return main(arguments)


def write_checkpoints(folder: Path, reporting: Connection) -> None:
    """Checkpoints without end, after those that are there; each reported once written."""
    kept = Checkpoints(folder, keep=2)
    for step in count((kept.steps() or [0])[-1] + 1):
        kept.save(step, checkpoint(step), best=step % 3 == 0)
        reporting.send(step)


def checkpoint(step: int) -> dict[str, Any]:
    """4 MiB that tell the step in every number."""
    return {f"w{i}": torch.full((2**18,), float(step)) for i in range(4)}


class OddError(Exception):
    """Has more to it than its message."""

    def __init__(self, task: int, why: str) -> None:
        super().__init__(f"task {task} is odd: {why}")
        self.task = task


class Fault(NamedTuple):
    """What goes wrong on one rank, once: at step 3, or in the validation after it."""

    rank: int
    action: Callable[[], object]
    where: str = "sampler"
    bias: str = "none"


def raises(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


def unknown_error() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("known on one rank alone")


AT = 3
NAN = "a NaN"
FAULTS = {
    "NaN": Fault(1, lambda: NAN),
    "NaN, compressed": Fault(1, lambda: NAN, bias="topk:50%"),
    "NaN, fed back": Fault(2, lambda: NAN, bias="ef21:topk:50%"),
    "value": Fault(1, raises(ValueError("no such task"))),
    "value on process 0": Fault(0, raises(ValueError("no such task"))),
    "key": Fault(2, raises(KeyError("letter"))),
    "file": Fault(1, raises(FileNotFoundError(errno.ENOENT, "No such file or directory", "letters.npy"))),
    "text": Fault(1, lambda: b"\xff".decode()),
    "end": Fault(1, lambda: next(iter(()))),
    "memory": Fault(2, raises(MemoryError("of one rank"))),
    "own": Fault(1, raises(OddError(5, "it has no letters"))),
    "local": Fault(1, unknown_error),
    "optimizer": Fault(2, raises(RuntimeError("no update")), where="optimizer"),
    "validation": Fault(0, raises(ValueError("nothing to validate on")), where="validation"),
    "nothing": Fault(0, lambda: None),
}


class Tasks:
    """Sinusoids, and what else is done at a step."""

    def __init__(self, at: int = AT, action: Callable[[], object] | None = None) -> None:
        self.sound = Sinusoid(shots=5, queries=5, seed=1)
        self.at, self.action = at, action

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        batch = self.sound.sample(step, num_tasks, rank=rank, world_size=world_size)
        if step == self.at and self.action is not None and self.action() is NAN:
            batch.query_y[0] = math.nan
        return batch


class Momentum(CompositeMomentum):
    """And what else is done at a step."""

    done, action = 0, None

    def step(self, closure: Any = None) -> Any:
        if self.done == AT and self.action is not None:
            self.action()
        self.done += 1
        return super().step(closure)


def train_with_faults(folder: Path) -> None:
    """One run after the other with the same processes, a fault in each; what comes of it is printed."""
    with start(timeout=60) as world:
        for name, fault in FAULTS.items():
            action = {fault.where: fault.action} if world.rank == fault.rank else {}
            learner = MAML(SinusoidMLP((8,), generator=torch.Generator().manual_seed(0)).double(), F.mse_loss)
            optimizer = Momentum(learner.parameters(), lr=0.02, beta=0.3)
            optimizer.action = action.get("optimizer")
            try:
                train(
                    learner,
                    optimizer,
                    Tasks(action=action.get("sampler")),
                    iterations=AT + 2,
                    meta_batch=6,
                    workers=3,
                    bias=None if fault.bias == "none" else parse(fault.bias),
                    validation=Tasks(at=0, action=action.get("validation")),
                    evaluate_every=AT + 1,
                    evaluate_tasks=6,
                    run_dir=folder / name,
                    settings={},
                    checkpoint_every=1,
                    world=world,
                )
                print(f"{name}: done")
            except Exception as error:  # noqa: BLE001  (any at all: the test reads what it was)
                print(f"{name}: {type(error).__name__}: {error}")
