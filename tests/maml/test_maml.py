"""MAML over all tasks at once against the loop of `slow_maml`, closed forms and finite differences."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections import OrderedDict

import pytest
import torch
from problems import (
    MODELS,
    assert_close,
    mlp,
    problem,
    randomised,
    regression_batch,
)
from slow_maml import adapt_task, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, Clip, CompositeMomentum, Identity, TaskBatch, TopK
from metamom.maml.vmap_errors import _inplace_modules
from metamom.nets.models import SinusoidMLP, use_batch_statistics
from metamom.tasks import Sinusoid


def mean_over_workers(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.mean(0) for name, g in grads.items()}


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_loop(name, steps, estimator):
    model, loss_fn, batch = problem(name)
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=steps, estimator=estimator)
    grads, losses = learner.meta_gradient(batch)
    first_order = estimator == "first-order"
    expected, expected_losses = slow_meta_gradient(
        model, loss_fn, batch, steps=steps, inner_lr=0.05, first_order=first_order
    )
    assert {n: g.shape for n, g in grads.items()} == {n: (1, *p.shape) for n, p in model.named_parameters()}
    assert_close(mean_over_workers(grads), expected)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_first_order_and_exact_differ(name):
    """Else the comparisons above would prove nothing about second order."""
    model, loss_fn, batch = problem(name)
    exact = MAML(model, loss_fn, inner_lr=0.05).meta_gradient(batch).grads
    first = MAML(model, loss_fn, inner_lr=0.05, estimator="first-order").meta_gradient(batch).grads
    assert max(float((exact[n] - first[n]).abs().max()) for n in exact) > 1e-3


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", ["MLP with LayerNorm", "BatchNorm2d"])
def test_each_worker_has_the_mean_over_its_own_tasks(name, workers):
    model, loss_fn, batch = problem(name)
    grads, _ = MAML(model, loss_fn, inner_lr=0.05, inner_steps=2).meta_gradient(batch, workers=workers)
    for i, part in enumerate(batch.split(workers)):
        expected, _ = slow_meta_gradient(model, loss_fn, part, steps=2, inner_lr=0.05)
        assert_close({n: g[i] for n, g in grads.items()}, expected)


@pytest.mark.parametrize(
    "options", [{}, {"adapt": ["3"]}, {"learn_inner_lr": "tensor"}], ids=["all", "ANIL", "learned"]
)
@pytest.mark.parametrize("workers", [1, 2, 6])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 6, 7])
def test_chunks_change_nothing(chunk_size, workers, options):
    model, loss_fn, _ = problem("MLP with LayerNorm")
    batch = regression_batch(tasks=6)
    options = {"inner_lr": 0.05, "inner_steps": 2, **options}
    whole = MAML(model, loss_fn, **options).meta_gradient(batch, workers)
    learner = MAML(model, loss_fn, chunk_size=chunk_size, **options)
    chunked = learner.meta_gradient(batch, workers)
    assert_close(chunked.grads, whole.grads, 1e-13)
    torch.testing.assert_close(chunked.losses, whole.losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(learner.losses(batch), whole.losses, rtol=1e-13, atol=0)


def test_chunks_bound_how_many_tasks_run_at_once():
    seen = []

    def loss_fn(predictions: Tensor, y: Tensor) -> Tensor:
        seen.append(torch._C._functorch.get_unwrapped(predictions).shape[0])
        return F.mse_loss(predictions, y)

    learner = MAML(randomised(mlp()), loss_fn, chunk_size=2)
    learner.meta_gradient(regression_batch(tasks=6), workers=1)
    learner.losses(regression_batch(tasks=6))
    assert seen == [2] * 12


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("kind", ["scalar", "tensor", "entry", True])
@pytest.mark.parametrize("name", ["MLP", "MLP with LayerNorm", "GroupNorm"])
def test_learned_step_sizes(name, kind, estimator):
    model, loss_fn, batch = problem(name)
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=3, learn_inner_lr=kind, estimator=estimator)
    generator = torch.Generator().manual_seed(3)
    learned = learner.step_sizes.learned()
    with torch.no_grad():
        for alpha in learned.values():
            alpha.mul_(torch.rand(alpha.shape, generator=generator) + 0.5)
    shapes = {n: () if kind == "tensor" else p.shape for n, p in model.named_parameters()}
    expected_shapes = {"inner_lr": ()} if kind == "scalar" else {f"inner_lr.{n}": s for n, s in shapes.items()}
    assert {n: tuple(a.shape) for n, a in learned.items()} == {n: tuple(s) for n, s in expected_shapes.items()}
    grads, _ = learner.meta_gradient(batch, workers=2)
    for i, part in enumerate(batch.split(2)):
        expected, _ = slow_meta_gradient(
            model, loss_fn, part, steps=3, learned=learned, first_order=estimator == "first-order"
        )
        assert_close({n: g[i] for n, g in grads.items()}, expected)
    assert all(float(grads[n].abs().max()) > 1e-8 for n in learned if not n.endswith("conv.bias"))
    assert {id(a) for a in learned.values()} <= {id(p) for p in learner.parameters()}  # an optimizer finds them


@pytest.mark.parametrize("kind", ["scalar", "tensor", "entry"])
def test_step_sizes_are_learned_by_the_loop_of_the_readme(kind):
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, inner_lr=0.05, learn_inner_lr=kind)
    before = {name: a.detach().clone() for name, a in learner.step_sizes.learned().items()}
    opt = CompositeMomentum(learner.parameters(), lr=0.01)
    learner.backward(batch, workers=2, bias=TopK(ratio=0.9))
    opt.step()
    assert any(not torch.equal(a, before[name]) for name, a in learner.step_sizes.learned().items())


@pytest.mark.parametrize("kind", ["tensor", "scalar"])
def test_one_number_a_task_is_not_spread_over_the_last_dimension(kind):
    """As many tasks as inputs: numbers [T] that met gradients [T, out, in] unaligned would fit without an error."""
    model = randomised(nn.Linear(4, 1))
    batch = regression_batch(tasks=4, dim=4)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, learn_inner_lr=kind)
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, learned=learner.step_sizes.learned())
    assert_close(mean_over_workers(learner.meta_gradient(batch, workers=4).grads), expected)


def test_step_sizes_given_one_by_one():
    model, loss_fn, batch = problem("MLP")
    generator = torch.Generator().manual_seed(4)
    inner_lr: dict[str, float | Tensor] = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        by_entry = torch.rand(p.shape, generator=generator, dtype=torch.float64) * 0.1 + 0.01
        inner_lr[name] = [0.01 * (i + 1), torch.tensor(0.03, dtype=torch.float64), by_entry][i % 3]
    learner = MAML(model, loss_fn, inner_lr=inner_lr, inner_steps=3)
    expected, _ = slow_meta_gradient(model, loss_fn, batch, steps=3, inner_lr=inner_lr)
    assert_close(mean_over_workers(learner.meta_gradient(batch, workers=2).grads), expected)
    assert not learner.step_sizes.learned()


@pytest.mark.parametrize("reserved", ["shared", "fixed", "training", "all", "alpha"])
def test_a_parameter_may_have_any_name(reserved):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(reserved if reserved != "training" else "train_", nn.Parameter(torch.ones(1, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return x @ next(self.parameters())

    learner = MAML(Named(), F.mse_loss, learn_inner_lr=True)
    grads, _ = learner.meta_gradient(regression_batch(dim=1).to(dtype=torch.float32))
    assert len(grads) == 2


@pytest.mark.parametrize(
    "adapt",
    [["head"], "head", ["head.weight", "head.bias"], lambda name: name.startswith("head")],
    ids=["module", "string", "names", "predicate"],
)
@pytest.mark.parametrize("learn", [False, "tensor"])
@pytest.mark.parametrize("workers", [1, 2])
def test_anil(adapt, learn, workers):
    model, loss_fn, batch = problem("GroupNorm")
    learner = MAML(model, loss_fn, inner_lr=0.2, inner_steps=3, adapt=adapt, learn_inner_lr=learn)
    assert learner.adapted == ("head.weight", "head.bias")
    grads, _ = learner.meta_gradient(batch, workers)
    for i, part in enumerate(batch.split(workers)):
        expected, _ = slow_meta_gradient(
            model,
            loss_fn,
            part,
            steps=3,
            inner_lr=0.2,
            adapted=learner.adapted,
            learned=learner.step_sizes.learned(),
        )
        assert_close({n: g[i] for n, g in grads.items()}, expected)
    assert set(learner.adapt(batch.support_x, batch.support_y)) == set(learner.adapted)


@pytest.mark.parametrize("workers", [1, 4])
def test_frozen_parameters_stay_and_get_no_gradient(workers):
    model, loss_fn, batch = problem("MLP")
    model[0].weight.requires_grad_(False)
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=2)
    grads, _ = learner.meta_gradient(batch, workers)
    expected, _ = slow_meta_gradient(model, loss_fn, batch, steps=2, inner_lr=0.05)
    assert "0.weight" not in grads
    assert_close(mean_over_workers(grads), expected)
    learner.backward(batch)
    assert model[0].weight.grad is None


def test_tied_parameters_move_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.out = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))

    class Explicit(nn.Module):
        """The same with the shared matrix written out, so that nothing is left to the tying."""

        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = (nn.Parameter(torch.empty(s)) for s in ((2, 2), 2, 2))
            self.out = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(F.linear(torch.tanh(F.linear(x, self.w, self.a)), self.w, self.b)))

    tied, explicit = randomised(Tied()), randomised(Explicit())
    with torch.no_grad():
        for p, q in zip(tied.parameters(), explicit.parameters(), strict=True):
            assert p.shape == q.shape
            q.copy_(p)
    batch = regression_batch()
    grads, _ = MAML(tied, F.mse_loss, inner_lr=0.1, inner_steps=3).meta_gradient(batch, 2)
    expected, _ = slow_meta_gradient(explicit, F.mse_loss, batch, steps=3, inner_lr=0.1)
    assert_close(dict(zip(expected, mean_over_workers(grads).values(), strict=True)), expected)


def test_unused_parameters_have_a_gradient_of_zero():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    grads, _ = MAML(randomised(Half()), F.mse_loss, inner_steps=2).meta_gradient(regression_batch(), 2)
    assert float(grads["idle.weight"].abs().max()) == 0
    assert float(grads["used.weight"].abs().min()) > 0


def test_meta_gradient_is_the_derivative_of_the_losses():
    """Central differences, entry by entry: error h^2 = 1e-8 and rounding 1e-16 / h = 1e-12, at a scale of 1."""
    model = randomised(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    batch = regression_batch()
    learner = MAML(model, F.mse_loss, inner_lr=0.1, inner_steps=3, learn_inner_lr="scalar")
    grads = mean_over_workers(learner.meta_gradient(batch).grads)
    h = 1e-4
    for name, p in learner.meta_parameters().items():
        numbers, flat = torch.empty(p.numel(), dtype=torch.float64), p.detach().view(-1)
        for i, value in enumerate(flat.tolist()):
            ends = []
            for shift in (h, -h):
                flat[i] = value + shift
                with torch.no_grad():
                    ends.append(float(learner.losses(batch).mean()))
            flat[i] = value
            numbers[i] = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close(grads[name].view(-1), numbers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_backward_of_the_losses_is_backward(estimator, chunk_size):
    model, loss_fn, batch = problem("MLP with LayerNorm")
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=2, estimator=estimator, chunk_size=chunk_size)
    learner.losses(batch).mean().backward()
    by_hand = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    result = learner.backward(batch)
    assert_close({n: p.grad for n, p in model.named_parameters()}, by_hand)
    assert result.loss.item() == pytest.approx(float(learner.losses(batch).mean().detach()), rel=1e-12)
    assert not result.loss.requires_grad


def test_backward_accumulates_as_torch_does():
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, inner_lr=0.05)
    learner.backward(batch, workers=2)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    learner.backward(batch, workers=2)
    assert_close({n: p.grad for n, p in model.named_parameters()}, {n: 2 * g for n, g in once.items()}, 1e-15)
    assert_close(once, mean_over_workers(learner.meta_gradient(batch, 2).grads), 1e-15)


@pytest.mark.parametrize("bias", [None, Identity(), TopK(7), TopK(ratio=0.2), Clip(0.1)], ids=repr)
def test_the_operator_meets_each_workers_whole_gradient(bias):
    model, loss_fn, batch = problem("GroupNorm")
    learner = MAML(model, loss_fn, inner_lr=0.2)
    result = learner.backward(batch, workers=2, bias=bias)
    sent, plain = [], []
    for part in batch.split(2):
        grads, _ = slow_meta_gradient(model, loss_fn, part, inner_lr=0.2)
        vector = torch.cat([g.flatten() for g in grads.values()])
        plain.append(vector)
        sent.append(vector if bias is None else bias(vector))
    total, mean = (sent[0] + sent[1]) / 2, (plain[0] + plain[1]) / 2
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, total, rtol=0, atol=1e-10 * float(mean.abs().max()))
    assert result.metrics["grad_norm"] == pytest.approx(float(total.norm()), rel=1e-9)
    assert result.metrics["bias_error"] == pytest.approx(float((total - mean).norm() / mean.norm()), rel=1e-9, abs=1e-9)
    d = mean.numel()
    kept = {TopK(7): 7, TopK(ratio=0.2): round(0.2 * d)}.get(bias)
    assert result.metrics["wire_bytes"] == (2 * d * 8 if kept is None else 2 * kept * (8 + 4))


def test_accuracy_is_of_the_query_sets():
    model, loss_fn, batch = problem("BatchNorm2d")
    right = []
    for t in range(batch.num_tasks):
        end = adapt_task(
            model,
            loss_fn,
            weights_of(model),
            batch.support_x[t],
            batch.support_y[t],
            steps=5,
            inner_lr=lambda name: 0.3,
            adapted=dict(model.named_parameters()),
        )
        scores = torch.func.functional_call(model, end, (batch.query_x[t],))
        right.append((scores.argmax(-1) == batch.query_y[t]).double().mean())
    metrics = MAML(model, loss_fn, inner_lr=0.3, inner_steps=5, chunk_size=3).backward(batch, workers=2).metrics
    assert metrics["accuracy"] == pytest.approx(float(torch.stack(right).mean()))
    assert MAML(mlp().double(), F.mse_loss).backward(regression_batch()).metrics["accuracy"] is None


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", ["MLP with LayerNorm", "Conv4"])
def test_adapt_predict_and_trajectory(name, steps):
    model, loss_fn, batch = problem(name)
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=4)
    adapted = learner.adapt(batch.support_x, batch.support_y, steps=steps)
    predictions = learner.predict(adapted, batch.query_x)
    along = list(learner.trajectory(batch.support_x, batch.support_y, steps=4))
    assert len(along) == 5
    for t in range(batch.num_tasks):
        end = adapt_task(
            model,
            loss_fn,
            weights_of(model),
            batch.support_x[t],
            batch.support_y[t],
            steps=steps,
            inner_lr=lambda n: 0.05,
            adapted=dict(model.named_parameters()),
        )
        assert_close({n: w[t].detach() for n, w in adapted.items()}, {n: w.detach() for n, w in end.items()})
        assert_close({n: w[t] for n, w in along[steps].items()}, {n: w.detach() for n, w in end.items()})
        alone = torch.func.functional_call(model, end, (batch.query_x[t],))
        torch.testing.assert_close(predictions[t], alone, rtol=1e-10, atol=1e-10)
    assert not any(w.requires_grad for params in along for w in params.values())
    grads = torch.autograd.grad(predictions.sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    assert any(float(g.abs().max()) > 0 for g in grads)


def test_adapt_takes_its_own_number_of_steps_and_no_graph_without_gradients():
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=3)
    with torch.no_grad():
        own = learner.adapt(batch.support_x, batch.support_y)
    assert not any(w.requires_grad for w in own.values())
    with_graph = learner.adapt(batch.support_x, batch.support_y, steps=3)
    assert_close(own, {n: w.detach() for n, w in with_graph.items()}, 1e-15)
    with pytest.raises(ValueError, match="inner steps must be >= 0; got -1"):
        learner.adapt(batch.support_x, batch.support_y, steps=-1)


def test_prediction_in_inference_mode():
    model = nn.Sequential(nn.Linear(2, 3), use_batch_statistics(nn.BatchNorm1d(3)), nn.Linear(3, 1)).double()
    model.register_buffer("unit", torch.ones(1, dtype=torch.float64))
    learner, batch = MAML(model, F.mse_loss), regression_batch()
    params = {n: w.detach() for n, w in learner.adapt(batch.support_x, batch.support_y).items()}
    expected = learner.predict(params, batch.query_x)
    with torch.inference_mode():
        assert torch.equal(learner.predict(params, batch.query_x * 1.0), expected)


# Linear regression on a finite data set: y = (1, 0, 2, 1), loss 1/2 mean, alpha = 0.1, w = (1/2, -1/2).
FEATURES = [(1.0, 0.0), (1.0, 1.0), (0.0, 2.0), (-1.0, 1.0)]
TARGETS = [1.0, 0.0, 2.0, 1.0]
POPULATION = {1: (0.320859375, -1.445), 2: (0.274535302734375, -1.0440125)}


def half_mean_square(predictions: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(predictions, targets)


def linear_learner(steps: int = 1, estimator: str = "exact") -> MAML:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.5]]))
    return MAML(model, half_mean_square, inner_lr=0.1, inner_steps=steps, estimator=estimator)


def chosen(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> TaskBatch:
    """One task for each (support indices, query indices) into the data set."""
    x = torch.tensor(FEATURES, dtype=torch.float64)
    y = torch.tensor(TARGETS, dtype=torch.float64).unsqueeze(-1)
    inner, outer = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    return TaskBatch(x[inner], y[inner], x[outer], y[outer])


ALL = (0, 1, 2, 3)
WITH_REPLACEMENT = {
    (1, 1): (0.3290625, -1.50125),
    (2, 1): (0.3249609375, -1.473125),
    (3, 1): (0.32359375, -1.46375),
    (1, 2): (0.306815625, -1.27185),
    (2, 2): (0.29076181640625, -1.163201171875),
}


@pytest.mark.parametrize("steps", POPULATION)
def test_population_gradient_of_linear_regression(steps):
    grads, _ = linear_learner(steps).meta_gradient(chosen([(ALL, ALL)]))
    assert grads["weight"].flatten().tolist() == pytest.approx(POPULATION[steps], abs=1e-12)


def test_first_order_gradient_of_linear_regression():
    """Sigma (I - alpha Sigma) (w - theta) with Sigma = diag(3/4, 3/2), theta = (0, 5/6)."""
    grads, _ = linear_learner(estimator="first-order").meta_gradient(chosen([(ALL, ALL)]))
    assert grads["weight"].flatten().tolist() == pytest.approx((0.346875, -1.7), abs=1e-12)


@pytest.mark.parametrize(("m", "steps"), WITH_REPLACEMENT)
def test_mean_over_all_batches_with_replacement(m, steps):
    batch = chosen([(inner, ALL) for inner in itertools.product(ALL, repeat=m)])
    grads, _ = linear_learner(steps).meta_gradient(batch)
    assert grads["weight"].flatten().tolist() == pytest.approx(WITH_REPLACEMENT[m, steps], abs=1e-12)


@pytest.mark.parametrize(
    ("m", "expected"), [(1, (0.3290625, -1.50125)), (2, (0.32359375, -1.46375)), (3, (0.3217708333333333, -1.45125))]
)
def test_mean_over_all_batches_without_replacement(m, expected):
    batch = chosen([(inner, ALL) for inner in itertools.combinations(ALL, m)])
    grads, _ = linear_learner().meta_gradient(batch)
    assert grads["weight"].flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("m", "expected"), [(1, (0.21875, -0.86)), (2, (0.269453125, -1.1415625))])
def test_mean_over_all_batches_that_serve_as_support_and_query(m, expected):
    batch = chosen([(points, points) for points in itertools.product(ALL, repeat=m)])
    grads, _ = linear_learner().meta_gradient(batch)
    assert grads["weight"].flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("m", "expected"), [(1, 4.855089849853515), (2, 2.305785711669921)])
def test_mean_square_error_over_all_batches(m, expected):
    """One worker a task, so that every single estimate is seen."""
    batches = list(itertools.product(ALL, repeat=m))
    batch = chosen(list(itertools.product(batches, batches)))
    grads, _ = linear_learner().meta_gradient(batch, workers=batch.num_tasks)
    errors = grads["weight"].flatten(1) - torch.tensor(POPULATION[1], dtype=torch.float64)
    assert float(errors.square().sum(1).mean()) == pytest.approx(expected, abs=1e-12)


class Faulty(nn.Module):
    """Does in ``forward`` what per-task weights forbid."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 1)
        self.how = how
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "buffer":
            self.count += 1
        if self.how == "buffer from data":
            self.count.copy_(x.mean())
        if self.how == "input":
            x.mul_(2)
        if self.how == "parameter":
            self.lin.weight.mul_(2)
        if self.how == "parameter without gradients":
            with torch.no_grad():
                self.lin.weight.mul_(0.5)
        if self.how == "if" and x.sum() > 0:
            x = x + 1
        if self.how == "item":
            x = x * x.max().item()
        if self.how == "mask":
            x = x[x[:, 0] > 0]
        return self.lin(x)


