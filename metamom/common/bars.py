"""Whether evaluations show progress bars of their own: not within a task that has one for the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the bars of evaluations inside."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def bars_hidden() -> bool:
    """Whether a caller shows the progress of the whole."""
    return _hidden.get()
