"""Embeddings under `torch.func.vmap`, where a task's gradient must not depend on which tasks are computed with it.

vmap lays the tables of all tasks end to end, and hands ``padding_idx`` on as it is: the padding row is then left out
of the first task's gradient alone. Where all tasks share one table, ``scale_grad_by_freq`` counts over all of them.
Both are options of the derivative alone: here the lookup is done without them, and they are applied to its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class EmbeddingsByTask(TorchFunctionMode):
    """Looks embeddings up task by task.

    Attributes:
        seen: whether a lookup with such an option has been done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.embedding:
            return self._lookup(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _lookup(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        """`torch.nn.functional.embedding`; gradients are dense whatever ``sparse`` says."""
        found = F.embedding(input, weight, None, max_norm, norm_type)
        if padding_idx is None and not scale_grad_by_freq and not sparse:
            return found
        self.seen = True
        if scale_grad_by_freq:
            flat = input.flatten()
            counts = (flat.unsqueeze(0) == flat.unsqueeze(1)).sum(1).reshape(input.shape)
            found = _ScaledGradient.apply(found, counts.unsqueeze(-1))  # type: ignore[no-untyped-call]
        if padding_idx is not None:
            is_padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
            found = torch.where(is_padding, found.detach(), found)
        return found


class _ScaledGradient(Function):
    """Its input, with a gradient divided by counts, once: as PyTorch's, that gradient's derivative is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(found: Tensor, counts: Tensor) -> Tensor:
        return found.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (counts,), g = ctx.saved_tensors, cotangents[0]
        return g.detach() / counts + (g - g.detach()), None


def has_embeddings(model: nn.Module) -> bool:
    """Whether the model has an embedding among its modules."""
    return any(isinstance(module, nn.Embedding) for module in model.modules())
