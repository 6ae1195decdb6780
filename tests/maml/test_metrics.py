"""Accuracies against values counted by hand, as the loss function means predictions and targets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import loop_over
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate
from metamom.maml.metrics import accuracy

TASKS = 2


class Scores(nn.Module):
    """Predictions that are part of the inputs, so that a test writes them down; its weight starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * x


class Fixed:
    """A sampler of one batch."""

    def __init__(self, batch: TaskBatch) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        assert num_tasks == self.batch.num_tasks
        return self.batch


def batch_of(scores: Any, labels: Any) -> TaskBatch:
    """The same points in all support and query sets."""
    x, y = torch.as_tensor(scores), torch.as_tensor(labels)
    x, y = (z.expand(TASKS, *z.shape).clone() for z in (x, y))
    return TaskBatch(x, y, x, y)


def learner_of(loss_fn: Callable[..., Tensor], **options: Any) -> MAML:
    return MAML(Scores(), loss_fn, inner_lr=1e-12, **options)


def assert_accuracy(loss_fn: Callable[..., Tensor], scores: Any, labels: Any, expected: float | None) -> None:
    """By `backward` and by `evaluate`, before adaptation and after."""
    batch = batch_of(scores, labels)
    found = learner_of(loss_fn).backward(batch).metrics["accuracy"]
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))
    result = evaluate(learner_of(loss_fn), Fixed(batch), tasks=TASKS, steps=(0, 1))
    assert result.metric == ("loss" if expected is None else "accuracy")
    if expected is not None:
        torch.testing.assert_close(result.values, torch.full((2, TASKS), expected, dtype=torch.float64))


# 2 classes of 2 points of 3 positions, the classes along axis 1, and what is right of them
SEQUENCES = torch.tensor([[[2.0, 0.0, 5.0], [1.0, 3.0, 4.0]], [[0.0, 0.0, 1.0], [9.0, 9.0, 2.0]]])
BEST = torch.tensor([[0, 1, 0], [1, 1, 1]])
LABELS = torch.tensor([[0, 0, 0], [1, 1, 0]])  # 4 of 6 are right


def by_flattening(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p.transpose(1, 2).flatten(0, 1), y.flatten())


def by_log_softmax(p: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(p, 1), y)


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda p, y: F.cross_entropy(p / 2, y),
        by_log_softmax,
        by_flattening,
        lambda p, y: (p.logsumexp(1) - p.gather(1, y.unsqueeze(1)).squeeze(1)).mean(),  # nothing of torch's to see
    ],
)
def test_sequences_have_their_classes_along_axis_1(loss_fn):
    assert_accuracy(loss_fn, SEQUENCES, LABELS, 4 / 6)


def test_images_have_their_classes_along_axis_1():
    """As many classes as rows and columns: shapes alone do not say which axis is which."""
    scores = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [4.0, 0.0]]])  # [C, H, W]: best are 0 1 / 1 0
    labels = torch.tensor([[0, 1], [0, 0]])  # 3 of 4; along the last axis 0 1 / 1 0 of other scores would be 1 of 4
    assert_accuracy(F.cross_entropy, scores[None], labels[None], 3 / 4)
    assert_accuracy(partial(F.cross_entropy, ignore_index=0), scores[None], labels[None], 1.0)


def test_words_may_have_their_classes_last():
    scores = SEQUENCES.transpose(1, 2)  # [N, L, C]
    assert_accuracy(lambda p, y: F.cross_entropy(p.flatten(0, 1), y.flatten()), scores, LABELS, 4 / 6)
    assert_accuracy(lambda p, y: F.cross_entropy(p.transpose(1, 2), y), scores, LABELS, 4 / 6)


def test_what_shapes_and_loss_leave_open_is_no_accuracy():
    square = torch.randn(2, 3, 3)
    labels = torch.randint(0, 3, (2, 3))
    assert accuracy(square[None], labels[None]) is None
    assert_accuracy(lambda p, y: F.cross_entropy(p.transpose(1, 2), y), square, labels, None)
    assert_accuracy(lambda p, y: F.cross_entropy(p.transpose(1, 2).flatten(0, 1), y.flatten()), square, labels, None)


@pytest.mark.parametrize("ignored", [1, 255])
@pytest.mark.parametrize(
    "make",
    [
        lambda i: nn.CrossEntropyLoss(ignore_index=i),
        lambda i: partial(F.cross_entropy, ignore_index=i),
        lambda i: lambda p, y: F.cross_entropy(p, y, ignore_index=i),
        lambda i: lambda p, y: F.nll_loss(F.log_softmax(p, 1), y, ignore_index=i),
    ],
    ids=["module", "partial", "lambda", "nll"],
)
def test_ignored_targets_do_not_count(make, ignored):
    labels = torch.tensor([[0, ignored, ignored], [ignored, ignored, 0]])  # 1 of 2 is right
    assert_accuracy(make(ignored), SEQUENCES, labels, 1 / 2)


