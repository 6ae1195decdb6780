"""Functions of channels-last images under `torch.func.vmap`: poolings, means and concatenation.

PyTorch's own would copy the images to the other layout, in their derivatives or under vmap. The operators are in
`metamom.nets.pooling`.

Legend: N images of one task, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.nets.inside_vmap import differentiated, suitable
from metamom.nets.pooling import Averages, Windows, average, maximum, mean


class ChannelsLastFunctions:
    """Replacements for functions that PyTorch or vmap would copy to another layout.

    Attributes:
        seen: whether a call has been replaced.
    """

    def __init__(self) -> None:
        self.seen = False

    def max_pool2d(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        """`torch.nn.functional.max_pool2d`."""
        if not return_indices and is_channels_last(input) and differentiated(input):
            self.seen = True
            steps = kernel_size if stride is None or stride == [] else stride
            kernel, step, around, apart = (list(pair(each)) for each in (kernel_size, steps, padding, dilation))
            return as_images(maximum(as_group(input), Windows(kernel, step, around, apart, ceil_mode)))
        if input.dim() == 4 and suitable(input) and not differentiated(input):
            input = to_channels_last(input)
        pool = F.max_pool2d_with_indices if return_indices else F.max_pool2d
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode)

    def avg_pool2d(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        """`torch.nn.functional.avg_pool2d`."""
        if not is_channels_last(input):
            args = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
            pooled: Tensor = on_any_layout(F.avg_pool2d, (input, *args), {})
            return pooled
        self.seen = True
        steps = kernel_size if stride is None or stride == [] else stride
        kernel, step, around = (list(pair(each)) for each in (kernel_size, steps, padding))
        windows = Averages(kernel, step, around, ceil_mode, count_include_pad, divisor_override)
        return as_images(average(as_group(input), windows))

    def adaptive_avg_pool2d(self, input: Tensor, output_size: Any) -> Tensor:
        """`torch.nn.functional.adaptive_avg_pool2d`, which vmap takes task by task for channels-last images."""
        if output_size in (1, (1, 1), [1, 1]) and input.dim() in (3, 4):
            return self.mean(input, (-2, -1), keepdim=True)
        pooled: Tensor = on_any_layout(F.adaptive_avg_pool2d, (input, output_size), {})
        return pooled

    def mean(self, input: Tensor, *args: Any, **options: Any) -> Tensor:
        """`torch.mean`, of each image and channel or of anything else."""
        dim = args[0] if args else options.get("dim")
        plain = len(args) < 3 and options.keys() <= {"dim", "keepdim"}
        if not plain or not isinstance(dim, (tuple, list)) or not is_channels_last(input) or not _are_sides(dim):
            every: Tensor = torch.mean(input, *args, **options)
            return every
        self.seen = True
        found = mean(as_group(input)).squeeze(0)
        keepdim = args[1] if len(args) > 1 else options.get("keepdim", False)
        return found[:, :, None, None] if keepdim else found

    def cat(self, tensors: Any, *args: Any, **options: Any) -> Tensor:
        """`torch.cat`, which under vmap copies channels-last images to the other layout."""
        dim = args[0] if args else options.get("dim", options.get("axis", 0))
        if dim not in (1, -3) or "out" in options or len(tensors) == 0 or not all(map(is_channels_last, tensors)):
            return torch.cat(tensors, *args, **options)
        self.seen = True
        return torch.cat([x.permute(0, 2, 3, 1) for x in tensors], 3).permute(0, 3, 1, 2)


def on_any_layout(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function of PyTorch. Some do not take the channels-last images of the functions above under vmap."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "querying is_contiguous inside of vmap" not in str(error):
            raise
    plain = [x.contiguous() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
    return func(*plain[: len(args)], **dict(zip(kwargs, plain[len(args) :], strict=True)))


def as_group(images: Tensor) -> Tensor:
    """``[N, C, H, W]`` as one group, ``[1, N, H, W, C]``."""
    return images.permute(0, 2, 3, 1).unsqueeze(0)


def as_images(group: Tensor) -> Tensor:
    """``[1, N, H, W, C]``, or ``[N, 1, H, W, C]``, as ``[N, C, H, W]``."""
    return group.squeeze(0 if group.shape[0] == 1 else 1).permute(0, 3, 1, 2)


def to_channels_last(images: Tensor) -> Tensor:
    """The same images in the layout in which PyTorch's poolings are fast; its convolutions are slower in it."""
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def is_channels_last(input: Any) -> bool:
    """Whether images ``[N, C, H, W]`` of one task, under vmap or without it, lie in memory as ``[N, H, W, C]``."""
    if not isinstance(input, Tensor) or input.dim() != 4:
        return False
    if torch._C._are_functorch_transforms_active() and not torch._C._functorch.is_batchedtensor(input):
        return False
    return suitable(input) and input.numel() > 0 and input.shape[1] > 1 and input.stride(1) == 1


def pair(value: Any) -> tuple[int, int]:
    """Kernel sizes, strides and the like of both sides, from one number or two."""
    first, second = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    return int(first), int(second)


def _are_sides(dim: Sequence[Any]) -> bool:
    """Whether these are the axes of height and width of images ``[N, C, H, W]``."""
    return sorted(axis % 4 if isinstance(axis, int) else -1 for axis in dim) == [2, 3]
