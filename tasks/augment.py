"""Random augmentations of the images of one task, drawn from the generator that a sampler passes.

Each is called as ``augment(images, generator)`` with images ``[M, C, H, W]`` in [0, 1] and returns new ones. Each image
gets its own draws. The generator is seeded by counter, so the result does not depend on the number of processes. All
images of a task are processed at once.

Legend: M images, C channels, H and W pixels.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.common.did_you_mean import did_you_mean
from metamom.tasks.episodic import Augment, augmentation_name

GREY = (0.299, 0.587, 0.114)  # luma of R, G and B (ITU-R BT.601), as in Pillow


@dataclass(frozen=True)
class PadCrop:
    """Pad with zeros and cut out the original size at a random place.

    Args:
        padding: at each side, as a fraction of the image's size.
    """

    padding: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.padding <= 1:
            raise ValueError(f"padding must be a fraction of the image's size, 0 < padding <= 1; got {self.padding!r}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``[M, C, H, W]``."""
        M, C, H, W = images.shape
        shift = []
        for size in (H, W):
            most = max(1, round(self.padding * size))
            moved = torch.randint(-most, most + 1, (M, 1), generator=generator)
            shift.append(torch.arange(size) + moved)  # [M, size]: where each row or column comes from
        rows, columns = shift
        inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
        places = (rows.clamp(0, H - 1) * W)[:, :, None] + columns.clamp(0, W - 1)[:, None, :]
        taken = images.flatten(2).gather(2, places.flatten(1)[:, None].expand(M, C, -1).to(images.device))
        return taken.view(M, C, H, W) * inside[:, None].to(images)


@dataclass(frozen=True)
class ResizedCrop:
    """Cut out a random rectangle and enlarge it to the original size, bilinearly.

    Args:
        scale: range of the rectangle's area, as a fraction of the image's.
        ratio: range of its width by its height; drawn evenly on a logarithmic scale, and limited by the image.

    Reference:
        Szegedy et al., "Going deeper with convolutions" (2015), section 6; the defaults are milder in scale.
    """

    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range (low, high) with 0 < low <= high <= 1; got {self.scale!r}.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be a range (low, high) with 0 < low <= high; got {self.ratio!r}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``[M, C, H, W]``."""
        M, _, H, W = images.shape
        u = torch.rand(4, M, generator=generator, dtype=torch.float64)
        area = self.scale[0] + u[0] * (self.scale[1] - self.scale[0])
        low, high = torch.tensor(self.ratio, dtype=torch.float64).log()
        ratio = (low + u[1] * (high - low)).exp() * H / W
        across, down = (area * ratio).sqrt().clamp_max(1), (area / ratio).sqrt().clamp_max(1)  # fractions of W and H
        theta = torch.zeros(M, 2, 3, dtype=torch.float64)
        theta[:, 0, 0], theta[:, 0, 2] = across, (2 * u[2] - 1) * (1 - across)
        theta[:, 1, 1], theta[:, 1, 2] = down, (2 * u[3] - 1) * (1 - down)
        grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Flip:
    """Mirror left and right.

    Args:
        probability: of each image.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in 0..1; got {self.probability!r}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``[M, C, H, W]``."""
        flipped = torch.rand(len(images), generator=generator) < self.probability
        return torch.where(flipped[:, None, None, None].to(images.device), images.flip(-1), images)


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, then contrast, then saturation, each by a random factor in ``1 - a .. 1 + a``.

    Results are cut to [0, 1]. Grey images (C other than 3) have no saturation.

    Args:
        brightness: a of the brightness.
        contrast: a of the contrast, the distance to the image's mean grey.
        saturation: a of the saturation, the distance to each pixel's grey.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1; got {getattr(self, name)!r}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``[M, C, H, W]``."""
        u = torch.rand(3, len(images), 1, 1, 1, generator=generator).to(images)
        spread = torch.tensor([self.brightness, self.contrast, self.saturation]).to(images).view(3, 1, 1, 1, 1)
        brightness, contrast, saturation = 1 + spread * (2 * u - 1)
        images = (images * brightness).clamp(0, 1)
        mean = _grey(images).mean((-2, -1), keepdim=True)
        images = (mean + contrast * (images - mean)).clamp(0, 1)
        if images.shape[1] == 3:
            grey = _grey(images)
            images = (grey + saturation * (images - grey)).clamp(0, 1)
        return images


@dataclass(frozen=True)
class Chain:
    """Several augmentations, one after the other."""

    steps: tuple[Augment, ...]

    def __repr__(self) -> str:
        return f"[{', '.join(str(augmentation_name(step)) for step in self.steps)}]"

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``[M, C, H, W]``."""
        for step in self.steps:
            images = step(images, generator)
        return images


AUGMENTATIONS: dict[str, Augment] = {
    "crop": PadCrop(),
    "resized-crop": ResizedCrop(),
    "flip": Flip(),
    "jitter": ColorJitter(),
}


def augmentation(given: Any) -> Augment | None:
    """The augmentation that a user named: a function, names with commas between, or a list of names and functions.

    They are applied in order.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown name, and for a name that comes twice.

    Example:
        >>> augment = augmentation(["crop", "flip"])
        >>> augment(torch.rand(10, 3, 84, 84), torch.Generator().manual_seed(0)).shape
        torch.Size([10, 3, 84, 84])
    """
    if given is None or (callable(given) and not isinstance(given, str)):
        return given
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) or callable(name) for name in names):
        raise TypeError(
            f"augment must be names of augmentations ({', '.join(AUGMENTATIONS)}), a function of images and a "
            f"generator, or None; got {given!r:.100}."
        )
    unknown = [name for name in names if isinstance(name, str) and name not in AUGMENTATIONS]
    if unknown:
        raise ValueError(
            f"augment knows {', '.join(AUGMENTATIONS)}; got {unknown[0]!r}{did_you_mean(unknown, AUGMENTATIONS) or '.'}"
        )
    named = [name for name in names if isinstance(name, str)]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ValueError(f"augment has {twice[0]!r} {named.count(twice[0])} times. Name each augmentation once.")
    steps = tuple(AUGMENTATIONS[name] if isinstance(name, str) else name for name in names)
    return Chain(steps) if steps else None


def named_augmentation(text: str) -> Augment | None:
    """The augmentation that is described by a text, if it is made of those of this file.

    Example:
        >>> named_augmentation(str(augmentation_name(augmentation(["crop", "flip"]))))
        [PadCrop(padding=0.1), Flip(probability=0.5)]
    """
    kinds: dict[str, Any] = {type(each).__name__: type(each) for each in AUGMENTATIONS.values()}
    try:
        tree: Any = ast.parse(text, mode="eval").body
        calls: list[Any] = tree.elts if isinstance(tree, ast.List) else [tree]
        steps = []
        for each in calls:
            steps.append(kinds[each.func.id](**{one.arg: ast.literal_eval(one.value) for one in each.keywords}))
    except (SyntaxError, AttributeError, LookupError, TypeError, ValueError):  # a function of the user's
        return None
    made: Augment = Chain(tuple(steps)) if isinstance(tree, ast.List) else steps[0]
    return made if augmentation_name(made) == text else None


def _grey(images: Tensor) -> Tensor:
    """``[M, 1, H, W]``: luma of RGB, the mean of other channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor(GREY, dtype=images.dtype, device=images.device).view(3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
