"""Checkpoints of a run: written atomically, checked when read; the newest few and the best are kept."""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metamom.common.files import replacing
from metamom.common.user_code import users_level

FORMAT = 1
_NAME = re.compile(r"step-(\d+)(\.unvalidated)?\.pt")
# errors seen when reading a damaged zip archive or the pickle in it
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError,
    TypeError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError, AssertionError,
    NotImplementedError,
)  # fmt: skip
_DEEPEST = 100  # nesting of containers; real states have about ten levels


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


class CheckpointFormatError(CheckpointError):
    """The checkpoint is intact, but was written by another version of metamom."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (nested containers of tensors, numbers and strings) to ``path`` atomically.

    Tensors are written without a copy in memory.

    Raises:
        CheckpointError: for a state that `load` could not read.
        OSError: as `metamom.common.files.replacing`.
    """
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(_plain({"format": FORMAT, **state}), file)
        except RuntimeError as error:  # torch's error about a truncated file, if the disk is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        try:  # fail now rather than on resume; memory-mapped, so that no tensor is read
            written = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
            _check_size(written, temporary.stat().st_size)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"the state for {path} holds something other than tensors, numbers, strings and containers of them, "
                f"which could only be read by running code from the file: {_reason(error)} "
                "Keep it out of the state_dict of the model, optimizer or scheduler that it belongs to."
            ) from error
        except ValueError as error:
            raise CheckpointError(
                f"the state for {path} could not be read again: {error}. Keep dense tensors with memory of their own."
            ) from error


def load(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint from `save`. This never runs code from the file (``weights_only=True``).

    Raises:
        CheckpointError: for a file that is missing, damaged, or of another format.
    """
    try:
        if path.exists() and not path.is_file():
            raise zipfile.BadZipFile("it is not a file")
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_size(state, path.stat().st_size)
        if torch.device(device).type != "cpu":
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}.") from error
    except _DAMAGE as error:
        raise CheckpointError(f"checkpoint {path} is cut short or damaged ({_reason(error)}).") from error
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(state, dict) or type(found) is not int or found != FORMAT:
        raise CheckpointFormatError(
            f"checkpoint {path} has format {found!r:.40}; this version of metamom reads format {FORMAT}. "
            "Use the version that wrote it (see config.json), or start a new run."
        )
    return state


def _check_archive(path: Path) -> None:
    """Refuse an archive that `save` cannot have written, before reading more into memory than the file holds.

    Raises:
        zipfile.BadZipFile: for a damaged archive, or one that claims to hold more than its file.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) < len(records):
            raise zipfile.BadZipFile("it holds a record twice")
        if min((record.header_offset for record in records), default=0) != 0:
            raise zipfile.BadZipFile("it does not begin with its first record")
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise zipfile.BadZipFile(f"{record.filename} is compressed, but checkpoints never are")
        if sum(record.file_size for record in records) > size:
            raise zipfile.BadZipFile("it claims to hold more than its file")
        broken = archive.testzip()  # torch.load would not detect a flipped bit
    if broken is not None:
        raise zipfile.BadZipFile(f"wrong checksum in {broken}")


def _check_size(state: Any, size: int) -> None:
    """Refuse contents that need far more memory, or time to traverse, than a file of ``size`` bytes justifies.

    Raises:
        ValueError: for tensors larger than the file, containers nested too deeply, or one repeated too often.
    """
    storages: dict[int, int] = {}
    seen, waiting = 0, [(state, 0)]
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > 100 * size:
            raise ValueError("its containers are nested too deeply, or too often")
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError(f"it holds a tensor of layout {value.layout} on device {value.device}")
            if value.numel() * value.element_size() > size:
                raise ValueError(f"it holds a tensor of shape {tuple(value.shape)}, which is larger than the file")
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (str, bytes, bytearray)) and len(value) > size:
            raise ValueError("it holds a text larger than the file")
        elif isinstance(value, dict):
            waiting += ((entry, depth + 1) for pair in value.items() for entry in pair)
        elif isinstance(value, (list, tuple, set)):
            waiting += ((entry, depth + 1) for entry in value)
    if sum(storages.values()) > size:
        raise ValueError("its tensors are larger than the file")


