"""How a run ended, recorded in the history of its ``config.json``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from metamom.common.diverged import DivergedError
from metamom.common.user_code import users_level
from metamom.training.directory import RunDirectory, read_config

Kind = Literal["finished", "stopped", "interrupted", "diverged", "failed"]


class Ending(NamedTuple):
    """How the last start of a run ended.

    Attributes:
        kind: ``"finished"``: all iterations are done; ``"stopped"`` by a callback; ``"interrupted"`` by a signal;
            ``"diverged"``: a value was not finite; ``"failed"``: any other error.
        step: the steps completed by then.
        reason: the callback's reason or the error; ``None`` for ``"finished"``.
        time: UTC, ISO 8601.
    """

    kind: Kind
    step: int
    reason: str | None
    time: str


def how_ended(run_dir: str | Path) -> Ending | None:
    """How the run in ``run_dir`` ended.

    Returns:
        ``None`` if that is unknown: the run is under way, was killed, or is of metamom 0.1.

    Raises:
        ValueError: if there is no run, or its configuration cannot be read.
    """
    return ending_of(read_config(run_dir))


def ending_of(config: dict[str, Any]) -> Ending | None:
    """`how_ended`, given the contents of ``config.json``."""
    history = config["history"]
    ended = history[-1].get("ended") if history else None
    if not isinstance(ended, dict) or ended.get("kind") not in get_args(Kind) or not isinstance(ended.get("step"), int):
        return None
    reason, when = ended.get("reason"), ended.get("time")
    return Ending(ended["kind"], ended["step"], None if reason is None else str(reason), str(when))


def recorder(
    run: RunDirectory, done: Callable[[], int], stopped: Callable[[], str | None]
) -> Callable[[Any, BaseException | None, Any], None]:
    """An exit callback for `contextlib.ExitStack.push` that records how a run ended.

    Args:
        run: its directory, still open.
        done: the steps completed.
        stopped: why a callback has stopped the run; ``None`` if none has.
    """

    def record(kind: Any, error: BaseException | None, traceback: Any) -> None:
        reason = stopped() if error is None else str(error) or type(error).__name__
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            run.write_ending(Ending(_kind(error, reason), done(), reason, now)._asdict())
        except OSError as failed:  # for the record only: neither a good run nor its error is lost over it
            if not isinstance(error, OSError):  # which says why already
                warnings.warn(f"could not record in {run.path} how the run ended: {failed}", stacklevel=users_level())

    return record


def _kind(error: BaseException | None, reason: str | None) -> Kind:
    if error is None:
        return "finished" if reason is None else "stopped"
    if isinstance(error, DivergedError):
        return "diverged"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
