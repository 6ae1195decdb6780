"""Replacements for functions that `torch.func.vmap` or second derivatives get wrong; they agree with a loop over tasks.

Embeddings: vmap concatenates the tables of all tasks, so an index beyond one table would read from the next task's.
It also passes ``padding_idx`` on unchanged, so the padding row is left out of the first task's gradient only. If all
tasks share one table, ``scale_grad_by_freq`` counts over all tasks. Both options affect only the derivative: the lookup
is done without them, and they are applied to its result. One-hot vectors of indices outside the classes would be all
zeros.

Others: the gradient of the source of `torch.select_scatter` is wrong. `torch.index_fill` uses one task's value for all
tasks if only the values differ between tasks. `torch.roll` of a single number rolls over the tasks. The derivative of
`torch.prelu` fails if the tasks share the input but not the slopes.

Losses: vmap does not support how torch checks the variances in `torch.nn.functional.gaussian_nll_loss`, or how it sums
the label weights in `torch.nn.functional.cross_entropy` with label smoothing.

Tensors under vmap report that they do not require a gradient, and do not accept hooks.

Attention: the fused kernels do not have a second derivative, and the CPU kernel does not have a vmap rule. So attention
is written out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from inspect import getattr_static
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import _reduction as _Reduction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metamom.compile.tracing import is_tracing


class FunctionsByTask(TorchFunctionMode):
    """Replaces calls of these functions inside a model.

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
        other = by_task(func)
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


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """`torch.select_scatter`."""
    if input.select(dim, index).shape != src.shape:
        return torch.select_scatter(input, src, dim, index)  # raises torch's own error
    index %= input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, index, index + 1)


def index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """`torch.index_fill`."""
    if not isinstance(value, Tensor) or value.dim() > 0:
        return torch.index_fill(input, dim, index, value)
    filled = torch.zeros_like(input, dtype=torch.bool).index_fill(dim, index, True)
    return torch.where(filled, value.to(input.dtype), input)


