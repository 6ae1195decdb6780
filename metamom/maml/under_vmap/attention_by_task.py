"""Attention, written out.

The fused kernels do not have a second derivative, and the CPU kernel does not have a vmap rule.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.nets.linear import linear


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, written out."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    if attn_mask is not None:  # a query with every key masked gets zeros
        blind = (scores == float("-inf")).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    else:
        weights = scores.softmax(-1)
    return F.dropout(weights, dropout_p) @ value


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found = linear(input, weight, bias)
    return F.linear(input, weight, bias) if found is None else found


def _with(function: Callable[..., Any], **names: Any) -> FunctionType:
    """A copy of a function of `torch.nn.functional` that finds other objects under these names."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__, {**vars(F), **names}, argdefs=function.__defaults__)


# `torch.nn.functional.multi_head_attention_forward`, with the attention above in place of the fused one. Its check for
# overrides (`__torch_function__`) has already run.
multi_head_attention = _with(
    F.multi_head_attention_forward,
    scaled_dot_product_attention=attention,
    has_torch_function=lambda tensors: False,
    linear=_linear,
    **{name: _with(getattr(F, name), linear=_linear) for name in ("_in_projection", "_in_projection_packed")},
)
