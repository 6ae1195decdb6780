"""Write metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHOWN = ("loss", "accuracy", "grad_norm", "bias_error", "validation")


def find_writer() -> Callable[..., Any]:
    """Find TensorBoard's writer.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard=True needs TensorBoard: pip install 'metamom[tensorboard]'.") from error
    return SummaryWriter


@contextmanager
def writing_to(folder: Path, done: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes a line of metrics to ``folder``, for a run that resumes after ``done`` steps."""
    board = find_writer()(str(folder), purge_step=done)

    def write(line: Mapping[str, Any]) -> None:
        for name in SHOWN:
            if line.get(name) is not None:
                board.add_scalar(name, line[name], line["step"])

    try:
        yield write
    finally:
        board.close()
