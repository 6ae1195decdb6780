"""The networks: shapes, initial weights from a named generator, and batch statistics."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from metamom.nets.layers import BatchNormReLU
from metamom.nets.models import Conv4, SinusoidMLP, use_batch_statistics

MAKERS: dict[str, Callable[..., nn.Module]] = {
    "SinusoidMLP": SinusoidMLP,
    "Conv4": lambda **options: Conv4(5, hidden=8, **options),
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
    for module in net.modules():
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
