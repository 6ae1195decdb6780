"""The networks: shapes, initial weights from a named generator, and batch statistics."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from problems import assert_close
from slow_maml import slow_meta_gradient
from torch import nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.nets.layers import BatchNormReLU
from metamom.nets.models import Conv4, SinusoidMLP, use_batch_statistics
from metamom.nets.resnet import ResNet12

MAKERS: dict[str, Callable[..., nn.Module]] = {
    "SinusoidMLP": SinusoidMLP,
    "Conv4": lambda **options: Conv4(5, hidden=8, **options),
    "Conv4 with max-pooling": lambda **options: Conv4(5, hidden=8, image_size=20, pooling="max", **options),
    "ResNet12": lambda **options: ResNet12(5, widths=(4, 6, 8, 10), **options),
}
each_network = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("hidden", [(40, 40), (7,), (3, 5, 2)])
def test_sinusoid_mlp_shapes(hidden):
    net = SinusoidMLP(hidden)
    assert net(torch.randn(6, 1)).shape == (6, 1)
    widths = [1, *hidden, 1]
    expected = [shape for a, b in pairwise(widths) for shape in ((b, a), (b,))]
    assert [tuple(p.shape) for p in net.parameters()] == expected


@pytest.mark.parametrize(("ways", "channels", "hidden"), [(5, 1, 64), (20, 1, 4), (3, 3, 8), (1, 2, 1)])
def test_conv4_shapes(ways, channels, hidden):
    net = Conv4(ways, channels, hidden)
    assert net(torch.rand(6, channels, 28, 28)).shape == (6, ways)
    convolutions = 9 * hidden * (channels + 3 * hidden)
    assert sum(p.numel() for p in net.parameters()) == convolutions + 4 * 2 * hidden + (hidden + 1) * ways


def test_parameter_counts_of_the_literature():
    assert sum(p.numel() for p in SinusoidMLP().parameters()) == 80 + 1640 + 41
    biases = 4 * 64  # of the convolutions: normalisation subtracts them again, so Conv4 goes without
    assert sum(p.numel() for p in Conv4(5).parameters()) == 112_261 - biases
    assert [name for name, _ in Conv4(5).named_parameters() if name.startswith("head")] == ["head.weight", "head.bias"]


@each_network
def test_a_generator_determines_the_weights(make):
    assert same(make(generator=generator(3)), make(generator=generator(3)))
    assert not same(make(generator=generator(3)), make(generator=generator(4)))


@each_network
def test_with_a_generator_the_global_one_is_not_touched(make):
    before = torch.get_rng_state()
    make(generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@each_network
def test_without_a_generator_the_global_one_is_used(make):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = make()
    assert same(drawn, make(generator=generator(3)))


@each_network
def test_initial_weights_are_glorot_and_biases_zero(make):
    net = make(generator=generator(0))
    for module in net.head.modules() if isinstance(net, ResNet12) else net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            bound = math.sqrt(6 / (fan_in + fan_out))
            largest = float(module.weight.detach().abs().max())
            assert 0.5 * bound < largest <= bound
            assert module.bias is None or not bool(module.bias.any())
        if isinstance(module, BatchNormReLU):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


@each_network
def test_every_parameter_is_trainable_finite_and_there_are_no_buffers(make):
    net = make()
    assert all(p.requires_grad and bool(p.isfinite().all()) and p.device.type == "cpu" for p in net.parameters())
    assert list(net.buffers()) == []


def test_conv4_normalises_by_the_batch_at_hand_in_both_modes():
    """Transductive: a prediction depends on the other images of its batch, and evaluation mode changes nothing."""
    net = Conv4(5, hidden=4, generator=generator(0)).double()
    x = torch.rand(6, 1, 28, 28, generator=generator(1), dtype=torch.float64)
    training = net(x)
    net.eval()
    assert torch.equal(net(x), training)
    others = torch.cat([x[:1], x[1:] ** 2])
    assert float((net(others)[0] - training[0]).detach().abs().max()) > 1e-3
    torch.testing.assert_close(net(x.flip(0)), training.flip(0))


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        ((), ValueError, r"SinusoidMLP needs at least one hidden layer; got hidden=\(\)"),
        ((0,), ValueError, "a width in hidden must be >= 1; got 0"),
        ((40, -1), ValueError, "a width in hidden must be >= 1; got -1"),
        ((40, 1.5), TypeError, "a width in hidden must be a whole number; got 1.5"),
        (40, TypeError, r"hidden must be the widths of the hidden layers, such as \(40, 40\); got 40"),
        ("40", TypeError, "got '40'"),
    ],
)
def test_bad_widths(hidden, error, message):
    with pytest.raises(error, match=message):
        SinusoidMLP(hidden)


@pytest.mark.parametrize("name", ["ways", "channels", "hidden"])
@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-5, ValueError), ("5", TypeError), (None, TypeError)])
def test_bad_sizes(name, size, error):
    with pytest.raises(error, match=f"{name} must be .*; got {size!r}"):
        Conv4(**{"ways": 5, name: size})


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 3)),
        (nn.BatchNorm3d(4), (6, 4, 2, 2, 2)),
        (nn.SyncBatchNorm(4), (6, 4, 3)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (6, 4, 3, 3)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_use_batch_statistics(norm, shape):
    model = nn.Sequential(nn.Sequential(norm))
    parameters, original = list(model.parameters()), copy.deepcopy(model)
    x = torch.randn(shape, generator=generator(0)) * 3 + 5
    by_batch = model.train()(x).detach()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert use_batch_statistics(model) is model
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), by_batch)
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    for other in (original, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(found)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(other.train(other is original)(x), by_batch)


def test_use_batch_statistics_leaves_other_layers_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Dropout(), nn.GroupNorm(1, 3))
    before = dict(model.state_dict())
    use_batch_statistics(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_slice_of_the_sinusoid_network_is_a_plain_sequential():
    net = SinusoidMLP((4, 4), generator=torch.Generator().manual_seed(0))
    body = net[:-1]
    assert type(body) is nn.Sequential
    x = torch.linspace(-1, 1, 3)[:, None]
    assert torch.equal(net[-1](body(x)), net(x))


# Networks for larger images


LARGE: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "Conv4": (lambda **options: Conv4(3, 3, 4, image_size=21, pooling="max", generator=generator(0), **options), 21),
    "ResNet12": (lambda **options: ResNet12(3, 3, (3, 4, 5, 6), generator=generator(0), **options), 20),
}
each_large = pytest.mark.parametrize(("make", "size"), LARGE.values(), ids=LARGE.keys())


def tasks_of(size: int, queries: int = 2) -> TaskBatch:
    sets = []
    for seed, shots in enumerate((1, queries)):
        x = torch.rand(2, 3 * shots, 3, size, size, generator=generator(seed), dtype=torch.float64)
        sets += [x, torch.arange(3).repeat(2, shots)]
    return TaskBatch(*sets)


@each_large
@pytest.mark.parametrize("adapt", [None, ["head"]])
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_are_those_of_a_plain_loop(make, size, adapt, first_order):
    model, batch = make().double(), tasks_of(size)
    estimator = "first-order" if first_order else "exact"
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, inner_steps=2, adapt=adapt, estimator=estimator)
    names = [name for name, _ in model.named_parameters() if adapt is None or name.startswith("head.")]
    expected, losses = slow_meta_gradient(
        model, F.cross_entropy, batch, steps=2, inner_lr=0.1, adapted=names, first_order=first_order
    )
    found = learner.meta_gradient(batch)
    assert_close({name: g.mean(0) for name, g in found.grads.items()}, expected, 1e-10)
    torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=1e-10)


def test_the_published_networks_for_84_by_84():
    """Parameters of the literature: miniImageNet's Conv4, and ResNet-12 of 64, 160, 320 and 640 channels."""
    for hidden, count in ((32, 32_901), (64, 121_093)):
        net = Conv4(5, 3, hidden, image_size=84, pooling="max")
        biases = 4 * hidden  # of the convolutions: normalisation subtracts them again, so Conv4 goes without
        assert sum(p.numel() for p in net.parameters()) == count - biases
        assert net.head.in_features == hidden * 25
        assert net(torch.rand(6, 3, 84, 84)).shape == (6, 5)
    net = ResNet12(64)
    assert 12.4e6 < sum(p.numel() for p in net.features.parameters()) < 12.5e6
    assert net(torch.rand(2, 3, 84, 84)).shape == (2, 64)
    assert ResNet12(5, 1, (2, 3, 4, 5))(torch.rand(2, 1, 16, 40)).shape == (2, 5)


