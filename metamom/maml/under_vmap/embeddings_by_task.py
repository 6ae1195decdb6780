"""Lookups that agree with a loop over tasks under `torch.func.vmap`.

vmap concatenates the tables of all tasks, so an index beyond one table would read from the next task's. It also passes
``padding_idx`` on unchanged, so the padding row is left out of the first task's gradient only. If all tasks share one
table, ``scale_grad_by_freq`` counts over all tasks. Both options affect only the derivative: the lookup is done without
them, and they are applied to its result. One-hot vectors of indices outside the classes would be all zeros.

Bags of embeddings do not have second derivatives in PyTorch, so they are written out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from metamom.maml.under_vmap.largest_norms import shortened


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
    found = F.embedding(input, weight)
    if max_norm is not None:
        found = shortened(input, weight, found, max_norm, norm_type)
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


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`torch.nn.functional.embedding_bag`. Gradients are dense, and have derivatives unless scaled by frequency."""
    fits = input.dim() == 1 if offsets is not None else input.dim() == 2
    if scale_grad_by_freq or not fits or mode not in ("sum", "mean", "max"):  # or torch's own error
        if max_norm is not None:
            raise ValueError(
                "bags of embeddings with max_norm are written out, and not with scale_grad_by_freq=True: leave out one "
                "of them."
            )
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )
    words = embedding(input, weight, padding_idx, max_norm, norm_type)  # [B, L, D] or [L, D]
    counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
    if per_sample_weights is not None:
        words = words * per_sample_weights.unsqueeze(-1)
    if offsets is not None:  # each bag sees all words, and counts its own
        place = torch.arange(input.shape[0], device=input.device)
        bag = (place.unsqueeze(1) >= (offsets[:-1] if include_last_offset else offsets)).sum(1) - 1
        bags = offsets.shape[0] - int(include_last_offset)
        counted = counted & (bag == torch.arange(bags, device=input.device).unsqueeze(1))
        words = words.unsqueeze(0)
    chosen = counted.unsqueeze(-1)
    if mode == "max":
        largest = torch.where(chosen, words, -math.inf).max(-2).values
        return torch.where(chosen.any(-2), largest, 0.0)
    total = torch.where(chosen, words, 0.0).sum(-2)
    return total if mode == "sum" else total / chosen.sum(-2).clamp(min=1)


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
