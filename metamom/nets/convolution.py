"""Convolutions of images with separate kernels for each group (task), differentiable any number of times.

Legend: G groups, N images of each, C channels in, K channels out, kernels of height and width kh, kw.

A convolution and its two derivatives are the three products of one bilinear form, so the derivatives of each are the
other two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metamom.nets import kernels
from metamom.nets.grouped import Grouped, not_a_view
from metamom.nets.kernels.convolutions import Geometry, convolve_backward


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve images ``[G, N, H, W, C]`` with each group's kernels.

    Args:
        x: the images.
        weight: ``[G, K, C / groups, kh, kw]``.
        bias: ``[G, K]``.
        geometry: how the kernels move.

    Returns:
        ``[G, N, H', W', K]``.
    """
    out: Tensor = _Convolution.run(x, weight, bias, geometry.numbers())
    return out


def _is_plain(x: Tensor) -> bool:
    """Whether all groups are there as they are: outside `torch.func.vmap`, and not in a graph that is traced."""
    traced = kernels.are_native(x) or torch._C._len_torch_dispatch_stack()
    return not traced and not torch._C._are_functorch_transforms_active()


class _Convolution(Grouped):
    """See `convolve`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
        return not_a_view(kernels.convolve(x.contiguous(), weight, bias, geometry))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x: Tensor | None
        to_weight: Tensor | None
        if all(ctx.needs_input_grad[:2]) and not torch.is_grad_enabled() and _is_plain(x):
            to_x, to_weight = convolve_backward(x.contiguous(), weight, c.contiguous(), ctx.geometry)
        else:
            to_x = _ToImages.run(c, weight, ctx.geometry, *x.shape[2:4]) if ctx.needs_input_grad[0] else None
            to_weight = _ToKernels.run(x, c, ctx.geometry, *weight.shape[3:]) if ctx.needs_input_grad[1] else None
        to_bias = c.sum((1, 2, 3)) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None


class _ToImages(Grouped):
    """The cotangent of the images: ``c [G, N, H', W', K]`` and kernels to ``[G, N, H, W, C]``."""

    @staticmethod
    def forward(c: Tensor, weight: Tensor, geometry: list[int], H: int, W: int) -> Tensor:
        return kernels.convolve_to_images(c.contiguous(), weight, geometry, H, W)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        c, weight, ctx.geometry, *_ = inputs
        ctx.save_for_backward(c, weight)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        c, weight = ctx.saved_tensors
        to_c = _Convolution.run(x, weight, None, ctx.geometry) if ctx.needs_input_grad[0] else None
        to_weight = _ToKernels.run(x, c, ctx.geometry, *weight.shape[3:]) if ctx.needs_input_grad[1] else None
        return to_c, to_weight, None, None, None


class _ToKernels(Grouped):
    """The cotangent of the kernels: images and ``c [G, N, H', W', K]`` to ``[G, K, C / groups, kh, kw]``."""

    @staticmethod
    def forward(x: Tensor, c: Tensor, geometry: list[int], kh: int, kw: int) -> Tensor:
        return kernels.convolve_to_kernels(x.contiguous(), c.contiguous(), geometry, kh, kw)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, c, ctx.geometry, *_ = inputs
        ctx.save_for_backward(x, c)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        x, c = ctx.saved_tensors
        to_x = _ToImages.run(c, weight, ctx.geometry, *x.shape[2:4]) if ctx.needs_input_grad[0] else None
        to_c = _Convolution.run(x, weight, None, ctx.geometry) if ctx.needs_input_grad[1] else None
        return to_x, to_c, None, None, None
