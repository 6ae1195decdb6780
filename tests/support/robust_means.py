"""The robust means and attacks that the shared suite goes through. Each stands for its kind; one line adds one."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

# n = 9 vectors suit all of them
RULES = [
    "mean",
    "median",
    "trimmed:0.25",
    "geomedian",
    "krum:2",
    "multi-krum:2",
    "multi-krum:3:4",
    "centred-clip:0.7",
    "centred-clip:2.5:iterations=4",
    "nnm:2>median",
    "nnm:3>krum:2",
    "nnm:2>trimmed:0.3",
    "nnm:2>geomedian",
    "nnm:2>centred-clip:1",
    "bucketing:2>median",
    "bucketing:2>krum:1",
    "bucketing:2:seed=5>centred-clip:1",
    "nnm:2>bucketing:2>median",
]
DRAWING = [how for how in RULES if "bucketing" in how]
STEADY = [how for how in RULES if how not in DRAWING]  # the order of the vectors plays no part
STATEFUL = [how for how in RULES if "clip" in how or how in DRAWING]
BOUNDED = [how for how in RULES if how not in ("mean", *DRAWING)]  # two faulty vectors of nine move them a bounded way
# by entries, or from the median of each entry
BY_ENTRIES = [how for how in RULES if any(word in how.split(">")[-1] for word in ("trimmed", "clip"))]
BY_ENTRIES += [how for how in RULES if how.split(">")[-1] == "median"]
ATTACKS = [
    "sign-flip:2",
    "ipm:2",
    "ipm:2:eps=4",
    "alie:2",
    "alie:2:z=1.5",
    "mimic:2",
    "mimic:2:worker=3",
    "gaussian:2",
    "gaussian:3:std=0.5:seed=4",
]


def vectors(n: int = 9, d: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Vectors ``[n, d]`` in general position."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def crowds(draw: st.DrawFn, min_n: int = 5, max_n: int = 8) -> Tensor:
    """``[n, d]`` with points that coincide, points on a line, and points far out."""
    n, d = draw(st.integers(min_n, max_n)), draw(st.integers(1, 3))
    entry = st.integers(-3, 3).map(float) if draw(st.booleans()) else st.floats(-10, 10)
    values = draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=n, max_size=n))
    x = torch.tensor(values, dtype=torch.float64)
    far = draw(st.sampled_from([0.0, 10.0, 1e4]))
    x[draw(st.integers(0, n - 1))] += far
    return x


def spread2(x: Tensor) -> float:
    """The mean of squared distances from the mean."""
    return float((x - x.mean(0)).square().sum(1).mean())


def slack(x: Tensor) -> float:
    """Rounding of squared distances between vectors of this size."""
    return 1e-11 * (1 + float(x.abs().max())) ** 2 * math.sqrt(x.numel())
