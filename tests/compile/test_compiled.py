"""Compiled meta-gradients: the same numbers as plain ones, and each graph made once."""

from __future__ import annotations

import pickle
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor
from problems import (
    MODELS,
    REGRESSION,
    assert_close,
    conv4,
    generator,
    image_batch,
    plain_conv4,
    problem,
    randomised,
    regression_batch,
    relative_error,
    small_batch,
)
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from metamom import MAML, TaskBatch, kernels
from metamom.nets.kernels.build import CompilerError
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Sinusoid

pytestmark = pytest.mark.xdist_group("compile")  # while one process builds the kernels, others need not wait
Grads = dict[str, Tensor]


class Pairs(nn.Module):
    """Scores every pair of points, as additive attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(2, 20, bias=False), nn.Linear(2, 20, bias=False)
        self.value = nn.Linear(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.query(x).view(len(x), 1, -1) + self.key(x).view(1, len(x), -1)
        return self.value(torch.tanh(pairs)).mean(1)


def test_a_model_that_scores_pairs_compiles(traced):
    model = Pairs().double()
    points = [torch.randn(2, 25, d, generator=generator(d + s), dtype=torch.float64) for s in (0, 5) for d in (2, 1)]
    batch = TaskBatch(*points)
    ours, theirs = (MAML(model, F.mse_loss, compile=c).meta_gradient(batch).grads for c in (True, False))
    assert relative_error(ours, theirs) < 1e-12
    assert len(traced) == 1


# the same numbers


@pytest.mark.parametrize(
    ("workers", "chunk_size", "options"),
    [
        pytest.param(1, None, {}, marks=pytest.mark.slow),
        pytest.param(2, 1, {}, marks=pytest.mark.slow),
        (4, 3, {}),
        (1, 2, {"inner_steps": 2, "learn_inner_lr": "tensor"}),
        (2, None, {"estimator": "first-order"}),
        (2, 3, {"adapt": ["head"]}),
        pytest.param(2, None, {"learn_inner_lr": "tensor"}, marks=pytest.mark.slow),
        (1, None, {"learn_inner_lr": "entry"}),
    ],
)
def test_the_traced_graph_agrees_with_plain_layers(traced, workers, chunk_size, options):
    model, batch = conv4(), image_batch(tasks=4)
    options = {"inner_lr": 0.1, **options}
    plain = MAML(plain_conv4(model), F.cross_entropy, **options).meta_gradient(batch, workers)
    learner = MAML(model, F.cross_entropy, chunk_size=chunk_size, compile=True, **options)
    for _ in range(2):
        grads, losses = learner.meta_gradient(batch, workers)
        assert {n: g.shape for n, g in grads.items()} == {n: g.shape for n, g in plain.grads.items()}
        assert relative_error(grads, plain.grads) < 1e-10
        torch.testing.assert_close(losses, plain.losses, rtol=1e-10, atol=1e-10)
        assert not any(g.requires_grad for g in grads.values())
    # chunks are of equal size here: at most three of four tasks are two
    assert len(traced) == 1


class Quartic(nn.Module):
    """Predicts the sum of its weights' fourth powers, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.x.pow(4).sum() * torch.ones_like(inputs[..., :1])


def test_second_derivatives_of_a_compiled_learner(traced):
    """pytorch 183603: eager gives 3, 27, 75, 147 and the compiled function an error; 91469, 181581: silently wrong.

    With u = x - a g(x), g(x) = 4 x³, the query loss Σ u⁴ has the derivative 4 u³ (1 - a 12 x²).
    """
    model, zero = Quartic(), torch.zeros(1, 1, 1, dtype=torch.float64)
    batch = TaskBatch(zero, zero, zero, zero)
    learner = MAML(model, nn.L1Loss(), inner_lr=0.01, compile=True)
    grads = learner.meta_gradient(batch).grads["x"][0]
    x = model.x.detach()
    u = x - 0.01 * 4 * x**3
    curvature = 12 * x**2
    assert curvature.tolist() == [3.0, 27.0, 75.0, 147.0]
    torch.testing.assert_close(grads, 4 * u**3 * (1 - 0.01 * curvature))
    assert len(traced) == 1


