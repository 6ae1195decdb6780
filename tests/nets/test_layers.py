"""The layers against plain PyTorch, with their first, second and third derivatives, and under `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count

import pytest
import torch
from cases import loop_over
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from metamom.nets import kernels
from metamom.nets.layers import BatchNormReLU, StridedConv, _Fold, _Unfold
from metamom.nets.models import Conv4, SinusoidMLP

CPU = torch.device("cpu")
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=["plain", "native"], autouse=True, scope="module")
def implementation(request) -> Iterator[None]:
    """Every test of this file runs on both implementations of the operators."""
    with kernels.native(CPU) if request.param == "native" else nullcontext():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 with every parameter drawn, so that gains of 1 and shifts of 0 hide nothing."""
    model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * draw(*p.shape, seed=100 * seed + i) + (1.0 if p.dim() == 1 else 0.0))
    return model


def plain_conv(layer: StridedConv, images: Tensor) -> Tensor:
    return F.conv2d(images.movedim(-1, 1), layer.weight, stride=2, padding=1).movedim(1, -1)


def pre_activation(layer: BatchNormReLU, x: Tensor) -> Tensor:
    return F.batch_norm(x.movedim(-1, 1), None, None, layer.weight, layer.bias, training=True, eps=layer.eps)


def plain_norm_relu(layer: BatchNormReLU, x: Tensor) -> Tensor:
    return F.relu(pre_activation(layer, x)).movedim(1, -1)


@loop_over(height=(1, 2, 7, 28), width=(1, 2, 7, 28), channels=((1, 1), (1, 4), (3, 2)))
def test_strided_conv_is_conv2d(height, width, channels):
    layer = randomised(StridedConv(*channels))
    images = draw(2, height, width, channels[0], seed=7).requires_grad_()
    out, expected = layer(images), plain_conv(layer, images)
    torch.testing.assert_close(out, expected, **TIGHT)
    cotangent = draw(*out.shape, seed=8)
    inputs = (images, layer.weight)
    for ours, theirs in zip(*(torch.autograd.grad(o, inputs, cotangent) for o in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)


def test_strided_conv_has_the_weights_of_conv2d():
    """One state dict serves both, whatever the layout of the weights in memory."""
    layer = StridedConv(3, 4)
    twin = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    twin.load_state_dict(layer.state_dict())
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(layer.weight, twin.weight)
    images = torch.randn(2, 9, 9, 3)
    torch.testing.assert_close(layer(images), twin(images.movedim(-1, 1)).movedim(1, -1))


@loop_over(shape=((5, 3), (2, 4, 1), (2, 3, 3, 5), (1, 1, 1, 2), (2, 7, 7, 65)), eps=(1e-5, 0.1))
def test_batch_norm_relu_is_batch_norm_and_relu(shape, eps):
    layer = randomised(BatchNormReLU(shape[-1], eps))
    x = 3 * draw(*shape, seed=7) + 5
    # torch refuses to normalise one position; x - mean is zero there
    alone = x.numel() == x.shape[-1]
    expected = F.relu(layer.bias).expand(shape) if alone else plain_norm_relu(layer, x)
    torch.testing.assert_close(layer(x), expected, **TIGHT)


def test_batch_norm_relu_takes_images_that_are_not_contiguous():
    layer = randomised(BatchNormReLU(3))
    for x in (draw(2, 3, 5, 4).movedim(1, -1), draw(1, 3, 5, 4).movedim(1, -1), draw(4, 5, 6)[..., ::2]):
        torch.testing.assert_close(layer(x), plain_norm_relu(layer, x), **TIGHT)


def test_sixteen_bits_stay_sixteen_but_the_statistics_do_not():
    """4096 positions around 300: a sum in bfloat16 would stop growing long before the end."""
    layer = BatchNormReLU(2)
    x = (300 + 4 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, layer(x.float()).to(torch.bfloat16), rtol=0, atol=0)


def smallest_pre_activation(model: nn.Module, x: Tensor) -> float:
    """How near a ReLU of the model comes to its kink on this input."""
    distances: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        value = pre_activation(module, args[0]) if isinstance(module, BatchNormReLU) else args[0]
        distances.append(value.detach().abs().min())

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, (BatchNormReLU, nn.ReLU))]
    model(x)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(distances).min()) if distances else float("inf")