class Checkpoints:
    """The checkpoints in one folder: ``step-00000500.pt`` after 500 steps, and ``best.pt``.

    While a validation is under way, and until the next checkpoint, ``step-00000500.unvalidated.pt`` has the state
    before it. Earlier versions ignore it, and go back to the checkpoint before.

    Args:
        folder: created with the first checkpoint.
        keep: how many of the newest to keep, >= 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"at least the newest checkpoint must be kept; got keep={keep}.")
        self.folder = folder
        self.keep = keep

    @property
    def best(self) -> Path:
        """The path of the best checkpoint."""
        return self.folder / "best.pt"

    def sweep(self) -> None:
        """Delete unfinished files of a killed process. Only for the process with exclusive write access."""
        for half in self.folder.glob(".*.tmp"):
            half.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps of the existing checkpoints, ascending."""
        return [step for step, path in self._all() if path == self.path(step)]

    def path(self, step: int, *, validated: bool = True) -> Path:
        """The path of the checkpoint after ``step`` steps."""
        return self.folder / f"step-{step:08d}{'' if validated else '.unvalidated'}.pt"

    def beyond_start(self) -> list[Path]:
        """The checkpoints after at least one step."""
        after = [path for step, path in self._all() if step > 0]
        return [*after, *([self.best] if self.best.exists() else [])]

    def _all(self) -> list[tuple[int, Path]]:
        """The checkpoints with their steps, the newest last; of one step, the validated one last."""
        if not self.folder.is_dir():
            return []
        found = [
            (match, self.folder / match.group()) for match in map(_NAME.fullmatch, os.listdir(self.folder)) if match
        ]
        newest_last = sorted(found, key=lambda each: (int(each[0].group(1)), each[0].group(2) is None))
        return [(int(match.group(1)), path) for match, path in newest_last]

    def save(self, step: int, state: dict[str, Any], *, best: bool = False) -> None:
        """Write the checkpoint, then remove the oldest beyond ``keep``; ``best=True`` writes ``best.pt`` too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if best:  # first, since after a crash before the next line this step runs again and is found best again
            save(self.best, {"step": step, **state})
        save(self.path(step), {"step": step, **state})
        # later ones are damaged, since `load_newest` has skipped them: do not count them
        for old in [there for there in self.steps() if there <= step][: -self.keep]:
            self.path(old).unlink(missing_ok=True)
        self._drop_unvalidated(lambda there: there <= step)

    def save_unvalidated(self, step: int, state: dict[str, Any]) -> None:
        """Write the state before the validation after ``step`` steps; the next checkpoint replaces it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.path(step, validated=False), {"step": step, **state})
        self._drop_unvalidated(lambda there: there < step)

    def _drop_unvalidated(self, which: Callable[[int], bool]) -> None:
        for step, path in self._all():
            if which(step) and path != self.path(step):
                path.unlink(missing_ok=True)

    def load_newest(self, *, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """Load the newest intact checkpoint, with a warning for each damaged one that is skipped.

        Returns:
            Its state with ``"step"``, or ``None`` if there is no checkpoint at all.

        Raises:
            CheckpointError: if there are checkpoints but none is usable, or the newest intact one has another format.
        """
        there = self._all()
        for step, path in reversed(there):
            try:
                state = load(path, device=device)
            except CheckpointFormatError:
                raise
            except CheckpointError as error:
                if path == there[0][1]:
                    raise CheckpointError(
                        f"no checkpoint in {self.folder} can be used: {error} Put back a copy of one, or start a new "
                        "run in another directory."
                    ) from error
                warnings.warn(f"{error} Going back to the one before.", stacklevel=users_level())
            else:
                found = state.get("step", step)
                if type(found) is int and 0 <= found != step:  # other types are refused where it is used
                    raise CheckpointError(
                        f"checkpoint {path} holds another step than its name says: "
                        f"{found if found < 10**18 else 'a number of many digits'}. Restore it from a copy, or "
                        "remove it."
                    )
                return state
        return None


def _plain(value: Any) -> Any:
    """Replace NumPy's scalars in ``value`` by Python's numbers; the former cannot be read without running code."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:  # an OrderedDict (a module's state) has attributes, so keep it
        return {key: _plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    return value


def _reason(error: BaseException) -> str:
    """The line of an error that gives its reason, without torch's pages of advice."""
    text = str(error).split("WeightsUnpickler error:")[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].split(" Please use")[0]
