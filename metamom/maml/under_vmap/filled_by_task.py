"""Tensors that all tasks share under `torch.func.vmap`, as one for each task, so that each can have its own draws.

Legend: T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from metamom.compile.tracing import is_tracing

_C: Any = functorch
_PARTS = ("TransformType", "peek_interpreter_stack", "_add_batch_dim", "is_functorch_wrapped_tensor")
_HAS_PARTS = all(hasattr(functorch, name) for name in _PARTS)  # another version of PyTorch may not
_KINDS = ("empty", "zeros", "ones", "full")
_METHODS = ("new", *(f"new_{kind}" for kind in _KINDS))
# functions that make a tensor like another one, to be filled, as the distributions of PyTorch use them
NEW: frozenset[Callable[..., Any]] = frozenset(
    [getattr(torch, f"{kind}_like") for kind in _KINDS] + [getattr(torch.Tensor, name) for name in _METHODS]
)


def of_each_task(tensor: Any, tasks: int) -> Any:
    """Numbers that the tasks share, as a tensor for each task; others, and all outside of vmap, as they are.

    Args:
        tensor: of one task, ``[...]``.
        tasks: T.

    Example:
        >>> draw = lambda x: x + of_each_task(torch.empty(2), 3).normal_()
        >>> noise = torch.func.vmap(draw, randomness="different")(torch.zeros(3, 2))
        >>> len(noise.unique())
        6
    """
    level = _level()
    if level is None or not isinstance(tensor, Tensor) or _C.is_functorch_wrapped_tensor(tensor):
        return tensor
    if not tensor.is_floating_point():  # such as masks and indices, which vmap takes from all tasks together only
        return tensor
    return _C._add_batch_dim(tensor.unsqueeze(0).repeat(tasks, *[1] * tensor.dim()), 0, level)


def of_all_tasks(args: tuple[Any, ...], tasks: int) -> tuple[Any, ...]:
    """The arguments of a function that draws, where several tensors have different axes of tasks.

    Under vmap, PyTorch expands one of the tensors of `torch.normal` and `torch.binomial` at most.

    Args:
        args: tensors of one task, and others.
        tasks: T.
    """
    if sum(isinstance(arg, Tensor) for arg in args) < 2:
        return args
    return tuple(of_each_task(arg, tasks) for arg in args)


def _level() -> int | None:
    """The level of the vmap that runs; ``None`` if none runs, or something else inside of it."""
    if not _HAS_PARTS or is_tracing():
        return None
    layer = _C.peek_interpreter_stack()
    if layer is None or layer.key() != _C.TransformType.Vmap:
        return None
    level: int = layer.level()
    return level