def smooth(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Tensor]:
    """A model and an input at which finite differences meet no kink."""
    for seed in count():
        model, x = randomised(make(), seed), draw(*shape, seed=99 + seed)
        if smallest_pre_activation(model, x) > 1e-3:
            return model, x
    raise AssertionError


SMOOTH = {
    "StridedConv": (lambda: StridedConv(2, 3), (2, 5, 4, 2)),
    "BatchNormReLU": (lambda: BatchNormReLU(3), (2, 3, 2, 3)),
    "SinusoidMLP": (lambda: SinusoidMLP((4, 3)), (5, 1)),
    "Conv4": (lambda: Conv4(2, hidden=3), (2, 1, 28, 28)),
}
each_model = pytest.mark.parametrize("name", SMOOTH)


def as_function(model: nn.Module) -> Callable[..., Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return lambda x, *weights: functional_call(model, dict(zip(names, weights, strict=True)), (x,))


def gradcheck_inputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.detach().clone().requires_grad_() for p in (x, *model.parameters()))


@each_model
def test_gradcheck(name):
    model, x = smooth(SMOOTH[name][0], *SMOOTH[name][1])
    large = name == "Conv4"
    assert torch.autograd.gradcheck(as_function(model), gradcheck_inputs(model, x), fast_mode=large)


@each_model
def test_gradgradcheck(name):
    model, x = smooth(SMOOTH[name][0], *SMOOTH[name][1])
    large = name == "Conv4"
    assert torch.autograd.gradgradcheck(as_function(model), gradcheck_inputs(model, x), fast_mode=large)


def third_derivatives(f: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Derivatives of a mixed second directional derivative of ``sum(sin(f))``."""
    value = torch.sin(f(*inputs)).sum()
    for order in (1, 2):
        grads = torch.autograd.grad(value, inputs, create_graph=True)
        value = sum((g * draw(*g.shape, seed=10 * order + i)).sum() for i, g in enumerate(grads))
    return torch.autograd.grad(value, inputs)


def test_third_derivatives_of_batch_norm_relu():
    layer, x = smooth(lambda: BatchNormReLU(3), 4, 2, 3)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean((0, 1))
        return F.relu(centred / torch.sqrt((centred**2).mean((0, 1)) + layer.eps) * weight + bias)

    ours, theirs = (third_derivatives(f, gradcheck_inputs(layer, x)) for f in (as_function(layer), plain))
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 1e-2
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_third_derivatives_of_strided_conv():
    layer, x = randomised(StridedConv(2, 3)), draw(2, 5, 4, 2, seed=7)
    plain = lambda x, weight: F.conv2d(x.movedim(-1, 1), weight, stride=2, padding=1).movedim(1, -1)  # noqa: E731
    ours, theirs = (third_derivatives(f, gradcheck_inputs(layer, x)) for f in (as_function(layer), plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


TASKS = 3


def of_tasks(x: Tensor, dim: int | None, seed: int) -> Tensor:
    """Each task its own, along a new axis ``dim``; or the same for all."""
    if dim is None:
        return x.detach()
    return (x.detach() + 0.1 * draw(TASKS, *x.shape, seed=seed)).movedim(0, dim)


def of_task(x: Tensor, dim: int | None, task: int) -> Tensor:
    return x if dim is None else x.select(dim, task)


def plain_sum(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: torch.sin(f(*args)).sum()


def adapted_loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss after a gradient step in all weights: its gradient takes second derivatives."""
    loss = plain_sum(f)

    def after_a_step(x: Tensor, *weights: Tensor) -> Tensor:
        steps = grad(loss, tuple(range(1, 1 + len(weights))))(x, *weights)
        return loss(x, *(w - 0.1 * g for w, g in zip(weights, steps, strict=True)))

    return after_a_step


@pytest.mark.parametrize(("x_dim", "weights_dim"), [(0, 0), (2, 1), (0, None), (None, 0)])
@each_model
def test_vmap_is_a_loop_over_tasks(name, x_dim, weights_dim):
    """Predictions, gradients and gradients through a gradient step; weights and inputs of each task or shared."""
    make, shape = SMOOTH[name]
    model = randomised(make())
    weights = [of_tasks(p, weights_dim, seed=60 + i) for i, p in enumerate(model.parameters())]
    args = [of_tasks(draw(*shape, seed=7), x_dim, seed=50), *weights]
    dims = [x_dim, *(weights_dim for _ in weights)]
    f = as_function(model)
    every = tuple(range(len(args)))
    for g in (f, grad(plain_sum(f), every), grad(adapted_loss(f), every)):
        batched = vmap(g, in_dims=tuple(dims))(*args)
        each = [g(*(of_task(a, dim, t) for a, dim in zip(args, dims, strict=True))) for t in range(TASKS)]
        if isinstance(batched, Tensor):
            batched, each = (batched,), [(one,) for one in each]
        for ours, *theirs in zip(batched, *each, strict=True):
            torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-10, atol=1e-10)


