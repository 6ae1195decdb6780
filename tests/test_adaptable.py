"""`evaluate` of any learner, by any metric, and paired comparisons."""

from __future__ import annotations

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, compare_learners, evaluate, evaluation, paired_difference
from metamom.evaluation import Adaptable
from metamom.interop.imports import import_torchvision
from metamom.maml.padding import pad
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.task_metrics import calibration_error, macro_f1, rmse
from metamom.tasks import Episodes, Sinusoid

FAMILY = Sinusoid(shots=5, queries=7, seed=3, dtype=torch.float64)


def images(ways: int = 3) -> Episodes:
    drawn = torch.rand(120, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return Episodes(drawn, torch.arange(120) % 12, ways=ways, shots=2, queries=5)


class Wrapped:
    """A MAML that shows only the two methods, and what else the protocol allows."""

    def __init__(self, learner: MAML) -> None:
        self.learner = learner
        self.loss_fn = learner.loss_fn

    def adapt(self, support_x: Tensor, support_y: Tensor, *, steps: int) -> dict[str, Tensor]:
        return self.learner.adapt(support_x, support_y, steps=steps)

    def predict(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.learner.predict(state, x)

    def parameters(self):
        return self.learner.parameters()


def sinusoid_learner() -> MAML:
    return MAML(SinusoidMLP((10,), generator=torch.Generator().manual_seed(0)).double(), F.mse_loss, inner_lr=0.02)


def classifier(ways: int = 3) -> MAML:
    model = Conv4(ways, hidden=4, generator=torch.Generator().manual_seed(0))
    return MAML(model, F.cross_entropy, inner_lr=0.4)


def test_a_maml_has_the_protocol():
    learner: Adaptable = sinusoid_learner()
    assert isinstance(learner.adapt(*FAMILY.sample(0, 2)[:2], steps=1), dict)


@pytest.mark.parametrize(
    ("learner", "family"), [(sinusoid_learner(), FAMILY), (classifier(), images())], ids=["values", "classes"]
)
@pytest.mark.parametrize("metric", [None, "loss"])
def test_any_learner_is_evaluated_as_maml_is(learner, family, metric):
    expected = evaluate(learner, family, tasks=12, steps=(5, 0, 1), metric=metric)
    found = evaluate(Wrapped(learner), family, tasks=12, steps=(5, 0, 1), metric=metric)
    assert (found.metric, found.steps) == (expected.metric, expected.steps)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-6)


def test_tasks_of_several_sizes():
    tasks = [
        tuple(x[0] for x in Sinusoid(shots, queries, seed=shots, dtype=torch.float64).sample(0, 1)[:4])
        for shots, queries in ((3, 4), (6, 2), (5, 5))
    ]

    class Padded:
        def sample(self, step: int, num_tasks: int) -> TaskBatch:
            return pad(tasks)

    learner = sinusoid_learner()
    expected = evaluate(learner, Padded(), tasks=3, steps=(0, 2))
    found = evaluate(Wrapped(learner), Padded(), tasks=3, steps=(0, 2))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-12)
    for metric in ("rmse", lambda p, y: (p - y).square().mean().sqrt()):
        for each in (learner, Wrapped(learner)):
            values = evaluate(each, Padded(), tasks=3, steps=(0, 2), metric=metric).values
            torch.testing.assert_close(values, expected.values.sqrt(), rtol=1e-10, atol=1e-12)


# metrics


@pytest.mark.parametrize("learner", [classifier(), Wrapped(classifier())], ids=["MAML", "wrapped"])
def test_metrics_by_name_and_as_functions(learner):
    def accuracy_of_mine(scores: Tensor, labels: Tensor) -> float:
        return float((scores.argmax(-1) == labels).float().mean())

    family = images()
    plain = evaluate(learner, family, tasks=10, steps=(0, 1))
    mine = evaluate(learner, family, tasks=10, steps=(0, 1), metric=accuracy_of_mine)
    assert (plain.metric, mine.metric) == ("accuracy", "accuracy_of_mine")
    torch.testing.assert_close(plain.values, mine.values, rtol=1e-6, atol=1e-6)
    for name, function in (("macro-f1", macro_f1), ("calibration-error", calibration_error)):
        named, given = (evaluate(learner, family, tasks=10, steps=(1,), metric=each) for each in (name, function))
        assert named.metric == name
        assert torch.equal(named.values, given.values)
    few = evaluate(learner, family, tasks=10, steps=(1,), metric=functools.partial(calibration_error, bins=2))
    assert few.metric == "calibration_error"


