"""Compiled meta-gradients: the same numbers as plain ones, compiled when it pays; and bfloat16 products."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import metamom.compiled
import metamom.maml
from metamom import MAML, TaskBatch, kernels
from metamom.compiled import join_products
from metamom.kernels.build import CompilerError, load
from metamom.nets import Conv4, SinusoidMLP
from metamom.tasks import Sinusoid

WAYS = 3
Grads = dict[str, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int = 0, tasks: int = 2, dtype: torch.dtype = torch.float64) -> TaskBatch:
    xs = [torch.rand(tasks, WAYS * shots, 1, 28, 28, generator=generator(seed + shots)).to(dtype) for shots in (1, 2)]
    ys = [torch.arange(WAYS).repeat(tasks, shots) for shots in (1, 2)]
    return TaskBatch(xs[0], ys[0], xs[1], ys[1])


def numbers(seed: int = 0, tasks: int = 2, dim: int = 1, dtype: torch.dtype = torch.float64) -> TaskBatch:
    sizes = [(tasks, n, d) for n in (5, 7) for d in (dim, 1)]
    return TaskBatch(*(torch.randn(s, generator=generator(seed + i)).to(dtype) for i, s in enumerate(sizes)))


def conv4(hidden: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Conv4:
    return Conv4(WAYS, hidden=hidden, generator=generator(seed)).to(dtype)


class PlainConv4(nn.Module):
    """Conv4 of torch's own layers, with the same state dict."""

    def __init__(self, of: Conv4) -> None:
        super().__init__()
        kernels_of = [block[0].weight for block in of.features]
        blocks = [
            nn.Sequential(
                nn.Conv2d(w.shape[1], w.shape[0], 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(w.shape[0], track_running_stats=False),
                nn.ReLU(),
            )
            for w in kernels_of
        ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(of.head.in_features, of.head.out_features)
        self.to(of.head.weight.dtype)
        self.load_state_dict(of.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture
def traced(monkeypatch) -> list[int]:
    """Everything of compiling but TorchInductor: the graph runs as it was traced. One entry a compilation."""
    compilations: list[int] = []

    def as_it_is(graph: Any, inputs: Any) -> Any:
        compilations.append(len(inputs))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", as_it_is)
    return compilations


def relative_error(ours: Grads, theirs: Grads) -> float:
    assert list(ours) == list(theirs)
    a, b = (torch.cat([g.double().flatten() for g in grads.values()]) for grads in (ours, theirs))
    return float((a - b).norm() / b.norm())


# one product for two


def factors(rows: int, columns: int, inners: tuple[int, int], tasks: tuple[int, int] = (2, 2)) -> list[Tensor]:
    sizes = [s for T, k in zip(tasks, inners, strict=True) for s in ((T, rows, k), (T, k, columns))]
    return [torch.randn(s, generator=generator(i), dtype=torch.float64) for i, s in enumerate(sizes)]


def products_in(graph: torch.fx.GraphModule) -> int:
    return sum(node.target is torch.ops.aten.bmm.default for node in graph.graph.nodes)


def check_joining(function: Callable[..., Any], args: list[Tensor], joined: int, products: int) -> None:
    graph = make_fx(function)(*args)
    assert join_products(graph) == joined
    assert products_in(graph) == products
    torch.testing.assert_close(graph(*args), function(*args), rtol=1e-12, atol=1e-12)


SMALL_INNER = factors(40, 50, (3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c, d: torch.bmm(a, b) + torch.bmm(c, d),
        lambda a, b, c, d: a @ b + c @ d,
        lambda a, b, c, d: (torch.bmm(a, b).view(80, 50) + torch.bmm(c, d).view(80, 50)) * 2,
        lambda a, b, c, d: torch.bmm(a, b).view(2, 40, 5, 10) + torch.bmm(c, d).view(2, 40, 5, 10),
        lambda a, b, c, d: torch.bmm(torch.sin(a), b) + torch.bmm(torch.sin(c) * 2, d),
    ],
    ids=["bmm", "matmul", "flattened", "as images", "of other results"],
)
def test_a_sum_of_two_products_becomes_one(function):
    check_joining(function, SMALL_INNER, joined=1, products=1)


def test_every_pair_is_joined():
    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (torch.bmm(a, b) + torch.bmm(c, d)) * (torch.bmm(2 * a, b) + torch.bmm(c, 3 * d))

    check_joining(function, SMALL_INNER, joined=2, products=2)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c, d: (torch.bmm(a, b) + torch.bmm(c, d), torch.bmm(a, b)),
        lambda a, b, c, d: (lambda p: (p + torch.bmm(c, d), 2 * p))(torch.bmm(a, b)),
        lambda a, b, c, d: (lambda p: (torch.bmm(c, d) + p.view(2, 40, 50), p.sum()))(torch.bmm(a, b)),
        lambda a, b, c, d: (lambda p: p + p)(torch.bmm(a, b)),
        lambda a, b, c, d: torch.add(torch.bmm(a, b), torch.bmm(c, d), alpha=2),
        lambda a, b, c, d: torch.bmm(a, b) - torch.bmm(c, d),
        lambda a, b, c, d: torch.bmm(a, b) + 1,
        lambda a, b, c, d: torch.sin(torch.bmm(a, b)) + torch.bmm(c, d),
    ],
    ids=["control", "used twice", "used twice before a view", "added to itself", "alpha", "minus", "+ 1", "sin"],
)
def test_other_sums_stay_as_they_are(function, request):
    graph = make_fx(function)(*SMALL_INNER)
    joined = int("control" in request.node.name)  # the same pair, where the product of the second use is its own
    check_joining(function, SMALL_INNER, joined, products_in(graph) - joined)


@pytest.mark.parametrize(("rows", "columns", "inners"), [(4, 50, (3, 4)), (40, 50, (30, 4)), (1, 1, (1, 1))])
def test_products_of_large_inner_dimension_stay_two(rows, columns, inners):
    """They cost more than writing their result: copying the factors would gain nothing."""
    function = lambda a, b, c, d: torch.bmm(a, b) + torch.bmm(c, d)  # noqa: E731
    check_joining(function, factors(rows, columns, inners), joined=0, products=2)


def test_a_sum_that_broadcasts_stays_as_it_is():
    """Every pair of rows, as additive attention has them: the terms' entries do not meet one to one."""

    def every_pair(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.bmm(a, b).view(2, 40, 1, 50) + torch.bmm(c, d).view(2, 1, 40, 50)

    check_joining(every_pair, SMALL_INNER, joined=0, products=2)
    one_for_all = factors(40, 50, (3, 4), tasks=(2, 1))
    check_joining(lambda a, b, c, d: torch.bmm(a, b) + torch.bmm(c, d), one_for_all, joined=0, products=2)


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
        (1, None, {}),
        (2, 1, {}),
        (4, 3, {}),
        (1, 2, {"inner_steps": 3}),
        (2, None, {"estimator": "first-order"}),
        (2, 3, {"adapt": ["head"]}),
        (2, None, {"learn_inner_lr": "tensor"}),
        (1, None, {"learn_inner_lr": "entry"}),
    ],
)
def test_the_traced_graph_agrees_with_plain_layers(traced, workers, chunk_size, options):
    model, batch = conv4(), images(tasks=4)
    options = {"inner_lr": 0.1, **options}
    plain = MAML(PlainConv4(model), F.cross_entropy, **options).meta_gradient(batch, workers)
    learner = MAML(model, F.cross_entropy, chunk_size=chunk_size, compile=True, **options)
    for _ in range(2):
        grads, losses = learner.meta_gradient(batch, workers)
        assert {n: g.shape for n, g in grads.items()} == {n: g.shape for n, g in plain.grads.items()}
        assert relative_error(grads, plain.grads) < 1e-10
        torch.testing.assert_close(losses, plain.losses, rtol=1e-10, atol=1e-10)
        assert not any(g.requires_grad for g in grads.values())
    # chunks are of equal size here: at most three of four tasks are two
    assert len(traced) == 1