@each_model
def test_vmap_within_vmap(name):
    make, shape = SMOOTH[name]
    model = randomised(make())
    x = draw(2, TASKS, *shape, seed=7)
    weights = [of_tasks(p, 0, seed=60 + i) for i, p in enumerate(model.parameters())]
    g = grad(adapted_loss(as_function(model)), tuple(range(1, 1 + len(weights))))
    nested = vmap(vmap(g), in_dims=(0, *(None for _ in weights)))(x, *weights)
    each = [[g(x[i, t], *(w[t] for w in weights)) for t in range(TASKS)] for i in range(2)]
    for k, ours in enumerate(nested):
        theirs = torch.stack([torch.stack([each[i][t][k] for t in range(TASKS)]) for i in range(2)])
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@given(sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)))
@settings(deadline=None)
def test_unfold_and_fold_are_adjoint(sizes):
    """``<unfold(x), p> == <x, fold(p)>``."""
    B, H, W, C = sizes
    x, p = draw(B, H, W, C), draw(B, (H + 1) // 2, (W + 1) // 2, 9 * C, seed=1)
    unfolded, folded = _Unfold.run(x), _Fold.run(p, H, W)
    torch.testing.assert_close((unfolded * p).sum(), (x * folded).sum(), **TIGHT)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (StridedConv(3, 4), (2, 3, 28, 28), r"StridedConv wants images \[N, H, W, 3\].*got \(2, 3, 28, 28\)"),
        (StridedConv(3, 4), (28, 28, 3), r"StridedConv wants images \[N, H, W, 3\].*got \(28, 28, 3\)"),
        (BatchNormReLU(4), (2, 4, 7, 7), r"BatchNormReLU wants \[N, \.\.\., 4\].*got \(2, 4, 7, 7\)"),
        (Conv4(5), (2, 28, 28), r"Conv4 wants images \[N, 1, height, width\].*got \(2, 28, 28\)"),
        (Conv4(5, channels=3), (2, 28, 28, 3), r"Conv4 wants images \[N, 3, height, width\].*got \(2, 28, 28, 3\)"),
        (
            Conv4(5, 3, 4, pooling="max"),
            (2, 3, 64, 64),
            r"Conv4 wants images \[N, 3, 28, 28\]; got \(2, 3, 64, 64\)\. It is made for image_size=28: create it with "
            r"image_size=64, or resize the images\.$",
        ),
        (
            Conv4(5, 3, 4, pooling="max"),
            (2, 3, 64, 48),
            r"got \(2, 3, 64, 48\)\. It is made for image_size=28: resize the images\.$",
        ),
    ],
)
def test_inputs_of_another_shape(module, shape, message):
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(shape))
