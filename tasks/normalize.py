"""Normalisation of images by constants: the mean and standard deviation of each channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MeanStd = tuple[Sequence[float], Sequence[float]]


class Constants(NamedTuple):
    """Mean and standard deviation of each of C channels, in units of [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def described(self) -> dict[str, list[float]]:
        """The constants as JSON values."""
        return {"mean": list(self.mean), "std": list(self.std)}


def check_constants(given: Any, channels: int | None = None) -> Constants | None:
    """Check constants, or ``None``, and return them.

    Raises:
        TypeError: for anything but two lists of numbers.
        ValueError: for another number of channels, and for a standard deviation that is not above 0.
    """
    if given is None:
        return None
    try:
        mean, std = (tuple(float(number) for number in each) for each in given)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"normalize must be (mean, std), two lists of a number for each channel, or 'dataset'; got {given!r:.100}."
        ) from error
    if len(mean) != len(std) or not mean or (channels is not None and len(mean) != channels):
        wanted = "the same number of" if channels is None else f"{channels}"
        raise ValueError(f"normalize needs {wanted} means and standard deviations; got {len(mean)} and {len(std)}.")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(
            f"normalize needs finite means and standard deviations above 0; got {mean} and {std}. A channel of one "
            "value has no spread: leave normalize out, or pass a standard deviation of 1."
        )
    return Constants(mean, std)


def normalised(x: Tensor, constants: Constants, *, in_place: bool = False) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel of ``[..., C, H, W]``.

    Args:
        x: the images.
        constants: of as many channels.
        in_place: change ``x`` and return it, which saves its memory.

    Raises:
        ValueError: for images of another number of channels.
    """
    if x.dim() < 3 or x.shape[-3] != len(constants.mean):
        raise ValueError(
            f"normalize has constants of {len(constants.mean)} channels; the images are [..., "
            f"{', '.join(map(str, x.shape[-3:]))}], not [..., {len(constants.mean)}, height, width]."
        )
    mean, std = (torch.tensor(each, dtype=x.dtype, device=x.device)[:, None, None] for each in constants)
    return (x.sub_(mean) if in_place else x - mean).div_(std)


def measured(parts: Iterable[Tensor]) -> Constants:
    """Mean and standard deviation of each channel over parts ``[n, C, H, W]`` of the data, scaled to [0, 1].

    Args:
        parts: at least one; floating point, in any scale.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    shift: Tensor | None = None
    for part in parts:
        wide = part.to(torch.float64).transpose(0, 1).flatten(1)
        if shift is None:  # a first guess of the mean, against cancellation
            shift = wide.mean(1, keepdim=True)
        wide = wide - shift
        count, total, squares = count + wide.shape[1], total + wide.sum(1), squares + (wide * wide).sum(1)
    assert shift is not None
    mean = total / count
    variance = (squares / count - mean * mean).clamp_min(0)
    return Constants(tuple((mean + shift.flatten()).tolist()), tuple(variance.sqrt().tolist()))