@pytest.mark.parametrize("blocks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchinductor_agrees_with_plain_layers(blocks):
    """The real compiler, with metamom's own operators in the graph: one for both workers' chunks of one task.

    Of two blocks the first has images, and the second has activations that need gradients; more take only longer.
    """
    model = conv4()
    reference = plain_conv4(model)
    model.features, reference.features = model.features[:blocks], reference.features[:blocks]
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, chunk_size=1, compile=True)
    plain = MAML(reference, F.cross_entropy, inner_lr=0.1)
    for batch in (image_batch(0), image_batch(10)):
        grads, losses = learner.meta_gradient(batch, workers=2)
        expected = plain.meta_gradient(batch, workers=2)
        assert relative_error(grads, expected.grads) < 1e-10
        torch.testing.assert_close(losses, expected.losses, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_torchinductor_in_fewer_bits_is_as_exact_as_the_plain_path(autocast):
    """Both roundings against float64, over ten batches: TorchInductor's may be another one, and no worse."""
    exact = MAML(conv4(hidden=16), F.cross_entropy, inner_lr=0.1)
    fewer = {
        compile: MAML(conv4(hidden=16, dtype=torch.float32), F.cross_entropy, inner_lr=0.1, compile=compile,
                      autocast=autocast)
        for compile in (False, True)
    }  # fmt: skip
    errors: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(10):
        batch = image_batch(10 * seed, shots=(1, 5))
        expected = exact.meta_gradient(batch, workers=2)
        for compile, learner in fewer.items():
            grads, losses = learner.meta_gradient(batch.to("cpu", torch.float32), workers=2)
            errors[compile].append(relative_error(grads, expected.grads))
            # a unit next to zero in one of these batches moves a loss by 4.5e-4, in PyTorch's own layers too
            bits = {"rtol": 1e-3, "atol": 1e-3} if autocast is None else {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(losses.double(), expected.losses, **bits)
    plain, compiled = (statistics.median(errors[compile]) for compile in (False, True))
    assert compiled < 2 * plain
    assert plain < (0.02 if autocast is None else 0.5)  # a unit on the other side of zero moves a whole gradient


class Scaled(nn.Module):
    """A linear model of inputs scaled by a buffer and shifted by a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("scale", torch.tensor(2.0))
        self.shift = nn.Parameter(torch.tensor([0.5, 0.25]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale + self.shift)


def in_place(model: Scaled) -> None:
    model.scale.mul_(3)
    model.shift.add_(1)


def by_a_state_dict(model: Scaled) -> None:
    model.load_state_dict({name: 0.7 * value for name, value in model.state_dict().items()})


def by_others(model: Scaled) -> None:
    model.scale = 3 * model.scale
    model.shift = nn.Parameter(model.shift + 1, requires_grad=False)


def by_an_optimizer(model: Scaled) -> None:
    model.linear.weight.mul_(2)


@pytest.mark.parametrize("change", [in_place, by_a_state_dict, by_an_optimizer, by_others])
def test_values_that_change_are_followed(traced, change):
    """Of weights, and of buffers and frozen parameters too, which are not among the graph's arguments."""
    model, batch = Scaled().double(), regression_batch(dim=2)
    learner = MAML(model, F.mse_loss, compile=True)
    before = learner.meta_gradient(batch).grads
    with torch.no_grad():
        change(model)
    after = MAML(model, F.mse_loss).meta_gradient(batch).grads
    assert relative_error(before, after) > 1e-2
    assert relative_error(learner.meta_gradient(batch).grads, after) < 1e-12


def test_compiling_at_every_call_is_reported_once_and_keeps_no_graph_for_ever(traced):
    """A buffer that is replaced at each step is followed, and costs a compilation each time: nobody wants that."""
    model, batch = Scaled().double(), regression_batch(dim=2)
    learner = MAML(model, F.mse_loss, compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(17):
            model.scale = 1.1 * model.scale
            expected = MAML(model, F.mse_loss).meta_gradient(batch).grads
            assert relative_error(learner.meta_gradient(batch).grads, expected) < 1e-12
    assert len(traced) == 17
    assert [str(warning.message)[:46] for warning in caught] == ["the meta-gradient has been compiled 8 times, w"]
    assert len(learner._gradients.compiled.graphs) == 16
    learner.meta_gradient(batch)
    assert len(traced) == 17  # the newest is kept


def test_each_shape_and_setting_is_compiled_once(traced):
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 1)).double()
    learner = MAML(model, F.mse_loss, compile=True)

    def compilations(batch: TaskBatch, workers: int = 1) -> int:
        grads = learner.meta_gradient(batch, workers).grads
        expected = MAML(model, F.mse_loss, inner_steps=learner.inner_steps).meta_gradient(batch, workers).grads
        assert relative_error(grads, expected) < 1e-12
        return len(traced)

    assert compilations(small_batch()) == 1
    assert compilations(small_batch(seed=5)) == 1
    assert compilations(small_batch(tasks=4)) == 2
    assert compilations(small_batch(tasks=4), workers=2) == 3
    learner.inner_steps = 2
    assert compilations(small_batch()) == 4
    model.eval()
    assert compilations(small_batch()) == 5
    model.train()
    assert compilations(small_batch()) == 5


def test_another_loss_is_not_taken_for_the_old_one(traced):
    learner = MAML(nn.Linear(1, 1).double(), F.mse_loss, compile=True)
    learner.meta_gradient(small_batch())
    learner.loss_fn = F.l1_loss
    losses = learner.meta_gradient(small_batch()).losses
    torch.testing.assert_close(losses, MAML(learner.model, F.l1_loss).meta_gradient(small_batch()).losses)
    assert len(traced) == 2


def a_module(model: nn.Sequential) -> None:
    model[1] = nn.Sigmoid()


def a_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, given, out: 3 * out)