def test_torchinductor_agrees_with_plain_layers():
    """The real compiler, with metamom's own operators in the graph: one for both workers' chunks of one task."""
    model = conv4()
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, chunk_size=1, compile=True)
    plain = MAML(PlainConv4(model), F.cross_entropy, inner_lr=0.1)
    for batch in (images(0), images(10)):
        grads, losses = learner.meta_gradient(batch, workers=2)
        expected = plain.meta_gradient(batch, workers=2)
        assert relative_error(grads, expected.grads) < 1e-10
        torch.testing.assert_close(losses, expected.losses, rtol=1e-10, atol=1e-10)


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
    model, batch = Scaled().double(), numbers(dim=2)
    learner = MAML(model, F.mse_loss, compile=True)
    before = learner.meta_gradient(batch).grads
    with torch.no_grad():
        change(model)
    after = MAML(model, F.mse_loss).meta_gradient(batch).grads
    assert relative_error(before, after) > 1e-2
    assert relative_error(learner.meta_gradient(batch).grads, after) < 1e-12


def test_each_shape_and_setting_is_compiled_once(traced):
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 1)).double()
    learner = MAML(model, F.mse_loss, compile=True)

    def compilations(batch: TaskBatch, workers: int = 1) -> int:
        grads = learner.meta_gradient(batch, workers).grads
        expected = MAML(model, F.mse_loss, inner_steps=learner.inner_steps).meta_gradient(batch, workers).grads
        assert relative_error(grads, expected) < 1e-12
        return len(traced)

    assert compilations(numbers()) == 1
    assert compilations(numbers(seed=5)) == 1
    assert compilations(numbers(tasks=4)) == 2
    assert compilations(numbers(tasks=4), workers=2) == 3
    learner.inner_steps = 2
    assert compilations(numbers()) == 4
    model.eval()
    assert compilations(numbers()) == 5
    model.train()
    assert compilations(numbers()) == 5


