"""A run's directory: its lock, its files, and how to read them.

``config.json``      everything needed to repeat the run: the ``settings``, where those that define the run must not
                     change when it is resumed; the ``length`` and similar options, which may; the ``environment``
                     (versions, hardware, command); and the ``history`` of every start (length, environment,
                     settings that may change, and how it ended)
``metrics.jsonl``    one object a line, appended and flushed
``checkpoints/``     see `metamom.training.checkpoints`
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import sys
import time
import warnings
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from metamom.common.files import write_atomically
from metamom.common.schema import read_record
from metamom.common.user_code import users_level
from metamom.training.checkpoints import CheckpointError, Checkpoints

LONGEST = 300  # characters of a setting in an error
MANY = 10  # differences that an error lists
# settings that identify the data, and those that follow from it
OF_DATA = re.compile(
    r"((?P<digest>((sampler|validation)\.)*data_sha256(\.\w+)?)|((sampler|validation)\.)+(images|items|normalize)\b"
    r"|constants\b)"
)


@dataclass
class Config:
    """The contents of ``config.json``. Files of earlier versions have no history and count as a run with one start."""

    settings: dict[str, Any]
    length: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


class RunDirectory:
    """A run directory opened for writing; a context manager that holds its lock.

    The operating system releases the lock when the process dies. Existing files do not change before `write_config` and
    `forget_metrics_from`, so a resume that is refused changes nothing.

    Args:
        path: created if missing.
        settings: the settings that define the run, as JSON values. A resumed run must have the same.
        free: settings, as ``"name"`` or ``"name.name"``, that only affect where and how the run is computed.
        later: settings that earlier versions did not record; compared only if the record has them.
        length: options that may change on resume, as JSON values; for the record.
        resume: continue an existing run, if any.
        keep: how many of the newest checkpoints to keep.

    Raises:
        ValueError: if another process writes there; if it holds a run and ``resume`` is false; if that run has
            different settings (the message names them).
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        free: Collection[str] = (),
        later: Collection[str] = (),
        length: Mapping[str, Any] | None = None,
        resume: bool = False,
        keep: int = 3,
    ) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; a run needs a directory of its own.")
        self.path.mkdir(parents=True, exist_ok=True)
        start = {"length": dict(length or {}), "environment": environment()}
        self._config: dict[str, Any] = {"settings": dict(settings), **start}
        self._history: list[dict[str, Any]] = []
        self._free = {name: value for name, value in settings.items() if name in free}
        self._fresh = False
        self._metrics: IO[str] | None = None
        _check_files(self.path)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is writing to the run directory {self.path}; wait for it or choose another directory."
            ) from error
        try:
            self._check(json.loads(json.dumps(dict(settings))), free, later, resume)
        except BaseException:
            self.close()
            raise

    def _check(self, settings: dict[str, Any], free: Collection[str], later: Collection[str], resume: bool) -> None:
        there = [name for name in ("metrics.jsonl", "runs", "report.md") if (self.path / name).exists()]
        there += [str(path.relative_to(self.path)) for path in self.checkpoints.beyond_start()]
        if not there:  # empty, or a start without any step, so there is nothing to lose
            if (self.path / "config.json").exists():
                read_config(self.path)  # refuses a file that is not a run's
            self._fresh = True
            return
        if not resume:
            raise ValueError(
                f"{self.path} already holds a run ({', '.join(there)}); resume it (--resume, or resume=True), or "
                "choose another directory."
            )
        config = read_config(self.path)
        unrecorded = [name for name in later if name not in config["settings"]]
        if not str(config["environment"].get("python")).startswith("{}.{}.".format(*sys.version_info)):
            unrecorded.append("code")  # only comparable within one version of Python
        differences = list(_differences(config["settings"], settings, {*free, *unrecorded}))
        if changed := _changed_data(differences):
            raise ValueError(
                f"the data of the run in {self.path} have changed since it began ({changed}): a resumed run must have "
                "the same files. Put them back, or start a new run in another directory."
            )
        if differences:
            raise ValueError(
                f"the run in {self.path} was made with other settings: {_first_of(differences)}. "
                "Resume it with its own settings, or choose another directory. On the command line, --config "
                f"{self.path / 'config.json'} gives them."
            )
        before = {name: config[name] for name in ("length", "environment")}
        self._history = config["history"] or [before]

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        metrics, self._metrics = self._metrics, None
        try:
            if metrics is not None:
                metrics.close()  # fails again if a line could not be written
        finally:
            self._lock.release()

    def write_config(self) -> None:
        """Write ``config.json``. On resume, call this only after the checkpoint has been loaded."""
        self.checkpoints.sweep()
        start = {name: self._config[name] for name in ("length", "environment")}
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._history = [*self._history, {"began": began, "settings": self._free, **start}]
        self._write_config()

    def write_ending(self, ending: Mapping[str, Any]) -> None:
        """Record how the run that `write_config` began has ended, see `metamom.training.ending`."""
        self._history = [*self._history[:-1], {**self._history[-1], "ended": dict(ending)}]
        self._write_config()

    def _write_config(self) -> None:
        config = {**self._config, "history": self._history}
        write_atomically(self.path / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def newest_state(self) -> dict[str, Any] | None:
        """Load the newest intact checkpoint; ``None`` if no run has started in the directory.

        Raises:
            CheckpointError: if there are metrics but no checkpoint, or none that is usable.
        """
        if self._fresh:
            return None
        state = self.checkpoints.load_newest()
        if state is None and read_log(self.path).lines:
            raise CheckpointError(
                f"{self.path} holds the metrics of a run but none of its checkpoints, so the run cannot be resumed. "
                "Put a checkpoint back, or start a new run in another directory."
            )
        return state

    def has_validated(self, step: int) -> bool:
        """Whether the metrics before ``step`` contain a numeric validation."""
        values = [line.get("validation") for line in read_log(self.path).lines if line["step"] < step]
        return any(isinstance(value, (int, float)) and not math.isnan(value) for value in values)

    def forget_metrics_from(self, step: int, until: float = math.inf) -> None:
        """Drop the metrics of steps that will run again, and a truncated last line.

        Unreadable lines are dropped with a warning, and the original file is kept next to the new one. A warning also
        names steps before ``step`` without a line. Lines of steps from ``until`` on will not run again, so they stay in
        a copy of the file. So does a truncated last line of a step before ``step`` or from ``until`` on.
        """
        path = self.path / "metrics.jsonl"
        log = read_log(self.path)
        kept = [line for line in log.lines if line["step"] < step]
        beyond = [line["step"] for line in log.lines if line["step"] >= max(step, until)]
        follows = log.lines[-1]["step"] + 1 if log.lines else 0  # the step of a truncated line
        lost = log.cut is not None and not step <= follows < max(until, step + 1)
        copy = _free_name(path, "longer" if beyond and not (log.damaged or lost) else "damaged")
        if log.damaged or beyond or lost:
            write_atomically(copy, path.read_bytes())
        if path.exists():
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        if log.damaged:
            warnings.warn(
                f"{path} was damaged in line {_listed(log.damaged)}: all that can be read is kept, and a copy of the "
                f"damaged file is {copy.name}.",
                stacklevel=users_level(),
            )
        if lost:
            warnings.warn(
                f"{path} was cut short in line {log.cut}, and that step will not be repeated: a copy of the original "
                f"file is {copy.name}.",
                stacklevel=users_level(),
            )
        if beyond:
            warnings.warn(
                f"{path} held metrics of step {_listed(beyond)}, after the checkpoint, that this run will not "
                f"repeat: they are kept in {copy.name}.",
                stacklevel=users_level(),
            )
        steps = [-1, *(line["step"] for line in kept), step]
        if gaps := [n for a, b in itertools.pairwise(steps) for n in range(a + 1, b)]:
            warnings.warn(f"{path} has no metrics of step {_listed(gaps)}.", stacklevel=users_level())

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl`` and flush it to the operating system."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()


def read_config(path: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of the run in ``path``: ``{"settings", "length", "environment", "history"}``.

    Raises:
        ValueError: if there is no run, or its configuration cannot be read.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} holds no run: there is no {file}.")
    try:
        return vars(read_record(Config, file))
    except ValueError as error:
        raise ValueError(f"the run's configuration cannot be read. {error}") from error


class Log(NamedTuple):
    """The contents of ``metrics.jsonl``.

    Attributes:
        lines: the readable lines, by increasing step.
        damaged: the line numbers of unreadable lines.
        cut: the line number of a truncated last line; ``None`` if the last line is complete.
    """

    lines: list[dict[str, Any]]
    damaged: list[int]
    cut: int | None = None


def read_log(path: str | Path) -> Log:
    """Read the lines of ``metrics.jsonl``. A truncated last line is ignored; a line out of order counts as damaged."""
    file = Path(path) / "metrics.jsonl"
    *whole, cut = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    found = {number: _line(text) for number, text in enumerate([*whole, cut] if cut else whole, 1)}
    good = {number: line for number, line in found.items() if line is not None}
    numbers = list(good)
    kept = [numbers[i] for i in _longest_rising([line["step"] for line in good.values()])]
    short = {len(whole) + 1} & set(found) - set(good)
    damaged = set(found) - set(kept) - short
    return Log([good[number] for number in kept], sorted(damaged), next(iter(short), None))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``, without a last line that a crash truncated.

    Raises:
        ValueError: if a line before the last is not a JSON object with a larger step than the lines before.
    """
    log = read_log(path)
    if log.damaged:
        raise ValueError(
            f"{Path(path) / 'metrics.jsonl'}, line {log.damaged[0]} is not a JSON object with a step above the "
            "earlier ones. Resume the run, which keeps all that can be read, or delete the line."
        )
    return log.lines


def _line(text: bytes) -> dict[str, Any] | None:
    """Parse a line of metrics; ``None`` if it is not one."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return dict(line) if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _longest_rising(steps: list[int]) -> list[int]:
    """Indices of the longest increasing subsequence. Lines that damage has misplaced are not in it."""
    ends: list[int] = []  # ends[k]: the index of the smallest last element of an increasing sequence of length k + 1
    before: list[int] = []
    for place, step in enumerate(steps):
        length = bisect_left(ends, step, key=steps.__getitem__)
        before.append(ends[length - 1] if length else -1)
        ends[length : length + 1] = [place]
    rising: list[int] = []
    place = ends[-1] if ends else -1
    while place >= 0:
        rising.append(place)
        place = before[place]
    return rising[::-1]


def _listed(numbers: list[int]) -> str:
    """Format numbers as ``3, 12 to 19``; only the first ones if there are many."""
    groups = [[n for _, n in group] for _, group in itertools.groupby(enumerate(numbers), lambda at: at[1] - at[0])]
    names = [str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups]
    return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)