def a_hook_before(model: nn.Sequential) -> None:
    model[0].register_forward_pre_hook(lambda module, given: (given[0] + 1,))


@pytest.mark.parametrize("change", [a_module, a_hook, a_hook_before])
def test_modules_and_hooks_that_change_are_followed(traced, change):
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    learner = MAML(model, F.mse_loss, compile=True)
    before = learner.meta_gradient(small_batch()).losses
    change(model)
    after = MAML(model, F.mse_loss).meta_gradient(small_batch()).losses
    assert not torch.allclose(before, after)
    torch.testing.assert_close(learner.meta_gradient(small_batch()).losses, after)
    assert len(traced) == 2


def test_tracing_makes_one_mode_for_the_shapes_of_all_nodes(traced, monkeypatch):
    """Not one for each node, as `make_fx` does where there is none, which took half of its time."""
    made, begin = [], FakeTensorMode.__init__

    def counted(mode: FakeTensorMode, *args: Any, **options: Any) -> None:
        made.append(mode)
        begin(mode, *args, **options)

    monkeypatch.setattr(FakeTensorMode, "__init__", counted)
    MAML(nn.Linear(1, 1).double(), F.mse_loss, compile=True).meta_gradient(small_batch())
    assert (len(traced), len(made)) == (1, 1)


