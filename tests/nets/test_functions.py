"""The replacements of slow functions under vmap: values and two derivatives against PyTorch's own in a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from derivatives import derivatives, draw
from torch import Tensor
from torch.nn import functional as F

from metamom.maml.under_vmap.functions_by_task import FunctionsByTask
from metamom.nets import kernels
from metamom.nets.kernels import convolutions, normalisations
from metamom.nets.normalisation import normalise

Model = Callable[..., Tensor]


@pytest.fixture(params=["plain", "native"], autouse=True, scope="module")
def implementation(request) -> Iterator[None]:
    """Every test of this file runs on both implementations of the operators."""
    with kernels.native(torch.device("cpu")) if request.param == "native" else nullcontext():
        yield


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch) -> None:
    """Every operator is computed as for small tasks, and as for large ones."""
    monkeypatch.setattr(convolutions, "SMALL", 0 if request.param == "large" else 2**40)
    monkeypatch.setattr(normalisations, "LARGE", 0 if request.param == "large" else 2**40)


def looped(model: Model) -> Model:
    return lambda *args: torch.stack([model(*own) for own in zip(*args, strict=True)])


def batched(model: Model) -> tuple[Model, FunctionsByTask]:
    functions = FunctionsByTask()

    def run(*args: Tensor) -> Tensor:
        with functions:
            return torch.func.vmap(model)(*args)

    return run, functions


def check(model: Model, *args: Tensor, replaced: bool = True) -> None:
    run, functions = batched(model)
    ours, theirs = derivatives(run, args), derivatives(looped(model), args)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda said, i=i: f"derivative {i}: {said}")
    assert functions.seen is replaced


CONVOLUTIONS = {
    "3x3": ((4, 3, 3, 3), {"padding": 1}),
    "no padding": ((4, 3, 3, 3), {}),
    "stride": ((4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "stride of each side": ((4, 3, 3, 2), {"stride": (2, 3), "padding": (0, 1)}),
    "dilation": ((4, 3, 3, 3), {"dilation": (2, 1), "padding": 2}),
    "dilation and stride": ((2, 3, 2, 2), {"dilation": 2, "stride": 2}),
    "groups": ((6, 1, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise with stride": ((3, 1, 3, 3), {"groups": 3, "stride": 2}),
    "1x1": ((5, 3, 1, 1), {}),
    "5x4": ((2, 3, 5, 4), {"padding": (2, 1)}),
    "same": ((2, 3, 3, 5), {"padding": "same"}),
    "same, dilated": ((2, 3, 3, 3), {"padding": "same", "dilation": 2}),
    "valid": ((2, 3, 3, 3), {"padding": "valid"}),
    "a list of one": ((2, 3, 3, 3), {"stride": [2], "padding": [1]}),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.usefixtures("size")
def test_conv2d(name, bias):
    shape, options = CONVOLUTIONS[name]
    for height, width in ((7, 8), (6, 5)):
        x, weight = draw(3, 2, 3, height, width, seed=1), draw(3, *shape, seed=2)
        own = [draw(3, shape[0], seed=3)] if bias else []
        check(lambda *args, options=options: F.conv2d(*args, **options), x, weight, *own)


def test_kernels_that_all_tasks_share():
    weight = draw(4, 3, 3, 3, seed=2)
    check(lambda x: F.conv2d(x, weight, padding=1), draw(3, 2, 3, 6, 6, seed=1))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kernels_that_all_tasks_share_without_a_gradient(name):
    shape, options = CONVOLUTIONS[name]
    x, weight, bias = draw(3, 2, 3, 7, 8, seed=1), draw(*shape, seed=2), draw(shape[0], seed=3)
    run, _ = batched(lambda x: F.conv2d(x, weight, bias, **options))
    found, expected = run(x), torch.stack([F.conv2d(each, weight, bias, **options) for each in x])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pooled, _ = batched(lambda x: F.max_pool2d(F.relu(F.conv2d(x, weight, bias, **options)), 2, ceil_mode=True))
    expected = torch.stack([F.max_pool2d(each, 2, ceil_mode=True) for each in expected.relu()])
    torch.testing.assert_close(pooled(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", [{"padding": "same"}, {"stride": 2, "padding": 1}])
def test_what_pytorch_must_do_is_left_to_it(options):
    """A kernel of even size with padding "same", and images without a batch."""
    if options["padding"] == "same":
        check(
            lambda x, w: F.conv2d(x, w, **options),
            draw(2, 2, 3, 5, 5, seed=1),
            draw(2, 2, 3, 2, 2, seed=2),
            replaced=False,
        )
    check(lambda x, w: F.conv2d(x, w, **options), draw(2, 3, 5, 5, seed=1), draw(2, 2, 3, 3, 3, seed=2), replaced=False)


AVERAGES = {
    "2": {"kernel_size": 2},
    "overlapping": {"kernel_size": (3, 2), "stride": (2, 1)},
    "padded": {"kernel_size": 3, "padding": 1, "stride": []},
    "padding left out": {"kernel_size": [3], "padding": (1, 0), "count_include_pad": False},
    "last windows cut": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "divisor": {"kernel_size": 2, "divisor_override": 3},
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_average_pooling(name, layout):
    x = draw(3, 2, 7, 6, 4, seed=1)
    axes = (0, 3, 1, 2) if layout == "channels last" else (0, 1, 2, 3)

    def model(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.permute(axes) ** 2, **AVERAGES[name])

    last = layout == "channels last"
    check(model, x if last else x.permute(0, 1, 4, 2, 3).contiguous(), replaced=last)


def test_errors_are_those_of_pytorch():
    run, _ = batched(lambda x, w: F.conv2d(x, w))
    for kernel in ((2, 4, 3, 3), (2, 3, 9, 9)):  # channels that do not match; a kernel that does not fit
        with pytest.raises(RuntimeError, match=r"channels|[Kk]ernel size"):
            run(draw(2, 2, 3, 5, 5, seed=1), draw(2, *kernel, seed=2))
    run, _ = batched(lambda x, w: F.batch_norm(x, None, None, w, w, training=True))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(draw(2, 1, 3, 1, 1, seed=1), draw(2, 3, seed=2))


def normalised(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """`F.batch_norm` under vmap. In a loop it is written out, since PyTorch's third derivative of its own is wrong."""
    if torch._C._functorch.is_batchedtensor(x):
        return F.batch_norm(x, None, None, gain, shift, training=True, eps=1e-3)
    centred = x - x.mean((0, 2, 3), keepdim=True)
    scale = torch.rsqrt((centred**2).mean((0, 2, 3), keepdim=True) + 1e-3)
    return centred * scale * gain[:, None, None] + shift[:, None, None]


