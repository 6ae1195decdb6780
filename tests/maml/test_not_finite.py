"""NaN in the data, or made by training."""

from __future__ import annotations

import math

import pytest
import torch
from mistakes import Batches, Q, S, T, V, classes, classifier, regressor
from torch import Tensor, nn

from metamom import DivergedError, TaskBatch, TopK, evaluate, train
from metamom.maml.batch_checks import NonFiniteDataError


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
    with torch.no_grad():
        learner.model[0].weight[0] = math.inf
    assert not math.isfinite(learner.backward(V).loss)


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