def test_compiling_draws_nothing(traced):
    """Or a run that is resumed, and compiles again, would draw other numbers than one that went on."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    learner = MAML(model, F.mse_loss, compile=True)
    with torch.random.fork_rng(devices=[]):
        losses = []
        for _ in range(2):  # compiling, and compiled
            torch.manual_seed(0)
            losses.append(learner.meta_gradient(small_batch()).losses)
            losses.append(torch.rand(1))
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])
    assert len(traced) == 1


def test_a_learner_that_has_compiled_pickles(traced):
    learner = MAML(nn.Linear(1, 1).double(), F.mse_loss, compile=True)
    losses = learner.meta_gradient(small_batch()).losses
    copied = pickle.loads(pickle.dumps(learner))
    assert torch.equal(copied.meta_gradient(small_batch()).losses, losses)
    assert len(traced) == 2


def test_autocast_around_it_is_not_compiled_in(traced):
    learner = MAML(nn.Linear(1, 8), lambda p, y: (p.float().mean() - y.mean()) ** 2, compile=True)
    batch = small_batch(dtype=torch.float32)
    exact = learner.meta_gradient(batch).losses
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(learner.meta_gradient(batch).losses, exact)
    assert torch.equal(learner.meta_gradient(batch).losses, exact)
    assert len(traced) == 2


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((name, 2) for name in MODELS),
        *((name, 1) if name in REGRESSION else pytest.param(name, 1, marks=pytest.mark.slow) for name in MODELS),
    ],
)
def test_traced_agrees_with_the_loop(name, steps, monkeypatch):
    """The graph that is to be compiled, run as it is."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    model, loss_fn, batch = problem(name)
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=steps, learn_inner_lr="tensor", compile=True)
    learned = learner.step_sizes.learned()
    for _ in range(2):
        grads, _ = learner.meta_gradient(batch, workers=2)
        for i, part in enumerate(batch.split(2)):
            expected, _ = slow_meta_gradient(model, loss_fn, part, steps=steps, learned=learned)
            assert_close({n: g[i] for n, g in grads.items()}, expected)
        with torch.no_grad():
            for p in learner.parameters():
                p.mul_(1.1)


def test_nothing_that_changes_is_compiled_in(monkeypatch):
    graphs = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graphs.append(graph) or graph)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double().eval()
    model[0].bias.requires_grad_(False)
    model.register_buffer("unused", torch.zeros(2))
    inner_lr = {n: torch.tensor(0.1) for n, p in model.named_parameters() if p.requires_grad}
    eager = MAML(model, F.mse_loss, inner_lr=inner_lr)
    compiled = MAML(model, F.mse_loss, inner_lr=inner_lr, compile=True)

    def check(number_of_graphs: int, workers: int = 1) -> None:
        batch = regression_batch(seed=len(graphs))
        assert_close(compiled.meta_gradient(batch, workers).grads, eager.meta_gradient(batch, workers).grads, 1e-12)
        assert len(graphs) == number_of_graphs

    check(1)
    check(1)
    check(2, workers=2)
    with torch.no_grad():
        model[0].bias.add_(1.0)  # frozen
        for learner in (eager, compiled):
            for alpha in learner.step_sizes.buffers():
                alpha.mul_(2)
    check(2)
    eager.inner_steps = compiled.inner_steps = 2
    check(3)
    model.train()
    batch = regression_batch()
    first, second = (compiled.meta_gradient(batch).losses for _ in range(2))
    assert len(graphs) == 4
    assert not torch.equal(first, second)  # dropout is on, and draws again


def small_batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("make", "steps", "dtype", "tolerance"),
    [
        pytest.param(lambda: SinusoidMLP((5,)), 1, torch.float32, 1e-6, id="MLP in float32"),
        pytest.param(lambda: SinusoidMLP((5,)), 2, torch.float32, 1e-6, id="two steps", marks=pytest.mark.slow),
        pytest.param(small_batch_norm_net, 1, torch.float64, 1e-12, id="BatchNorm in float64", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_is_eager(make, steps, dtype, tolerance):
    net = randomised(make()).to(dtype)
    batch = Sinusoid(shots=3, queries=3, seed=0).sample(0, 4).to(dtype=dtype)
    options = {"inner_lr": 0.01, "inner_steps": steps}
    eager, compiled = MAML(net, F.mse_loss, **options), MAML(net, F.mse_loss, compile=True, **options)
    for _ in range(2):  # the second time with other weights: they must not be compiled in
        ours, theirs = compiled.meta_gradient(batch, workers=2), eager.meta_gradient(batch, workers=2)
        assert_close(ours.grads, theirs.grads, tolerance)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=tolerance, atol=0)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)


