"""Poolings of channels-last images, which PyTorch's derivatives or `torch.func.vmap` would copy to the other layout.

An elementwise function of two layouts takes over ten times as long as one of channels-last images alone.

Legend: G groups (tasks), N images of each, C channels. Images are ``[G, N, H, W, C]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.nets.grouped import Grouped, not_a_view


class Averages(NamedTuple):
    """The windows of an average, as in `torch.nn.functional.avg_pool2d`."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ceil_mode: bool
    count_include_pad: bool
    divisor_override: int | None


def average(y: Tensor, windows: Averages) -> Tensor:
    """Averages over windows, ``[G, N, H', W', C]``."""
    found: Tensor = _Average.run(y, windows)
    return found


class _Average(Grouped):
    @staticmethod
    def forward(y: Tensor, windows: Averages) -> Tensor:
        return _group(torch.ops.aten.avg_pool2d(_images(y), *windows), y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, ctx.windows = inputs
        ctx.size = y.shape[2:4]

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        return _Spread.run(dz, ctx.size, ctx.windows), None


class _Spread(Grouped):
    """The derivative of `_Average`: a share of each average for every entry of its window."""

    @staticmethod
    def forward(dz: Tensor, size: torch.Size, windows: Averages) -> Tensor:
        averages = _images(dz)
        like = dz.new_empty(averages.shape[0], *size, averages.shape[1]).permute(0, 3, 1, 2)  # its shape and layout
        return _group(torch.ops.aten.avg_pool2d_backward(averages, like, *windows), dz)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, ctx.windows = inputs

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:
        return _Average.run(c, ctx.windows), None, None


def mean(y: Tensor) -> Tensor:
    """The mean of each image and channel, ``[G, N, C]``."""
    found: Tensor = _Mean.run(y)
    return found


class _Mean(Grouped):
    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.mean((2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        (y,) = inputs
        ctx.size = y.shape[2:4]

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Tensor:
        found: Tensor = _SpreadMean.run(dz, *ctx.size)
        return found


class _SpreadMean(Grouped):
    """The derivative of `_Mean`, ``[G, N, C]`` to ``[G, N, H, W, C]``, without a copy for each position."""

    @staticmethod
    def forward(dz: Tensor, H: int, W: int) -> Tensor:
        share = (dz / (H * W)).contiguous()
        return share[:, :, None, None].expand(*dz.shape[:2], H, W, dz.shape[2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:
        return _Mean.run(c), None, None


class Windows(NamedTuple):
    """The windows of a maximum, as in `torch.nn.functional.max_pool2d`."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool


def maximum(y: Tensor, windows: Windows) -> Tensor:
    """Maxima over windows, ``[G, N, H', W', C]``."""
    found: Tensor = _Maximum.run(y, windows)[0]
    return found


class _Maximum(Grouped):
    """``(maxima, places)``; places are numbers in 0..HW-1."""

    @staticmethod
    def forward(y: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        z, places = torch.ops.aten.max_pool2d_with_indices(_images(y), *windows)
        return _group(z, y), _group(places, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, ctx.windows = inputs
        ctx.size = y.shape[2:4]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, dz: Tensor, _: Any) -> tuple[Tensor, None]:
        return _Put.run(dz, *ctx.saved_tensors, *ctx.size, ctx.windows), None


class _Put(Grouped):
    """The derivative of `_Maximum`: the cotangents of maxima, added where these were found."""

    @staticmethod
    def forward(dz: Tensor, places: Tensor, H: int, W: int, windows: Windows) -> Tensor:
        maxima = _images(dz)
        like = dz.new_empty(maxima.shape[0], H, W, maxima.shape[1]).permute(0, 3, 1, 2)  # its shape and layout
        back = torch.ops.aten.max_pool2d_with_indices_backward
        return _group(back(maxima, like, *windows, _images(places)), dz)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, places, *_, ctx.windows = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, ...]:
        return _Choose.run(c, *ctx.saved_tensors, ctx.windows), None, None, None, None


class _Choose(Grouped):
    """The derivative of `_Put`: the entries of images at these places."""

    @staticmethod
    def forward(c: Tensor, places: Tensor, windows: Windows) -> Tensor:
        G, N, H, W, C = c.shape
        return c.reshape(G * N, H * W, C).gather(1, places.reshape(G * N, -1, C)).view(places.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        c, places, ctx.windows = inputs
        ctx.size = c.shape[2:4]
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        return _Put.run(dz, *ctx.saved_tensors, *ctx.size, ctx.windows), None, None


def _images(y: Tensor) -> Tensor:
    """``[G, N, H, W, C]`` as channels-last images ``[G N, C, H, W]``."""
    return y.contiguous().flatten(0, 1).permute(0, 3, 1, 2)


def _group(images: Tensor, like: Tensor) -> Tensor:
    """``[G N, C, H, W]`` as ``[G, N, H, W, C]``."""
    last = images.permute(0, 2, 3, 1).contiguous()
    return not_a_view(last.view(*like.shape[:2], *last.shape[1:]))
