"""The operators that the suites go through, and gradients to give them."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from metamom import QSGD, Clip, ClipValue, Compose, Identity, Normalize, RandK, Sign, TopK
from metamom.bias import (
    DASHA,
    DIANA,
    EF14,
    EF21,
    EF21SGD2M,
    EF21SGDM,
    MARINA,
    MLMCQSGD,
    BiasOperator,
    Block8,
    Clip21,
    Clip21SGD2M,
    ErrorFeedback,
    GaussianNoise,
    Layout,
    MLMCTopK,
    Natural,
    PowerSGD,
    TernGrad,
)
from metamom.bias.select import INTEGERS

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
G = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)

# Nothing is drawn and nothing carried: a row's image depends on the row alone.
PLAIN: list[BiasOperator] = [
    Identity(),
    TopK(1),
    TopK(3),
    TopK(ratio=0.3),
    TopK(ratio=1.0),
    TopK(2, ties="all"),
    Clip(0.5),
    Clip(1e-3),
    Clip(30.0),
    ClipValue(0.5),
    ClipValue(1e30),
    Normalize(),
    Sign(),
    Block8(),
    Block8(3, dynamic=True),
    Compose(Clip(1.0), TopK(ratio=0.3)),
    Compose(TopK(2), Sign()),
]
RANDOM: list[BiasOperator] = [
    RandK(1),
    RandK(3, seed=5),
    RandK(ratio=0.7),
    RandK(ratio=1.0),
    RandK(2, scaled=True),
    RandK(2, shared=True),
    RandK(2, scaled=True, shared=True),
    QSGD(1),
    QSGD(4, seed=5),
    QSGD(127),
    QSGD(128),
    QSGD(2**15 - 1),
    QSGD(2**15),
    QSGD(2**30 - 1),
    Compose(Clip(1.0), QSGD(4)),
    Compose(RandK(3), RandK(2)),
    Compose(QSGD(3), QSGD(2)),
    MLMCTopK(2),
    MLMCTopK(ratio=0.3, geometric=0.5, seed=5),
    MLMCQSGD(),
    MLMCQSGD(3, geometric=0.25, seed=5),
    Compose(Clip(1.0), MLMCTopK(1)),
    Natural(seed=5),
    TernGrad(),
    TernGrad(clip=1.5, seed=5),
    Block8(2, random=True, dynamic=True, seed=5),
    Compose(Clip(1.0), Natural()),
]
LAYERWISE: list[BiasOperator] = [
    TopK(1, per_tensor=True),
    TopK(ratio=0.3, per_tensor=True),
    TopK(1, per_tensor=True, ties="all"),
    RandK(1, per_tensor=True),
    RandK(ratio=0.5, per_tensor=True, scaled=True, shared=True, seed=2**64 - 1),
    Clip(0.5, per_tensor=True),
    Normalize(per_tensor=True),
    Sign(per_tensor=True),
    QSGD(3, per_tensor=True),
    MLMCTopK(1, per_tensor=True),
    MLMCQSGD(2, per_tensor=True),
    TernGrad(per_tensor=True),
    Block8(2, per_tensor=True),
    Block8(2, random=True, per_tensor=True),
    Compose(Normalize(per_tensor=True), TopK(2), QSGD(3, per_tensor=True)),
]
FEEDBACK: list[ErrorFeedback] = [
    EF14(TopK(2)),
    EF14(Sign(per_tensor=True)),
    EF14(Compose(RandK(3), QSGD(4))),
    EF21(TopK(1)),
    EF21(RandK(2)),
    EF21SGDM(TopK(1), eta=0.1),
    EF21SGDM(Sign()),
    EF21SGDM(TopK(ratio=0.3, per_tensor=True), eta=1),
    Clip21(0.5),
    EF21SGD2M(TopK(1), eta=0.3),
    Clip21SGD2M(0.5, eta=0.3, server=0.5),
    Clip21SGD2M(0.5, eta=0.3, noise=0.1, seed=3),
    DIANA(RandK(2, scaled=True), alpha=0.5),
    MARINA(QSGD(4), p=0.4),
    DASHA(RandK(2, scaled=True), a=0.2),
    DASHA(MLMCTopK(1), a=0.2, eta=0.3),
    EF21(Natural(nearest=True)),
    DIANA(Natural(), alpha=0.5),
    EF14(Block8(2, dynamic=True)),
    EF14(PowerSGD(1)),
    DIANA(PowerSGD(1, seed=5), alpha=0.5),
]
NOISY: list[BiasOperator] = [GaussianNoise(0.5), Compose(Clip(1.0), GaussianNoise(0.1, seed=5))]
NEAREST: list[BiasOperator] = [Natural(nearest=True)]  # of powers of two, which are not those times a number
STATELESS = PLAIN + NEAREST + RANDOM + LAYERWISE + NOISY
LOW_RANK: list[BiasOperator] = [
    PowerSGD(1),
    PowerSGD(2),
    PowerSGD(1, fresh=True),
    Compose(Clip(1.0), PowerSGD(1, fresh=True)),
]
EVERY = [*STATELESS, *LOW_RANK, *FEEDBACK]
QUIET = [operator for operator in EVERY if not re.search("noise|powersgd", operator.spec)]  # signs stay
FROM_ZERO = [operator for operator in EVERY if "noise" not in operator.spec]  # zero stays zero

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def each(operators: list[BiasOperator]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("operator", operators, ids=repr)


@st.composite
def gradients(draw: st.DrawFn, min_d: int = 3, rows: int | None = None) -> Tensor:
    """``[d]`` or ``[n, d]`` of any dtype, with ties, zeros of both signs, and vectors of zeros."""
    n, d = rows or draw(st.integers(1, 3)), draw(st.integers(min_d, 10))
    entries = st.one_of(st.integers(-3, 3).map(float), st.floats(-100, 100, width=16))
    values = draw(st.lists(st.lists(entries, min_size=d, max_size=d), min_size=n, max_size=n))
    g = torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
    return g[0] if rows is None and n == 1 and draw(st.booleans()) else g


def cut(d: int) -> Layout:
    """The sizes of a vector and a matrix, unless there is but one entry."""
    if d == 1:
        return Layout([(1,)])
    first = d // 3 + (d - d // 3) % 2  # empty at d = 2
    return Layout([(first,), (2, (d - first) // 2)])


def bits(g: Tensor) -> Tensor:
    return g.contiguous().view(INTEGERS[g.element_size()])


def assert_identical(a: Tensor, b: Tensor) -> None:
    """Bit for bit: the sign of zero too."""
    assert a.dtype is b.dtype
    assert a.shape == b.shape
    assert torch.equal(bits(a), bits(b)), f"{a} and {b}"


def rounding(dtype: torch.dtype, d: int) -> float:
    """Relative error of a norm over d entries, and of one product more."""
    return (4 + math.sqrt(d)) * torch.finfo(dtype).eps
