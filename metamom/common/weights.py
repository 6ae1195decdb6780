"""Compare weights by name and shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from metamom.common.kinds import named_type

MOST = 6  # names of one kind in an error


def differences(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """How the names and shapes of two sets of tensors differ, as parts of a sentence; none if they agree.

    Args:
        wanted: those of the model.
        given: those of a file or checkpoint.

    Example:
        >>> import torch
        >>> differences({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(4), "c": torch.ones(1)})
        ['missing: b [3]', 'unexpected: c [1]', 'of other shapes: a [4] for [2]']
    """
    missing = [f"{name} {_shape(x)}" for name, x in wanted.items() if name not in given]
    unexpected = [f"{name} {_shape(x)}" for name, x in given.items() if name not in wanted]
    both = [name for name in wanted if name in given]
    shapes = [
        f"{name} {_shape(given[name])} for {_shape(wanted[name])}"
        for name in both
        if _shape(wanted[name]) != _shape(given[name])
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of other shapes", shapes))
    return [f"{kind}: {_listed(names)}" for kind, names in kinds if names]


def _shape(x: Any) -> str:
    return str(list(x.shape)) if hasattr(x, "shape") else named_type(x)


def _listed(names: Collection[str]) -> str:
    return ", ".join(list(names)[:MOST]) + f" and {len(names) - MOST} more" * (len(names) > MOST)