def test_torchs_own_ignored_label_does_not_count():
    assert_accuracy(F.cross_entropy, SEQUENCES, torch.tensor([[0, 0, -100], [-100, 1, 0]]), 2 / 4)
    nothing = accuracy(SEQUENCES[None], torch.full((1, 2, 3), -100))
    assert nothing.isnan().all()


LOGITS = torch.tensor([-1.0, 0.2, 3.0, -0.1, 0.7])
ONES = torch.tensor([0, 1, 0, 0, 1])  # 4 of 5 are right; 3 of 5 are zeros, 3 of 5 of the probabilities are > 1/2


def bce(p: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(p, y)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, y: bce(p.squeeze(-1), y.float()),
        lambda p, y: bce(p[:, 0], y.to(p.dtype)),
        lambda p, y: bce(p.flatten(), y.to(p)),
        lambda p, y: bce(p, y[:, None].float()),
        lambda p, y: nn.BCEWithLogitsLoss()(p, y.unsqueeze(1).float()),
        lambda p, y: F.binary_cross_entropy(torch.sigmoid(p).squeeze(-1), y.float()),
        lambda p, y: F.binary_cross_entropy(p.squeeze(-1).sigmoid(), y.float()),
    ],
)
@loop_over(kind=(torch.int64, torch.int32, torch.uint8, torch.bool))
def test_one_logit(loss_fn, kind):
    assert_accuracy(loss_fn, LOGITS[:, None], ONES.to(kind), 4 / 5)


def test_one_probability():
    """Of 1/2 and more: at a threshold of zero all would be ones."""
    probabilities = LOGITS.sigmoid()[:, None]
    assert_accuracy(lambda p, y: F.binary_cross_entropy(p.squeeze(-1), y.float()), probabilities, ONES, 4 / 5)


def test_labels_of_several_kinds_at_once():
    """Each a label of its own, [N, 2]."""
    scores = torch.tensor([[1.0, -1.0], [2.0, 2.0], [-3.0, 1.0]])
    labels = torch.tensor([[1, 1], [1, 0], [0, 1]])
    assert_accuracy(lambda p, y: bce(p, y.float()), scores, labels, 4 / 6)


@pytest.mark.parametrize(
    ("loss_fn", "scores", "labels"),
    [
        (F.mse_loss, LOGITS[:, None], ONES[:, None].float()),
        (lambda p, y: F.mse_loss(p.squeeze(-1), y.float()), LOGITS[:, None], ONES),  # values that are whole numbers
        (lambda p, y: F.softplus(-p.squeeze(-1) * (2 * y - 1)).mean(), LOGITS[:, None], ONES),  # nothing to see
        (bce, LOGITS[:, None], ONES[:, None].float()),
        (F.cross_entropy, SEQUENCES[:, :, 0], torch.tensor([[0.9, 0.1], [0.2, 0.8]])),  # probabilities of classes
        (lambda p, y: F.cross_entropy(p, 1 - y), SEQUENCES, LABELS),  # other labels than the targets
        (lambda p, y: F.cross_entropy(p[:, :2], y) + p[:, 2].pow(2).mean(), torch.randn(4, 3), ONES[:4]),  # two heads
    ],
)
def test_what_is_no_classification_has_no_accuracy(loss_fn, scores, labels):
    assert_accuracy(loss_fn, scores, labels, None)


def test_other_losses_of_class_scores():
    scores, labels = SEQUENCES[:, :, 2], torch.tensor([0, 0])  # best are 0 and 1
    for loss_fn in (
        lambda p, y: F.mse_loss(p, F.one_hot(y, 2).float()),
        lambda p, y: bce(p, F.one_hot(y, 2).float()),
        lambda p, y: F.cross_entropy(p, F.one_hot(y, 2) * 0.9 + 0.05),
    ):
        assert_accuracy(loss_fn, scores, labels, 1 / 2)


def pick(p: Tensor, y: Tensor) -> Tensor:
    return p.gather(1, y[:, None]).mean()