@each_large
def test_running_statistics_are_kept_on_request(make, size):
    plain, kept = make(), make(running_statistics=True)
    assert list(plain.buffers()) == []
    assert any(name.endswith("running_mean") for name, _ in kept.named_buffers())
    assert same(plain, kept)
    x = torch.rand(6, 3, size, size)
    torch.testing.assert_close(plain(x), kept(x))
    kept.eval()
    assert not torch.allclose(plain(x), kept(x))
    torch.testing.assert_close(kept(x[:1]), kept(x)[:1])


def test_dropout():
    net = ResNet12(3, widths=(4, 6, 8, 10), drop_rate=0.5)
    x = torch.rand(6, 3, 16, 16)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    batch = tasks_of(16).to(dtype=torch.float32)
    found = MAML(net.train(), F.cross_entropy, inner_lr=0.1).meta_gradient(batch)
    assert all(bool(g.isfinite().all()) for g in found.grads.values())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Conv4(5, image_size=15, pooling="max"), ValueError, "image_size of at least 16; got 15"),
        (lambda: Conv4(5, image_size="28"), TypeError, "image_size must be a whole number"),
        (lambda: Conv4(5, pooling="mean"), ValueError, "pooling must be one of stride, max; got 'mean'"),
        (lambda: Conv4(5, running_statistics=True), ValueError, 'with pooling="max" only'),
        (
            lambda: Conv4(5, 3, 4, image_size=84, pooling="max")(torch.rand(2, 3, 80, 84)),
            ValueError,
            r"3, 84, 84\]; got",
        ),
        (lambda: Conv4(5)(torch.rand(2, 3, 28, 28)), ValueError, r"\[N, 1, height, width\], such as 28 by 28"),
        (lambda: ResNet12(5)(torch.rand(2, 1, 84, 84)), ValueError, r"wants images \[N, 3, height, width\]"),
        (lambda: ResNet12(5, widths=(2, 3, 4, 5))(torch.rand(2, 3, 15, 84)), ValueError, "at least 16 by 16"),
        (lambda: ResNet12(5, widths=(64, 160)), ValueError, "widths must be the channels of the four blocks"),
        (lambda: ResNet12(5, widths=(1, 2, 3, 0)), ValueError, "a width in widths must be >= 1; got 0"),
        (lambda: ResNet12(5, drop_rate=1), ValueError, "drop_rate must be in"),
        (lambda: ResNet12(5, drop_rate="0"), TypeError, "drop_rate must be a number"),
        (lambda: ResNet12(0), ValueError, "ways must be >= 1"),
    ],
)
def test_bad_arguments_of_networks_for_larger_images(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_he_normal_weights():
    net = ResNet12(5, widths=(32, 32, 32, 32), generator=generator(0))
    for module in net.features.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert abs(float(module.weight.detach().std()) / math.sqrt(2 / 1.0001 / fan_out) - 1) < 0.1
