"""A run's directory: who may write to it, what is in it, and how it is read again.

``config.json``      everything needed to run it again: ``settings`` that may not change when a run is resumed, its
                     ``length`` and the like, which may, and the ``environment``: versions and hardware
``metrics.jsonl``    one object a line, appended and flushed
``checkpoints/``     see `metamom.checkpoints`
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from metamom.checkpoints import CheckpointError, Checkpoints
from metamom.files import write_atomically


class RunDirectory:
    """A run directory opened for writing; a context manager that holds its lock.

    The lock is the operating system's, so a process that dies gives it back.

    Args:
        path: made if missing.
        settings: what defines the run, as JSON values. A resumed run must have the same.
        length: what may change when it is resumed, as JSON values; for the record.
        resume: go on with the run that is there, if any.
        keep: how many of the newest checkpoints to keep.

    Raises:
        ValueError: if another process writes there; if a run is there and ``resume`` is false; if the run there has
            other settings (the message names them).
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        length: Mapping[str, Any] | None = None,
        resume: bool = False,
        keep: int = 3,
    ) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; a run needs a directory of its own.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._config = {"settings": dict(settings), "length": dict(length or {}), "environment": environment()}
        self._metrics: IO[str] | None = None
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is writing to the run directory {self.path}; wait for it or choose another directory."
            ) from error
        try:
            self._check(json.loads(json.dumps(dict(settings))), resume)
            self.checkpoints.sweep()
        except BaseException:
            self.close()
            raise

    def _check(self, settings: dict[str, Any], resume: bool) -> None:
        there = [name for name in ("metrics.jsonl", "runs", "report.md") if (self.path / name).exists()]
        there += [str(path.relative_to(self.path)) for path in self.checkpoints.beyond_start()]
        if not there:  # nothing, or a start that came to nothing: no step was done, so there is nothing to lose
            if (self.path / "config.json").exists():
                read_config(self.path)  # refuses one that is no run's
            self.checkpoints.path(0).unlink(missing_ok=True)
            return
        if not resume:
            raise ValueError(
                f"{self.path} holds a run already ({', '.join(there)}); resume it (--resume, or resume=True), "
                "or choose another directory."
            )
        differences = list(_differences(read_config(self.path)["settings"], settings))
        if differences:
            raise ValueError(
                f"the run in {self.path} was made with other settings: {'; '.join(differences)}. "
                "Resume it with its own settings, or choose another directory."
            )

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        metrics, self._metrics = self._metrics, None
        try:
            if metrics is not None:
                metrics.close()  # which fails again where a line could not be written
        finally:
            self._lock.release()

    def write_config(self) -> None:
        """Write ``config.json``; when a run is resumed, not before its checkpoint has proved to be usable."""
        write_atomically(self.path / "config.json", (json.dumps(self._config, indent=2) + "\n").encode())

    def newest_state(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, ``None`` in a directory where no run has begun.

        Raises:
            CheckpointError: if there are metrics but no checkpoint, or none that is usable.
        """
        state = self.checkpoints.load_newest()
        if state is None and read_metrics(self.path):
            raise CheckpointError(
                f"{self.path} holds the metrics of a run but none of its checkpoints, so it cannot go on. "
                "Put a checkpoint back, or start a new run in another directory."
            )
        return state

    def forget_metrics_from(self, step: int) -> None:
        """Drop the metrics of steps that will be done again, and a last line cut short."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] < step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl`` and hand it to the operating system."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()


def read_config(path: str | Path) -> dict[str, Any]:
    """``config.json`` of the run in ``path``: ``{"settings": ..., "length": ..., "environment": ...}``.

    Raises:
        ValueError: if there is no run, or its configuration cannot be read.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} holds no run: there is no {file}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["settings"], dict):
            raise TypeError("settings is no object")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as a run's configuration: {error!r}.") from error
    return dict(config)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without a last one that a crash cut short.

    Raises:
        ValueError: if a line before the last is no JSON object.
    """
    file = Path(path) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is no JSON object: {error}") from error
    return metrics


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    try:
        version = metadata.version("metamom")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "unknown"
    return {
        "metamom": version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


def _differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            yield from _differences(there.get(key), here.get(key), f"{place}.{key}" if place else key)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from _differences(a, b, f"{place}[{number}]")
    elif there != here:
        yield f"{place} is {there!r} there and {here!r} here"
