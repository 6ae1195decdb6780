"""Replacements for attributes of a tensor that `torch.func.vmap` does not know, and for its hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from metamom.compile.tracing import is_tracing
from metamom.maml.vmap_errors import VmapError
from metamom.nets.aliases import CURRENT

REQUIRES_GRAD: Callable[..., Any] = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
IS_LEAF: Callable[..., Any] = torch.Tensor.is_leaf.__get__  # type: ignore[attr-defined]
GRAD_FN: Callable[..., Any] = torch.Tensor.grad_fn.__get__  # type: ignore[union-attr]
DATA: Callable[..., Any] = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def requires_grad(tensor: Tensor, *kind: Any) -> bool:
    """`torch.Tensor.requires_grad`, which vmap hides and a model's forward may depend on.

    PyTorch's own code gets vmap's answer: if it were true, that code would use features that such tensors do not have.
    """
    if _asking(sys._getframe(1)).partition(".")[0] == "torch":
        return tensor.requires_grad
    return _of_all_tasks(tensor).requires_grad


def is_leaf(tensor: Tensor, *kind: Any) -> bool:
    """`torch.Tensor.is_leaf`, which is true of all tensors under vmap."""
    return _of_all_tasks(tensor).is_leaf


def _of_all_tasks(tensor: Tensor) -> Tensor:
    """A tensor under vmap with all tasks, to ask for what it knows of its graph; others as they are."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def data(tensor: Tensor, *kind: Any) -> Tensor:
    """`torch.Tensor.data`, which tensors under vmap do not have: of a model's, a copy to read.

    Raises:
        VmapError: in inference mode, where changes in place of the copy cannot be noticed.
    """
    if not torch._C._functorch.is_batchedtensor(tensor):
        return tensor.data
    aliases = CURRENT.get()
    if aliases is None:  # of predictions and targets, in a loss
        return tensor.detach()
    if tensor.is_inference():
        raise VmapError(
            "the forward reads .data, which tensors do not have if all tasks are computed at once. Call .detach().",
            gist="its forward reads .data",
        )
    copy = tensor.detach().clone()
    aliases.copied(tensor, copy)
    return copy


def grad_fn(tensor: Tensor, *kind: Any) -> Any:
    """`torch.Tensor.grad_fn`, which tensors under vmap do not have.

    Raises:
        VmapError: under vmap, for a model or its hooks; PyTorch also reads it to print a tensor.
    """
    asking = _asking(sys._getframe(1))
    reads = asking.partition(".")[0] != "torch" or asking == "torch.autograd.graph"
    if reads and torch._C._functorch.is_batchedtensor(tensor):
        raise VmapError(
            "the forward reads the grad_fn of a tensor or registers a hook on it, which is not possible under "
            "torch.func.vmap: all tasks are computed at once. To change a gradient, use a torch.autograd.Function.",
            gist="its forward reads the grad_fn of a tensor",
        )
    return tensor.grad_fn


def _asking(frame: FrameType | None) -> str:
    """The name of the module whose code called a function in ``frame``, past the frames of nested modes."""
    while frame is not None and (frame.f_code.co_name == "__torch_function__" or _is_of_mode(frame)):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def _is_of_mode(frame: FrameType) -> bool:
    """Whether a frame belongs to `metamom.maml.under_vmap.functions_by_task`, which calls these replacements."""
    return frame.f_globals.get("__name__") == "metamom.maml.under_vmap.functions_by_task"


def register_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
    """`torch.Tensor.register_hook`, which tensors under vmap do not support.

    Raises:
        VmapError: under vmap, with what to do instead.
        ValueError: in a graph that is compiled, where a hook would run while it is traced only.
    """
    if is_tracing():
        raise ValueError(
            "the forward registers a hook on a tensor, which does not run in a compiled meta-gradient. Remove it, or "
            "run without compiling."
        )
    if not torch._C._functorch.is_batchedtensor(tensor):
        return tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    raise VmapError(
        "the forward registers a hook on a tensor, which does not run under torch.func.vmap: all tasks are computed at "
        "once. To change a gradient, use a torch.autograd.Function; hooks on the model's parameters do run.",
        gist="its forward registers a hook on a tensor",
    )


def retain_grad(tensor: Tensor) -> None:
    """`torch.Tensor.retain_grad`. It does nothing for tensors under vmap, since they do not outlive the call."""
    if not torch._C._functorch.is_batchedtensor(tensor):
        tensor.retain_grad()
