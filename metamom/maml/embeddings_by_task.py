"""Lookups that agree with a loop over tasks under `torch.func.vmap`.

vmap concatenates the tables of all tasks, so an index beyond one table would read from the next task's. It also passes
``padding_idx`` on unchanged, so the padding row is left out of the first task's gradient only. If all tasks share one
table, ``scale_grad_by_freq`` counts over all tasks. Both options affect only the derivative: the lookup is done without
them, and they are applied to its result. One-hot vectors of indices outside the classes would be all zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding`. Gradients are dense even with ``sparse=True``."""
    input = within(input, weight.shape[0])
    found = F.embedding(input, weight, None, max_norm, norm_type)
    if scale_grad_by_freq:
        flat = input.flatten()
        counts = (flat.unsqueeze(0) == flat.unsqueeze(1)).sum(1).reshape(input.shape)
        found = _ScaledGradient.apply(found, counts.unsqueeze(-1))  # type: ignore[no-untyped-call]
    if padding_idx is not None:
        is_padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
        found = torch.where(is_padding, found.detach(), found)
    return found


def table_lookup(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """`torch.embedding`, which `torch.nn.functional.embedding` calls, and which exported models call directly."""
    padding = None if padding_idx < 0 else padding_idx
    return embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    """`torch.nn.functional.one_hot`."""
    return F.one_hot(index if num_classes < 0 else within(index, num_classes), num_classes)


def within(index: Tensor, n: int) -> Tensor:
    """Return ``index`` if all of it is in 0..n-1. The check is a lookup, so that it also works in compiled graphs.

    Raises:
        RuntimeError: from torch, as in a loop over the tasks, for an index out of range.
    """
    numbers = torch.arange(n, dtype=index.dtype, device=index.device)
    return numbers.gather(0, index.long().flatten()).reshape(index.shape)


class _ScaledGradient(Function):
    """The identity, with its gradient divided by counts. As in PyTorch, this gradient's own derivative is not."""

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
