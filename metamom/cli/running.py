"""Run a command: start the processes' world if it shares its work, and turn exceptions into exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from metamom.cli.flag_names import in_flags
from metamom.common.allocator import out_of_memory
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
    except (MemoryError, RuntimeError) as error:
        if (why := out_of_memory(error)) is None:
            raise
        print(f"metamom: error: not enough memory: {why}. Take smaller batches.", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("METAMOM_DEBUG"):
            raise
        print(f"metamom: error: {in_flags(str(error), arguments)}", file=sys.stderr)
        return 2


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
