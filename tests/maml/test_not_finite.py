"""NaN in the data, or made by training."""

from __future__ import annotations

import math

import pytest
import torch
from mistakes import Batches, Q, S, T, V, classes, classifier, regressor
from torch import Tensor, nn

from metamom import MAML, CompositeMomentum, DivergedError, TaskBatch, TopK, evaluate, train
from metamom.bias import EF21, NonFiniteError
from metamom.maml.checks.batch_checks import NonFiniteDataError


def nan_in(field: str, batch: TaskBatch = V) -> TaskBatch:
    x = getattr(batch, field).clone()
    x[2, 1] = math.nan
    x[3, 0] = math.inf
    return batch._replace(**{field: x})


@pytest.mark.parametrize("bias", [None, TopK(3)])
@pytest.mark.parametrize("field", TaskBatch._fields[:4])
def test_data_that_is_not_finite_is_named(field, bias):
    points = S if field.startswith("support") else Q
    learner = regressor()
    with pytest.raises(NonFiniteDataError, match=rf"{field} holds 2 of {4 * points}, first in task 2\. Clean"):
        learner.backward(nan_in(field), bias=bias)
    assert all(p.grad is None for p in learner.parameters())


def test_every_field_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteDataError, match=r"support_x holds 2 of 24, .*; query_y holds 2 of 12, "):
        regressor().backward(nan_in("support_x", nan_in("query_y")))


def test_a_step_with_such_data_is_named_in_training():
    class FromStep3:
        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
            return nan_in("query_x") if step == 3 else V

    learner = regressor()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    with pytest.raises(NonFiniteDataError, match=r"step 3: the result is not finite, and neither is the data.*query_x"):
        train(learner, optimizer, FromStep3(), iterations=5, meta_batch=T)


def test_nan_that_training_made_is_not_blamed_on_the_data():
    learner = regressor()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e20)
    with pytest.raises(DivergedError, match="Try a smaller lr"):
        train(learner, optimizer, Batches(V), iterations=20, meta_batch=T)


def test_an_evaluation_names_the_data_too():
    with pytest.raises(NonFiniteDataError, match="query_x holds 2 of 12, first in task 2"):
        evaluate(regressor(), Batches(nan_in("query_x")), tasks=T)
    bad = nan_in("query_x", classes())
    with pytest.raises(NonFiniteDataError, match="query_x holds 4 of 48, first in task 2"):
        evaluate(classifier(), Batches(bad), tasks=T)


