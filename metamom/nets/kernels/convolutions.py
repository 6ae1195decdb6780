"""Convolutions with separate kernels for each group, and their two derivatives.

Legend: G groups, N images of each, C channels in, K channels out, kernels of height and width kh, kw.

Images are channels-last, ``[G, N, H, W, C]``, and kernels ``[G, K, C / groups, kh, kw]``. Large convolutions are
computed group by group with PyTorch's own, small ones as patches and one batched matrix product. So are those with
kernels of 1 x 1, whose patches are the images' own positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# If a group has few patches, and those of all groups stay in the cache, one batched product beats a convolution each.
FEW = 256  # patches of a group
SMALL = 6 * 2**20  # bytes


class Geometry(NamedTuple):
    """How the kernel moves over an image, as in `torch.nn.functional.conv2d`."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def numbers(self) -> list[int]:
        """All numbers in a row, as operators take them."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """The inverse of `numbers`."""
        a, b, c, d, e, f, groups = numbers
        return cls((a, b), (c, d), (e, f), groups)

    def size(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output."""
        high, wide = (
            (image[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return high, wide

    def patches_fit(self, images: Sequence[int], out: Sequence[int], kernel: Tensor) -> bool:
        """Whether the patches of groups of images, ``[G, N]``, are few and small, or single positions.

        Args:
            images: G and N.
            out: height and width of the result.
            kernel: kernels of any group, ``[..., C, kh, kw]``.
        """
        if self.groups == 1 and tuple(kernel.shape[-2:]) == (1, 1):
            return True
        each = images[1] * out[0] * out[1]
        entries = images[0] * each * kernel.shape[-3] * kernel.shape[-2] * kernel.shape[-1]
        return self.groups == 1 and each <= FEW and entries * kernel.element_size() <= SMALL


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Sequence[int]) -> Tensor:
    """``[G, N, H, W, C]``, kernels and biases ``[G, K]`` to ``[G, N, H', W', K]``."""
    geometry, kernel = Geometry.of(numbers), weight.shape[3:]
    out = geometry.size(x.shape[2:], kernel)
    if geometry.patches_fit(x.shape[:2], out, weight):
        patches, matrix = _patches(x, kernel, geometry), _matrix(weight)
        product = torch.bmm(patches, matrix) if bias is None else torch.baddbmm(bias[:, None], patches, matrix)
        return product.view(*x.shape[:2], *out, -1)
    stride, padding, dilation, groups = geometry
    if _shared(weight) and (bias is None or _shared(bias)):
        images, own_bias = x.flatten(0, 1).permute(0, 3, 1, 2), None if bias is None else bias[0]
        return _cut(F.conv2d(images, weight[0], own_bias, stride, padding, dilation, groups), len(x))
    biases = [None] * len(x) if bias is None else list(bias)
    return _stack(
        [
            F.conv2d(images.permute(0, 3, 1, 2), own, b, stride, padding, dilation, groups)
            for images, own, b in zip(x, weight, biases, strict=True)
        ]
    )


def convolve_to_images(c: Tensor, weight: Tensor, numbers: Sequence[int], H: int, W: int) -> Tensor:
    """The cotangent of the images, from that of the result: ``[G, N, H', W', K]`` to ``[G, N, H, W, C]``."""
    geometry = Geometry.of(numbers)
    if geometry.patches_fit(c.shape[:2], c.shape[2:], weight):
        taps = torch.bmm(c.flatten(1, 3), _matrix(weight).mT)
        return _fold(taps.view(*c.shape[:4], *weight.shape[3:], -1), geometry, H, W)
    parts = 1 if _shared(weight) else len(c)
    shape = (len(c) // parts * c.shape[1], weight.shape[2] * geometry.groups, H, W)
    like = torch.empty(
        shape, dtype=c.dtype, device=c.device, memory_format=torch.channels_last
    )  # only its shape is used
    if parts == 1:
        return _cut(_derivative(c.flatten(0, 1), like, weight[0], geometry, 0), len(c))
    return _stack([_derivative(each, like, own, geometry, 0) for each, own in zip(c, weight, strict=True)])


def convolve_to_kernels(x: Tensor, c: Tensor, numbers: Sequence[int], kh: int, kw: int) -> Tensor:
    """The kernels' cotangent, from that of the result: ``[G, N, H', W', K]`` to ``[G, K, C / groups, kh, kw]``."""
    geometry = Geometry.of(numbers)
    K, C = c.shape[4], x.shape[4] // geometry.groups
    like = c.new_empty(K, C, kh, kw)  # only its shape is used
    if geometry.patches_fit(c.shape[:2], c.shape[2:], like):
        product = torch.bmm(c.flatten(1, 3).mT, _patches(x, (kh, kw), geometry))
        return product.view(-1, K, kh, kw, C).permute(0, 1, 4, 2, 3).contiguous()
    return torch.stack(
        [_derivative(each, images.permute(0, 3, 1, 2), like, geometry, 1) for each, images in zip(c, x, strict=True)]
    )


def convolve_backward(x: Tensor, weight: Tensor, c: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`convolve_to_images` and `convolve_to_kernels` in one call of PyTorch's derivative for each group.

    Args:
        x: images, ``[G, N, H, W, C]``.
        weight: kernels, ``[G, K, C / groups, kh, kw]``.
        c: the cotangent of the result, ``[G, N, H', W', K]``.
        numbers: the geometry.
    """
    geometry = Geometry.of(numbers)
    if geometry.patches_fit(c.shape[:2], c.shape[2:], weight):
        kernel = weight.shape[3:]
        return convolve_to_images(c, weight, numbers, *x.shape[2:4]), convolve_to_kernels(x, c, numbers, *kernel)
    stride, padding, dilation, groups = geometry
    found = [
        torch.ops.aten.convolution_backward(
            each.permute(0, 3, 1, 2),
            images.permute(0, 3, 1, 2),
            own,
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [True, True, False],
        )
        for each, images, own in zip(c, x, weight, strict=True)
    ]
    return _stack([one[0] for one in found]), torch.stack([one[1].contiguous() for one in found])


def _matrix(weight: Tensor) -> Tensor:
    """Kernels as the matrix that multiplies patches: ``[G, K, C, kh, kw]`` to ``[G, kh kw C, K]``."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 3)


def _derivative(c: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    """PyTorch's derivative of a convolution: the images' (``which=0``) or the kernels' (``which=1``)."""
    stride, padding, dilation, groups = geometry
    wanted = [which == 0, which == 1, False]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        c.permute(0, 3, 1, 2), x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return found[which].contiguous() if which else found[which]


def _shared(weight: Tensor) -> bool:
    """Whether all groups have the same kernels or biases, as tasks do before their first step."""
    return len(weight) > 1 and weight.stride(0) == 0


def _cut(images: Tensor, groups: int) -> Tensor:
    """Images ``[G N, C, H, W]`` of all groups as ``[G, N, H, W, C]``."""
    last = images.permute(0, 2, 3, 1).contiguous()
    return last.view(groups, -1, *last.shape[1:])


def _stack(groups: list[Tensor]) -> Tensor:
    """Stack images ``[N, C, H, W]`` of all groups."""
    last = [x.permute(0, 2, 3, 1).contiguous() for x in groups]
    return last[0].unsqueeze(0) if len(groups) == 1 else torch.stack(last)


def _patches(x: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """Patches ``[G, N H' W', kh kw C]`` of images."""
    (top, left), (down, right) = geometry.padding, geometry.stride
    high, wide = geometry.size(x.shape[2:], kernel)
    if tuple(kernel) == (1, 1) and (top, left, down, right) == (0, 0, 1, 1):
        return x.flatten(1, 3)
    padded = (F.pad(x, (0, 0, left, left, top, top)) if top or left else x).contiguous()
    group, image, row, column, channel = padded.stride()
    below, beside = geometry.dilation[0] * row, geometry.dilation[1] * column
    windows = padded.as_strided(
        (*x.shape[:2], high, wide, *kernel, x.shape[4]),
        (group, image, down * row, right * column, below, beside, channel),
    )
    return windows.reshape(x.shape[0], -1, kernel[0] * kernel[1] * x.shape[4])


def _fold(taps: Tensor, geometry: Geometry, H: int, W: int) -> Tensor:
    """The adjoint of `_patches`: add ``[G, N, H', W', kh, kw, C]`` where the kernel read them, ``[G, N, H, W, C]``."""
    (top, left), (down, right), (below, beside) = geometry.padding, geometry.stride, geometry.dilation
    G, N, high, wide, kh, kw, C = taps.shape
    if (kh, kw, top, left, down, right) == (1, 1, 0, 0, 1, 1):
        return taps.view(G, N, H, W, C)
    out = taps.new_zeros(G, N, H + 2 * top, W + 2 * left, C)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * below, i * below + down * (high - 1) + 1, down)
            columns = slice(j * beside, j * beside + right * (wide - 1) + 1, right)
            out[:, :, rows, columns] += taps[:, :, :, :, i, j]
    return out[:, :, top : top + H, left : left + W].contiguous()
