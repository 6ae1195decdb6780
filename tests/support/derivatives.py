"""Drawn tensors, and all derivatives of a function up to the third along fixed directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivatives(run: Callable[..., Tensor], args: Sequence[Tensor]) -> list[Tensor]:
    """The value, all first derivatives along a fixed cotangent, and all derivatives of those along another."""
    own = [x.detach().clone().requires_grad_() for x in args]
    out = run(*own)
    cotangent = draw(*out.shape, seed=50).requires_grad_()
    first = torch.autograd.grad(out, own, cotangent, create_graph=True)
    along = [draw(*x.shape, seed=60 + i) for i, x in enumerate(first)]
    total = sum((g * v).sum() for g, v in zip(first, along, strict=True) if g.requires_grad)
    second = torch.autograd.grad(total, [*own, cotangent], materialize_grads=True, create_graph=True)
    third = torch.autograd.grad(sum((x**2).sum() for x in second), own, materialize_grads=True)
    return [out, *first, *second, *third]
