"""Measure a row of the speed benchmark: agreement first, then times in turns, work and memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from metamom.experiments.shared.peak import peak_mib
from metamom.experiments.speed import with_jax
from metamom.experiments.speed.peers import META, ROUGH, Contender, makers, prepare
from metamom.experiments.speed.rows import MetaRow, OptimizerRow, Row

TOLERANCE = 1e-8  # between float64 results, relative to their norm
ROUGH_TOLERANCE = 1.0  # for contenders that round to few digits on purpose: only catches garbage
WARM_UP = 2  # rounds, after the first call
LEAST_ROUNDS = 5
GEMM_SIZES = (1024, 2048)
TURN_SECONDS = 0.05  # minimum length of a turn: training repeats the same work, with its code and data in the caches
# What libraries raise for a network that they do not support.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
STEPS = 100  # optimizer steps timed as one: a single step is too short for the clock


@dataclass
class Measured:
    """The measurements of a row.

    Attributes:
        row: the computation.
        flops: useful work of one iteration; ``None`` if it has no matrix products.
        differences: the distance of each contender's float64 outcome from the reference's, relative to its norm.
        float32_differences: the same in float32.
        first_calls: seconds to make a contender and run its first iteration, including compiling, with
            TorchInductor's cache empty.
        milliseconds: of one iteration, round by round, for contenders that agree.
        cpu_milliseconds: the same in CPU time of the process, over all threads.
        failures: why contenders cannot run the row.
        gemm: milliseconds of a float32 product of square matrices, by size, in the same rounds.
        alone: see `alone`; empty by default.
    """

    row: Row
    flops: int | None = None
    differences: dict[str, float] = field(default_factory=dict)
    float32_differences: dict[str, float] = field(default_factory=dict)
    first_calls: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_milliseconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    gemm: dict[int, list[float]] = field(default_factory=dict)
    alone: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def refused(self) -> list[str]:
        """The contenders that compute something else, and are not timed."""
        checks = ((self.differences, TOLERANCE), (self.float32_differences, self.row.tolerance))
        found = {
            name
            for values, most in checks
            for name, value in values.items()
            if not value <= (ROUGH_TOLERANCE if name in ROUGH else most)
        }
        return [name for name in self.differences if name in found]


def steps_of(row: Row) -> int:
    """The number of iterations timed as one."""
    return STEPS if isinstance(row, OptimizerRow) else 1


def check(row: Row, names: list[str], device: torch.device) -> Measured:
    """Compare the contenders' results in float64, where rounding does not decide any ReLU."""
    measured = Measured(row)
    exact = row.to(device, torch.float64)
    reference = None
    for name in names:
        # bfloat16 applies to float32 only
        try:
            contender = makers(row.to(device, torch.float32) if name in ROUGH else exact)[name]()
            for _ in range(steps_of(row)):
                contender.iterate()
        except FAILURES as error:
            measured.failures[name] = f"{type(error).__name__}: {error}"
            continue
        outcome = _flat(row, contender)
        reference = outcome if reference is None else reference
        measured.differences[name] = _difference(outcome, reference)
    return measured


def begin(measured: Measured, device: torch.device) -> dict[str, Contender]:
    """Make the contenders that agree, and time and compare their first iterations.

    Returns:
        Those that still agree, by name.
    """
    row, contenders, reference = measured.row, {}, None
    for name, make in makers(row).items():
        if name not in measured.differences or name in measured.refused:
            continue
        start = now(device)
        try:
            contender = make()
            contender.iterate()
            measured.first_calls[name] = now(device) - start
            for _ in range(steps_of(row) - 1):
                contender.iterate()
        except FAILURES as error:
            measured.failures[name] = f"{type(error).__name__}: {error}"
            del measured.differences[name]
            continue
        contenders[name] = contender
        outcome = _flat(row, contender)
        reference = outcome if reference is None else reference
        measured.float32_differences[name] = _difference(outcome, reference)
    return {name: contender for name, contender in contenders.items() if name not in measured.refused}


