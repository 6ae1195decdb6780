"""Average pooling of channels-last images, which `torch.func.vmap` would first copy to the other layout.

Legend: G groups (tasks), N images of each, C channels. Images are ``[G, N, H, W, C]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.nets.grouped import Grouped


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


def _images(y: Tensor) -> Tensor:
    """``[G, N, H, W, C]`` as channels-last images ``[G N, C, H, W]``."""
    return y.contiguous().flatten(0, 1).permute(0, 3, 1, 2)


def _group(images: Tensor, like: Tensor) -> Tensor:
    """``[G N, C, H, W]`` as ``[G, N, H, W, C]``."""
    last = images.permute(0, 2, 3, 1).contiguous()
    return last.view(*like.shape[:2], *last.shape[1:])
