"""Write metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from metamom.training.callbacks import Callback, RunState, Status

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


class TensorBoard(Callback):
    """Write the metrics for TensorBoard; ``train(tensorboard=True)`` adds one.

    Args:
        folder: for the files; ``None`` for the folder ``tensorboard`` of the run's directory.
    """

    _may_stop = False

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_start(self, state: RunState) -> None:
        """Open the files.

        Raises:
            ValueError: without a folder, or without TensorBoard.
        """
        folder = self.folder
        if folder is None:
            if state.run_dir is None:
                raise ValueError(
                    "TensorBoard() writes into the run's directory: pass run_dir=, or TensorBoard(folder)."
                )
            folder = state.run_dir / "tensorboard"
        self._writer = find_writer()(str(folder), purge_step=state.step)

    def on_step(self, state: RunState) -> None:
        for name in SHOWN:
            if state.metrics.get(name) is not None:
                self._writer.add_scalar(name, state.metrics[name], state.metrics["step"])

    def on_end(self, state: RunState, status: Status) -> None:
        self._writer.close()