def test_macro_f1_is_the_textbooks():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores, labels = torch.randn(11, 4, generator=generator), torch.randint(0, 4, (11,), generator=generator)
        found, each = scores.argmax(-1).tolist(), []
        for c in range(4):
            tp = sum(a == b == c for a, b in zip(found, labels.tolist(), strict=True))
            fp, fn = found.count(c) - tp, labels.tolist().count(c) - tp
            if tp + fp + fn:
                each.append(2 * tp / (2 * tp + fp + fn))
        assert float(macro_f1(scores, labels)) == pytest.approx(np.mean(each))


def test_calibration_error_is_that_of_a_loop_over_bins():
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (200,), generator=generator)
    confidence, found = scores.softmax(-1).max(-1)
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            right = (found == labels)[inside].double().mean()
            total += float(inside.sum()) / 200 * abs(float(right - confidence[inside].mean()))
    assert float(calibration_error(scores, labels)) == pytest.approx(total)
    certain = 100 * F.one_hot(labels, 3).double()
    assert float(calibration_error(certain, labels)) == pytest.approx(0, abs=1e-12)


def test_rmse_refuses_shapes_that_would_broadcast():
    assert float(rmse(torch.ones(4, 1), torch.zeros(4))) == 1
    with pytest.raises(ValueError, match=r"of the same shape; got \[4, 1\] and \[3\]"):
        rmse(torch.ones(4, 1), torch.zeros(3))


def test_metrics_of_torchmetrics():
    with contextlib.suppress(ImportError):
        import_torchvision()  # which torchmetrics imports, and which may lack its compiled operators
    functional = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
    family, learner = images(), classifier()
    for theirs, name in (
        (functools.partial(functional.multiclass_accuracy, num_classes=3, average="micro"), "accuracy"),
        (functools.partial(functional.multiclass_f1_score, num_classes=3, average="macro"), "macro-f1"),
        (functools.partial(functional.multiclass_calibration_error, num_classes=3, n_bins=15), "calibration-error"),
    ):
        ours, other = (evaluate(learner, family, tasks=10, steps=(0, 1), metric=each) for each in (name, theirs))
        torch.testing.assert_close(ours.values, other.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("learner", "family", "options", "error", "message"),
    [
        (sinusoid_learner(), FAMILY, {"metric": "acuracy"}, ValueError, "got 'acuracy'; did you mean accuracy?"),
        (sinusoid_learner(), FAMILY, {"metric": 3}, TypeError, "metric must be accuracy, loss, macro-f1"),
        (sinusoid_learner(), FAMILY, {"metric": "accuracy"}, ValueError, "accuracy compares class scores"),
        (Wrapped(sinusoid_learner()), FAMILY, {"metric": "accuracy"}, ValueError, "accuracy compares class scores"),
        (sinusoid_learner(), FAMILY, {"metric": "macro-f1"}, ValueError, "macro-f1 takes class scores"),
        (classifier(), images(), {"metric": "rmse"}, ValueError, "rmse compares"),
        (classifier(), images(), {"metric": lambda p, y: p}, ValueError, "must return one number for each task"),
        (Wrapped(sinusoid_learner()), FAMILY, {"norm": "batch"}, TypeError, r"norm can be chosen for a metamom\.MAML"),
        (Wrapped(sinusoid_learner()), FAMILY, {"inner_lr": 0.1}, TypeError, "inner_lr can be chosen"),
        (sinusoid_learner(), FAMILY, {"inner_lr": -1.0}, ValueError, "inner_lr"),
        (Wrapped, FAMILY, {}, TypeError, "the class Wrapped itself"),
        (nn.Linear(1, 1), FAMILY, {}, TypeError, "with methods adapt and predict; got a Linear"),
    ],
)
def test_bad_arguments(learner, family, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(learner, family, tasks=4, steps=(0,), **options)


class Odd:
    def __init__(self, answer) -> None:
        self.answer = answer

    def adapt(self, support_x, support_y, *, steps):
        return None

    def predict(self, state, x):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, TypeError, r"Odd\.predict must return predictions, a tensor \[T, Q, \.\.\.\]; got a NoneType"),
        (torch.ones(3, 7, 1), ValueError, r"for the queries of 4 tasks; got \[3, 7, 1\]"),
        (torch.ones(4, 7, 1), TypeError, "Odd has no loss_fn to measure a loss with"),
    ],
)
def test_learners_that_answer_something_else(answer, error, message):
    with pytest.raises(error, match=message):
        evaluate(Odd(answer), FAMILY, tasks=4, steps=(0,))


