"""The paper's two experiments: data, model, and how the nodes' gradients are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metamom.common.checks import is_word
from metamom.experiments.paper.nodes import Gradients, gradients_in_order, gradients_together
from metamom.interop.imports import import_torchvision
from metamom.tasks.images import LabelledImages, labelled_images
from metamom.tasks.locate import PathLike


def mlp() -> nn.Module:
    """MNIST's model: 784, 512, 512, 10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def resnet18() -> nn.Module:
    """Fashion-MNIST's model: torchvision's ResNet-18, BatchNorm with running statistics.

    Raises:
        ValueError: if torchvision is not installed.
    """
    try:
        import_torchvision()
        from torchvision import models
    except ImportError as error:
        raise ValueError(f"Fashion-MNIST's ResNet-18 needs torchvision: pip install torchvision ({error}).") from error
    model: nn.Module = models.resnet18(num_classes=10)
    return model


@dataclass(frozen=True)
class Protocol:
    """One of the experiments.

    Attributes:
        dataset: its name for ``metamom data``.
        title: its name in the authors' files.
        mean: subtracted from pixels in [0, 1].
        std: the divisor after that.
        channels: number of equal channels of every image.
        flips: mirror each image with probability 1/2, test images too, with new draws in each epoch.
        model: the factory, which draws the weights from torch's global generator.
        description: the model in words, for the record.
        gradients: the function for the nodes' gradients.
        together: whether it computes a chunk's nodes at once.
        activations: approximate count of numbers kept per image for the backward pass; bounds the chunk.
    """

    dataset: str
    title: str
    mean: float
    std: float
    channels: int
    flips: bool
    model: Callable[[], nn.Module]
    description: str
    gradients: Gradients
    together: bool
    activations: int

    def data(self, part: str, root: PathLike | None) -> LabelledImages:
        """Images ``[N, 28, 28]``, normalised, float32, and labels ``[N]``."""
        images, labels = labelled_images(self.dataset, part, root)
        return LabelledImages(images.float().div_(255).sub_(self.mean).div_(self.std), labels)

    def initial(self, seed: int) -> Initial:
        """The model as after ``torch.manual_seed(seed)``, and a generator that continues where its draws ended.

        The global generator is restored afterwards.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = self.model()
            state = torch.get_rng_state()
        draws = torch.Generator()
        draws.set_state(state)
        return Initial(model, draws)

    def seen(self, images: Tensor, flipped: Tensor | None) -> Tensor:
        """Images ``[N, H, W]`` as the model takes them, ``[N, channels, H, W]``; ``flipped [N]`` says which are."""
        if flipped is not None:
            images = torch.where(flipped[:, None, None], images.flip(-1), images)
        return images.unsqueeze(1).expand(-1, self.channels, -1, -1)


class Initial(NamedTuple):
    """A model before its first step, and the generator of all later draws."""

    model: nn.Module
    draws: torch.Generator


PROTOCOLS = {
    "mnist": Protocol(
        dataset="mnist",
        title="MNIST",
        mean=0.1307,
        std=0.3081,
        channels=1,
        flips=False,
        model=mlp,
        description="MLP 784-512-512-10",
        gradients=gradients_together,
        together=True,
        activations=4000,
    ),
    "fashion": Protocol(
        dataset="fashion",
        title="FashionMNIST",
        mean=0.5,
        std=0.5,
        channels=3,
        flips=True,
        model=resnet18,
        description="ResNet-18, running statistics",
        gradients=gradients_in_order,
        together=False,
        activations=300_000,
    ),
}


def protocol(dataset: str) -> Protocol:
    """One of the experiments by name.

    Raises:
        ValueError: if there is none of that name.
    """
    if not is_word(dataset, PROTOCOLS):
        raise ValueError(f"the paper's experiments are {' and '.join(PROTOCOLS)}; got {dataset!r}.")
    return PROTOCOLS[dataset]