def test_labels_of_which_none_counts_are_named():
    batch = classes()
    y = batch.query_y.clone()
    y[2] = -100
    bad = batch._replace(query_y=y)
    said = r"not finite: all labels of query_y are -100 in 1 of 4 tasks, first in task 2\. .* nothing to average"
    for call in (lambda: classifier().backward(bad), lambda: evaluate(classifier(), Batches(bad), tasks=T)):
        with pytest.raises(NonFiniteDataError, match=said):
            call()
    # a task that has nothing to adapt to stays where it is, and a sum of nothing is zero
    assert math.isfinite(classifier().backward(batch._replace(support_y=y)).loss)
    summed = classifier(loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    found = summed.backward(bad)
    assert math.isfinite(found.loss)
    *_, adapted = summed.trajectory(bad.support_x, bad.support_y, steps=1)
    _, each = summed.judge(adapted, summed.predict(adapted, bad.query_x), bad.query_y)
    assert each.isnan().tolist() == [False, False, True, False]
    assert found.metrics["accuracy"] == pytest.approx(float(each[~each.isnan()].mean()))  # of those that have labels
    nothing = batch._replace(query_y=torch.full_like(y, -100))
    assert summed.backward(nothing).metrics["accuracy"] is None


def test_nan_that_a_loss_masks_is_fine():
    """Targets that are missing."""

    def masked(p: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.isnan(), 0.0, p - y.nan_to_num()).pow(2).mean()

    batch = V._replace(query_y=V.query_y.index_fill(1, torch.tensor([1]), math.nan))
    assert math.isfinite(regressor(masked).backward(batch).loss)


# training that diverges in one's own loop


@pytest.fixture(params=[None, "topk:50%"], ids=["no bias", "topk"])
def bias(request) -> str | None:
    return request.param


def refused(learner: MAML, batch: TaskBatch, said: str, **options: object) -> None:
    """`backward` raises an error with these words, and leaves ``.grad`` as it was."""
    marks = {name: torch.randn_like(p) for name, p in learner.meta_parameters().items()}
    for name, p in learner.meta_parameters().items():
        p.grad = marks[name].clone()
    with pytest.raises(DivergedError, match=said) as caught:
        learner.backward(batch, **options)
    assert isinstance(caught.value, NonFiniteError)
    assert caught.value.step is None
    assert str(caught.value).endswith(".grad is unchanged. check_finite=False returns such results instead.")
    assert all(torch.equal(p.grad, marks[name]) for name, p in learner.meta_parameters().items())


def broken(learner: MAML) -> MAML:
    with torch.no_grad():
        learner.model[-1].bias[0] = math.inf
    return learner


def test_weights_that_are_not_finite(bias):
    refused(
        broken(regressor()),
        V,
        r"the weights are not finite: 2\.bias\. An earlier step was too.*smaller lr",
        bias=bias,
    )


class Scaled(nn.Module):
    """Predictions, or a loss, times a buffer and a frozen parameter."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)
        self.register_buffer("scale", torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        of = self.inner(x) if y is None else (x - y).square().mean()
        return of * self.scale * self.frozen


@pytest.mark.parametrize("name", ["scale", "frozen"])
@pytest.mark.parametrize("of_loss", [False, True])
def test_nan_in_what_is_not_trained_is_named(bias, of_loss, name):
    model, loss = Scaled(nn.Linear(1, 1)), Scaled()
    learner = MAML(model, loss, inner_lr=0.1)
    learner.backward(V, bias=bias)
    learner.zero_grad()
    getattr(loss if of_loss else model, name).fill_(math.nan)
    refused(learner, V, rf"not trained hold NaN: {'loss_fn.' if of_loss else ''}{name}\. Compute or load", bias=bias)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_inner_steps_that_are_too_large(bias, inner_steps, vectorize):
    learner = regressor(inner_lr=1e30, inner_steps=inner_steps, vectorize=vectorize)
    said = (
        r"not finite in 4 of 4 tasks, first in task 0: the inner steps are too large\. Its loss is \d.* after 1 of inn"
    )
    refused(learner, V, f"{said}er_lr=1e\\+30\\. Try a smaller inner_lr", bias=bias)


def test_the_number_of_inner_steps_is_named():
    """Each step of gradient descent on (w - y)^2 multiplies the distance by 1 - 2 inner_lr."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    learner = MAML(model, lambda p, y: (p - y).square().mean(), inner_lr=1e7, inner_steps=6)
    ones = torch.ones(2, 1, 1)
    refused(learner, TaskBatch(ones, 3 * ones, ones, 3 * ones), "not finite after 3 of inner_lr=1e\\+07")


def test_only_one_task_is_too_steep():
    y = V.support_y.clone()
    y[2] += 1e18
    refused(
        regressor(inner_lr=1e3),
        V._replace(support_y=y),
        "in 1 of 4 tasks, first in task 2: the inner steps are too large",
    )


def test_weights_that_have_grown_too_large(bias):
    learner = regressor()
    with torch.no_grad():
        learner.model[0].weight.fill_(1e30)
        learner.model[-1].weight.fill_(1e30)
    refused(learner, V, "not because of the inner steps: the weights have grown too large.*Try a smaller lr", bias=bias)


def root(p: Tensor, y: Tensor) -> Tensor:
    """Its derivative is not finite where all targets are 0."""
    return (p * y).square().sum().sqrt() + p.square().mean()


def test_a_derivative_that_is_not_finite(bias):
    said = r"the losses are finite, but the meta-gradient is not: .* \(add a small number inside it\).*Try a smaller lr"
    refused(regressor(root), V._replace(query_y=0 * V.query_y), said, bias=bias)
    said = r"in 4 of 4 tasks, first in task 0: the gradient of inner step 1 is NaN although .*add a small number inside"
    refused(regressor(root), V._replace(support_y=0 * V.support_y), said, bias=bias)


def test_the_check_may_be_left_out():
    learner = broken(regressor())
    found = learner.backward(V, check_finite=False)
    assert not math.isfinite(found.loss)
    assert not learner.model[-1].bias.grad.isfinite().all()
    with pytest.raises(NonFiniteDataError, match="query_x"):
        learner.backward(nan_in("query_x"), check_finite=False)


def test_a_norm_that_overflows_is_no_failure():
    """Entries that are finite, and squares that are not."""
    learner = regressor(lambda p, y: 1e30 * (p * y).mean(), inner_lr=1e-30)
    assert math.isfinite(learner.backward(V).loss)
    assert all(p.grad.isfinite().all() for p in learner.parameters())


def test_error_feedback_keeps_its_state():
    learner, feedback = regressor(), EF21(TopK(ratio=0.5))
    learner.backward(V, bias=feedback)
    before = {name: str(value) for name, value in feedback.state_dict().items()}
    kept = learner.model[-1].bias.detach().clone()
    broken(learner)
    with pytest.raises(DivergedError):
        learner.backward(V, bias=feedback)
    assert {name: str(value) for name, value in feedback.state_dict().items()} == before
    with torch.no_grad():
        learner.model[-1].bias.copy_(kept)
    learner.backward(V, bias=feedback)


def test_a_loop_of_ones_own_stops():
    learner = regressor()
    optimizer = CompositeMomentum(learner.parameters(), lr=1e20)

    def loop() -> None:
        for _ in range(20):
            optimizer.zero_grad()
            learner.backward(V)
            optimizer.step()

    with pytest.raises(DivergedError, match="the weights have grown too large"):
        loop()