def test_non_finite_predictions_name_the_data():
    class Infinite(Sinusoid):
        def sample(self, step, num_tasks, *, rank=0, world_size=1):
            batch = super().sample(step, num_tasks, rank=rank, world_size=world_size)
            batch.query_x[1] = math.inf
            return batch

    with pytest.raises(ValueError, match="query_x holds 7 of 28, first in task 1"):
        evaluate(Wrapped(sinusoid_learner()), Infinite(5, 7, dtype=torch.float64), tasks=4, steps=(0,), metric="rmse")


# options at evaluation


def test_another_inner_step_size():
    learner = sinusoid_learner()
    faster = MAML(learner.model, F.mse_loss, inner_lr=0.05)
    found = evaluate(learner, FAMILY, tasks=10, steps=(0, 3), inner_lr=0.05)
    assert torch.equal(found.values, evaluate(faster, FAMILY, tasks=10, steps=(0, 3)).values)
    assert learner.inner_lr == 0.02
    learned = MAML(learner.model, F.mse_loss, inner_lr=0.02, learn_inner_lr="tensor")
    assert torch.equal(evaluate(learned, FAMILY, tasks=10, steps=(0, 3), inner_lr=0.05).values, found.values)
    assert {float(alpha.detach()) for alpha in learned.inner_lr.values()} == {0.02}


# comparisons


def test_paired_differences_are_those_of_numpy():
    a, b = sinusoid_learner(), sinusoid_learner()
    b.inner_lr = 0.05
    first, second = (evaluate(each, FAMILY, tasks=50, steps=(0, 1, 5)) for each in (a, b))
    found = paired_difference(second, first)
    values = (second.values - first.values).numpy()
    np.testing.assert_allclose(found.mean, values.mean(1), atol=1e-15)
    np.testing.assert_allclose(found.halfwidth, 1.959963984540054 * values.std(1, ddof=1) / math.sqrt(50))
    assert found.mean[0] == found.halfwidth[0] == 0  # the same before adaptation
    one = paired_difference(second, first.at(0))
    assert one.steps == (0, 1, 5)
    np.testing.assert_allclose(one.values, second.values - first.values[0])
    compared = compare_learners({"slow": a, "fast": b}, FAMILY, tasks=50, steps=(0, 1, 5))
    assert list(compared.evaluations) == ["slow", "fast"]
    assert torch.equal(compared.differences["fast"].values, found.values)


def test_differences_of_other_evaluations_are_refused():
    learner = sinusoid_learner()
    a = evaluate(learner, FAMILY, tasks=10, steps=(0, 1))
    with pytest.raises(ValueError, match="the same metric on the same tasks; got loss on 10 tasks and rmse on 10"):
        paired_difference(a, evaluate(learner, FAMILY, tasks=10, steps=(0, 1), metric="rmse"))
    with pytest.raises(ValueError, match="loss on 10 tasks and loss on 12"):
        paired_difference(a, evaluate(learner, FAMILY, tasks=12, steps=(0, 1)))
    with pytest.raises(ValueError, match=r"got \(0, 1\) and \(0, 2\)"):
        paired_difference(a, evaluate(learner, FAMILY, tasks=10, steps=(0, 2)))
    with pytest.raises(ValueError, match="after 0, 1 steps; got 5"):
        a.at(5)
    with pytest.raises(ValueError, match="at least two learners"):
        compare_learners({"one": learner}, FAMILY)


def test_what_is_printed_is_a_small_table():
    learner = sinusoid_learner()
    result = evaluate(learner, FAMILY, tasks=50, steps=(0, 10))
    lines = str(result).splitlines()
    assert lines == repr(result).splitlines()
    assert lines[0] == "steps  loss      ± 95 %"
    assert lines[2] == f"   10  {result.mean[1]:<8.4f}  {result.halfwidth[1]:.4f}"
    assert lines[3] == "(50 tasks)"
    assert isinstance(result, tuple)
    other = sinusoid_learner()
    other.inner_lr = 0.05
    table = repr(compare_learners({"slow": learner, "fast": other}, FAMILY, tasks=50, steps=(1,))).splitlines()
    assert table[0].split() == ["steps", "loss", "±", "95", "%", "minus", "slow", "±", "95", "%"]
    assert len(table) == 4
    assert len(table[2].split()) == 6
    assert evaluation.Evaluation._fields[:4] == ("steps", "mean", "halfwidth", "values")
