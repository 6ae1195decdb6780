"""Which frames of an error are in code of the user's: not in metamom, nor in what is installed."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[1]
# `tasks` and `experiments` are links in a checkout
OURS = [str(path.resolve()) for path in (PACKAGE, PACKAGE / "tasks", PACKAGE / "experiments")]
INSTALLED = [str(Path(path).resolve()) for path in sysconfig.get_paths().values()]


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames in the user's files, outermost first."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]


def place_in_user_code(error: BaseException) -> str | None:
    """The file and the line in the user's code that raised an error, or that has a syntax error."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = user_frames(error)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None


def users_level() -> int:
    """The ``stacklevel`` that makes a warning point at the user's line.

    It is 2 if no frame is the user's, as when a command runs.

    Example:
        >>> users_level()  # called from here
        1
    """
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith("<frozen") and not _is_within(file, [*OURS, *INSTALLED]):
            return level
        frame, level = frame.f_back, level + 1
    return 2


def raised_by_metamom(error: BaseException) -> bool:
    """Whether metamom's own code raised an error, also where the user's code has called it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_within(frames[-1].filename, OURS)


def _is_users(file: str) -> bool:
    if file.startswith("<"):  # of no file, such as Python's own import system
        return False
    return not _is_within(file, [*OURS, *INSTALLED])


def _is_within(file: str, folders: list[str]) -> bool:
    return any(Path(file).resolve().is_relative_to(folder) for folder in folders)