FAULTS = {
    "buffer": r"changed in place: 1\.body\.count",
    "buffer from data": "module '1.body' \\(Faulty\\)",
    "input": "changed in place: its input",
    "parameter": "module '1.body' \\(Faulty\\)",
    "parameter without gradients": r"changed in place: 1\.body\.lin\.weight|module '1.body' \(Faulty\).*written-to",
    "if": "module '1.body' \\(Faulty\\).*control flow",
    "item": "module '1.body' \\(Faulty\\).*item",
    "mask": "module '1.body' \\(Faulty\\)",
}


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_model_that_cannot_run_over_tasks_is_named(how, tasks):
    faulty = Faulty(how)
    model = nn.Sequential(nn.Identity(), nn.Sequential(OrderedDict(body=faulty)))
    batch = regression_batch(tasks=tasks).to(dtype=torch.float32)
    if how == "if":
        batch = batch._replace(support_x=batch.support_x.abs())
    with pytest.raises(ValueError, match=f"(?s)({FAULTS[how]}).*Write the forward without in-place"):
        MAML(model, F.mse_loss).meta_gradient(batch)
    assert faulty.count.item() == 0


def test_a_layer_without_a_batching_rule_is_named():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(2, 3, batch_first=True)
            self.out = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.memory(x)[0][:, -1])

    batch = TaskBatch(torch.randn(2, 3, 4, 2), torch.randn(2, 3, 1), torch.randn(2, 3, 4, 2), torch.randn(2, 3, 1))
    with pytest.raises(ValueError, match=r"module 'memory' \(LSTM\).*Batching rule not implemented"):
        MAML(Recurrent(), F.mse_loss).meta_gradient(batch)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_single_parameter_may_lie_in_memory_as_it_likes(workers):
    """Such as a convolution's without a bias, its channels last."""
    model = nn.Conv2d(2, 3, 3, bias=False).double().to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    torch.manual_seed(0)
    sizes = [(3, n, *shape) for n in (4, 2) for shape in ((2, 3, 3), (3, 1, 1))]
    batch = TaskBatch(*(torch.randn(size, dtype=torch.float64) for size in sizes))
    grads, _ = MAML(model, F.mse_loss, inner_lr=0.1).meta_gradient(batch, workers=workers)
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.1)
    assert_close(mean_over_workers(grads), expected)


