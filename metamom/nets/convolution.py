"""Convolutions of images with separate weights for each group (task), with derivatives of every order.

Legend: G groups, N images of each, C channels in, K channels out, kernels of height and width kh, kw.

Images are ``[G, N, C, H, W]``, and channels-last in memory. A convolution and its two derivatives are the three
products of one bilinear form, so the derivative of each is made of the other two. Large ones are computed group by
group with PyTorch's own convolution, small ones as patches and one batched matrix product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.nets.grouped import Grouped

# Patches up to this size stay in the cache: one batched product on them beats a convolution for each group.
SMALL = 6 * 2**20  # bytes


class Geometry(NamedTuple):
    """How the kernel moves over an image, as in `torch.nn.functional.conv2d`."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def size(self, image: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output."""
        high, wide = (
            (image[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return high, wide

    def patches_fit(self, images: int, out: tuple[int, int], kernel: Tensor) -> bool:
        """Whether the patches of so many images are small. ``kernel``: ``[..., C, kh, kw]``."""
        entries = images * out[0] * out[1] * kernel.shape[-3] * kernel.shape[-2] * kernel.shape[-1]
        return self.groups == 1 and entries * kernel.element_size() <= SMALL


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve images ``[G, N, C, H, W]`` with each group's kernels.

    Args:
        x: the images.
        weight: ``[G, K, C / groups, kh, kw]``.
        bias: ``[G, K]``.
        geometry: how the kernels move.

    Returns:
        ``[G, N, K, H', W']``.
    """
    out: Tensor = _Convolution.run(x, weight, bias, geometry)
    return out


def channels_last(x: Tensor) -> Tensor:
    """View ``[G, N, C, H, W]`` as ``[G, N, H, W, C]``, contiguous; copies only if it must."""
    return x.permute(0, 1, 3, 4, 2).contiguous()


def channels_second(x: Tensor) -> Tensor:
    """View ``[G, N, H, W, C]`` as ``[G, N, C, H, W]``."""
    return x.permute(0, 1, 4, 2, 3)


class _Convolution(Grouped):
    """See `convolve`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        kernel = _kernel(weight)
        out = geometry.size((x.shape[3], x.shape[4]), kernel)
        if geometry.patches_fit(x.shape[0] * x.shape[1], out, weight):
            patches, matrix = _patches(x, kernel, geometry), _matrix(weight)
            product = torch.bmm(patches, matrix) if bias is None else torch.baddbmm(bias[:, None], patches, matrix)
            return channels_second(product.view(*x.shape[:2], *out, -1))
        images = channels_second(channels_last(x))
        biases = [None] * len(x) if bias is None else list(bias)
        return _stack([_conv2d(image, own, b, geometry) for image, own, b in zip(images, weight, biases, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = _ToImages.run(c, weight, ctx.geometry, *x.shape[3:]) if ctx.needs_input_grad[0] else None
        to_weight = _ToKernels.run(x, c, ctx.geometry, *_kernel(weight)) if ctx.needs_input_grad[1] else None
        to_bias = c.sum((1, 3, 4)) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None


class _ToImages(Grouped):
    """The cotangent of the images: ``c [G, N, K, H', W']`` and kernels to ``[G, N, C, H, W]``."""

    @staticmethod
    def forward(c: Tensor, weight: Tensor, geometry: Geometry, H: int, W: int) -> Tensor:
        if geometry.patches_fit(c.shape[0] * c.shape[1], (c.shape[3], c.shape[4]), weight):
            taps = torch.bmm(channels_last(c).flatten(1, 3), _matrix(weight).mT)
            return _fold(taps.view(*c.shape[:2], *c.shape[3:], *_kernel(weight), -1), geometry, H, W)
        shape = (c.shape[1], weight.shape[2] * geometry.groups, H, W)
        like = torch.empty(shape, dtype=c.dtype, device=c.device, memory_format=torch.channels_last)  # of its shape
        cotangents = channels_second(channels_last(c))
        return _stack(
            [
                _conv2d_backward(cotangent, like, own, geometry, 0)
                for cotangent, own in zip(cotangents, weight, strict=True)
            ]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        c, weight, ctx.geometry, *_ = inputs
        ctx.save_for_backward(c, weight)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        c, weight = ctx.saved_tensors
        to_c = _Convolution.run(x, weight, None, ctx.geometry) if ctx.needs_input_grad[0] else None
        to_weight = _ToKernels.run(x, c, ctx.geometry, *_kernel(weight)) if ctx.needs_input_grad[1] else None
        return to_c, to_weight, None, None, None


class _ToKernels(Grouped):
    """The cotangent of the kernels: images and ``c [G, N, K, H', W']`` to ``[G, K, C / groups, kh, kw]``."""

    @staticmethod
    def forward(x: Tensor, c: Tensor, geometry: Geometry, kh: int, kw: int) -> Tensor:
        K, C = c.shape[2], x.shape[2] // geometry.groups
        like = c.new_empty(()).expand(K, C, kh, kw)
        if geometry.patches_fit(c.shape[0] * c.shape[1], (c.shape[3], c.shape[4]), like):
            product = torch.bmm(_patches(x, (kh, kw), geometry).mT, channels_last(c).flatten(1, 3))
            return product.view(-1, kh, kw, C, K).permute(0, 4, 3, 1, 2)
        images, cotangents = (channels_second(channels_last(each)) for each in (x, c))
        return torch.stack(
            [
                _conv2d_backward(cotangent, image, like, geometry, 1)
                for cotangent, image in zip(cotangents, images, strict=True)
            ]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, c, ctx.geometry, *_ = inputs
        ctx.save_for_backward(x, c)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        x, c = ctx.saved_tensors
        to_x = _ToImages.run(c, weight, ctx.geometry, *x.shape[3:]) if ctx.needs_input_grad[0] else None
        to_c = _Convolution.run(x, weight, None, ctx.geometry) if ctx.needs_input_grad[1] else None
        return to_x, to_c, None, None, None


def _kernel(weight: Tensor) -> tuple[int, int]:
    return weight.shape[-2], weight.shape[-1]


def _matrix(weight: Tensor) -> Tensor:
    """Kernels as the matrix that multiplies patches: ``[G, K, C, kh, kw]`` to ``[G, kh kw C, K]``."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 3)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def _conv2d_backward(c: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    """PyTorch's derivative of a convolution: the images' (``which=0``) or the kernels' (``which=1``)."""
    stride, padding, dilation, groups = geometry
    wanted = [which == 0, which == 1, False]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        c, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return found[which]


def _stack(groups: list[Tensor]) -> Tensor:
    """Stack images of all groups channels-last."""
    if len(groups) == 1:
        return groups[0].unsqueeze(0)
    return channels_second(torch.stack([x.permute(0, 2, 3, 1) for x in groups]))


def _patches(x: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """Patches ``[G, N H' W', kh kw C]`` of images ``[G, N, C, H, W]``."""
    (top, left), (down, right) = geometry.padding, geometry.stride
    high, wide = geometry.size((x.shape[3], x.shape[4]), kernel)
    padded = F.pad(channels_last(x), (0, 0, left, left, top, top)).contiguous()
    group, image, row, column, channel = padded.stride()
    below, beside = geometry.dilation[0] * row, geometry.dilation[1] * column
    windows = padded.as_strided(
        (*x.shape[:2], high, wide, *kernel, x.shape[2]),
        (group, image, down * row, right * column, below, beside, channel),
    )
    return windows.reshape(x.shape[0], -1, kernel[0] * kernel[1] * x.shape[2])


def _fold(taps: Tensor, geometry: Geometry, H: int, W: int) -> Tensor:
    """The adjoint of `_patches`: add ``[G, N, H', W', kh, kw, C]`` where the kernel read them, ``[G, N, C, H, W]``."""
    (top, left), (down, right), (below, beside) = geometry.padding, geometry.stride, geometry.dilation
    G, N, high, wide, kh, kw, C = taps.shape
    out = taps.new_zeros(G, N, H + 2 * top, W + 2 * left, C)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * below, i * below + down * (high - 1) + 1, down)
            columns = slice(j * beside, j * beside + right * (wide - 1) + 1, right)
            out[:, :, rows, columns] += taps[:, :, :, :, i, j]
    return channels_second(out[:, :, top : top + H, left : left + W])