POINTS = SEQUENCES[:, :, 2], torch.tensor([0, 0])  # 2 points of 2 outputs, the larger ones 0 and 1
BY_HAND = {
    "gather": lambda p, y: -pick(F.log_softmax(p, 1), y),
    "gather along the last axis": lambda p, y: -p.log_softmax(-1).gather(dim=-1, index=y.unsqueeze(-1)).mean(),
    "index": lambda p, y: -torch.log_softmax(p, dim=1)[torch.arange(len(y)), y].mean(),
    "logarithm of a softmax": lambda p, y: -torch.log(F.softmax(p, dim=1)[torch.arange(len(y)), y]).mean(),
    "one-hot": lambda p, y: -(F.one_hot(y, 2) * F.log_softmax(p, 1)).sum(1).mean(),
    "comparison": lambda p, y: -((y[:, None] == torch.arange(2)) * F.log_softmax(p, 1)).sum(1).mean(),
    "where": lambda p, y: -torch.where(y[:, None] == torch.arange(2), p.log_softmax(1), 0.0).sum(1).mean(),
    "unit matrix": lambda p, y: -(torch.eye(2)[y] * F.log_softmax(p, 1)).sum(1).mean(),
    "einsum": lambda p, y: -torch.einsum("nc,nc->n", F.one_hot(y, 2).float(), F.log_softmax(p, 1)).mean(),
    "focal": lambda p, y: -((1 - F.softmax(p, 1)) ** 2 * F.log_softmax(p, 1)).gather(1, y[:, None]).mean(),
    "temperature": lambda p, y: -pick(F.log_softmax(p / 2, 1), y),
    "normaliser": lambda p, y: -pick(p - p.logsumexp(1, keepdim=True), y),
    "exponentials": lambda p, y: -pick((p.exp() / p.exp().sum(1, keepdim=True)).log(), y),
    "shifted": lambda p, y: -pick((z := p - p.max(1, keepdim=True).values) - z.exp().sum(-1, keepdim=True).log(), y),
    "distribution": lambda p, y: -Categorical(logits=p).log_prob(y).mean(),
    "smoothed": lambda p, y: F.kl_div(F.log_softmax(p, 1), F.one_hot(y, 2) * 0.9 + 0.05, reduction="batchmean"),
    "clamped labels": lambda p, y: -pick(F.log_softmax(p, 1), y.clamp(min=0)),
    "margin": nn.MultiMarginLoss(),
    "by name": lambda p, y: F.cross_entropy(target=y, input=p),
    "Brier": lambda p, y: ((F.softmax(p, 1) - F.one_hot(y, 2)) ** 2).sum(1).mean(),
    "Brier of units": lambda p, y: F.mse_loss(p, torch.eye(2)[y]),
    "Brier of scattered ones": lambda p, y: F.mse_loss(p, torch.zeros_like(p).scatter(1, y[:, None], 1.0)),
    "one-hot probabilities": lambda p, y: F.binary_cross_entropy(p.sigmoid(), F.one_hot(y, 2).float()),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", BY_HAND)
def test_classification_by_hand(name):
    estimator = "first-order" if name == "margin" else "exact"  # torch has no second derivative of it
    learner = learner_of(BY_HAND[name], estimator=estimator)
    assert learner.backward(batch_of(*POINTS)).metrics["accuracy"] == pytest.approx(1 / 2)


def pair_distances(p: Tensor) -> Tensor:
    return (p[:, None] - p[None]).square().sum(-1)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, y: (pair_distances(p) * torch.where(y[:, None] == y[None], 1.0, -1.0)).mean(),  # an embedding
        lambda p, y: -(F.log_softmax(p @ p.T, 1) * (y[:, None] == y[None])).mean(),
        lambda p, y: -pick(F.log_softmax(-p, 1), y),  # distances
        lambda p, y: pick(p, y),
        lambda p, y: ((-p).logsumexp(1) + p.gather(1, y[:, None]).squeeze(1)).mean(),
        lambda p, y: F.mse_loss(p, 1 - F.one_hot(y, 2).float()),
        lambda p, y: bce(p, (y[:, None] > torch.arange(2)).to(p)),  # ranks
        lambda p, y: torch.maximum(0.3 * (y[:, None] - p), -0.7 * (y[:, None] - p)).mean(),  # quantiles
        lambda p, y: (p[:, 1] + (y - p[:, 0]) ** 2 / p[:, 1].exp()).mean(),  # a mean and a variance
        lambda p, y: bce(p[:, 0], y.to(p)) + p[:, 1].square().mean(),  # a logit and something else
        lambda p, y: F.mse_loss(p, torch.arange(4.0).view(2, 2)[y]),  # a vector for each label
        lambda p, y: -pick(F.log_softmax(p, 1), 1 - y),  # other labels
        lambda p, y: -pick(F.log_softmax(p, 0), y),  # over the points
        lambda p, y: bce(p - p.mean(1, keepdim=True), y[:, None].expand(-1, 2).to(p)),
    ],
)
def test_outputs_that_are_no_class_scores_have_no_accuracy(loss_fn):
    assert_accuracy(loss_fn, *POINTS, None)


