"""Flags from a file: ``--config``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from metamom.cli.flags import flagged
from metamom.cli.parser import Parser
from metamom.common.did_you_mean import did_you_mean
from metamom.common.flag_types import Listed
from metamom.common.numbers import shown
from metamom.common.options import declared
from metamom.experiments.options import RecipeOptions

LARGEST = 1 << 20  # bytes
NAMES_OF_A_COMPARISON = {"validation_tasks": "evaluate_tasks", "test_tasks": "tasks"}
OF_MOMENTUM = {"beta", "first_step", "normalize"}


def read_flags(leaf: Parser, file: str) -> dict[str, Any]:
    """The values of a command's flags in a file: by name, or in the ``config.json`` of a run.

    Args:
        leaf: the parser of the command.
        file: its name; ``.json`` is read as JSON, any other as YAML.

    Returns:
        Values by the name that argparse keeps them under. ``null`` leaves a flag at its default.

    Raises:
        ValueError: in one line, for a file that cannot be read, an unknown name, or a value of the wrong type.
        OSError: if the file cannot be opened.
    """
    flags = {each.dest: each for each in leaf._actions if each.dest not in ("help", "config")}
    named = {flag.lstrip("-").replace("-", "_"): dest for dest, each in flags.items() for flag in each.option_strings}
    content = _read(Path(file))
    if isinstance(content.get("settings"), dict):
        content = _of_run(content, set(flags))
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = named.get(name, name)
        if name == "task" and leaf.get_default("task") is not None:
            if value != leaf.get_default("task"):
                raise ValueError(f"{file} is for task {shown(str(value))}; got the command {leaf.prog}")
            continue
        if name not in flags:
            near = did_you_mean([name], [each.replace("_", "-") for each in flags])
            raise ValueError(f"{file}: unknown flag {shown(str(key))}{near}")
        if name in values:
            raise ValueError(f"{file}: {shown(str(key))} is given twice")
        try:
            values[name] = _value(flags[name], value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{file}: {key}: {error}") from None
    return {name: value for name, value in values.items() if value is not None}


def _read(file: Path) -> dict[Any, Any]:
    """The names and values in a file."""
    if not file.exists():
        raise ValueError(f"there is no file {file}")
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; a file of flags has at most {LARGEST:,}")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else _yaml(text)
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if content is None:  # an empty file
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{file}: wanted flags by name, such as lr: 0.1; got {_kind(content)}")
    return content


def _yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        # anchors can make a small file huge
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("aliases (*name) are not allowed")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(
            f"not YAML: {getattr(error, 'problem', None) or 'a character that YAML does not allow'}{where}"
        ) from None


def _of_run(content: dict[Any, Any], known: set[str]) -> dict[str, Any]:
    """The flags that repeat a run: its settings and its length."""
    settings, length = dict(content["settings"]), content.get("length")
    options = flagged()
    if isinstance(base := settings.pop("base", None), dict):
        own = {NAMES_OF_A_COMPARISON.get(name, name): value for name, value in settings.items()}
        replaced = {name for name, each in options.items() if "compare" not in each.flag.commands}
        settings = {name: value for name, value in base.items() if name not in replaced} | own
    elif isinstance(length, dict):
        settings = length | settings
    if isinstance(tracked := settings.get("track_bias"), list) and tracked:  # [every, draws]
        settings["track_bias"] = f"every={tracked[0]}"
    flagless = {each.name for each in declared(RecipeOptions) if each.option.flag is None} - {"task"}
    # a run records options that not every command has
    left_out = ({*options, "server"} - known) | flagless | {"processes"}
    if settings.get("optimizer", "momentum") != "momentum":
        left_out |= OF_MOMENTUM
    return {name: value for name, value in settings.items() if name not in left_out}


def _value(action: argparse.Action, value: Any) -> Any:
    """The value as the flag's own parser gives it; ``None`` for the default."""
    if value is None:
        return None
    if isinstance(value, bool):
        if action.nargs in (0, "?"):  # a flag that needs no value
            return action.const if value else None
        raise ValueError(f"wanted a value; got {str(value).lower()}")
    if action.nargs == 0:
        raise ValueError(f"wanted true or false; got {_kind(value)}")
    if isinstance(value, list):
        if not isinstance(action.type, Listed):
            raise ValueError("wanted one value; got a list")
        return action.type.of([_text(entry) for entry in value])
    text = _text(value)
    parsed = action.type(text) if callable(action.type) else text
    if action.choices is not None and parsed not in action.choices:
        choices = list(map(str, action.choices))
        raise ValueError(
            f"invalid choice: {shown(text)} (choose from {', '.join(choices)}){did_you_mean([text], choices)}"
        )
    return parsed


def _text(value: Any) -> str:
    """As it would stand on the command line."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"wanted a number or a word; got {_kind(value)}")
    return str(value)


def _kind(value: Any) -> str:
    if isinstance(value, int | float | str):
        return shown(str(value))
    names = {"dict": "a mapping", "list": "a list", "NoneType": "nothing"}
    kind = type(value).__name__
    return names.get(kind, f"a {kind}")
