"""Functions of channels-last images under vmap: values and derivatives against PyTorch's own in a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from derivatives import derivatives, draw
from torch import Tensor
from torch.nn import functional as F

from metamom.maml.under_vmap.functions_by_task import FunctionsByTask
from metamom.nets.kernels import convolutions

Model = Callable[..., Tensor]


def last(x: Tensor) -> Tensor:
    """``[N, H, W, C]`` as images ``[N, C, H, W]`` that stay in memory as they are."""
    return x.permute(0, 3, 1, 2)


def check(model: Model, *args: Tensor, replaced: bool = True, shared: tuple[Tensor, ...] = ()) -> None:
    functions = FunctionsByTask()
    tasks = len(args[0])

    def whole(*own: Tensor) -> tuple[Tensor, ...]:
        return *own[: len(args)], *(x.expand(tasks, *x.shape) for x in own[len(args) :])

    def batched(*own: Tensor) -> Tensor:
        with functions:
            return torch.func.vmap(model)(*whole(*own))

    def looped(*own: Tensor) -> Tensor:
        return torch.stack([model(*one) for one in zip(*whole(*own), strict=True)])

    ours, theirs = derivatives(batched, (*args, *shared)), derivatives(looped, (*args, *shared))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda said, i=i: f"derivative {i}: {said}")
    assert functions.seen is replaced


POOLINGS = {
    "2": {"kernel_size": 2},
    "overlapping": {"kernel_size": (3, 2), "stride": (2, 1)},
    "padded": {"kernel_size": 3, "stride": [2], "padding": 1},
    "dilated": {"kernel_size": 2, "stride": [], "dilation": (2, 1)},
    "last windows cut": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
}


@pytest.mark.parametrize("name", POOLINGS)
def test_maxima(name):
    check(lambda x: F.max_pool2d(last(x) ** 2, **POOLINGS[name]), draw(3, 2, 7, 6, 4, seed=1))


def test_maxima_of_infinite_and_nan_entries():
    x = draw(2, 1, 4, 4, 3, seed=1)
    x[0, 0, 0, 0, 0], x[1, 0, 3, 3, 2] = float("nan"), -float("inf")
    x.requires_grad_()
    with FunctionsByTask():
        found = torch.func.vmap(lambda x: F.max_pool2d(last(x), 2))(x)
    expected = torch.stack([F.max_pool2d(last(one), 2) for one in x])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_what_a_pooling_gets_is_checked():
    with FunctionsByTask(), pytest.raises(RuntimeError, match="pad should be at most half of"):
        torch.func.vmap(lambda x: F.max_pool2d(last(x), 2, padding=2))(draw(2, 1, 4, 4, 3, seed=1).requires_grad_())


MEANS: dict[str, Model] = {
    "a method": lambda x: x.mean((2, 3)),
    "a function": lambda x: torch.mean(x, dim=[-1, -2]),
    "axes kept": lambda x: x.mean((3, 2), keepdim=True),
    "axes kept, by position": lambda x: torch.mean(x, (3, 2), True),
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, 1),
}


@pytest.mark.parametrize("name", MEANS)
def test_means(name):
    check(lambda x: MEANS[name](last(x) ** 2), draw(3, 2, 5, 4, 3, seed=1))


OTHER_MEANS: dict[str, Model] = {
    "of everything": lambda x: x.mean(),
    "of everything, axes kept": lambda x: x.mean(dim=None, keepdim=True),
    "of one axis by NumPy's name, which is kept": lambda x: x.mean(axis=1, keepdim=True),
    "of two axes by NumPy's name": lambda x: torch.mean(input=x, axis=(2, 3)),
    "of other axes": lambda x: x.mean((1, 2)),
    "of one axis": lambda x: x.mean(-1),
    "in another dtype": lambda x: x.mean((2, 3), dtype=torch.float64),
    "in the other layout": lambda x: x.contiguous().mean((2, 3)),
}


@pytest.mark.parametrize("name", OTHER_MEANS)
def test_other_means_are_left_to_pytorch(name):
    check(lambda x: OTHER_MEANS[name](last(x) ** 2), draw(3, 2, 5, 4, 3, seed=1), replaced=False)


def test_concatenated_images_keep_their_layout():
    x, y = draw(3, 2, 5, 4, 3, seed=1), draw(3, 2, 5, 4, 2, seed=2)
    check(lambda x, y: torch.cat([last(x) ** 2, last(y)], 1) ** 2, x, y)
    check(lambda x, y: torch.cat((last(x) ** 2, last(y)), dim=-3) ** 2, x, y)
    check(lambda x, y: torch.cat(tensors=(last(x) ** 2, last(y)), axis=1) ** 2, x, y)
    with FunctionsByTask():
        found = torch.func.vmap(lambda x, y: torch.cat([last(x), last(y)], 1))(x, y)
    assert found.stride()[2] == 1


def test_other_concatenations_are_left_to_pytorch():
    x, y = draw(3, 2, 5, 4, 3, seed=1), draw(3, 1, 5, 4, 3, seed=2)
    check(lambda x, y: torch.cat([last(x), last(y)]) ** 2, x, y, replaced=False)
    check(lambda x: torch.cat([last(x), last(x).contiguous()], dim=1) ** 2, x, replaced=False)
    check(lambda x: torch.cat([last(x), last(x)], axis=2) ** 2, x, replaced=False)


POINTWISE = {"one": {}, "stride": {"stride": (2, 3)}, "padding": {"padding": (1, 0)}, "groups": {"groups": 2}}


@pytest.mark.parametrize("name", POINTWISE)
def test_kernels_of_one_entry(name, monkeypatch):
    """They are products of positions for images of any size."""
    monkeypatch.setattr(convolutions, "SMALL", 0)
    options, fan_in = POINTWISE[name], 4 // POINTWISE[name].get("groups", 1)
    x, weight, bias = draw(3, 2, 5, 6, 4, seed=1), draw(3, 6, fan_in, 1, 1, seed=2), draw(3, 6, seed=3)
    check(lambda x, w, b: F.conv2d(last(x), w, b, **options), x, weight, bias)
    check(lambda x, w: F.conv2d(last(x), w, **options), x, weight)


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "groups": 2}], ids=str)
def test_kernels_that_tasks_share_before_their_first_step(options, monkeypatch):
    """One convolution of all tasks' images, with the derivatives of each task's kernels."""
    monkeypatch.setattr(convolutions, "SMALL", 0)
    x, fan_in = draw(3, 2, 5, 6, 4, seed=1), 4 // options.get("groups", 1)
    weight, bias = draw(6, fan_in, 3, 3, seed=2), draw(6, seed=3)
    check(lambda x, w, b: F.conv2d(last(x), w, b, **options), x, shared=(weight, bias))
    check(lambda x, b, w: F.conv2d(last(x), w, b, **options), x, draw(3, 6, seed=4), shared=(weight,))
