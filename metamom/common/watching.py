"""Who watches an evaluation: its own progress, or a caller that shows the progress of the whole or may stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from tqdm import tqdm

from metamom.common.log_lines import LogLines

Watch = Callable[[int, int], None]
"""Called between the blocks of an evaluation with the tasks that are done, and how many there are."""


class _Watching(NamedTuple):
    """How evaluations are watched.

    Attributes:
        label: of their own progress; ``None`` shows none.
        watches: the callers' functions.
    """

    label: str | None = "evaluate"
    watches: tuple[Watch, ...] = ()


_ALONE = _Watching()
_watching: ContextVar[_Watching] = ContextVar("watching", default=_ALONE)


@contextmanager
def watched(label: str | None, *watches: Watch) -> Iterator[None]:
    """Watch the evaluations inside.

    Args:
        label: of their own progress: a bar in a terminal, elsewhere lines on standard error; ``None`` shows none.
        *watches: functions to call between blocks, after those of the callers further out. One may raise an error.
    """
    token = _watching.set(_Watching(label, (*_watching.get().watches, *watches)))
    try:
        yield
    finally:
        _watching.reset(token)


class Watched:
    """An evaluation as those who watch it see it; a context manager.

    Args:
        tasks: how many there are.
        shown: whether this process shows progress.
    """

    def __init__(self, tasks: int, shown: bool) -> None:
        label, self._watches = _watching.get()
        hidden = None if shown and label is not None else True
        self._tasks = tasks
        self._bar = tqdm(total=tasks, desc=label, unit="task", leave=False, disable=hidden)
        self._lines = LogLines(label or "", tasks, "tasks", since=0) if hidden is None and self._bar.disable else None

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def between(self, done: int) -> None:
        """Show that so many tasks are done, and call those who watch. The last block is followed by no call."""
        self._bar.update(done - self._bar.n)
        if self._lines is not None:
            self._lines.stepped(done, {})
        for watch in self._watches:
            watch(done, self._tasks)