def roll(input: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """`torch.roll`."""
    return input.clone() if input.dim() == 0 and dims == () else torch.roll(input, shifts, dims)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.prelu`."""
    if weight.numel() != 1 and (input.dim() < 2 or input.shape[1] != weight.numel()):
        return torch.prelu(input, weight)  # raises torch's own error
    slopes = weight.reshape(-1, *[1] * (input.dim() - 2)) if input.dim() > 1 else weight.reshape(())
    return torch.where(input > 0, input, slopes * input)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`, written out.

    Raises:
        ValueError: for negative variances, and as torch's.
    """
    if not isinstance(var, Tensor):
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)
    var = _not_negative(var)
    if var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif input.dim() != var.dim() or sum(v for n, v in zip(input.shape, var.shape, strict=True) if n != v) != 1:
            raise ValueError(
                f"gaussian_nll_loss needs a variance for each prediction {list(input.shape)}, or that shape with an "
                f"axis of size 1; got {list(var.shape)}."
            )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"the reduction of gaussian_nll_loss must be none, mean or sum; got {reduction!r}.")
    var = torch.where(var < eps, var + (eps - var).detach(), var)  # torch clamps the value, not the derivative
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _not_negative(var: Tensor) -> Tensor:
    """Return the variances unchanged.

    Raises:
        ValueError: for negative ones (in a compiled graph, torch's RuntimeError).
    """
    negative = var < 0
    if is_tracing():
        return var + within(negative.long(), 1).to(var.dtype)
    while torch._C._functorch.is_functorch_wrapped_tensor(negative):
        negative = torch._C._functorch.get_unwrapped(negative)
    if negative.any():
        raise ValueError(
            "gaussian_nll_loss needs variances >= 0; got negative ones. Make them positive, for example by exp() or "
            "F.softplus() of the model's output."
        )
    return var


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`. A weighted mean is the weighted sum over the weights of counted labels."""
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    smoothed = weight is not None and label_smoothing > 0 and not target.is_floating_point()
    if weight is None or not smoothed or reduction != "mean":
        return F.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction=reduction, label_smoothing=label_smoothing
        )
    total = F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    counted = target != ignore_index
    weights = weight.gather(0, torch.where(counted, target, 0).flatten()).reshape(target.shape)
    return total / torch.where(counted, weights, 0.0).sum()


def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (recent PyTorch only), by way of `cross_entropy` above."""
    weight, smoothing = options.get("weight"), options.get("label_smoothing", 0.0)
    if weight is None or smoothing == 0 or options.get("reduction", "mean") != "mean" or target.is_floating_point():
        loss: Tensor = F.linear_cross_entropy(input, linear_weight, target, **options)
        return loss
    scores = F.linear(input, linear_weight, options.get("linear_bias"))
    ignored = options.get("ignore_index")
    return cross_entropy(
        scores.reshape(-1, scores.shape[-1]),
        target.reshape(-1),
        weight,
        ignore_index=-100 if ignored is None else ignored,
        label_smoothing=smoothing,
    )


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


# `torch.nn.functional.multi_head_attention_forward`, with the attention above in place of the fused one. Its check for
# overrides (`__torch_function__`) has already run.
multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "scaled_dot_product_attention": attention, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


REQUIRES_GRAD: Callable[..., Any] = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def requires_grad(tensor: Tensor, *kind: Any) -> bool:
    """`torch.Tensor.requires_grad`, which vmap hides and a model's forward may depend on.

    PyTorch's own code gets vmap's answer: if it were true, that code would use features that such tensors do not have.
    """
    asking: FrameType | None = sys._getframe(1)
    while asking is not None and asking.f_code.co_name == "__torch_function__":  # skip the frames of nested modes
        asking = asking.f_back
    if asking is not None and str(asking.f_globals.get("__name__")).partition(".")[0] == "torch":
        return tensor.requires_grad
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def register_hook(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
    """`torch.Tensor.register_hook`, which tensors under vmap do not support.

    Raises:
        ValueError: with what to do instead.
    """
    if not torch._C._functorch.is_batchedtensor(tensor):
        return tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    raise ValueError(
        "the forward registers a hook on a tensor, which does not run under MAML: all tasks are computed at once. To "
        "change a gradient, use a torch.autograd.Function; hooks on the model's parameters do run."
    )


def retain_grad(tensor: Tensor) -> None:
    """`torch.Tensor.retain_grad`. It does nothing for tensors under vmap, since they do not outlive the call."""
    if not torch._C._functorch.is_batchedtensor(tensor):
        tensor.retain_grad()


def _under_all_names(name: str) -> list[Callable[..., Any]]:
    """All versions of a function that models may call: torch's, a tensor's, and the operator (in exported models)."""
    operator = getattr(torch.ops.aten, name)
    overloads = [getattr(operator, kind) for kind in operator.overloads() if not kind.endswith("out")]
    return [operator, *overloads, *(getattr(home, name) for home in (torch, torch.Tensor, F) if hasattr(home, name))]


_OTHERS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(_under_all_names("embedding"), table_lookup),
    **dict.fromkeys(_under_all_names("one_hot"), one_hot),
    **dict.fromkeys(_under_all_names("select_scatter"), select_scatter),
    **dict.fromkeys(_under_all_names("index_fill"), index_fill),
    **dict.fromkeys(_under_all_names("roll"), roll),
    **dict.fromkeys(_under_all_names("prelu"), prelu),
    **dict.fromkeys(_under_all_names("scaled_dot_product_attention"), attention),
    F.embedding: embedding,  # its arguments are in a different order than the operator's
    F.multi_head_attention_forward: multi_head_attention,
    F.gaussian_nll_loss: gaussian_nll_loss,
    F.cross_entropy: cross_entropy,
    REQUIRES_GRAD: requires_grad,
    torch.Tensor.register_hook: register_hook,
    torch.Tensor.retain_grad: retain_grad,
}
if hasattr(F, "linear_cross_entropy"):
    _OTHERS[F.linear_cross_entropy] = linear_cross_entropy


def by_task(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The replacement of a function, if there is one."""
    return _OTHERS.get(func)


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


def may_call_them(model: nn.Module) -> bool:
    """Whether the model has modules that call one of these functions, or name one in their ``forward``."""
    return any(
        isinstance(module, (nn.Embedding, nn.MultiheadAttention, nn.PReLU)) or _names_one(type(module))  # type: ignore[arg-type]  # a class hashes
        for module in model.modules()
    )


@cache
def _names_one(kind: type[nn.Module]) -> bool:
    """Whether the code of a module's ``forward`` names one of these functions in any branch."""
    names = {"requires_grad" if function == REQUIRES_GRAD else function.__name__ for function in _OTHERS}
    code = getattr(getattr_static(kind, "forward", None), "__code__", None)
    todo: list[CodeType] = [] if code is None else [code]
    while todo:
        code = todo.pop()
        if not names.isdisjoint(code.co_names):
            return True
        todo += [const for const in code.co_consts if isinstance(const, CodeType)]
    return False
