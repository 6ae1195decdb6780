"""The residual network of few-shot learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.common.checks import check_flag, check_number, check_whole
from metamom.nets.initial import bare, initialise_residual

SLOPE = 0.1  # of the leaky ReLUs
SMALLEST = 16  # pixels a side, which four poolings reduce to one


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with normalisation and leaky ReLU, added to a 1x1 convolution, then 2x2 max-pooling.

    ``[N, channels, H, W] -> [N, width, H // 2, W // 2]``.

    Args:
        channels: of the input.
        width: channels of the output.
        drop_rate: probability of a zero in the output, in training mode.
        running_statistics: see `ResNet12`.
    """

    def __init__(self, channels: int, width: int, *, drop_rate: float = 0.0, running_statistics: bool = False) -> None:
        super().__init__()
        fan_ins = (channels, width, width)
        self.convs = nn.ModuleList(bare(nn.Conv2d, a, width, 3, padding=1, bias=False) for a in fan_ins)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=running_statistics) for _ in fan_ins)
        self.shortcut = nn.Sequential(
            bare(nn.Conv2d, channels, width, 1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=running_statistics),
        )
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Activations of the next block."""
        out = x
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            out = out + self.shortcut(x) if i == last else out
            out = F.leaky_relu(out, SLOPE)
        pooled: Tensor = self.drop(F.max_pool2d(out, 2))
        return pooled


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, then a linear classifier: ``[N, channels, H, W] -> [N, ways]``.

    The classifier, ``head``, gets the mean over positions, so images may have any size from 16 by 16 (84 by 84 in the
    reference). Normalisation uses the statistics of the current batch (transductive, as in MAML). The layers are
    PyTorch's own, which metamom runs fast with per-task weights.

    Args:
        ways: number of classes.
        channels: channels of the images.
        widths: channels of each of the four blocks.
        drop_rate: probability of a zero after each block in training mode, 0 <= drop_rate < 1.
        running_statistics: keep running statistics of the normalisation, for pretrained weights and for
            ``MAML(norm="frozen")``. In ``eval()`` the network then normalises by them.
        generator: draws the initial weights; torch's default generator if ``None``.

    Example:
        >>> ResNet12(5, widths=(8, 16, 32, 64))(torch.rand(10, 3, 84, 84)).shape
        torch.Size([10, 5])

    Reference:
        Lee, Maji, Ravichandran, Soatto, "Meta-learning with differentiable convex optimization" (2019), section 4.1;
        dropout in all blocks in place of DropBlock in the last two.
    """

    def __init__(
        self,
        ways: int,
        channels: int = 3,
        widths: Sequence[int] = (64, 160, 320, 640),
        *,
        drop_rate: float = 0.0,
        running_statistics: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("ways", ways), ("channels", channels)):
            check_whole(name, size, 1)
        given: object = widths
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 4:
            raise ValueError(
                f"widths must be the channels of the four blocks, such as (64, 160, 320, 640); got {widths!r}."
            )
        widths = [check_whole("a width in widths", width, 1) for width in widths]
        check_number("drop_rate", drop_rate)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in 0 <= drop_rate < 1; got {drop_rate}.")
        check_flag("running_statistics", running_statistics)
        self.channels = channels
        self.features = nn.Sequential(
            *(
                ResidualBlock(fan_in, width, drop_rate=drop_rate, running_statistics=running_statistics)
                for fan_in, width in zip((channels, *widths[:-1]), widths, strict=True)
            )
        )
        self.head = bare(nn.Linear, widths[-1], ways)
        initialise_residual(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]`` of images ``[N, channels, H, W]``."""
        if x.dim() != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < SMALLEST:
            raise ValueError(
                f"ResNet12 wants images [N, {self.channels}, height, width] of at least {SMALLEST} by {SMALLEST}, such "
                f"as 84 by 84; got {tuple(x.shape)}."
            )
        scores: Tensor = self.head(self.features(x).mean((-2, -1)))
        return scores
