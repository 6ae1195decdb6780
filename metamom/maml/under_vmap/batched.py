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
_C: Any = functorch
# PyTorch's own parts, which another version may not have; then its own vmap runs
_PARTS = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim")
_HAS_PARTS = hasattr(_OF_TORCH, "lazy_load_decompositions") and all(hasattr(functorch, name) for name in _PARTS)
# the same for calls outside of vmap
_LAYERS = (
    "TransformType",
    "peek_interpreter_stack",
    "pop_dynamic_layer_stack",
    "push_dynamic_layer_stack",
    "maybe_get_level",
    "is_functorch_wrapped_tensor",
    "_unwrap_batched",
    "_add_batch_dim",
)
_HAS_LAYERS = all(hasattr(functorch, name) for name in _LAYERS)
_loaded = False  # whether PyTorch has registered the decompositions that vmap uses


class _UnusualError(Exception):
    """Arguments or results that are not tensors of all tasks in dicts, tuples and lists."""


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


def of_lone_task(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same as `over_tasks` where there is one task, in one call without vmap, as far as PyTorch's functions agree.

    Example:
        >>> of_lone_task(lambda weights, x: x @ weights["w"])({"w": torch.ones(1, 2, 2)}, torch.ones(1, 3, 2)).shape
        torch.Size([1, 3, 2])
    """

    def run(*args: Any) -> Tensor:
        return function(*_each(lambda x: x.squeeze(0), args)).unsqueeze(0)

    return run


def on_all_tasks(function: Callable[..., Tensor], *batched: Tensor) -> Tensor | None:
    """Call a function on tensors of all tasks, inside of `over_tasks`, and return its result as each task's.

    Args:
        function: maps tensors ``[T, ...]`` to one ``[T, ...]``, outside of vmap, with derivatives.
        batched: tensors of one task, as a function under vmap sees them.

    Returns:
        The result of one task; ``None``, without a call, unless all of them are batched by the innermost vmap alone,
        along their first axis, and this version of PyTorch has what it takes.
    """
    if not _HAS_LAYERS or is_tracing():
        return None
    layer = _C.peek_interpreter_stack()
    if layer is None or layer.key() != _C.TransformType.Vmap:
        return None
    level, values = layer.level(), []
    for tensor in batched:
        if _C.maybe_get_level(tensor) != level:
            return None
        value, axis = _C._unwrap_batched(tensor, level)
        if axis != 0 or _C.is_functorch_wrapped_tensor(value):
            return None
        values.append(value)
    saved = _C.pop_dynamic_layer_stack()
    try:
        found = function(*values)
    finally:
        _C.push_dynamic_layer_stack(saved)
    result: Tensor = _C._add_batch_dim(found, 0, level)
    return result


def _over_tasks(function: Callable[..., Any], randomness: str, *args: Any) -> Any:
    global _loaded
    try:
        with torch._C.DisableTorchFunction():  # modes that watch the model would see each look at a shape
            tasks = None if is_tracing() or not _HAS_PARTS else _tasks(args, None)
    except _UnusualError:
        tasks = None
    if tasks is None:  # torch's own is traced, and raises its errors
        return torch.func.vmap(function, randomness=randomness)(*args)
    if not _loaded:
        _OF_TORCH.lazy_load_decompositions()
        _loaded = True
    level = _C._vmap_increment_nesting(tasks, randomness)
    try:
        out = function(*_each(lambda x: _C._add_batch_dim(x, 0, level), args))
        if isinstance(out, Tensor):
            return _C._remove_batch_dim(out, level, tasks, 0)
        found, form = pytree.tree_flatten(out)
        if not all(isinstance(x, Tensor) for x in found):
            kinds = sorted({type(x).__name__ for x in found if not isinstance(x, Tensor)})
            raise ValueError(f"vmap over the tasks needs tensors as results; got {', '.join(kinds)}.")
        return pytree.tree_unflatten([_C._remove_batch_dim(x, level, tasks, 0) for x in found], form)
    finally:
        _C._vmap_decrement_nesting()


def _tasks(tree: Any, known: int | None) -> int | None:
    """T, the length of the first axis of all tensors in a tree; ``known`` if it has none.

    Raises:
        _UnusualError: for tensors of other lengths, and for leaves that are not tensors.
    """
    if isinstance(tree, Tensor):
        if tree.dim() == 0 or (known is not None and tree.shape[0] != known):
            raise _UnusualError
        return tree.shape[0]
    if type(tree) is dict:
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        for leaf in pytree.tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                raise _UnusualError
            known = _tasks(leaf, known)
        return known
    for part in tree:
        known = _tasks(part, known)
    return known


def _each(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is dict:
        return {key: _each(function, part) for key, part in tree.items()}
    if type(tree) is tuple:
        return tuple([_each(function, part) for part in tree])
    return pytree.tree_map_only(Tensor, function, tree)