def test_written_out_normalisation_is_batch_norm():
    x, gain, shift = draw(4, 5, 3, 4, seed=1), draw(5, seed=2), draw(5, seed=3)
    expected = F.batch_norm(x, None, None, gain, shift, training=True, eps=1e-3)
    torch.testing.assert_close(normalised(x, gain, shift), expected, rtol=1e-12, atol=1e-12)


POOLINGS: dict[str, tuple[tuple, dict]] = {
    "2": ((2,), {}),
    "3, stride 2, padding 1": ((3, 2, 1), {}),
    "stride 1": ((2, 1), {}),
    "ceil": ((2,), {"ceil_mode": True}),
    "dilation": (((2, 1),), {"stride": (1, 2), "dilation": (2, 1)}),
    "ceil with padding": ((3, 3, 1), {"ceil_mode": True}),
}


def activations() -> dict[str, Model]:
    return {
        "none": lambda x: x,
        "relu": F.relu,
        "torch.relu": torch.relu,
        "a method": lambda x: x.relu(),
        "in place": lambda x: F.relu(x, inplace=True),
        "leaky": lambda x: F.leaky_relu(x, 0.2),
        "leaky in place": lambda x: F.leaky_relu(x, 0.1, inplace=True),
        "negative slope": lambda x: F.leaky_relu(x, -0.3),
        "a steep slope": lambda x: F.leaky_relu(x, 1.5),
        "gelu": F.gelu,
        "twice": lambda x: F.leaky_relu(F.relu(x), 0.1),
    }