def _free_name(path: Path, kind: str) -> Path:
    """An unused name for a copy of a file."""
    names = itertools.chain([f"{path.name}.{kind}"], (f"{path.name}.{kind}-{n}" for n in itertools.count(2)))
    return next(copy for name in names if not (copy := path.with_name(name)).exists())


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


def _first_of(differences: list[str]) -> str:
    """The differences, or the first of many: a run of another kind differs in almost all settings."""
    left_out = len(differences) - MANY
    return "; ".join(differences if left_out <= 0 else [*differences[:MANY], f"and {left_out} more"])


def _differences(there: Any, here: Any, free: Collection[str], place: str = "") -> Iterator[str]:
    if place in free:
        return
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            yield from _differences(there.get(key), here.get(key), free, f"{place}.{key}" if place else key)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (a, b) in enumerate(zip(there, here, strict=True)):
            yield from _differences(a, b, free, f"{place}[{number}]")
    elif there != there and here != here:
        return  # NaN in both
    elif there != here or isinstance(there, bool) != isinstance(here, bool):
        yield f"{place} is {_text(there)} there and {_text(here)} here"


def _changed_data(differences: list[str]) -> str | None:
    """Which entries say that the data have changed, if nothing else but what follows from it has."""
    matches = [OF_DATA.match(each) for each in differences]
    if not all(matches):
        return None
    return ", ".join(match["digest"] for match in matches if match is not None and match["digest"]) or None


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


def _check_files(path: Path) -> None:
    """Refuse to write if anything but a file has the name of one of the files."""
    for name, links in ((".lock", False), ("config.json", True), ("metrics.jsonl", True)):
        file = path / name
        if os.path.lexists(file) and not (file.is_file() and (links or not file.is_symlink())):
            kind = "a link" if file.is_symlink() else "a folder" if file.is_dir() else "not a regular file"
            raise ValueError(f"{file} is {kind}, where a run keeps a file of its own. Move it away.")