def test_in_place_activations_inside_are_fine():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    randomised(model)
    grads, _ = MAML(model, F.mse_loss, inner_lr=0.05).meta_gradient(regression_batch())
    expected, _ = slow_meta_gradient(model, F.mse_loss, regression_batch(), inner_lr=0.05)
    assert_close(mean_over_workers(grads), expected)


def test_only_modules_with_torchs_own_option_count_as_in_place():
    class Block(nn.Sequential):
        inplace = True  # means something else here

    class Mine(nn.ReLU):
        pass

    model = nn.Sequential(Block(nn.ReLU()), Mine(inplace=True), nn.Dropout(0.1, inplace=True))
    model[0].inplace = torch.ones(2)
    assert _inplace_modules(model) == "one of the in-place modules '1' (Mine), '2' (Dropout)"
    assert _inplace_modules(Block(nn.ReLU())) is None


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)])
def test_running_statistics_are_refused_by_name_and_left_alone(norm):
    model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(norm), nn.Linear(4, 1))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"running\s+statistics.*: 1\.0\..*use_batch_statistics\(model\)"):
        MAML(model, F.mse_loss)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    MAML(use_batch_statistics(model), F.mse_loss)
    with pytest.raises(ValueError, match=r"running\s+statistics.*: BatchNorm1d"):
        MAML(nn.BatchNorm1d(2), F.mse_loss)