@pytest.mark.parametrize("activation", activations())
@pytest.mark.usefixtures("size")
def test_norm_and_activation(activation):
    f = activations()[activation]
    x, gain, shift = draw(3, 4, 5, 3, 4, seed=1), draw(3, 5, seed=2), draw(3, 5, seed=3)
    check(lambda *args: f(normalised(*args)), x, gain, shift)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.usefixtures("size")
def test_norm_activation_and_pooling(pooling):
    args, options = POOLINGS[pooling]
    x, gain, shift = draw(3, 4, 5, 7, 6, seed=1), draw(3, 5, seed=2), draw(3, 5, seed=3)
    for name in ("none", "relu", "in place", "leaky", "gelu"):
        f = activations()[name]
        check(lambda *own, f=f: F.max_pool2d(f(normalised(*own)), *args, **options), x, gain, shift)


def test_indices_of_a_pooling():
    def model(*args: Tensor) -> Tensor:
        values, places = F.max_pool2d(F.relu(normalised(*args)), 2, return_indices=True)
        return values * places

    check(model, draw(3, 4, 5, 6, 6, seed=1), draw(3, 5, seed=2), draw(3, 5, seed=3))


def test_more_channels_than_a_block_has():
    x, gain, shift = draw(2, 2, 70, 4, 4, seed=1), draw(2, 70, seed=2), draw(2, 70, seed=3)
    check(lambda *args: F.max_pool2d(F.relu(normalised(*args)), 2), x, gain, shift)


def _changed_in_place(x: Tensor) -> Tensor:
    x *= 2.0
    return F.relu(x)


def _view_changed(x: Tensor) -> Tensor:
    x[:, 0].add_(3.0)
    return F.max_pool2d(F.relu(x), 2)


def _activation_changed(x: Tensor) -> Tensor:
    z = F.leaky_relu(x, 0.1)
    z[..., 0].mul_(-1.0)
    return F.max_pool2d(z, 2)


def _both_used(x: Tensor) -> Tensor:
    return F.relu(x) + x + F.max_pool2d(F.relu(x), 1)


def _in_place_and_used(x: Tensor) -> Tensor:
    z = F.relu(x, inplace=True)
    return F.max_pool2d(z, 1) + x


def _pooled_and_changed(x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(x), 2).sub_(1.0)


def _of_a_view(x: Tensor) -> Tensor:
    return F.relu(x[:2])


@pytest.mark.parametrize(
    "then",
    [
        _changed_in_place,
        _view_changed,
        _activation_changed,
        _both_used,
        _in_place_and_used,
        _pooled_and_changed,
        _of_a_view,
    ],
)
def test_what_happens_between_a_norm_and_its_activation(then):
    x, gain, shift = draw(3, 4, 5, 4, 4, seed=1), draw(3, 5, seed=2), draw(3, 5, seed=3)
    check(lambda *args: then(normalised(*args)), x, gain, shift)


def test_norm_without_gain_and_shift_and_with_running_statistics_are_left_to_pytorch():
    mean, var = draw(5, seed=4), draw(5, seed=5).exp()
    x, gain, shift = draw(3, 4, 5, 4, 4, seed=1), draw(3, 5, seed=2), draw(3, 5, seed=3)
    check(lambda x: F.relu(F.batch_norm(x, None, None, training=True)), x, replaced=False)
    check(lambda x, a, b: F.relu(F.batch_norm(x, mean, var, a, b)), x, gain, shift, replaced=False)


