"""Networks for sinusoids and for images, and a helper for other networks to run with per-task weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from metamom.common.checks import check_flag, check_whole, check_word
from metamom.nets.initial import bare, initialise
from metamom.nets.layers import BatchNormReLU, StridedConv
from metamom.nets.statistics import hide

Module = TypeVar("Module", bound=nn.Module)
SMALLEST = 16  # pixels a side, which four poolings reduce to one


class SinusoidMLP(nn.Sequential):
    """A ReLU network from a number to a number, ``[N, 1] -> [N, 1]``.

    Args:
        hidden: widths of the hidden layers.
        generator: draws the initial weights; torch's default generator if ``None``.

    Reference:
        Finn, Abbeel, Levine (2017), section 5.1: two hidden layers of 40.
    """

    def __init__(self, hidden: Sequence[int] = (40, 40), *, generator: torch.Generator | None = None) -> None:
        given: object = hidden
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"hidden must be the widths of the hidden layers, such as (40, 40); got {hidden!r}.")
        hidden = [check_whole("a width in hidden", width, 1) for width in hidden]
        if not hidden:
            raise ValueError(f"SinusoidMLP needs at least one hidden layer; got hidden={tuple(hidden)}.")
        widths = [1, *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [bare(nn.Linear, fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers, bare(nn.Linear, widths[-1], 1))
        initialise(self, generator)

    def __getitem__(self, index: Any) -> Any:
        """A layer; or a slice of them, as a plain `torch.nn.Sequential`."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


class Conv4(nn.Module):
    """Four blocks of convolution, then a linear classifier: ``[N, channels, H, W] -> [N, ways]``.

    Each block is a 3x3 convolution, normalisation by the statistics of the current batch (transductive, as in MAML)
    and ReLU. The convolutions do not have a bias, since the normalisation would subtract it. There are two forms:

    - ``pooling="stride"``: the convolutions have stride 2, and the classifier, ``head``, gets the mean over the
      remaining positions. It takes images of any size; 28 by 28 in the reference. The layers (`metamom.nets.layers`)
      are designed for per-task weights.
    - ``pooling="max"``: 2x2 max-pooling follows each block, and ``head`` gets all remaining positions, so
      ``image_size`` is fixed. ``Conv4(5, 3, 32, image_size=84, pooling="max")`` is the network of miniImageNet, also
      with ``hidden=64``. The layers are PyTorch's own, which metamom runs fast with per-task weights.

    Args:
        ways: number of classes N.
        channels: channels of the input.
        hidden: channels of every block.
        image_size: height and width of the images, at least 16, for ``pooling="max"``.
        pooling: ``"stride"`` or ``"max"``.
        running_statistics: with ``pooling="max"``, keep running statistics of the normalisation, for pretrained weights
            and for ``MAML(norm="frozen")``. In ``eval()`` the network then normalises by them.
        generator: draws the initial weights; torch's default generator if ``None``.

    Example:
        >>> Conv4(5, 3, 32, image_size=84, pooling="max")(torch.rand(10, 3, 84, 84)).shape
        torch.Size([10, 5])

    Reference:
        Finn, Abbeel, Levine (2017), section 5.2: the Omniglot network with strides, and the miniImageNet network of
        Ravi, Larochelle (2017) with max-pooling and 32 channels; Vinyals et al. (2016) have 64.
    """

    def __init__(
        self,
        ways: int,
        channels: int = 1,
        hidden: int = 64,
        *,
        image_size: int = 28,
        pooling: Literal["stride", "max"] = "stride",
        running_statistics: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        for name, size in (("ways", ways), ("channels", channels), ("hidden", hidden), ("image_size", image_size)):
            check_whole(name, size, 1)
        check_word("pooling", pooling, ("stride", "max"))
        self.pooling, self.image_size = pooling, image_size
        if check_flag("running_statistics", running_statistics) and pooling != "max":
            raise ValueError('Conv4 has running statistics with pooling="max" only; leave running_statistics out.')
        fan_ins = (channels, hidden, hidden, hidden)
        if pooling == "max":
            if image_size < SMALLEST:
                raise ValueError(f"four poolings need an image_size of at least {SMALLEST}; got {image_size}.")
            self.features = nn.Sequential(*(_pooled_block(a, hidden, running_statistics) for a in fan_ins))
        else:
            self.features = nn.Sequential(
                *(nn.Sequential(bare(StridedConv, a, hidden), BatchNormReLU(hidden)) for a in fan_ins)
            )
        self.head = bare(nn.Linear, hidden if pooling == "stride" else hidden * (image_size // SMALLEST) ** 2, ways)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]`` of images ``[N, channels, H, W]``."""
        fixed = self.pooling == "max"
        if x.dim() != 4 or x.shape[1] != self.channels or (fixed and set(x.shape[2:]) != {self.image_size}):
            size = f"{self.image_size}, {self.image_size}]" if fixed else "height, width], such as 28 by 28"
            advice = ""
            if x.dim() == 4 and x.shape[1] == self.channels:
                square = x.shape[2] == x.shape[3] >= SMALLEST
                create = f"create it with image_size={x.shape[3]}, or " if square else ""
                advice = f" It is made for image_size={self.image_size}: {create}resize the images."
            raise ValueError(f"Conv4 wants images [N, {self.channels}, {size}; got {tuple(x.shape)}.{advice}")
        if fixed:
            flat: Tensor = self.head(self.features(x).flatten(1))
            return flat
        scores: Tensor = self.head(self.features(x.movedim(1, -1)).mean((1, 2)))
        return scores


def _pooled_block(channels: int, hidden: int, running_statistics: bool) -> nn.Sequential:
    return nn.Sequential(
        bare(nn.Conv2d, channels, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden, track_running_stats=running_statistics),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def use_batch_statistics(model: Module) -> Module:
    """Turn off running statistics in every normalisation layer of ``model``, in place.

    The layers then normalise by the current batch, in training and in evaluation (transductive, as in MAML), also
    outside of `metamom.MAML`. Their running statistics stay in the ``state_dict`` but are neither read nor written, so
    that pretrained weights load before or after this call, and the model's own load into its original class.

    Returns:
        The same model.
    """
    for module in model.modules():
        hide(module)
    return model