def test_loss_functions():
    batch = regression_batch()
    model = mlp().double()
    with pytest.raises(ValueError, match=r"one number a task, as reduction='mean' does; got shape \(5, 1\)"):
        MAML(model, nn.MSELoss(reduction="none")).meta_gradient(batch)
    with pytest.raises(ValueError, match=r"loss_fn cannot run on all tasks at once: vmap"):
        MAML(model, lambda p, y: F.mse_loss(p, y) if p.sum() > 0 else p.sum()).meta_gradient(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be >= 1; got 0"),
        ({"estimator": "fo"}, "estimator must be one of exact, .*; got 'fo'"),
        ({"chunk_size": 0}, "chunk_size is a number of tasks"),
        ({"inner_lr": 0.0}, "inner_lr must be > 0 and finite; got 0.0"),
        ({"inner_lr": -1.0}, "inner_lr must be > 0 and finite"),
        ({"inner_lr": math.nan}, "inner_lr must be > 0 and finite"),
        ({"inner_lr": math.inf}, "inner_lr must be > 0 and finite"),
        ({"inner_lr": {"weight": 0.1}}, r"missing \['bias'\], unknown \[\]"),
        ({"inner_lr": {"weight": 0.1, "bias": 0.1, "other": 0.1}}, r"missing \[\], unknown \['other'\]"),
        ({"inner_lr": {"weight": torch.ones(2, 1), "bias": 0.1}}, r"its shape \(1, 2\); got \(2, 1\)"),
        ({"inner_lr": {"weight": torch.zeros(1, 2), "bias": 0.1}}, "must be > 0 and finite; weight has others"),
        ({"inner_lr": {"weight": 0.1, "bias": 0.1}, "learn_inner_lr": "scalar"}, "pass inner_lr as one number"),
        ({"learn_inner_lr": "each"}, "learn_inner_lr must be a bool"),
        ({"adapt": ["head"]}, r"\['head'\] is none of weight, bias"),
        ({"adapt": lambda name: False}, "adapt selects no trainable parameter; the model has: weight, bias"),
        ({"adapt": []}, "adapt selects no trainable parameter"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MAML(nn.Linear(2, 1), F.mse_loss, **options)


@pytest.mark.parametrize("workers", [3, 5])
def test_workers_must_divide_the_tasks(workers):
    with pytest.raises(ValueError, match="equal blocks"):
        MAML(mlp().double(), F.mse_loss).meta_gradient(regression_batch(tasks=4), workers=workers)


@pytest.mark.parametrize("workers", [True, 2.0, "2"])
def test_workers_are_a_whole_number(workers):
    with pytest.raises(TypeError, match="number of workers must be a whole number; got"):
        MAML(mlp().double(), F.mse_loss).backward(regression_batch(tasks=4), workers=workers)


def test_dropout_draws_a_mask_for_each_task():
    model = nn.Sequential(nn.Linear(2, 20), nn.Dropout(0.5), nn.Linear(20, 1)).double()
    one = regression_batch(tasks=1)
    same = TaskBatch(*(x.repeat(4, *[1] * (x.dim() - 1)) for x in one[:4]))
    learner = MAML(model, F.mse_loss)
    assert len(learner.meta_gradient(same).losses.unique()) == 4
    model.eval()
    assert len(learner.meta_gradient(same).losses.unique()) == 1


def test_the_global_generator_is_not_touched():
    model, loss_fn, batch = problem("Conv4")
    before = torch.get_rng_state()
    MAML(model, loss_fn, inner_steps=2).backward(batch, workers=2, bias=TopK(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_graph_is_kept():
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, inner_steps=3, learn_inner_lr=True)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    grads, losses = learner.meta_gradient(batch, workers=2)
    assert losses.grad_fn is None
    assert not any(g.requires_grad for g in grads.values())
    del grads, losses
    before = tensors()
    for _ in range(3):
        learner.meta_gradient(batch, workers=2)
    assert tensors() == before
    assert all(p.grad is None for p in learner.parameters())


def test_meta_gradient_works_without_gradients_enabled():
    model, loss_fn, batch = problem("MLP")
    expected = MAML(model, loss_fn).meta_gradient(batch).grads
    with torch.no_grad():
        assert_close(MAML(model, loss_fn).meta_gradient(batch).grads, expected, 1e-15)


@pytest.mark.parametrize("options", [{}, {"adapt": ["4"]}, {"learn_inner_lr": True}], ids=["all", "ANIL", "learned"])
def test_losses_are_the_same_without_gradients_enabled(options):
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, inner_lr=0.1, inner_steps=3, **options)
    expected = learner.losses(batch)
    assert expected.requires_grad
    with torch.no_grad():
        losses = learner.losses(batch)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-13, atol=0)


def test_a_copy_learns_on_its_own():
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, learn_inner_lr="tensor")
    twin = copy.deepcopy(learner)
    expected = learner.meta_gradient(batch).grads
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(2)
    assert_close(twin.meta_gradient(batch).grads, expected, 1e-15)