# when it pays


@pytest.fixture
def clock(monkeypatch) -> None:
    """Every plain meta-gradient takes a second, and compiling is reckoned at 12: 3 layers, 2 passes, 2 seconds each."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(metamom.compiled, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(metamom.maml, "COMPILE_SECONDS", 2.0)
    monkeypatch.setattr(metamom.compiled, "SPEED_UP", 2.0)
    monkeypatch.setattr(metamom.compiled, "FIRST_CALLS", 3)


def small(**options: Any) -> MAML:
    return MAML(SinusoidMLP((4,), generator=generator(0)).double(), F.mse_loss, **options)


def plain_calls(learner: MAML, traced: list[int], most: int = 60) -> int:
    """How many meta-gradients come before the first compiled one; ``most`` where there is none."""
    expected = small().meta_gradient(numbers()).grads
    for i in range(most):
        assert relative_error(learner.meta_gradient(numbers()).grads, expected) < 1e-12
        if traced:
            return i
    return most


@pytest.mark.parametrize(("iterations", "plain"), [(0, 60), (5, 60), (26, 60), (28, 3), (1000, 3)])
def test_auto_goes_by_the_iterations_to_come(clock, traced, iterations, plain):
    """After three calls, a second each: compiling saves half of the rest, and costs 12."""
    learner = small(compile="auto")
    learner.expect(iterations)
    assert plain_calls(learner, traced) == plain
    for _ in range(3):
        learner.meta_gradient(numbers())
    assert len(traced) == (plain < 60)


def test_auto_without_being_told_reckons_with_as_many_calls_as_there_have_been(clock, traced):
    """25 seconds were spent, of which compiling would have saved half: more than its 12."""
    assert plain_calls(small(compile="auto"), traced) == 25


def test_auto_counts_the_chunks_of_an_iteration(clock, traced):
    learner = small(compile="auto", chunk_size=1)
    learner.expect(10)
    learner.meta_gradient(numbers(tasks=6))  # 60 calls to come, of which three are watched
    assert len(traced) == 1


def test_auto_judges_each_shape_by_itself(clock, traced):
    learner = small(compile="auto")
    learner.expect(1000)
    for tasks in (2, 4, 6):
        for _ in range(3):
            learner.meta_gradient(numbers(tasks=tasks))
    assert traced == []
    learner.meta_gradient(numbers(tasks=4))
    assert len(traced) == 1


def test_a_short_run_is_not_compiled_by_the_real_clock(traced):
    learner = MAML(conv4(), F.cross_entropy, compile="auto")
    learner.expect(5)
    for seed in range(5):
        learner.meta_gradient(images(seed))
    assert traced == []


@pytest.fixture(params=["no compiler", "a failing one"])
def no_compiler(request, monkeypatch, tmp_path) -> Iterator[str]:
    """What the error says."""
    if request.param == "no compiler":
        monkeypatch.setenv("CXX", "/nonexistent")
        yield r"there is no /nonexistent on the path\. Install one .* or run without compiling"
        return
    failing = tmp_path / "cxx"
    failing.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path))
    load.cache_clear()
    yield "cxx cannot build metamom's kernels: error: no"
    load.cache_clear()


def test_auto_goes_on_without_a_compiler_and_warns_once(clock, traced, no_compiler):
    learner = small(compile="auto")
    learner.expect(1000)
    expected = small().meta_gradient(numbers()).grads
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tasks in (2, 2, 2, 2, 2, 4, 4, 4, 4, 4):
            grads = learner.meta_gradient(numbers(tasks=tasks)).grads
            assert tasks != 2 or relative_error(grads, expected) < 1e-15
    (warning,) = caught
    with pytest.raises(UserWarning, match=rf'compile="auto" goes on without compiling: .*{no_compiler}'):
        raise warning.message
    assert traced == []


def test_compile_true_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(CompilerError, match=r"Install one \(Debian: apt install g\+\+\), name it in \$CXX") as raised:
        small(compile=True)
    assert isinstance(raised.value, ValueError)


def test_a_compiler_that_fails_is_an_error_where_compiling_was_asked_for(traced, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path))
    load.cache_clear()
    with pytest.raises(CompilerError, match="cannot build metamom's kernels"):
        small(compile=True).meta_gradient(numbers())
    load.cache_clear()


@pytest.mark.parametrize("mode", [5, "always", None, "True", -1])
def test_compile_is_a_bool_or_auto(mode):
    with pytest.raises(ValueError, match=rf'compile must be True, False or "auto"; got {mode!r}\.'):
        small(compile=mode)


# float32


def recorded(monkeypatch, run: Callable[[], Grads]) -> tuple[Grads, list[Tensor]]:
    """What ``run`` returns, and which units were active in each layer of each pass."""
    active: list[Tensor] = []
    norm_relu = kernels.norm_relu

    def noting(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = norm_relu(*args)
        active.append(out[0] > 0)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "norm_relu", noting)
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


@pytest.mark.parametrize("steps", [1, 3])
def test_float32_is_exact_to_its_rounding(traced, steps):
    """The median: where a pre-activation lies within rounding of zero, float32 may take the other side; see below."""
    errors = []
    learner = MAML(conv4(8, dtype=torch.float32), F.cross_entropy, inner_lr=0.1, inner_steps=steps, compile=True)
    plain = MAML(PlainConv4(conv4(8)), F.cross_entropy, inner_lr=0.1, inner_steps=steps)
    for seed in range(0, 90, 10):
        ours = learner.meta_gradient(images(seed, dtype=torch.float32)).grads
        assert {g.dtype for g in ours.values()} == {torch.float32}
        errors.append(relative_error(ours, plain.meta_gradient(images(seed)).grads))
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
        model, batch = conv4(seed=seed, dtype=torch.float32), images(10 * seed, dtype=torch.float32)
        put_a_unit_on_its_kink(model, batch, unit=seed)
        error, same = compared(model, batch, monkeypatch)
        (together if same else apart).append(error)
    assert len(apart) >= 2, "no unit fell on the other side"
    assert len(together) >= 2, "no unit stayed"
    assert max(apart) > 1e-4
    assert max(together) < 1e-5
    assert all(error < 1e-4 for error in together)


# bfloat16


# The bounds are those of the problem. On noise, at the start, eight bits move the gradient of Conv4 by 12 %, whoever
# computes it: see test_conv4_in_bfloat16_is_as_exact_as_plain_layers.
HALVED = {
    "Conv4": (
        lambda: conv4(16, dtype=torch.float32),
        F.cross_entropy,
        lambda seed: images(seed, 4, torch.float32),
        0.25,
    ),
    "SinusoidMLP": (
        lambda: SinusoidMLP(generator=generator(0)),
        F.mse_loss,
        lambda seed: numbers(seed, 4, dtype=torch.float32),
        0.05,
    ),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_products(traced, name, compile):
    """Really on, for it changes the gradient, and by no more than eight bits explain."""
    make, loss_fn, batch_of, bound = HALVED[name]
    model = make()
    halved = MAML(model, loss_fn, autocast=torch.bfloat16, compile=compile)
    full = MAML(model, loss_fn)
    errors = []
    for seed in range(0, 50, 10):
        grads, losses = halved.meta_gradient(batch_of(seed))
        assert {x.dtype for x in (*grads.values(), losses)} == {torch.float32}
        errors.append(relative_error(grads, full.meta_gradient(batch_of(seed)).grads))
    assert 1e-5 < statistics.median(errors) < bound, errors
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(traced) == int(compile)


@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_in_evaluation(name):
    make, loss_fn, batch_of, bound = HALVED[name]
    model, batch = make(), batch_of(0)
    halved, full = (MAML(model, loss_fn, autocast=dtype) for dtype in (torch.bfloat16, None))
    with torch.no_grad():
        outs = [learner.predict(learner.adapt(*batch[:2], steps=2), batch.query_x) for learner in (halved, full)]
    assert [out.dtype for out in outs] == [torch.float32] * 2
    assert 1e-5 < float((outs[0] - outs[1]).norm() / outs[1].norm()) < bound


def gradient(model: nn.Module, batch: TaskBatch, autocast: bool) -> Grads:
    """Without tasks or adaptation, by torch alone."""
    with torch.autocast("cpu", torch.bfloat16, autocast):
        scores = model(batch.query_x[0])
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(scores.float(), batch.query_y[0]), list(weights.values()))
    return dict(zip(weights, grads, strict=True))


def test_conv4_in_bfloat16_is_as_exact_as_plain_layers():
    model = conv4(16, dtype=torch.float32)
    plain = PlainConv4(model)
    ours, theirs = [], []
    for seed in range(0, 50, 10):
        batch = images(seed, dtype=torch.float32)
        exact = gradient(plain, batch, autocast=False)
        ours.append(relative_error(gradient(model, batch, autocast=True), exact))
        theirs.append(relative_error(gradient(plain, batch, autocast=True), exact))
    assert statistics.median(ours) < 1.1 * statistics.median(theirs)


def test_bfloat16_reaches_the_convolutions_of_plain_layers():
    """A model without any other product: were they left in float32, nothing would change."""
    model = nn.Sequential(nn.Conv2d(1, WAYS, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    halved, full = (
        MAML(model, F.cross_entropy, autocast=dtype).meta_gradient(images(dtype=torch.float32)).grads
        for dtype in (torch.bfloat16, None)
    )
    assert relative_error(halved, full) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16"], ids=str)
def test_autocast_is_bfloat16_or_none(dtype):
    with pytest.raises(ValueError, match=r"autocast must be torch\.bfloat16 or None; got"):
        small(autocast=dtype)


def test_a_library_that_an_interrupt_cut_short_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    damaged, foreign = tmp_path / "ab" / "kernel.main.so", tmp_path.parent / "foreign.so"
    damaged.parent.mkdir()
    for path in (damaged, foreign):
        path.write_bytes(b"")

    def compile(graph, inputs):
        if damaged.exists():
            raise RuntimeError(f"ImportError: {damaged}: file too short")
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    learner = MAML(nn.Linear(1, 1), F.mse_loss, compile=True)
    learner.meta_gradient(Sinusoid(2, 2).sample(0, 2))
    assert not damaged.exists()

    def fails(graph, inputs):
        raise RuntimeError(f"ImportError: {foreign}: file too short")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    with pytest.raises(RuntimeError, match="foreign"):
        MAML(nn.Linear(1, 1), F.mse_loss, compile=True).meta_gradient(Sinusoid(2, 2).sample(0, 2))
    assert foreign.exists()