def measure(row: Row, names: list[str], device: torch.device, seconds: float, most_rounds: int) -> Measured:
    """Check a row, then time the contenders that agree and two matrix products, one after another, round by round.

    A turn is as many iterations as fill `TURN_SECONDS`, and gives their mean. Each round starts with the next
    contender. Timing ends after ``seconds`` and at least 5 rounds, or after ``most_rounds``.
    """
    measured = check(row, names, device)
    if not measured.differences:
        return measured  # none can run it
    can_run = "metamom" not in measured.failures
    measured.flops = flops(row) if isinstance(row, MetaRow) and can_run else None
    contenders = begin(measured, device)
    steps = steps_of(row)
    turns = [
        _Turn(
            contender.iterate,
            steps,
            measured.milliseconds.setdefault(name, []),
            measured.cpu_milliseconds.setdefault(name, []),
        )
        for name, contender in contenders.items()
    ]
    if measured.flops is not None:
        turns += [_Turn(_product(size, device), 1, measured.gemm.setdefault(size, []), []) for size in GEMM_SIZES]
    end = float("inf")
    least = min(LEAST_ROUNDS, most_rounds)
    for number in tqdm(range(-WARM_UP, most_rounds), desc="rounds", leave=False, disable=None):
        if number == 0:
            end = time.perf_counter() + seconds
        if number >= least and time.perf_counter() >= end:
            break
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            start, cpu_start = now(device), time.process_time()
            for _ in range(turn.repeat):
                turn.iterate()
            elapsed, cpu = now(device) - start, time.process_time() - cpu_start
            if number >= 0:
                turn.times.append(1e3 * elapsed / turn.repeat)
                turn.cpu_times.append(1e3 * cpu / turn.repeat)
            else:
                turn.repeat = max(turn.repeat, math.ceil(TURN_SECONDS * turn.repeat / elapsed))
    return measured


@dataclass
class _Turn:
    """A timed call, its repetitions in a turn, and the milliseconds and CPU milliseconds of one call, turn by turn."""

    iterate: Callable[[], Any]
    repeat: int
    times: list[float]
    cpu_times: list[float]


def now(device: torch.device) -> float:
    """Seconds, once all work queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _NoModules(nullcontext[None]):
    """Tracks no modules. Tracking registers hooks, and with hooks a model runs as a whole in each inner step."""

    parents: ClassVar[set[str]] = {"Global"}


def flops(row: MetaRow) -> int:
    """Floating-point operations of the matrix products in metamom's meta-gradient, computed without compiling."""
    contender = META["metamom"](row)
    if row.chunk_size == "auto":
        contender.iterate()  # it measures a task's memory, at the first call only
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        contender.iterate()
    return int(counter.get_total_flops())


def _flat(row: Row, contender: Contender) -> Tensor:
    """A contender's result, as one vector in the order of the model's trainable parameters."""
    outcome = contender.outcome()
    names = [name for name, p in row.model.named_parameters() if p.requires_grad]
    return torch.cat([outcome[name].double().cpu().flatten() for name in names])


def _difference(outcome: Tensor, reference: Tensor) -> float:
    return float((outcome - reference).norm() / reference.norm())


def _product(size: int, device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


@contextmanager
def empty_caches(kernels: bool = False) -> Iterator[None]:
    """An empty cache for TorchInductor, so that first calls compile; a cache named by the environment stays in use.

    Args:
        kernels: empty both caches, even those named by the environment, so that metamom's kernels are built again.
    """
    names = ["TORCHINDUCTOR_CACHE_DIR"] if kernels or "TORCHINDUCTOR_CACHE_DIR" not in os.environ else []
    names += ["METAMOM_CACHE"] if kernels else []
    before = {name: os.environ.get(name) for name in names}
    with TemporaryDirectory(prefix="metamom-speed-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: os.path.join(folder, name.lower()) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def alone(row: Row, name: str, device: torch.device) -> dict[str, float]:
    """Measure one contender in this process, which should do nothing else: three iterations.

    Returns:
        ``peak``, MiB; ``imports``, MiB, the peak before the contender was made; and ``first_call``, the seconds of
        making it and of its first iteration, with the caches as they are. Memory on a CPU is the process's resident
        set, compiling included; on CUDA what PyTorch (or JAX) allocated there.
    """
    prepare(name, device)
    imports = _peak(name, device)
    start = now(device)
    contender = makers(row)[name]()
    contender.iterate()
    first_call = now(device) - start
    for _ in range(2):
        contender.iterate()
    return {"peak": _peak(name, device), "imports": imports, "first_call": first_call}


def alone_elsewhere(row: str, name: str, options: list[str]) -> dict[str, float]:
    """Run `alone` in its own process, which finds this process's compiled code in the caches.

    Args:
        row: the row's name.
        name: the contender's name.
        options: the command line's options, passed on to the process.
    """
    command = [sys.executable, "-m", "metamom.experiments.speed", "--one", row, name, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {key: float(value) for key, value in json.loads(done.stdout).items()}


def _peak(name: str, device: torch.device) -> float:
    if device.type == "cuda":
        if name.startswith("jax"):
            return with_jax.peak_bytes(device) / 2**20
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_mib()
