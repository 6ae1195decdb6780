"""Declare an option once, as a field of a dataclass: its default, range and flag, and its place in a run's record.

    @dataclass(frozen=True)
    class Options:
        iterations: int = option(check=whole(1, MOST), record="length", flag=Flag("run", "total number"))

The flags and their help, the range checks, ``config.json`` and the comparison between processes are derived from these
fields. Importing this module does not import torch, which keeps the help of the command fast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, TypeAlias

from metamom.common.checks import check_flag, check_whole

Check: TypeAlias = Callable[[str, Any], Any]
Text: TypeAlias = str | Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Flag:
    """The command-line flag of an option. An option whose default is ``False`` takes no value, unless one is described.

    Attributes:
        group: of the help.
        meaning: its help, without the default. This and ``shows`` may be functions of the task.
        shows: the default in the help. If ``None``, it is the option's default, or the task's if that is ``None``. A
            function returns ``None`` for a task that lacks the option.
        default: of the commands, if it differs from the option's.
        type: parses the value.
        choices: the accepted values.
        metavar: the value in the help.
        bare: the value of a flag that is given without one; if ``None``, it needs one.
        commands: the commands that have it.
        before: the flag that follows it in the help, if that is not in the order of the fields.
        switch: whether it takes no value although the option's default is ``None``.
        name: of the flag, such as ``learner``, if it is not the option's.
    """

    group: str
    meaning: Text
    shows: str | Callable[[str], str | None] | None = None
    default: Any = None
    type: Callable[[str], Any] | None = None
    choices: Collection[str] | None = None
    metavar: str | None = None
    bare: Any = None
    commands: Collection[str] = ("train", "compare")
    before: str | None = None
    switch: bool = False
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Option:
    """What is declared of an option besides its type and default.

    Attributes:
        flag: its flag; ``None`` if only Python code can set it.
        check: takes the option's name and value, refuses a value out of range, and returns it as a plain Python value.
        record: where ``config.json`` has it: in the ``"settings"``, which a resumed run must share, or in the
            ``"length"``, which may change. Processes that train together must agree on both.
        as_json: converts the value for the record.
        compared: what processes must agree on instead, as a function of all options.
        later: earlier versions do not have it; a record without it has the default.
        free: only affects where and how a run is computed, so it may change on resume.
        own: only the task families that list the option among their own have it.
    """

    flag: Flag | None = None
    check: Check | None = None
    record: Literal["settings", "length"] | None = None
    as_json: Callable[[Any], Any] | None = None
    compared: Callable[[Any], Any] | None = None
    later: bool = False
    free: bool = False
    own: bool = False


def option(default: Any = dataclasses.MISSING, **declared: Any) -> Any:
    """A dataclass field; ``declared`` are the attributes of its `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(**declared)})


@dataclasses.dataclass(frozen=True)
class Declared:
    """An option of a dataclass: its name, its default (``dataclasses.MISSING`` for none), and its `Option`."""

    name: str
    default: Any
    option: Option


def declared(kind: Any) -> Iterator[Declared]:
    """The options of a dataclass, or of an instance, in the order of its fields."""
    for each in dataclasses.fields(kind):
        yield Declared(each.name, each.default, each.metadata.get("option", Option()))


def whole(least: float = -math.inf, most: float = math.inf) -> Check:
    """A whole number, checked by `metamom.common.checks.check_whole`."""
    return lambda name, value: check_whole(name, value, least, most)


def either(name: str, value: Any) -> bool:
    """``True`` or ``False``, checked by `metamom.common.checks.check_flag`."""
    return check_flag(name, value)
