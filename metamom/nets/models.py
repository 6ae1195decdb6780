"""Networks for sinusoids and for Omniglot, and a helper for other networks to run with per-task weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metamom.common.checks import check_whole
from metamom.nets.layers import BatchNormReLU, StridedConv
from metamom.nets.statistics import hide

Module = TypeVar("Module", bound=nn.Module)


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
            layers += [_bare(nn.Linear, fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers, _bare(nn.Linear, widths[-1], 1))
        _initialise(self, generator)

    def __getitem__(self, index: Any) -> Any:
        """A layer; or a slice of them, as a plain `torch.nn.Sequential`."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


class Conv4(nn.Module):
    """Four convolutions of stride 2, then a linear classifier: ``[N, channels, 28, 28] -> [N, ways]``.

    Each block is a 3x3 convolution, normalisation by the statistics of the current batch (transductive, as in MAML)
    and ReLU. The classifier, ``head``, gets the mean over the remaining positions. The convolutions do not have a bias,
    since the normalisation would subtract it. The layers (`metamom.nets.layers`) are designed for per-task weights.

    Args:
        ways: number of classes N.
        channels: channels of the input.
        hidden: channels of every block.
        generator: draws the initial weights; torch's default generator if ``None``.

    Reference:
        Finn, Abbeel, Levine (2017), section 5.2, the Omniglot network with strides.
    """

    def __init__(
        self, ways: int, channels: int = 1, hidden: int = 64, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.channels = channels
        for name, size in (("ways", ways), ("channels", channels), ("hidden", hidden)):
            check_whole(name, size, 1)
        blocks = [
            nn.Sequential(_bare(StridedConv, fan_in, hidden), BatchNormReLU(hidden))
            for fan_in in (channels, hidden, hidden, hidden)
        ]
        self.features = nn.Sequential(*blocks)
        self.head = _bare(nn.Linear, hidden, ways)
        _initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]`` of images ``[N, channels, 28, 28]``."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"Conv4 wants images [N, {self.channels}, height, width], such as 28 by 28; got {tuple(x.shape)}."
            )
        scores: Tensor = self.head(self.features(x.movedim(1, -1)).mean((1, 2)))
        return scores


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


def _bare(kind: type[Module], *args: int, **options: int) -> Module:
    """Create a module with uninitialised weights, so that it does not draw from the global generator."""
    return kind(*args, **options, device="meta").to_empty(device="cpu")


def _initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    """Glorot-uniform weights and zero biases for linear and convolutional layers."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # draw in index order, whatever the memory layout
            drawn = nn.init.xavier_uniform_(torch.empty(module.weight.shape), generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, BatchNormReLU):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
