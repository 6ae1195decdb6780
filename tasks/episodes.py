"""N-way K-shot classification episodes from any tensor whose items belong to classes.

Legend: T tasks, N images in all, M = ways · (shots + queries) images of one task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from metamom.common.checks import check_flag
from metamom.rng import Ints
from metamom.tasks.episodic import Augment as Augment
from metamom.tasks.episodic import EpisodicFamily, augmentation_name


class Episodes(EpisodicFamily):
    """Tasks "tell these `ways` classes apart": random classes of a labelled data set, random images of each.

    A task's classes are drawn without replacement and labelled 0..ways-1 in the order drawn. The images of each class
    are also drawn without replacement, so no image is in both sets. Sets are ordered shot by shot: one image of each
    class, then another of each.

    Args:
        images: ``[N, ...]``, uint8 (scaled to float32 in [0, 1]) or floating point (kept). Not copied, unless
            ``rotations`` is set, so do not change it afterwards.
        labels: ``[N]`` integers, one class each; any numbers in any order, any number of images of a class.
        ways: classes of a task.
        shots: support images per class.
        queries: query images per class.
        seed: 0 <= seed < 2^64.
        augment: called as ``augment(images, generator)`` with one task's scaled images ``[M, ...]`` (support, then
            query) and a generator seeded by counter; returns images of the same shape.
        rotations: images rotated by 90°, 180° and 270° (counter-clockwise) count as new classes, which gives four times
            as many: class c rotated r times is class ``c + r · (number of classes)``. This stores images four times.

    Attributes:
        num_classes: number of classes, including rotated ones.

    Returns (from `sample`):
        ``support_x: [T, ways · shots, ...]``, ``query_x: [T, ways · queries, ...]``; ``support_y`` and ``query_y``
        int64 class indices 0..ways-1.

    Raises:
        ValueError: for more ways than classes, more shots + queries than the smallest class has images, images and
            labels that don't match, or a count below 1.
        TypeError: for labels that aren't integers, or images neither uint8 nor floating point.

    Example:
        >>> images, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 6
        >>> Episodes(images, labels, ways=5, shots=1, queries=2).sample(0, 4).query_x.shape
        torch.Size([4, 10, 1, 8, 8])

    Reference:
        Vinyals et al., "Matching networks for one shot learning" (2016), section 4.1.
    """

    def __init__(
        self,
        images: Tensor | NDArray[Any],
        labels: Tensor | NDArray[Any] | Sequence[int],
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int = 0,
        augment: Augment | None = None,
        rotations: bool = False,
    ) -> None:
        images, labels = _checked(_tensor("images", images), _tensor("labels", labels))
        self.rotations = check_flag("rotations", rotations)
        if self.rotations:
            images, labels = _with_rotations(images, labels)
        self._images = images
        super().__init__(labels.cpu().numpy(), ways=ways, shots=shots, queries=queries, seed=seed, augment=augment)

    def _items(self, index: Ints) -> Tensor:
        places = torch.from_numpy(index).to(self._images.device)
        return self._images.index_select(0, places.flatten()).view(*index.shape, *self._images.shape[1:])

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`. It identifies data and augmentation, but does not contain them."""
        digest = hashlib.sha256()
        digest.update(self._images.cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(self._by_class.order.data)
        digest.update(self._by_class.starts.data)
        return {
            "family": "Episodes",
            "images": list(self._images.shape),
            "data_sha256": digest.hexdigest(),
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "rotations": self.rotations,
            "augment": augmentation_name(self.augment),
            "seed": self.seed,
        }


def _tensor(name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, an array or a list of numbers; got {type(values).__name__} ({error}). Join a "
            "list of tensors with torch.stack; replace class names by numbers."
        ) from error
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {tensor.layout}. Convert it with .to_dense().")
    return tensor


def _checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 (0..255) or floating point; got {images.dtype}. Convert them.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, one class each; got {labels.dtype}. Convert them with .long().")
    if images.ndim < 1 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"wanted images [N, ...] and labels [N] with the same N >= 1; got images {list(images.shape)} and labels "
            f"{list(labels.shape)}. Give one label to each image."
        )
    return images, labels


def _with_rotations(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images and their three rotations, and their classes ``c + r · (number of classes)``."""
    if images.ndim < 3 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"rotations=True needs square images [N, ..., H, H]; got {list(images.shape)}. Crop or pad them, or use "
            f"rotations=False."
        )
    classes, index = torch.unique(labels, return_inverse=True)
    turns = range(4)
    # Store rotated copies: rotating in every draw would take longer than everything else in it.
    return (
        torch.cat([torch.rot90(images, turn, (-2, -1)) for turn in turns]),
        torch.cat([index + turn * len(classes) for turn in turns]),
    )
