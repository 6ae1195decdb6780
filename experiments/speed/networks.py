"""Networks that are not metamom's, in PyTorch's own layers, for the speed benchmark."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.interop.imports import import_torchvision


def conv_net(hidden: int, size: int, channels: int, ways: int) -> nn.Sequential:
    """Four blocks of 3x3 convolution, normalisation, ReLU and max-pooling, then a linear classifier.

    Args:
        hidden: channels of every block.
        size: height and width of the images.
        channels: channels of the images.
        ways: number of classes.

    Reference:
        Vinyals et al. (2016); Finn, Abbeel, Levine (2017), the miniImageNet network with 32 channels.
    """
    blocks = [
        nn.Sequential(
            nn.Conv2d(fan_in, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        for fan_in in (channels, hidden, hidden, hidden)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(hidden * (size // 16) ** 2, ways))


class _Residual(nn.Module):
    """Three convolutions with normalisation in parallel with a 1x1 one, then a max-pooling."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, width, 3, padding=1, bias=False) for a in (fan_in, width, width))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=False) for _ in range(3))
        self.shortcut = nn.Sequential(
            nn.Conv2d(fan_in, width, 1, bias=False), nn.BatchNorm2d(width, track_running_stats=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            if i < 2:
                out = F.leaky_relu(out, 0.1)
        return F.max_pool2d(F.leaky_relu(out + self.shortcut(x), 0.1), 2)


def resnet12(widths: tuple[int, ...], ways: int, channels: int = 3) -> nn.Sequential:
    """Four residual blocks of three convolutions, then the mean over positions and a linear classifier.

    Args:
        widths: channels of each block.
        ways: number of classes.
        channels: channels of the images.

    Reference:
        Lee et al. (2019), MetaOptNet; without DropBlock.
    """
    pairs = zip((channels, *widths[:-1]), widths, strict=True)
    blocks = [_Residual(fan_in, width) for fan_in, width in pairs]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], ways))


def resnet18(ways: int) -> nn.Module:
    """torchvision's ResNet-18 as a pretrained network is used: frozen and in ``eval()``, with a new head ``fc``."""
    model: nn.Module = import_torchvision().models.resnet18(num_classes=ways)
    model.requires_grad_(False)
    model.get_submodule("fc").requires_grad_(True)
    return model.eval()


class LSTM(nn.Module):
    """A recurrent layer on sequences ``[N, length, channels]``, and a linear map of its last output to one number.

    Args:
        channels: size of each element of a sequence.
        hidden: width.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layer = nn.LSTM(channels, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions ``[N, 1]``."""
        outputs, _ = self.layer(x)
        predictions: Tensor = self.head(outputs[:, -1])
        return predictions


def mlp(widths: tuple[int, ...], ways: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between, then a linear classifier."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], ways))


class Encoder(nn.Module):
    """A transformer encoder on token vectors ``[N, tokens, d]``, and a linear classifier of the mean.

    Args:
        d: width.
        layers: number of layers, with four heads each.
        ways: number of classes.
    """

    def __init__(self, d: int, layers: int, ways: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(d, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]``."""
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # differentiable twice
            for layer in self.layers:
                x = layer(x)
        scores: Tensor = self.head(x.mean(1))
        return scores
