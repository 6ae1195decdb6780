"""Channels-last layouts of one task's images, which `torch.func.vmap` does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metamom.compile.tracing import is_tracing

DIMS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def in_layout(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function of PyTorch that takes ``memory_format=channels_last``, for a tensor of one task inside vmap.

    Args:
        func: such as `torch.Tensor.contiguous`, ``to``, ``clone``, ``is_contiguous`` or `torch.empty_like`.
        args: its arguments; the first is the tensor.
        kwargs: its keyword arguments.

    Returns:
        What it returns outside of vmap, in that layout; ``NotImplemented`` for a call that PyTorch can make.

    Example:
        >>> images = torch.ones(3, 2, 4, 5, 5)
        >>> call = lambda x: in_layout(torch.Tensor.contiguous, (x,), {"memory_format": torch.channels_last})
        >>> torch.func.vmap(call)(images).stride()
        (200, 100, 1, 20, 4)
        >>> in_layout(torch.Tensor.contiguous, (images[0],), {"memory_format": torch.channels_last})
        NotImplemented
    """
    dims = DIMS.get(kwargs.get("memory_format", torch.preserve_format))
    tensor = args[0] if args else kwargs.get("input")
    if dims is None or not isinstance(tensor, Tensor) or not torch._C._functorch.is_batchedtensor(tensor):
        return NotImplemented
    if func is torch.Tensor.is_contiguous:
        return tensor.dim() == dims and _last(tensor).is_contiguous()
    if tensor.dim() != dims:
        torch.empty(tensor.shape, memory_format=kwargs["memory_format"], device="meta")  # raises torch's own error
    others = {name: value for name, value in kwargs.items() if name != "memory_format"}
    if func in (torch.Tensor.contiguous, torch.clone, torch.Tensor.clone):
        same = func is torch.Tensor.contiguous and not is_tracing() and _last(tensor).is_contiguous()
        return tensor if same else _first(_last(tensor).clone(memory_format=torch.contiguous_format))
    found = func(*args, **others)
    return _first(_last(found).contiguous()) if isinstance(found, Tensor) and found.dim() == dims else found


def _last(images: Tensor) -> Tensor:
    """``[N, C, ...]`` to ``[N, ..., C]``."""
    return images.movedim(1, -1)


def _first(images: Tensor) -> Tensor:
    """``[N, ..., C]`` to ``[N, C, ...]``."""
    return images.movedim(-1, 1)
