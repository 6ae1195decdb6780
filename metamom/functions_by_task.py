"""Functions that `torch.func.vmap`, or second derivatives, do not take as they are, done so as to agree with a loop.

Embeddings: vmap lays the tables of all tasks end to end, so that a number beyond a table would be looked up in the next
task's; and it hands ``padding_idx`` on as it is, so the padding row is left out of the first task's gradient alone.
Where all tasks share one table, ``scale_grad_by_freq`` counts over all of them. Both are options of the derivative: the
lookup is done without them, and they are applied to its result. One-hot vectors of numbers that are none of the classes
would be all zeros.

Attention: the fused kernels have no second derivative, nor the one for CPUs a rule for vmap, so it is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class FunctionsByTask(TorchFunctionMode):
    """Replaces calls of these functions within a model.

    Attributes:
        seen: whether a call has been replaced.
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
        other = _OTHERS.get(func)
        if other is None:
            return func(*args, **(kwargs or {}))
        self.seen = True
        return other(*args, **(kwargs or {}))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding`; gradients are dense whatever ``sparse`` says."""
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


def one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    """`torch.nn.functional.one_hot`."""
    return F.one_hot(index if num_classes < 0 else within(index, num_classes), num_classes)


def within(index: Tensor, n: int) -> Tensor:
    """The same whole numbers, which must be in 0..n-1: a lookup that fails as a loop's would, and in compiled graphs.

    Raises:
        RuntimeError: by torch, for others.
    """
    numbers = torch.arange(n, dtype=index.dtype, device=index.device)
    return numbers.gather(0, index.long().flatten()).reshape(index.shape)


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
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def multi_head_attention(*args: Any, need_weights: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, which writes attention out where weights are wanted."""
    out, weights = F.multi_head_attention_forward(*args, need_weights=True, **kwargs)  # type: ignore[misc]
    return out, weights if need_weights else None


_OTHERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: embedding,
    F.one_hot: one_hot,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
}


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


def may_call_them(model: nn.Module) -> bool:
    """Whether the model has modules that call one of these functions."""
    return any(isinstance(module, (nn.Embedding, nn.MultiheadAttention)) for module in model.modules())