def test_state_dict_restores_learned_step_sizes():
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, learn_inner_lr=True)
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(1.5)
    other = MAML(randomised(mlp(), seed=9), loss_fn, inner_lr=1.0, learn_inner_lr=True)
    other.load_state_dict(learner.state_dict())
    assert_close(other.meta_gradient(batch).grads, learner.meta_gradient(batch).grads, 1e-15)


def test_the_loop_of_the_readme_learns():
    net = SinusoidMLP(generator=torch.Generator().manual_seed(0))
    tasks = Sinusoid(seed=0)
    learner = MAML(net, F.mse_loss, inner_lr=0.01)
    opt = CompositeMomentum(learner.parameters(), lr=0.03, beta=0.1)
    test = tasks.sample(10**6, 200)
    before = learner.losses(test).mean().item()
    for step in range(150):
        opt.zero_grad()
        learner.backward(tasks.sample(step, 32), workers=4, bias=TopK(ratio=0.3))
        opt.step()
    after = learner.losses(test).mean().item()
    assert after < 0.85 * before, f"{before} -> {after}"


# hooks of parameters


def test_hooks_of_parameters_run_as_in_a_backward_pass():
    """Before a gradient is added to what is there, and after; but not for `meta_gradient`, which leaves none."""
    torch.manual_seed(0)
    model, batch = nn.Linear(2, 1).double(), regression_batch(tasks=2)
    learner, calls = MAML(model, F.mse_loss, inner_lr=0.1), []
    model.weight.register_hook(lambda gradient: gradient / 2)
    model.weight.register_hook(lambda gradient: calls.append("seen"))
    model.bias.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    grads = learner.meta_gradient(batch).grads
    assert not calls
    for n in (1, 2):
        learner.backward(batch)
        torch.testing.assert_close(model.weight.grad, n * grads["weight"][0] / 2)
        torch.testing.assert_close(model.bias.grad, n * grads["bias"][0])
    assert calls[0] == calls[2] == "seen"
    torch.testing.assert_close(calls[3], 2 * grads["bias"][0])
