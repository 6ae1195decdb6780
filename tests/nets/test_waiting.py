"""Normalised activations that are computed when they are read: the same values and derivatives, and never unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from derivatives import derivatives, draw
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.maml.checks.hooks import is_of_pytorch
from metamom.maml.under_vmap.functions_by_task import FunctionsByTask
from metamom.nets.kernels import normalisations
from metamom.nets.normalisation import Pooling, normalise

Model = Callable[..., Tensor]


def normalised(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Batch normalisation; written out where it is PyTorch's own, which has wrong third derivatives."""
    if torch._C._len_torch_function_stack():
        return F.batch_norm(x, None, None, gain, shift, training=True, eps=1e-3)
    mean = x.mean((0, 2, 3), keepdim=True)
    rstd = torch.rsqrt(((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-3)
    return (x - mean) * rstd * gain[:, None, None] + shift[:, None, None]


def looped(model: Model) -> Model:
    return lambda *args: torch.stack([model(*own) for own in zip(*args, strict=True)])


def waiting(model: Model) -> Model:
    def run(*own: Tensor) -> Tensor:
        with FunctionsByTask(waits=True):
            return model(*own)

    return run


# a chunk of one task runs without vmap
WAYS = {"vmap": lambda model: torch.func.vmap(waiting(model)), "alone": lambda model: looped(waiting(model))}
POOLINGS: dict[str, tuple[tuple, dict]] = {
    "2": ((2,), {}),
    "3, stride 2, padding 1": ((3, 2, 1), {}),
    "stride 1": ((2, 1), {}),
    "ceil": ((2,), {"ceil_mode": True}),
    "dilation": (((2, 1),), {"stride": (1, 2), "dilation": (2, 1)}),
    "ceil with padding": ((3, 3, 1), {"ceil_mode": True}),
}
# gains by channel; with one that is not positive, the maximum is not that of the activations before
GAINS = {"positive": [0.5, 1.0, 2.0], "negative": [0.5, -1.0, 2.0], "zero": [0.5, 0.0, 2.0]}


@pytest.fixture(params=["small", "large"], autouse=True)
def size(request, monkeypatch) -> None:
    """Every operator is computed as for small tasks, and as for large ones."""
    for name in ("LARGE", "MANY"):
        monkeypatch.setattr(normalisations, name, 0 if request.param == "large" else 2**40)


def check(way: str, model: Model, *args: Tensor) -> None:
    ours, theirs = derivatives(WAYS[way](model), args), derivatives(looped(model), args)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda said, i=i: f"derivative {i}: {said}")


def inputs(gains: str = "positive", size: tuple[int, int] = (7, 6)) -> tuple[Tensor, Tensor, Tensor]:
    gain = torch.tensor([GAINS[gains]] * 2, dtype=torch.float64)
    return draw(2, 4, 3, *size, seed=1), gain, draw(2, 3, seed=3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gains", GAINS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling(pooling, gains, way):
    args, options = POOLINGS[pooling]
    for f in (lambda x: x, F.relu, lambda x: F.relu(x, inplace=True), lambda x: F.leaky_relu(x, 0.2)):
        check(way, lambda *own, f=f: F.max_pool2d(f(normalised(*own)), *args, **options), *inputs(gains))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gains", GAINS)
def test_the_first_of_equal_maxima_gets_the_gradient(gains, way):
    """Few values, so that most windows have ties, also between activations that a ReLU cuts off."""
    x, gain, shift = inputs(gains)
    for f in (lambda x: x, F.relu):
        check(way, lambda *own, f=f: F.max_pool2d(f(normalised(*own)), 3, 2, 1), x.sign(), gain, shift)


READS: dict[str, Model] = {
    "returned": lambda x: x,
    "activated and returned": F.relu,
    "an operator": lambda x: F.relu(x) * 2,
    "in a list": lambda x: torch.cat([F.relu(x), x], 1),
    "by name": lambda x: torch.add(input=x, other=1.0),
    "a method": lambda x: F.relu(x).flatten(1),
    "a view": lambda x: F.relu(x[:2]),
    "both": lambda x: F.relu(x) + x + F.max_pool2d(F.relu(x), 1),
    "after its pooling": lambda x: F.max_pool2d(F.relu(x), 1) + x,
    "a convolution": lambda x: F.conv2d(F.relu(x), x.new_ones(2, 3, 2, 2)),
    "a normalisation": lambda x: normalised(F.relu(x), x.new_ones(3), x.new_zeros(3)),
    "in place": lambda x: F.relu(x.mul_(2.0)),
    "pooled, then in place": lambda x: F.max_pool2d(F.relu(x), 2).sub_(1.0),
    "relu of a relu": lambda x: F.max_pool2d(F.relu(F.relu(x)), 2),
    "in place and used": lambda x: F.max_pool2d(F.relu(x, inplace=True), 1) + x,
    "indices": lambda x: torch.mul(*F.max_pool2d(F.relu(x), 2, return_indices=True)),
    "two poolings": lambda x: F.max_pool2d(F.relu(x), 2) + F.max_pool2d(x, 2),
    "an average": lambda x: F.avg_pool2d(F.relu(x), 2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reads", READS)
def test_what_reads_them_finds_them(reads, way):
    check(way, lambda *own: READS[reads](normalised(*own)), *inputs(size=(4, 4)))


@pytest.mark.parametrize("way", WAYS)
def test_what_the_model_keeps_is_there_afterwards(way):
    kept = []

    def model(*own: Tensor) -> Tensor:
        z = normalised(*own)
        kept.append(z)
        return F.max_pool2d(F.relu(z), 2)

    args = inputs()
    WAYS[way](model)(*args)
    found = torch._C._functorch.get_unwrapped(kept[0]) if way == "vmap" else torch.stack(kept)
    torch.testing.assert_close(found, looped(normalised)(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_results_of_operators_may_change_in_place(way):
    """As of nn.ReLU(inplace=True) right after a convolution or a pooling."""
    x, _, shift = inputs()
    for model in (
        lambda x, w, _: F.conv2d(x, w).relu_(),
        lambda x, w, _: F.avg_pool2d(F.conv2d(x, w), 2).mul_(2.0),
        lambda x, w, _: F.max_pool2d(F.conv2d(x, w), 2).sub_(2.0),
        lambda x, w, b: F.leaky_relu(normalised(F.conv2d(x, w), b, b), 0.2).mul_(2.0),
        lambda x, w, b: F.max_pool2d(F.relu(normalised(F.conv2d(x, w), b, b)), 2).sub_(2.0),
    ):
        check(way, lambda *own, model=model: model(*own) + own[2].sum(), x, draw(2, 3, 3, 2, 2, seed=4), shift)


def test_what_is_only_pooled_is_never_written(monkeypatch):
    written = []
    monkeypatch.setattr(normalisations, "write", lambda *args: written.append(args))
    for way in WAYS.values():
        way(lambda *own: F.max_pool2d(F.relu(normalised(*own)), 2))(*inputs())
    assert not written


class Own(nn.ReLU):
    """A module that is not PyTorch's."""


def test_activations_wait_only_in_models_that_run_no_other_code():
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.ReLU())

    assert is_of_pytorch(model())
    assert not is_of_pytorch(nn.Sequential(model(), Own()))
    hooked, before, replaced = model(), model(), model()
    hooked[2].register_forward_hook(lambda module, args, out: out * 2)
    before[2].register_forward_pre_hook(lambda module, args: None)
    replaced[2].forward = lambda x: x * 2
    assert not any(map(is_of_pytorch, (hooked, before, replaced)))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert not is_of_pytorch(model())
    finally:
        handle.remove()


def test_hooks_on_images_are_called():
    seen = []

    def model(*own: Tensor) -> Tensor:
        images = F.max_pool2d(normalised(*own), 2)
        images.register_hook(seen.append)
        return F.conv2d(images, images.new_ones(2, 3, 2, 2))

    args = [x[0].requires_grad_() for x in inputs()]
    with FunctionsByTask(waits=True):
        out = model(*args)
    out.sum().backward()
    assert [each.shape for each in seen] == [(4, 3, 3, 3)]


@pytest.mark.parametrize("gains", ["positive", "negative"])
@pytest.mark.parametrize("sets", [0, 1, 3])
def test_derivatives_numerically(sets, gains):
    y = draw(2, 2 if sets == 0 else 1, 5, 4, 3, seed=1)
    own = [x.requires_grad_() for x in (y, inputs(gains)[1], draw(2, 3, seed=3))]
    pooling = Pooling([2, 3, 2, 2, 1, 0, 1, 1], True)

    def run(*args: Tensor) -> Tensor:
        return normalise(*args, 1e-3, sets, waits=True).activated(0.0).pooled(pooling)

    assert torch.autograd.gradcheck(run, own)
    assert torch.autograd.gradgradcheck(run, own)
