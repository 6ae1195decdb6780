"""Draw the next meta-batches in a background thread while the current one is computed."""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from metamom.batch import Sampler, TaskBatch, TaskSampler, check_sampler, described, located, of_stream, takes_blocks
from metamom.common.checks import check_number, check_whole

if TYPE_CHECKING:
    from typing_extensions import Self

WATCHED = 4  # steps that are timed before the decision; the first, which may compile, does not count
MOST_AHEAD = 64


class _Request(NamedTuple):
    """Arguments of `Sampler.sample`."""

    step: int
    num_tasks: int
    rank: int
    world_size: int


class Prefetched(TaskSampler):
    """The same tasks as ``sampler``, drawn ahead in a background thread where that saves time.

    A batch depends only on its step, so the batches are exactly those of ``sampler``, in any order of steps, and a run
    resumes as before. After `sample` has returned step k, steps k+1, ..., k+ahead are drawn in one thread. By default
    the first steps are timed, and nothing is drawn ahead if sampling takes less than a tenth of a step.

    An error in a draw is raised when its step is requested. `close`, or the end of a ``with`` block, cancels draws that
    have not started; so does dropping the sampler. Reading and decoding release Python's lock, so they run at the same
    time as the model; other work in Python takes turns with it.

    Args:
        sampler: any sampler; it must allow a call in another thread, as all of metamom's do.
        ahead: how many steps to draw ahead, 1 to 64; each holds a batch in memory.
        threshold: draw ahead only if sampling takes more than this fraction of a step. 0 draws ahead at once.
        until: the number of steps of the run; steps from there on are not drawn ahead.

    Attributes:
        sampler: as given.

    Raises:
        TypeError: for anything but a sampler.
        ValueError: for a number out of range.

    Example:
        >>> import torch
        >>> from metamom.tasks import Sinusoid
        >>> with Prefetched(Sinusoid(), threshold=0) as tasks:
        ...     same = [torch.equal(tasks.sample(k, 4).query_y, Sinusoid().sample(k, 4).query_y) for k in range(5)]
        >>> all(same)
        True
    """

    def __init__(self, sampler: Sampler, ahead: int = 2, *, threshold: float = 0.1, until: int | None = None) -> None:
        check_sampler(sampler, "the sampler of Prefetched")
        check_number("threshold", threshold)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be a fraction of a step, 0 <= threshold < 1; got {threshold}.")
        self.sampler, self.threshold = sampler, threshold
        self.ahead = check_whole("ahead", ahead, 1, MOST_AHEAD)
        self.until = None if until is None else check_whole("until", until, 0)
        self._start()

    def _start(self) -> None:
        """Forget everything drawn and timed."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: dict[_Request, Future[TaskBatch]] = {}
        self._watch = _Watch(self.threshold)

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """Return the batch of ``sampler``; see `Sampler.sample`."""
        request = _Request(step, num_tasks, rank, world_size)
        if self._process != os.getpid():  # a fork has no threads of its parent
            self._start()
        with self._lock:
            pays = self._watch.pays
            waiting = self._pending.pop(request, None)
        began = time.perf_counter()
        try:
            batch = _draw(self.sampler, request) if waiting is None else waiting.result()
        finally:
            if waiting is None:
                self._watch.drew(began, time.perf_counter())
        if pays:
            with self._lock:
                self._draw_ahead(request)
        return batch

    def close(self) -> None:
        """Cancel the draws that have not started. The sampler remains usable, and starts again when called."""
        with self._lock:
            pool, self._pool, self._pending = self._pool, None, {}
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def draws_ahead(self) -> bool | None:
        """Whether steps are drawn ahead; ``None`` while the first ones are timed."""
        return self._watch.decision

    @property
    def workers(self) -> int | None:
        """Those of ``sampler``."""
        return self.sampler.workers if isinstance(self.sampler, TaskSampler) else None

    def with_stream(self, stream: str) -> Self:
        """The same of another stream, with a thread of its own."""
        other = copy.copy(self)
        other.sampler = of_stream(self.sampler, stream)
        return other

    def describe(self) -> dict[str, Any]:
        """The description of ``sampler``: its tasks are the same."""
        return described(self.sampler)

    def location(self) -> dict[str, Any]:
        """Where the sampler's data is."""
        return located(self.sampler)

    def __repr__(self) -> str:
        return f"Prefetched({self.sampler!r}, ahead={self.ahead})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _draw_ahead(self, request: _Request) -> None:
        """Ask for the steps after this one, and drop requests that no longer follow."""
        steps = range(request.step + 1, request.step + 1 + self.ahead)
        wanted = [request._replace(step=step) for step in steps if self.until is None or step < self.until]
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for other in wanted:
            if other not in self._pending:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(1, thread_name_prefix="metamom-prefetch")
                    weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
                # the thread holds the inner sampler only, so that dropping this one ends the thread
                self._pending[other] = self._pool.submit(_draw, self.sampler, other)


class _Watch:
    """Times the first steps, and decides whether drawing ahead pays.

    Attributes:
        decision: ``None`` until enough steps are timed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.decision: bool | None = True if threshold == 0 else None
        self._times: list[tuple[float, float]] = []  # beginning and end of each draw

    @property
    def pays(self) -> bool:
        return self.decision is True

    def drew(self, began: float, ended: float) -> None:
        """Note a draw in the foreground."""
        if self.decision is not None:
            return
        self._times.append((began, ended))
        if len(self._times) == WATCHED + 2:
            self.decision = self.share(self._times[1:]) > self.threshold

    @staticmethod
    def share(times: Sequence[tuple[float, float]]) -> float:
        """The fraction of a step, from one draw's beginning to the next one's, that is sampling."""
        shares = [(ended - began) / max(after - began, 1e-9) for (began, ended), (after, _) in pairwise(times)]
        return median(shares)


def _draw(sampler: Sampler, request: _Request) -> TaskBatch:
    if takes_blocks(sampler):
        return sampler.sample(request.step, request.num_tasks, rank=request.rank, world_size=request.world_size)
    whole = sampler.sample(request.step, request.num_tasks)
    return whole if request.world_size == 1 else whole.split(request.world_size)[request.rank]
