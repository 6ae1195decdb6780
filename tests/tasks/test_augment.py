"""Augmentations: each against a slow loop, each image with draws of its own, the same from the same generator."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn import functional as F

from metamom.tasks.augment import AUGMENTATIONS, ColorJitter, Flip, PadCrop, ResizedCrop, augmentation
from metamom.tasks.episodic import augmentation_name


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 64, channels: int = 3, height: int = 10, width: int = 12) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=generator(5))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmentation(name, channels):
    augment, x = AUGMENTATIONS[name], images(channels=channels)
    before, state = x.clone(), torch.get_rng_state()
    out = augment(x, generator())
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert torch.equal(augment(x, generator()), out)
    assert not torch.equal(augment(x, generator(1)), out)
    same = augment(x[:1].expand(64, -1, -1, -1), generator())
    assert len(same.flatten(1).unique(dim=0)) > 1
    assert pickle.loads(pickle.dumps(augment)) == augment


def test_pad_and_crop():
    """Every result is a window of the padded image."""
    x = images()
    for image, out in zip(x, PadCrop(0.2)(x, generator()), strict=True):
        padded = F.pad(image, (2, 2, 2, 2))
        windows = padded.unfold(1, 10, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4)
        assert (windows == out).flatten(2).all(2).sum() == 1


def test_flip():
    x = images(1000)
    out = Flip()(x, generator())
    kept, flipped = ((out == other).flatten(1).all(1) for other in (x, x.flip(-1)))
    assert bool((kept ^ flipped).all())
    assert 400 < int(flipped.sum()) < 600
    assert torch.equal(Flip(0)(x, generator()), x)
    assert torch.equal(Flip(1)(x, generator()), x.flip(-1))


def test_a_crop_of_everything_changes_nothing():
    x = images(height=12)
    torch.testing.assert_close(ResizedCrop((1, 1), (1, 1))(x, generator()), x, atol=1e-5, rtol=0)


def test_resized_crops_of_a_ramp():
    """On x-coordinates, a crop is a ramp of a smaller slope: its area, ratio and place can be read."""
    ramps = torch.stack(torch.meshgrid(torch.arange(100.0) / 99, torch.arange(100.0) / 99, indexing="ij"))
    out = ResizedCrop((0.25, 0.5), (0.5, 2))(ramps.expand(500, 2, 100, 100), generator())
    down = (out[:, 0, 60, 50] - out[:, 0, 40, 50]) * 99 / 20
    across = (out[:, 1, 50, 60] - out[:, 1, 50, 40]) * 99 / 20
    area, ratio = down * across, across / down
    assert 0.245 < float(area.min()) < 0.26
    assert 0.49 < float(area.max()) < 0.505
    assert 0.49 < float(ratio.min()) < 0.55
    assert 1.8 < float(ratio.max()) < 2.05
    assert 0 <= float(out.min()) <= float(out.max()) <= 1


def test_color_jitter():
    x = images(200) * 0.5 + 0.25
    out = ColorJitter(0.2, 0, 0)(x, generator())
    factors = (out / x).flatten(1)
    torch.testing.assert_close(factors.amin(1), factors.amax(1))
    assert 0.8 <= float(factors.min()) < 0.85
    assert 1.15 < float(factors.max()) < 1.2001
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    contrast = ColorJitter(0, 0.2, 0)(x, generator())
    mean = grey.mean((2, 3), keepdim=True)
    factors = ((contrast - mean) / (x - mean)).flatten(1).median(1).values
    torch.testing.assert_close(contrast, mean + factors[:, None, None, None] * (x - mean), atol=1e-5, rtol=0)
    saturation = ColorJitter(0, 0, 0.2)(x, generator())
    kept = (saturation * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(kept, grey, atol=1e-5, rtol=0)
    assert torch.allclose(ColorJitter(0, 0, 0)(x, generator()), x, atol=1e-6)


def test_lists_and_names():
    x = images()
    assert augmentation(None) is None
    assert augmentation([]) is None
    assert augmentation("flip") == augmentation(["flip"])
    assert augmentation("crop,flip") == augmentation("crop, flip") == augmentation(["crop", "flip"])
    both = augmentation(["crop", "flip"])
    used = generator()
    expected = Flip()(PadCrop()(x, used), used)
    assert torch.equal(both(x, generator()), expected)

    def darker(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return images / 2

    assert augmentation(darker) is darker
    mixed = augmentation(["flip", darker])
    assert float(mixed(x, generator()).max()) <= 0.5
    assert augmentation_name(mixed) == "[Flip(probability=0.5), test_lists_and_names.<locals>.darker]"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PadCrop(0), "padding must be a fraction"),
        (lambda: ResizedCrop((0, 1)), "scale must be a range"),
        (lambda: ResizedCrop(ratio=(2, 1)), "ratio must be a range"),
        (lambda: Flip(2), "probability must be in"),
        (lambda: ColorJitter(contrast=2), "contrast must be in"),
        (lambda: augmentation("crop,crop"), "augment has 'crop' 2 times. Name each augmentation once"),
        (lambda: augmentation(["flip", "crop", "flip"]), "augment has 'flip' 2 times"),
        (lambda: augmentation("crop,flipp"), "augment knows crop, resized-crop, flip, jitter; got 'flipp'"),
        (lambda: augmentation("crop,"), "augment knows crop, resized-crop, flip, jitter; got ''"),
        (lambda: augmentation(""), "augment knows crop, resized-crop, flip, jitter; got ''"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