def test_nan_and_infinite_activations_stay():
    x = draw(2, 2, 3, 4, 4, seed=1)
    x[0, 0, 0, 0, 0] = float("nan")
    ones = torch.ones(2, 3, dtype=torch.float64)
    run, _ = batched(lambda *args: F.max_pool2d(F.relu(normalised(*args)), 2))
    out = run(x, ones, ones)
    assert out[0, :, 0].isnan().all()
    assert out[0, :, 1:].isfinite().all()
    assert out[1].isfinite().all()


def test_the_layout_of_images_changes_nothing():
    x, weight = draw(2, 3, 4, 6, 6, seed=1), draw(2, 5, 4, 3, 3, seed=2)
    last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    run, _ = batched(lambda x, w: F.conv2d(x, w, padding=1))
    torch.testing.assert_close(run(x, weight), run(last, weight), rtol=0, atol=1e-12)


def of_images(x: Tensor, gain: Tensor | None, shift: Tensor | None, sets: int) -> Tensor:
    """Group normalisation under vmap; instance normalisation with 0 sets. In a loop it is written out."""
    if torch._C._functorch.is_batchedtensor(x):
        if sets:
            return F.group_norm(x, sets, gain, shift, eps=1e-3)
        return F.instance_norm(x, weight=gain, bias=shift, eps=1e-3)
    rows = x.reshape(len(x), sets or x.shape[1], -1)
    centred = rows - rows.mean(2, keepdim=True)
    out = (centred * torch.rsqrt((centred**2).mean(2, keepdim=True) + 1e-3)).view(x.shape)
    return out if gain is None or shift is None else out * gain[:, None, None] + shift[:, None, None]


@pytest.mark.parametrize("sets", [0, 1, 2, 6])
def test_statistics_of_each_image(sets):
    x, gain, shift = draw(3, 4, 6, 5, 4, seed=1), draw(3, 6, seed=2), draw(3, 6, seed=3)
    for name in ("none", "relu", "in place", "leaky", "gelu"):
        f = activations()[name]
        check(lambda *own, f=f: f(of_images(*own, sets)), x, gain, shift)
        check(lambda *own, f=f: F.max_pool2d(f(of_images(*own, sets)), 2), x, gain, shift)
    check(lambda x: F.relu(of_images(x, None, None, sets)), x)
    check(lambda *own: F.relu(of_images(*own, sets)), x[:, :1], gain, shift)  # one image


@pytest.mark.parametrize("sets", [0, 3])
def test_what_pytorch_must_normalise_is_left_to_it(sets):
    """Points without height and width."""
    x, gain, shift = draw(3, 4, 6, 5, seed=1), draw(3, 6, seed=2), draw(3, 6, seed=3)
    run, functions = batched(lambda *own: F.group_norm(own[0], 3, *own[1:]))
    expected = looped(lambda *own: F.group_norm(own[0], 3, *own[1:]))
    if not sets:
        run, functions = batched(lambda x, a, b: F.instance_norm(x, weight=a, bias=b))
        expected = looped(lambda x, a, b: F.instance_norm(x, weight=a, bias=b))
    torch.testing.assert_close(run(x, gain, shift), expected(x, gain, shift), rtol=1e-12, atol=1e-12)
    assert not functions.seen
    wrong, _ = batched(lambda x: F.group_norm(x, 4))
    with pytest.raises(RuntimeError, match="divisible"):
        wrong(draw(2, 2, 6, 3, 3, seed=1))


@pytest.mark.parametrize("sets", [0, 2])
def test_derivatives_of_a_normalisation_numerically(sets):
    y, gain, shift = draw(2, 1, 2, 3, 4, seed=1), draw(2, 4, seed=2), draw(2, 4, seed=3)
    own = [x.requires_grad_() for x in (y, gain, shift)]
    run = lambda *args: normalise(*args, 1e-3, sets).value  # noqa: E731
    assert torch.autograd.gradcheck(run, own)
    assert torch.autograd.gradgradcheck(run, own)
