"""Checkpoints of a run: written whole, checked when read, the newest few and the best kept."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from metamom.files import write_atomically

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (nested containers of tensors, numbers and strings) to ``path``, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save` wrote. Never runs code from the file (``weights_only=True``).

    Raises:
        CheckpointError: for a file that is missing, damaged, or of another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load itself would not notice a flipped bit
        if broken is not None:
            raise CheckpointError(f"checkpoint {path} is damaged (in {broken}).")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}.") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"checkpoint {path} is cut short or damaged: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(
            f"checkpoint {path} has format {found!r}; this version of metamom reads format {FORMAT}. "
            "Use the version that wrote it (see config.json), or start a new run."
        )
    return state


class Checkpoints:
    """The checkpoints in one folder: ``step-00000500.pt`` after 500 steps, and ``best.pt``.

    Args:
        folder: made when the first checkpoint is written.
        keep: how many of the newest to keep, >= 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"at least the newest checkpoint must be kept; got keep={keep}.")
        self.folder = folder
        self.keep = keep

    @property
    def best(self) -> Path:
        """Where the best checkpoint is kept."""
        return self.folder / "best.pt"

    def steps(self) -> list[int]:
        """Steps of the checkpoints present, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m.group(1)) for m in map(_NAME.fullmatch, (p.name for p in self.folder.iterdir())) if m)

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps is kept."""
        return self.folder / f"step-{step:08d}.pt"

    def beyond_start(self) -> list[Path]:
        """The checkpoints after at least one step."""
        after = [self.path(step) for step in self.steps() if step > 0]
        return [*after, *([self.best] if self.best.exists() else [])]

    def save(self, step: int, state: dict[str, Any], *, best: bool = False) -> None:
        """Write the checkpoint, then remove the oldest beyond ``keep``; ``best=True`` writes ``best.pt`` too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.path(step), {"step": step, **state})
        if best:
            save(self.best, {"step": step, **state})
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def load_newest(self, *, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest checkpoint that is whole; a warning names each damaged one passed over.

        Returns:
            Its state with ``"step"``, or ``None`` where there is no checkpoint at all.

        Raises:
            CheckpointError: if there are some and none is usable, or the newest whole one has another format.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return load(self.path(step), device=device)
            except CheckpointError as error:
                if "format" in str(error) or step == steps[0]:
                    raise
                warnings.warn(f"{error} Going back to the one before.", stacklevel=2)
        return None
