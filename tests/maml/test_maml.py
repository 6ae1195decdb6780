"""MAML over all tasks at once against the loop of `slow_maml`, and against finite differences."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from cases import loop_over
from problems import (
    MODELS,
    assert_close,
    mean_over_workers,
    mlp,
    problem,
    randomised,
    regression_batch,
)
from slow_maml import adapt_tasks, slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, Clip, CompositeMomentum, Identity, TaskBatch, TopK
from metamom.nets.models import SinusoidMLP, use_batch_statistics
from metamom.tasks import Sinusoid


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
@loop_over(workers=(1, 2, 6), chunk_size=range(1, 8))
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
    for t, end in enumerate(adapt_tasks(model, loss_fn, batch, steps=5, inner_lr=0.3)):
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
    for t, end in enumerate(adapt_tasks(model, loss_fn, batch, steps=steps, inner_lr=0.05)):
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
    """Before a gradient is added to what is there, and after. `meta_gradient` adds none: only the first kind runs."""
    torch.manual_seed(0)
    model, batch = nn.Linear(2, 1).double(), regression_batch(tasks=2)
    learner, calls = MAML(model, F.mse_loss, inner_lr=0.1), []
    model.weight.register_hook(lambda gradient: gradient / 2)
    model.weight.register_hook(lambda gradient: calls.append("seen"))
    model.bias.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    plain = MAML(copy.deepcopy(model), F.mse_loss, inner_lr=0.1).meta_gradient(batch, workers=2).grads
    grads = learner.meta_gradient(batch, workers=2).grads
    torch.testing.assert_close(grads["weight"], plain["weight"] / 2)
    assert calls == ["seen", "seen"]  # once for each worker
    calls.clear()
    grads = learner.meta_gradient(batch).grads
    assert calls == ["seen"]
    calls.clear()
    for n in (1, 2):
        learner.backward(batch)
        torch.testing.assert_close(model.weight.grad, n * grads["weight"][0])
        torch.testing.assert_close(model.bias.grad, n * grads["bias"][0])
    assert calls[0] == calls[2] == "seen"
    torch.testing.assert_close(calls[3], 2 * grads["bias"][0])
