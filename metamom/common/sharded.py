"""DTensors: tensors that lie on several processes."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor


def whole(x: Tensor) -> Tensor:
    """A DTensor's value on every process; any other tensor as it is."""
    return cast(Any, x).full_tensor() if is_sharded(x) else x


def local_part(x: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor as it is."""
    return cast(Any, x).to_local() if is_sharded(x) else x


def placed_as(x: Tensor, other: Tensor) -> Tensor:
    """A DTensor as it lies in another one of its shape; any other tensor as it is.

    Autograd may leave the gradient of a DTensor as partial sums, one on each process.
    """
    if not is_sharded(x) or cast(Any, x).placements == cast(Any, other).placements:
        return x
    return cast(Tensor, cast(Any, x).redistribute(placements=cast(Any, other).placements))


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, found without importing torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return bool(module is not None and isinstance(x, module.DTensor))
