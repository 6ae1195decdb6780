"""Inner step sizes that are learned or given one by one."""

from __future__ import annotations

import pytest
import torch
from problems import (
    assert_close,
    mean_over_workers,
    mlp,
    problem,
    randomised,
    regression_batch,
)
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TopK


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


def test_state_dict_restores_learned_step_sizes():
    model, loss_fn, batch = problem("MLP")
    learner = MAML(model, loss_fn, learn_inner_lr=True)
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(1.5)
    other = MAML(randomised(mlp(), seed=9), loss_fn, inner_lr=1.0, learn_inner_lr=True)
    other.load_state_dict(learner.state_dict())
    assert_close(other.meta_gradient(batch).grads, learner.meta_gradient(batch).grads, 1e-15)


@pytest.mark.parametrize("kind", ["tensor-step", "tensor", "entry"])
def test_step_sizes_of_unused_parameters_have_a_gradient_of_zero(kind):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, batch = randomised(Half()), regression_batch()
    grads, _ = MAML(model, F.mse_loss, inner_lr=0.1, inner_steps=2, learn_inner_lr=kind).meta_gradient(batch)
    alone = MAML(model.used, F.mse_loss, inner_lr=0.1, inner_steps=2, learn_inner_lr=kind).meta_gradient(batch).grads
    assert torch.equal(grads["inner_lr.used.weight"], alone["inner_lr.weight"])
    assert all(not grads[name].any() for name in grads if "idle" in name)


def test_some_entries_of_learned_step_sizes_may_be_negative_when_they_are_given_to_another_learner():
    """As Meta-SGD may have learned them; one step of a linear model in closed form."""
    model = nn.Linear(2, 1, bias=False).double()
    alpha = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    x, y = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64), torch.tensor([[[3.0]]], dtype=torch.float64)
    w = model.weight.detach()
    gradient = 2 * (x[0] @ w.T - y[0]) * x[0]
    for learn in (False, "entry"):
        learner = MAML(model, F.mse_loss, inner_lr={"weight": alpha}, learn_inner_lr=learn)
        moved = learner.adapt(x, y)["weight"][0]
        torch.testing.assert_close(moved, w - alpha * gradient, rtol=1e-12, atol=0)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, learn_inner_lr="entry")
    learner.inner_lr = {"weight": alpha}
    torch.testing.assert_close(learner.adapt(x, y)["weight"][0], w - alpha * gradient, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="may be negative, but not all"):
        MAML(model, F.mse_loss, inner_lr={"weight": -alpha.abs()})
    with pytest.raises(ValueError, match="must be > 0 and finite"):
        MAML(model, F.mse_loss, inner_lr={"weight": alpha}, learn_inner_lr="entry", positive_inner_lr=True)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("kind", ["entry", "tensor", "scalar", "tensor-step"])
def test_frozen_ones_stay_in_use(kind, positive):
    """Of each inner step its own, and the step sizes rather than their logarithms; new values are set in place."""
    model = randomised(mlp())
    options = {"inner_steps": 2, "learn_inner_lr": kind, "positive_inner_lr": positive}
    learner, batch = MAML(model, F.mse_loss, inner_lr=0.1, **options), regression_batch()
    with torch.no_grad():
        for p in learner.step_sizes.parameters():
            p.add_(0.01 * torch.arange(p.numel(), dtype=p.dtype).view_as(p))
    before, adapted = learner.meta_gradient(batch).grads, learner.adapt(*batch[:2])
    learner.step_sizes.requires_grad_(False)
    grads = learner.meta_gradient(batch).grads
    assert_close(grads, {name: grad for name, grad in before.items() if not name.startswith("inner_lr")})
    assert_close(learner.adapt(*batch[:2]), adapted)
    learner.inner_lr = 0.3
    assert_close(learner.adapt(*batch[:2]), MAML(model, F.mse_loss, inner_lr=0.3, inner_steps=2).adapt(*batch[:2]))
    assert not learner.step_sizes.learned()