def test_predictions_of_nan_are_wrong():
    scores = torch.tensor([[[1.0, 0.0], [float("nan"), float("nan")]]])
    assert torch.equal(accuracy(scores, torch.tensor([[0, 0]])), torch.tensor([0.5]))


def test_shares_are_exact_in_half_precision():
    scores = torch.zeros(1, 4099, 2, dtype=torch.float16)
    labels = torch.zeros(1, 4099, dtype=torch.int64)
    labels[0, 0] = 1
    assert torch.equal(accuracy(scores, labels), torch.tensor([4098 / 4099]))


def test_each_loss_is_read_by_itself():
    learner = learner_of(lambda p, y: F.cross_entropy(p, y, ignore_index=1))
    batch = batch_of(SEQUENCES, LABELS)
    assert learner.backward(batch).metrics["accuracy"] == pytest.approx(2 / 4)
    assert copy.deepcopy(learner).backward(batch).metrics["accuracy"] == pytest.approx(2 / 4)
    learner.loss_fn = F.cross_entropy
    assert learner.backward(batch).metrics["accuracy"] == pytest.approx(4 / 6)
    for classes in range(2, 40):  # many shapes: the last ones are remembered
        wide = torch.eye(classes)
        assert learner.backward(batch_of(wide, torch.arange(classes))).metrics["accuracy"] == 1


def test_a_compiled_learner_goes_by_what_was_traced(traced):
    learner = learner_of(lambda p, y: bce(p.squeeze(-1), y.float()), compile=True)
    batch = batch_of(LOGITS[:, None], ONES)
    for _ in range(2):
        assert learner.backward(batch).metrics["accuracy"] == pytest.approx(4 / 5)
    learner = learner_of(nn.CrossEntropyLoss(ignore_index=1), compile=True)
    for _ in range(2):
        assert learner.backward(batch_of(SEQUENCES, LABELS)).metrics["accuracy"] == pytest.approx(2 / 4)
    assert len(traced) == 2


def test_gradients_are_the_same_where_losses_are_watched():
    """A lambda around the loss, or the loss itself, watched or not."""
    x, y = torch.randn(3, 5, 2), torch.randint(0, 2, (3, 5))
    batch, model = TaskBatch(x, y, x, y), nn.Linear(2, 2)
    ours = MAML(model, F.cross_entropy).meta_gradient(batch).grads
    theirs = MAML(model, lambda p, y: p.logsumexp(1).mean() - p.gather(1, y[:, None]).mean()).meta_gradient(batch).grads
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


# ---- what the loss does with labels and scores before torch's own loss


def batch_of_labels(tasks: int, points: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(2):
        sets.append(torch.randn(tasks, points, 3, generator=generator))
        sets.append(torch.randint(0, 4, (tasks, points), generator=generator))
    return TaskBatch(*sets)


def plainly_right(learner: MAML, batch: TaskBatch) -> float:
    with torch.no_grad():
        predictions = learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x)
    return float((predictions.argmax(-1) == batch.query_y.view(predictions.shape[:2])).float().mean())


@pytest.mark.parametrize("points", [4, 5])
@pytest.mark.parametrize("drop", [lambda y: y.squeeze(-1), lambda y: y.flatten(), lambda y: y[:, 0]])
def test_labels_with_an_axis_of_one(drop, points):
    torch.manual_seed(0)
    batch = batch_of_labels(4, points)
    batch = batch._replace(support_y=batch.support_y.unsqueeze(-1), query_y=batch.query_y.unsqueeze(-1))
    learner = MAML(torch.nn.Linear(3, 4), lambda p, y: F.cross_entropy(p, drop(y)))
    assert learner.backward(batch).metrics["accuracy"] == pytest.approx(plainly_right(learner, batch))


@pytest.mark.parametrize(
    ("scale", "known"),
    [(lambda p: p / 0.5, True), (lambda p: 2 * p, True), (lambda p: p * 3.0, True), (lambda p: -p, False),
     (lambda p: p * -1.0, False), (lambda p: p.square(), False)],
)  # fmt: skip
def test_scores_that_the_loss_changes(scale, known):
    """A temperature leaves the largest score the largest; what else is done to scores may not."""
    torch.manual_seed(0)
    batch = batch_of_labels(4, 5)
    learner = MAML(torch.nn.Linear(3, 4), lambda p, y: F.cross_entropy(scale(p), y))
    found = learner.backward(batch).metrics["accuracy"]
    assert found == (pytest.approx(plainly_right(learner, batch)) if known else None)
