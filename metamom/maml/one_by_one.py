"""Run a function task by task, for models and losses that `torch.func.vmap` cannot batch.

Legend: T tasks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Vectorize = Literal["auto", "vmap", "loop"]
WAYS: tuple[Vectorize, ...] = ("auto", "vmap", "loop")


def one_by_one(function: Callable[..., Any], tasks: int) -> Callable[..., Any]:
    """The function for T tasks: it is called with each task's slices, and its results are stacked.

    Args:
        function: of one task's tensors, or trees of tensors.
        tasks: T; every tensor that the result is called with is ``[T, ...]``.
    """

    def of_all(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        parts: list[Sequence[Any]] = [x.unbind(0) if isinstance(x, Tensor) else [x] * tasks for x in leaves]
        each = [function(*pytree.tree_unflatten([part[task] for part in parts], spec)) for task in range(tasks)]
        return pytree.tree_map(lambda *of_tasks: torch.stack(of_tasks), *each)

    return of_all


def buffers_of_pytorch(model: nn.Module) -> set[str]:
    """The names of the buffers that belong to PyTorch's own layers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if type(module).__module__.partition(".")[0] == "torch"
        for name, _ in module.named_buffers(recurse=False)
    }


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Keep recurrent layers on a GPU from cuDNN, which has no second derivatives of them."""
    if not any(isinstance(m, nn.RNNBase) and next(m.parameters()).is_cuda for m in model.modules()):
        yield
        return
    with torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def checkpoint_refused() -> Iterator[None]:
    """Refuse `torch.utils.checkpoint`, which runs a part of the model again when the task's weights are gone.

    Raises:
        ValueError: if it was called.
    """
    found: list[str] = []
    before = sys.getprofile()

    def look(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            found.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
    if found:
        raise ValueError(
            "torch.utils.checkpoint runs a part of the model again in the backward pass, which no longer has the "
            "tasks' weights. Remove checkpoint(); chunk_size= of the learner bounds the memory instead."
        )
