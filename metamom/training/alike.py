"""Check whether a saved value can replace the current one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from metamom.common.kinds import named_type


def check_kind(mine: Tensor, saved: Tensor, place: str) -> None:
    """Check that both tensors are floating-point, complex, integer or boolean. Widths may differ."""
    if _kind(mine) != _kind(saved):
        raise ValueError(f"{place} should be of {mine.dtype}; got a tensor of {saved.dtype}")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def check_alike(mine: Any, saved: Any, place: str) -> None:
    """Refuse a saved value that differs from the current one in type, shape, keys or length.

    If the current value is unset, anything is accepted. Flags that an earlier version of torch lacked may be missing.
    """
    if mine is None or (isinstance(mine, bool) and (saved is None or isinstance(saved, bool))):
        return
    if is_number(mine):
        if not is_number(saved) or (_is_finite(mine) and not _is_finite(saved)):
            refuse(place, "a number", saved)
    elif isinstance(mine, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != mine.shape:
            refuse(place, f"a tensor of shape {tuple(mine.shape)}", saved)
    elif isinstance(mine, dict):
        if not isinstance(saved, dict):
            refuse(place, "a dict", saved)
        missing = [key for key, value in mine.items() if key not in saved and not isinstance(value, (bool, type(None)))]
        if missing:
            raise ValueError(f"{place} has no {', '.join(map(str, missing))}")
        for key in (key for key in mine if key in saved):
            check_alike(mine[key], saved[key], f"{place}.{key}")
    elif isinstance(mine, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(mine):
            refuse(place, f"{len(mine)} entries", saved)
        for i, (a, b) in enumerate(zip(mine, saved, strict=True)):
            check_alike(a, b, f"{place}[{i}]")
    elif type(saved) is not type(mine):
        refuse(place, named_type(mine), saved)


def same(mine: Any, saved: Any) -> bool:
    """Whether two values are equal. Numbers of Python and NumPy and tensors of one element compare as numbers."""
    if isinstance(mine, (list, tuple)) and isinstance(saved, (list, tuple)):
        return len(mine) == len(saved) and all(map(same, mine, saved))
    if isinstance(mine, Mapping) and isinstance(saved, Mapping):
        return mine.keys() == saved.keys() and all(same(value, saved[key]) for key, value in mine.items())
    if is_number(mine) and is_number(saved):
        return bool(mine == saved)
    if isinstance(mine, Tensor) and isinstance(saved, Tensor):
        return mine.shape == saved.shape and bool((mine == saved.to(mine.device)).all())
    return type(mine) is type(saved) and not isinstance(mine, Tensor) and bool(mine == saved)


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python or NumPy, or a 0-d tensor that holds one."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def refuse(place: str, wanted: str, got: Any) -> NoReturn:
    """Raise an error with the entry, the wanted value and the actual value."""
    raise ValueError(f"{place} should be {wanted}; got {short(got)}")


def short(value: Any) -> str:
    """A value for an error: numbers and text themselves, tensors by shape, others by type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length():,} bits"
    text = repr(value) if isinstance(value, (int, float, str, bytes, type(None))) else named_type(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
