"""Run a command: start the processes' world if it shares its work, and turn exceptions into exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from metamom.cli.flag_names import in_flags
from metamom.common.allocator import out_of_memory
from metamom.common.user_code import raised_by_metamom, user_frames
from metamom.distributed import ProcessError, start
from metamom.training.interrupts import TrainingInterrupted
from metamom.training.progress import DivergedError


def run(arguments: argparse.Namespace) -> int:
    """Run the command that the arguments name.

    Returns:
        Its exit status, as `metamom.cli.main` has it.
    """
    try:
        with warnings.catch_warnings(), _sigterm_as_interrupt():
            warnings.showwarning = _show_warning
            if "server" in arguments:  # a command that shares its work with other processes
                with start(server=arguments.server, timeout=arguments.timeout) as world:
                    return int(arguments.run(arguments, world))
            _refuse_processes()
            command: Callable[[argparse.Namespace], int] = arguments.run
            return command(arguments)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "signal_number", signal.SIGINT)
        print(f"\nmetamom: {str(interrupt) or 'interrupted.'}", file=sys.stderr)
        return 128 + int(number)
    except DivergedError as error:
        print(f"metamom: diverged: {error}", file=sys.stderr)
        return 1
    except ProcessError as error:
        print(f"metamom: error: {error}", file=sys.stderr)
        return 3
    except Exception as error:
        if (said := _explained(error)) is None:
            raise
        print(f"metamom: error: {in_flags(said, arguments)}", file=sys.stderr)
        return 2


def _explained(error: Exception) -> str | None:
    """What to print for an error in place of its traceback; ``None`` for one of metamom's own, a bug.

    Of an error in the user's code, such as the forward of a model, it is the part of the traceback in that code.
    """
    if isinstance(error, (MemoryError, RuntimeError)) and (why := out_of_memory(error)) is not None:
        return f"not enough memory: {why}. Take smaller batches."
    if os.environ.get("METAMOM_DEBUG"):
        return None
    said = str(error) if isinstance(error, (ValueError, TypeError, OSError)) else None
    cause: BaseException | None = error
    while cause is not None and not (frames := user_frames(cause)):
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if cause is None or (said is not None and frames[-1].filename in said):  # which says it all
        return said
    first = said if said is not None and raised_by_metamom(error) else f"{type(error).__name__}: {error}"
    return f"{first}\n{''.join(traceback.format_list(frames)).rstrip()}"


def _refuse_processes() -> None:
    """Of commands that do not share their work with other processes.

    Raises:
        ValueError: where torchrun has started several.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        raise ValueError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, each of which would do all of this: start the "
            "command without it. train and evaluate share their work."
        )


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Outside the training loop, which handles it, let SIGTERM end the command as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TrainingInterrupted("stopped by SIGTERM.", number)

    if threading.current_thread() is not threading.main_thread():  # handlers can be set there alone
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes, which say the same, the first
        print(f"metamom: warning: {message}", file=sys.stderr)
