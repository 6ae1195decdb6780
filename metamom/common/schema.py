"""Read records from untrusted files: JSON checked against the types of a dataclass."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

LARGEST = 64 << 20  # limit for a file of settings, in bytes; real ones have a few thousand

T = TypeVar("T")


def read_record(kind: type[T], path: Path) -> T:
    """Read a record from a JSON file.

    Args:
        kind: a dataclass with type hints; unknown fields in the file are ignored.
        path: of a regular file.

    Raises:
        ValueError: naming the first field of the wrong type, or saying why the file cannot be read.
        OSError: if the file cannot be opened.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read.")
    record: T = _checked(kind, path.read_bytes(), str(path))
    return record


def as_record(kind: type[T], value: Any, what: str) -> T:
    """Convert a JSON value to a record.

    Args:
        kind: a dataclass with type hints; unknown fields of the value are ignored.
        value: nested JSON values.
        what: what they are, for the error.

    Raises:
        ValueError: naming the first field of the wrong type.
    """
    record: T = _checked(kind, json.dumps(value), what)
    return record


def _checked(kind: Any, text: str | bytes, what: str) -> Any:
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = errors[0]
        why = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("json_invalid", "value_error"):  # not JSON; or fields valid, but not together
            raise ValueError(f"{what}: {why.removesuffix('.')}.") from error
        same = [e for e in errors if e["loc"][:1] == first["loc"][:1]]  # one error for each type that the field allows
        place = ".".join(map(str, first["loc"][: -1 if len(same) > 1 else None]))
        if first["type"] == "missing":
            raise ValueError(f"{what}: {place} is missing.") from error
        wanted = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in same))
        got = repr(first["input"])
        raise ValueError(
            f"{what}: {place or 'the whole'} should be {wanted}; got {got if len(got) <= 80 else got[:80] + '...'}."
        ) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