def test_a_library_that_an_interrupt_cut_short_is_made_again(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    damaged, foreign = tmp_path / "ab" / "kernel.main.so", tmp_path.parent / "foreign.so"
    damaged.parent.mkdir()
    for path in (damaged, foreign):
        path.write_bytes(b"")

    def compile(graph, inputs, options):
        if damaged.exists():
            raise RuntimeError(f"ImportError: {damaged}: file too short")
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    learner = MAML(nn.Linear(1, 1), F.mse_loss, compile=True)
    learner.meta_gradient(Sinusoid(2, 2).sample(0, 2))
    assert not damaged.exists()

    def fails(graph, inputs, options):
        raise RuntimeError(f"ImportError: {foreign}: file too short")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    with pytest.raises(CompilerError, match="foreign"):
        MAML(nn.Linear(1, 1), F.mse_loss, compile=True).meta_gradient(Sinusoid(2, 2).sample(0, 2))
    assert foreign.exists()


# float32


def recorded(monkeypatch, run: Callable[[], Grads]) -> tuple[Grads, list[Tensor]]:
    """What ``run`` returns, and which units were active in each layer of each pass."""
    active: list[Tensor] = []
    activate = kernels.activate

    def noting(*args: Any) -> Tensor:
        out = activate(*args)
        active.append(out > 0)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "activate", noting)
        return run(), active


def compared(model: Conv4, batch: TaskBatch, monkeypatch, **options: Any) -> tuple[float, bool]:
    """The error of a plain float32 meta-gradient relative to float64, and whether the same units were active."""
    both = []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        learner = MAML(model, F.cross_entropy, inner_lr=0.1, **options)
        cast = TaskBatch(*(x.to(dtype) if x.is_floating_point() else x for x in batch[:4]))
        both.append(recorded(monkeypatch, lambda: learner.meta_gradient(cast).grads))  # noqa: B023
    (narrow, on), (wide, on_exact) = both
    same = all(torch.equal(a, b) for a, b in zip(on, on_exact, strict=True))
    return relative_error(narrow, wide), same


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_float32_is_exact_to_its_rounding(traced, steps):
    """The median: where a pre-activation lies within rounding of zero, float32 may take the other side; see below."""
    errors = []
    learner = MAML(conv4(8, dtype=torch.float32), F.cross_entropy, inner_lr=0.1, inner_steps=steps, compile=True)
    plain = MAML(plain_conv4(conv4(8)), F.cross_entropy, inner_lr=0.1, inner_steps=steps)
    for seed in range(0, 50, 10):
        ours = learner.meta_gradient(image_batch(seed, dtype=torch.float32)).grads
        assert {g.dtype for g in ours.values()} == {torch.float32}
        errors.append(relative_error(ours, plain.meta_gradient(image_batch(seed)).grads))
    assert len(traced) == 1
    assert statistics.median(errors) < 1e-5, errors


def put_a_unit_on_its_kink(model: Conv4, batch: TaskBatch, unit: int) -> None:
    """Move one shift of the last block so that ``unit`` is zero in the first task, up to float32's rounding."""
    caught: list[Tensor] = []
    convolution, norm = model.features[-1]
    hook = convolution.register_forward_hook(lambda module, args, out: caught.append(out.detach()))
    model.double()(batch.support_x[0].double())
    hook.remove()
    value = F.batch_norm(caught[0].movedim(-1, 1), None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    channel = unit % value.shape[1]
    with torch.no_grad():
        norm.bias[channel] -= value.movedim(1, -1).reshape(-1)[unit]
        model.float().double()  # what both precisions then start from


def test_float32_differs_where_a_unit_falls_on_the_other_side_of_zero(monkeypatch):
    """Rounding alone moves a meta-gradient by 1e-6; 1e-4 and more come only with another set of active units."""
    apart, together = [], []
    for seed in range(16):
        model, batch = conv4(seed=seed, dtype=torch.float32), image_batch(10 * seed, dtype=torch.float32)
        put_a_unit_on_its_kink(model, batch, unit=seed)
        error, same = compared(model, batch, monkeypatch)
        (together if same else apart).append(error)
    assert len(apart) >= 2, "no unit fell on the other side"
    assert len(together) >= 2, "no unit stayed"
    assert max(apart) > 1e-4
    assert max(together) < 1e-5
    assert all(error < 1e-4 for error in together)
