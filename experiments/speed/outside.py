"""Other people's kinds of networks, in PyTorch's own layers, to compare vmap with a loop over the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from metamom.experiments.speed.networks import conv_net, mlp, resnet12

WAYS = 5


class Outside(NamedTuple):
    """A network and the shape of one of its inputs.

    Attributes:
        make: makes it; a number is the height and width of its images.
        shape: of an input, for that height and width; tokens are whole numbers below 50.
        is_image: whether inputs are images.
    """

    make: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    is_image: bool = True
    tokens: bool = False


class Residual(nn.Module):
    """``x + body(x)``, with another map of ``x`` if there is one, then a ReLU."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as ``body(x)``."""
        return F.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


class UNet(nn.Module):
    """One level down, one up by bilinear interpolation, joined to the features before."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down, self.inside = _conv(3, width), _conv(width, 2 * width)
        self.up, self.head = _conv(3 * width, width), nn.Linear(width, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]``."""
        first = F.relu(self.down(x))
        inside = F.relu(self.inside(F.max_pool2d(first, 2)))
        larger = F.interpolate(inside, size=first.shape[-2:], mode="bilinear", align_corners=False)
        scores: Tensor = self.head(F.relu(self.up(torch.cat([first, larger], 1))).mean((2, 3)))
        return scores


class Tied(nn.Module):
    """An autoencoder's encoder and decoder with one weight, and a classifier of what it gives."""

    def __init__(self, width: int = 64, hidden: int = 32) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.decoder.weight = nn.Parameter(torch.randn(width, hidden) / 8)
        self.encoder.weight = self.decoder.weight
        self.width, self.hidden = width, hidden
        self.head = nn.Linear(width, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]``."""
        inside = F.relu(F.linear(x, self.encoder.weight.t(), self.encoder.bias))
        scores: Tensor = self.head(self.decoder(inside))
        return scores


class EmbeddingLSTM(nn.Module):
    """An embedding of tokens, an LSTM, and a classifier of its last output."""

    def __init__(self, tokens: int = 50, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layer = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]``."""
        scores: Tensor = self.head(self.layer(self.embedding(x))[0][:, -1])
        return scores


def _conv(fan_in: int, fan_out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, **options)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, track_running_stats=False)


def _classified(width: int, *blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, WAYS))


def _groupnorm_blocks(width: int = 32) -> nn.Sequential:
    def block() -> nn.Module:
        parts = (_conv(width, width), nn.GroupNorm(8, width), nn.ReLU(), _conv(width, width), nn.GroupNorm(8, width))
        return Residual(nn.Sequential(*parts))

    return _classified(width, _conv(3, width), nn.ReLU(), block(), nn.MaxPool2d(2), block())


def _bottlenecks(width: int = 64, inside: int = 16) -> nn.Sequential:
    def block() -> nn.Module:
        first = (_conv(width, inside, 1), _norm(inside), nn.ReLU(), _conv(inside, inside), _norm(inside), nn.ReLU())
        return Residual(nn.Sequential(*first, _conv(inside, width, 1), _norm(width)))

    return _classified(width, _conv(3, width), _norm(width), nn.ReLU(), block(), block(), block())


def _mobile(width: int = 32) -> nn.Sequential:
    def block(fan_in: int, fan_out: int, stride: int) -> nn.Module:
        depthwise = (_conv(fan_in, fan_in, groups=fan_in, stride=stride), _norm(fan_in), nn.ReLU6())
        return nn.Sequential(*depthwise, _conv(fan_in, fan_out, 1), _norm(fan_out), nn.ReLU6())

    sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 4 * width, 2)]
    return _classified(4 * width, _conv(3, width, stride=2), nn.ReLU6(), *(block(*each) for each in sizes))


def _prelu_convs(width: int = 32) -> nn.Sequential:
    fan_ins = (3, width, width)
    blocks = [nn.Sequential(_conv(fan_in, width), nn.PReLU(width), nn.MaxPool2d(2)) for fan_in in fan_ins]
    return _classified(width, *blocks)


def _wide(norm: Callable[[nn.Linear], nn.Module] = lambda layer: layer) -> nn.Sequential:
    layers = (norm(nn.Linear(784, 256)), nn.ReLU(), norm(nn.Linear(256, 128)), nn.ReLU(), nn.Linear(128, WAYS))
    return nn.Sequential(*layers)


def _dropout_mlp() -> nn.Sequential:
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(128, WAYS))


def _batchnorm_mlp() -> nn.Sequential:
    def block(fan_in: int) -> nn.Module:
        return nn.Sequential(nn.Linear(fan_in, 128), nn.BatchNorm1d(128, track_running_stats=False), nn.ReLU())

    return nn.Sequential(block(64), block(128), nn.Linear(128, WAYS))


def _vectors(make: Callable[[], nn.Module], width: int = 64) -> Outside:
    return Outside(lambda size: make(), lambda size: (width,), is_image=False)


def _images(make: Callable[[], nn.Module]) -> Outside:
    return Outside(lambda size: make(), lambda size: (3, size, size))


# Widths are those of docs/performance; all have five classes.
OUTSIDE: dict[str, Outside] = {
    "dropout-mlp": _vectors(_dropout_mlp),
    "batchnorm-mlp": _vectors(_batchnorm_mlp),
    "tied": _vectors(Tied),
    "embedding-lstm": Outside(lambda size: EmbeddingLSTM(), lambda size: (12,), is_image=False, tokens=True),
    "wide-mlp": _vectors(_wide, 784),
    "weight-norm": _vectors(lambda: _wide(weight_norm), 784),
    "spectral-norm-eval": _vectors(lambda: _wide(spectral_norm).eval(), 784),
    "small-mlp": _vectors(lambda: mlp((64, 40, 40), WAYS)),
    "groupnorm-blocks": _images(_groupnorm_blocks),
    "bottlenecks": _images(_bottlenecks),
    "mobilenet": _images(_mobile),
    "prelu-convs": _images(_prelu_convs),
    "unet": _images(UNet),
    "resnet12": _images(lambda: resnet12((32, 64, 128, 256), WAYS)),
    "conv-bn-pool": Outside(lambda size: conv_net(32, size, 3, WAYS), lambda size: (3, size, size)),
}
