"""The kernels of large groups, PyTorch's own operators group by group, against the written-out ones."""

from __future__ import annotations

import pytest
import torch
from derivatives import draw

from metamom.nets.kernels import convolutions, normalisations
from metamom.nets.kernels.convolutions import Geometry


@pytest.mark.parametrize("few", [0, 2**30], ids=["convolutions", "patches"])
@pytest.mark.parametrize(
    "geometry",
    [Geometry((1, 1), (1, 1), (1, 1), 1), Geometry((2, 1), (0, 2), (1, 2), 1), Geometry((2, 2), (1, 1), (1, 1), 2)],
    ids=str,
)
def test_both_derivatives_of_a_convolution_in_one_call(geometry, few, monkeypatch):
    monkeypatch.setattr(convolutions, "FEW", few)
    x, weight = draw(2, 3, 6, 7, 4, seed=1), draw(2, 6, 4 // geometry.groups, 3, 3, seed=2)
    numbers = geometry.numbers()
    c = draw(*convolutions.convolve(x, weight, None, numbers).shape, seed=3)
    to_images, to_kernels = convolutions.convolve_backward(x, weight, c, numbers)
    torch.testing.assert_close(to_images, convolutions.convolve_to_images(c, weight, numbers, 6, 7))
    torch.testing.assert_close(to_kernels, convolutions.convolve_to_kernels(x, c, numbers, 3, 3))


@pytest.mark.parametrize("sets", [0, 1, 2, 4])
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.2])
def test_normalisations(sets, slope, monkeypatch):
    y, gain, shift = draw(3, 1 if sets else 2, 4, 3, 4, seed=1), draw(3, 4, seed=2), draw(3, 4, seed=3)
    dz = draw(*y.shape, seed=4)

    def run() -> list[torch.Tensor]:
        value, mean, rstd = normalisations.norm(y, gain, shift, 1e-5, sets)
        z = None if slope == 1 else normalisations.activate(y, gain, shift, mean, rstd, value, slope)
        with torch.no_grad():
            found = normalisations.norm_backward(dz, y, gain, mean, rstd, z, None, slope, sets)
        return [value, mean, rstd, *found]

    expected = run()
    for name in ("LARGE", "LARGE_BACKWARD", "LARGE_OF_ALL", "WIDE"):
        monkeypatch.setattr(normalisations, name, 0)
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
