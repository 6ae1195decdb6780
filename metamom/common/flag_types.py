"""Types of flag values: numbers within bounds, lists of them, names, paths.

The library checks lower bounds, and its errors say what to do. A flag only refuses what must be a mistake.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from metamom.common.checks import AT_ONCE, INNER_STEPS, MOST, POINTS, RUNS
from metamom.common.choices import METRICS
from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import real, shown, whole

ENTRIES = 100  # the longest list

T = TypeVar("T")


def count(most: int, least: int | None = None) -> Callable[[str], int]:
    """A whole number up to ``most``. Pass ``least`` if the library does not check it."""

    def parse(text: str) -> int:
        value = _or_argument_error(whole, text)
        if least is not None and not least <= value <= most:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {least:,} to {most:,}; got {shown(text)}")
        if abs(value) > most:
            raise argparse.ArgumentTypeError(f"wanted a whole number of at most {most:,}; got {shown(text)}")
        return value

    return parse


long_count = count(MOST)  # for sequential things: iterations, epochs
task_count = count(AT_ONCE)
point_count = count(POINTS)
step_count = count(INNER_STEPS)
run_count = count(RUNS)


def number(text: str) -> float:
    """A finite number."""
    return _or_argument_error(real, text)


def seed(text: str) -> int:
    """A whole number of any size."""
    return _or_argument_error(whole, text)


@dataclass(frozen=True)
class Listed(Generic[T]):
    """Values separated by commas.

    Attributes:
        each: parses one of them.
        what: they are, for the error.
    """

    each: Callable[[str], T]
    what: str

    def __call__(self, text: str) -> tuple[T, ...]:
        return self.of([entry.strip(" ") for entry in text.split(",")])

    def of(self, entries: list[str]) -> tuple[T, ...]:
        """Of those that are split already."""
        if not entries or not all(entries):
            raise argparse.ArgumentTypeError(f"wanted {self.what}; got {shown(','.join(entries))}")
        if len(entries) > ENTRIES:
            raise argparse.ArgumentTypeError(f"wanted at most {ENTRIES} of them; got {len(entries)}")
        return tuple(map(self.each, entries))


def counts(each: Callable[[str], int]) -> Listed[int]:
    """Whole numbers separated by commas."""
    return Listed(each, "whole numbers with commas between, such as 0,1,5")


numbers = Listed(number, "numbers with commas between, such as 1,0.1")
names = Listed(str, "names with commas between")


def path(text: str) -> str:
    """The path of a file or folder."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"wanted a path in UTF-8; got {shown(text)}") from None
    if not text:
        raise argparse.ArgumentTypeError("wanted a path; got ''")
    return text


def folder(text: str) -> Path:
    """The path of a folder to write to."""
    return Path(path(text))


def module_callable(text: str) -> str:
    """The name of a callable in a module, which is imported later: see `metamom.common.named_objects`."""
    module, colon, attribute = text.partition(":")
    if not (colon and all(part.isidentifier() for name in (module, attribute) for part in name.split("."))):
        raise argparse.ArgumentTypeError(f"wanted PACKAGE.MODULE:CALLABLE, such as my_models:Net; got {shown(text)}")
    return text


def metric(text: str) -> str:
    """The name of a metric, or of a callable in a module."""
    if text in METRICS or ":" in text:
        return text if text in METRICS else module_callable(text)
    raise argparse.ArgumentTypeError(
        f"wanted {', '.join(METRICS)}, or PACKAGE.MODULE:CALLABLE; got {shown(text)}{did_you_mean([text], METRICS)}"
    )


def count_or_auto(text: str) -> int | str:
    """A number of tasks, or ``auto``."""
    if text == "auto":
        return text
    try:
        return task_count(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"wanted a number of tasks, or auto: {error}") from None


def auto(flag: str) -> Callable[[str], str]:
    """Only ``auto``, for a flag that may also stand alone."""

    def parse(text: str) -> str:
        if text != "auto":
            raise argparse.ArgumentTypeError(f"wanted auto, or nothing after {flag}; got {shown(text)}")
        return text

    return parse


def every(text: str) -> int:
    """N of ``every=N``."""
    name, _, number = text.partition("=")
    if name != "every" or long_count(number) < 1:
        raise argparse.ArgumentTypeError(f"wanted every=N with N iterations >= 1, such as every=200; got {shown(text)}")
    return long_count(number)


def _or_argument_error(parse: Callable[[str], T], text: str) -> T:
    """Raise parse errors as ArgumentTypeError, since argparse hides the message of a ValueError."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from None
