"""Public reports about normalisation: what it uses is said, is not leaked, and is not changed behind one's back.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

import pytest
import torch
from problems import WAYS, labelled_batch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, WAYS)).double()
    model[1].running_mean.fill_(0.25)
    model[1].running_var.fill_(4.0)
    return model


def test_gains_and_shifts_adapt_unless_they_are_left_out():
    """cbfinn/maml 43: batch normalisation's own parameters stayed in the inner loop, which nothing said."""
    model, batch = network(), labelled_batch(4)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    assert all((adapted[name] != model.get_parameter(name)).any() for name in ("1.weight", "1.bias"))
    without = MAML(model, F.cross_entropy, inner_lr=0.1, adapt=lambda name: not name.startswith("1."))
    adapted = without.adapt(batch.support_x, batch.support_y)
    assert list(adapted) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    grads = without.meta_gradient(batch).grads  # the outer loop still learns them
    assert grads["1.weight"].any()
    assert grads["1.bias"].any()


def test_a_prediction_does_not_see_the_other_queries():
    """LearningToCompare_FSL 48: queries were normalised together, and 5-way 1-shot went from 90 % to 99.6 %."""
    model, batch = network(), labelled_batch(4)
    inductive, transductive = (MAML(model, F.cross_entropy, inner_lr=0.1, norm=norm) for norm in ("support", "batch"))
    for learner, alike in ((inductive, True), (transductive, False)):
        adapted = learner.adapt(batch.support_x, batch.support_y)
        sets = {"support_x": batch.support_x} if alike else {}
        together = learner.predict(adapted, batch.query_x, **sets)
        other = learner.predict(adapted, torch.cat([batch.query_x[:, :2], 3 * batch.query_x[:, 2:]], 1), **sets)
        assert torch.allclose(together[:, :2], other[:, :2], atol=1e-12) == alike


def test_running_statistics_can_be_used():
    """MAML++ 24: the layer had a flag for evaluation, and used the batch's statistics all the same."""
    model, batch = network(), labelled_batch(4)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, norm="frozen")
    adapted = learner.adapt(batch.support_x, batch.support_y)
    found = learner.predict(adapted, batch.query_x)
    for task in range(batch.num_tasks):
        u = {name: w[task] for name, w in adapted.items()}
        z = F.linear(batch.query_x[task], u["0.weight"], u["0.bias"])
        z = u["1.weight"] * (z - 0.25) / (4.0 + model[1].eps) ** 0.5 + u["1.bias"]
        torch.testing.assert_close(found[task], F.linear(z.relu(), u["3.weight"], u["3.bias"]))


@pytest.mark.parametrize("norm", ["batch", "support", "frozen"])
def test_no_statistic_moves(norm):
    """functorch 273, pytorch 96655: `vmap` over batch normalisation was an error, since it counts in place.

    pytorch-maml 8: statistics had to be turned off by hand. Here a model with dropout and statistics trains, and keeps
    the statistics that it came with.
    """
    model, batch = network(), labelled_batch(4)
    model.insert(3, nn.Dropout(0.5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    learner = MAML(model.train(), F.cross_entropy, inner_lr=0.1, norm=norm)
    learner.backward(batch)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def by_hand(model: nn.Sequential, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network with the statistics of the batch."""
    z = F.linear(x, weights["0.weight"], weights["0.bias"])
    z = (z - z.mean(0)) / (z.var(0, unbiased=False) + model[1].eps).sqrt()
    return F.linear((weights["1.weight"] * z + weights["1.bias"]).relu(), weights["3.weight"], weights["3.bias"])


def test_second_derivatives_pass_through_the_statistics():
    """functorch 384: the Omniglot example could not use batch normalisation."""
    model, batch = network(), labelled_batch(4)
    found = MAML(model, F.cross_entropy, inner_lr=0.1, norm="batch").meta_gradient(batch).grads
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        loss = F.cross_entropy(by_hand(model, weights, x), y)
        inner = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        u = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), inner, strict=True)}
        losses.append(F.cross_entropy(by_hand(model, u, query_x), query_y))
    torch.stack(losses).mean().backward()
    for name, w in weights.items():
        torch.testing.assert_close(found[name][0], w.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["support", "frozen"])
def test_a_query_by_itself_is_predicted_as_among_others(norm):
    """pytorch-maml PR 7: predictions were better for larger batches of queries, which were normalised together."""
    model, batch = network(), labelled_batch(4)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, norm=norm)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    support = {"support_x": batch.support_x} if norm == "support" else {}
    together = learner.predict(adapted, batch.query_x, **support)
    for q in range(batch.query_x.shape[1]):
        alone = learner.predict(adapted, batch.query_x[:, q : q + 1], **support)
        torch.testing.assert_close(alone[:, 0], together[:, q])


class Given:
    """A sampler of tasks that are listed."""

    def __init__(self, batch: TaskBatch, order: list[int]) -> None:
        self.batch, self.order = batch, order

    def sample(self, step: int, num_tasks: int) -> TaskBatch:
        return TaskBatch(*(x[self.order[:num_tasks]] for x in self.batch[:4]))


@pytest.mark.parametrize("norm", ["batch", "support", "frozen"])
def test_no_task_of_an_evaluation_leaks_into_another(norm):
    """higher 107: each test task moved the running statistics, and the next task saw what they had become.

    Here a task has the same value whatever is evaluated before it, and a model in training mode keeps its statistics.
    """
    model, batch = network().train(), labelled_batch(4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, norm=norm)
    order = list(range(batch.num_tasks))
    values = evaluate(learner, Given(batch, order), tasks=len(order), steps=(0, 1), metric="loss").values
    back = evaluate(learner, Given(batch, order[::-1]), tasks=len(order), steps=(0, 1), metric="loss").values
    torch.testing.assert_close(back.flip(1), values, rtol=1e-12, atol=1e-12)
    last = evaluate(learner, Given(batch, order[-2:]), tasks=2, steps=(0, 1), metric="loss").values
    torch.testing.assert_close(last, values[:, -2:], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
