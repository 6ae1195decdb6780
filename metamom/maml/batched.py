"""`torch.func.vmap` over a leading axis of tasks, without most of its Python overhead.

Each meta-gradient enters vmap twice for the model and twice for the loss. PyTorch's own checks its arguments and walks
their structure five times, which for a small network takes as long as the network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch import vmap as of_torch
from torch.utils import _pytree as pytree

from metamom.compile.tracing import is_tracing

_OF_TORCH: Any = of_torch  # the module, not the function of that name
# PyTorch's own parts, which another version may not have; then its own vmap runs
_PARTS = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim")
_HAS_PARTS = hasattr(_OF_TORCH, "lazy_load_decompositions") and all(hasattr(functorch, name) for name in _PARTS)


def over_tasks(function: Callable[..., Any], randomness: str = "error") -> Callable[..., Any]:
    """The same as ``torch.func.vmap(function, randomness=randomness)``.

    Args:
        function: maps tensors, or structures of tensors, of one task to a tensor or a structure of tensors.
        randomness: as of `torch.func.vmap`.

    Example:
        >>> over_tasks(lambda weights, x: x @ weights["w"])({"w": torch.eye(2).expand(3, 2, 2)}, torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    return partial(_over_tasks, function, randomness)


def _over_tasks(function: Callable[..., Any], randomness: str, *args: Any) -> Any:
    leaves, form = pytree.tree_flatten(args)
    alike = leaves and all(isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == leaves[0].shape[0] for x in leaves)
    if is_tracing() or not alike or not _HAS_PARTS:  # torch's own is traced, and raises its errors
        return torch.func.vmap(function, randomness=randomness)(*args)
    _OF_TORCH.lazy_load_decompositions()
    tasks = leaves[0].shape[0]
    level = functorch._vmap_increment_nesting(tasks, randomness)
    try:
        out = function(*pytree.tree_unflatten([functorch._add_batch_dim(x, 0, level) for x in leaves], form))
        if isinstance(out, Tensor):
            return functorch._remove_batch_dim(out, level, tasks, 0)
        found, form = pytree.tree_flatten(out)
        if not all(isinstance(x, Tensor) for x in found):
            kinds = sorted({type(x).__name__ for x in found if not isinstance(x, Tensor)})
            raise ValueError(f"vmap over the tasks needs tensors as results; got {', '.join(kinds)}.")
        return pytree.tree_unflatten([functorch._remove_batch_dim(x, level, tasks, 0) for x in found], form)
    finally:
        functorch._vmap_decrement_nesting()
