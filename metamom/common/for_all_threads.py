"""Changes of the whole process, such as a switch of PyTorch, that several threads need at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class ForAllThreads:
    """A context that the first thread enters and the last one leaves, in whatever order they come and go.

    Each thread on its own would restore what it found, which may be what another thread has set.

    Args:
        change: makes the context, which must be able to end in another thread than it began in.

    Example:
        >>> from contextlib import contextmanager
        >>> @contextmanager
        ... def told():
        ...     print("set")
        ...     yield
        ...     print("restored")
        >>> switched = ForAllThreads(told)
        >>> with switched(), switched():
        ...     print("inside")
        set
        inside
        restored
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._inside = 0
        self._entered = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Be inside of the context."""
        with self._lock:
            if self._inside == 0:
                self._entered.enter_context(self._change())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._entered.close()
