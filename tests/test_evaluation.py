"""Few-shot evaluation: against plain loops and NumPy, and at chance before adaptation."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metamom.evaluation.tasks
from metamom import MAML, CompositeMomentum, evaluate, train
from metamom.batch import TaskBatch
from metamom.evaluation import evaluate_norms
from metamom.evaluation.ensemble import Ensemble
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, FixedTasks, Omniglot, PerWorker, Sinusoid

FAMILY = Sinusoid(shots=5, queries=7, seed=3)
STEPS = (0, 1, 5, 10)


def sinusoid_learner(dtype: torch.dtype = torch.float64) -> MAML:
    model = SinusoidMLP((10, 10), generator=torch.Generator().manual_seed(0))
    return MAML(model.to(dtype), F.mse_loss, inner_lr=0.02)


def classes(ways: int = 5, **options: Any) -> Episodes:
    """Random images: classes that no learner can know before it adapts."""
    images = torch.rand(40 * 12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Episodes(images, torch.arange(480) % 40, ways=ways, shots=1, queries=3, **options)


def classifier(ways: int) -> MAML:
    state = torch.get_rng_state()
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, ways))
    torch.set_rng_state(state)
    return MAML(model, F.cross_entropy, inner_lr=0.1)


def looped(learner: MAML, batch: TaskBatch, steps: tuple[int, ...]) -> np.ndarray:
    """The slow twin: one task after the other, plain gradient descent on a copy of the model."""
    rows = []
    for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
        model = copy.deepcopy(learner.model)
        values = {}
        for step in range(max(steps) + 1):
            with torch.no_grad():
                out = model(query_x)
                right = (out.argmax(-1) == query_y).double().mean() if not query_y.is_floating_point() else None
                values[step] = float(learner.loss_fn(out, query_y) if right is None else right)
            grads = torch.autograd.grad(learner.loss_fn(model(support_x), support_y), list(model.parameters()))
            with torch.no_grad():
                for (name, w), g in zip(model.named_parameters(), grads, strict=True):
                    w -= learner.step_sizes.fixed[name] * g
        rows.append([values[step] for step in steps])
    return np.array(rows).T


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_mean_and_halfwidth_are_numpys(confidence):
    z = {0.5: 0.6744897501960817, 0.95: 1.959963984540054, 0.99: 2.5758293035489004}[confidence]
    result = evaluate(sinusoid_learner(), FAMILY, tasks=40, steps=STEPS, confidence=confidence)
    values = result.values.numpy()
    assert values.shape == (4, 40)
    assert result.steps == STEPS
    assert (result.metric, result.confidence) == ("loss", confidence)
    np.testing.assert_allclose(result.mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(result.halfwidth, z * values.std(1, ddof=1) / math.sqrt(40), rtol=1e-12)


def test_interval_is_that_of_the_literature():
    result = evaluate(sinusoid_learner(), FAMILY, tasks=40, steps=(1,))
    expected = 1.96 * result.values.numpy().std(ddof=1) / math.sqrt(40)
    assert result.halfwidth[0] == pytest.approx(expected, rel=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """The mean of 4,000 tasks is all but the truth; of 80 intervals of 95 %, 76 hold it, give or take 2."""
    made = sinusoid_learner()
    truth = evaluate(made, Sinusoid(5, 7, seed=99), tasks=4000, steps=(1,)).mean[0]
    held = 0
    for seed in range(80):
        part = evaluate(made, Sinusoid(5, 7, seed=seed), tasks=50, steps=(1,))
        held += abs(part.mean[0] - truth) <= part.halfwidth[0]
    assert 70 <= held < 80, held


def test_values_are_those_of_a_loop_over_tasks():
    made = sinusoid_learner()
    result = evaluate(made, FAMILY, tasks=12, steps=STEPS)
    batch = FAMILY.with_stream("test").sample(0, 12).to(dtype=torch.float64)
    np.testing.assert_allclose(result.values.numpy(), looped(made, batch, STEPS), rtol=1e-10)


def test_accuracies_are_those_of_a_loop_over_tasks():
    made, family = classifier(5), classes(5)
    result = evaluate(made, family, tasks=12, steps=(0, 3))
    assert result.metric == "accuracy"
    np.testing.assert_allclose(
        result.values.numpy(), looped(made, family.with_stream("test").sample(0, 12), (0, 3)), atol=1e-7
    )
    assert (result.values * 15).allclose((result.values * 15).round(), atol=1e-5)  # of 5 ways x 3 queries


def test_repeatable():
    first, second = (evaluate(sinusoid_learner(), FAMILY, tasks=20, steps=STEPS) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert first.mean == second.mean


def test_steps_in_any_order_and_twice():
    made = sinusoid_learner()
    ordered = evaluate(made, FAMILY, tasks=20, steps=(0, 1, 5))
    other = evaluate(made, FAMILY, tasks=20, steps=(5, 0, 5, 1))
    assert other.steps == (5, 0, 5, 1)
    assert torch.equal(other.values, ordered.values[[2, 0, 2, 1]])


@pytest.mark.parametrize("tasks", [120, 101])
def test_tasks_do_not_depend_on_how_many_are_computed_together(tasks, monkeypatch):
    made = sinusoid_learner()
    values = []
    for block in (50, 1, 7, 1000):
        monkeypatch.setattr(metamom.evaluation.tasks, "BLOCK", block)
        values.append(evaluate(made, FAMILY, tasks=tasks, steps=(0, 2)).values)
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-12, atol=0)


def test_fewer_tasks_are_the_first_of_more():
    made = sinusoid_learner()
    few, many = (evaluate(made, FAMILY, tasks=tasks, steps=(2,)).values for tasks in (13, 40))
    torch.testing.assert_close(many[:, :13], few, rtol=1e-12, atol=0)


class Plain:
    """A user's sampler: no streams, and a note of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, int]] = []

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        self.asked.append((step, num_tasks, rank, world_size))
        return FAMILY.sample(step, num_tasks, rank=rank, world_size=world_size)


def test_sampler_without_streams_is_asked_for_its_step_0():
    sampler = Plain()
    result = evaluate(sinusoid_learner(), sampler, tasks=100, steps=(1,))
    assert sampler.asked == [(0, 100, 0, 2), (0, 100, 1, 2)]
    assert torch.equal(
        result.values, evaluate(sinusoid_learner(), FAMILY, tasks=100, steps=(1,), stream="train").values
    )


@pytest.mark.parametrize("stream", [None, "validation"])
def test_tasks_come_from_their_stream_and_not_from_training(stream):
    made = sinusoid_learner()
    result = evaluate(made, FAMILY, tasks=30, steps=(0,), **({} if stream is None else {"stream": stream}))
    there = FAMILY.with_stream(stream or "test").sample(0, 30).to(dtype=torch.float64)
    trained_on = FAMILY.sample(0, 30).to(dtype=torch.float64)
    np.testing.assert_allclose(result.values.numpy(), looped(made, there, (0,)), rtol=1e-10)
    assert not np.isin(result.values.numpy(), looped(made, trained_on, (0,))).any()
    assert FAMILY.stream == "train"


@pytest.mark.parametrize(
    "sampler", [PerWorker([FAMILY, Sinusoid(5, 7, amplitude=(8, 9)), FAMILY]), FixedTasks(FAMILY, 60)], ids=type
)
def test_other_samplers(sampler):
    assert evaluate(sinusoid_learner(), sampler, tasks=60, steps=(1,)).values.shape == (1, 60)


# nothing is changed


def test_learner_and_gradients_are_unchanged():
    made = MAML(sinusoid_learner().model, F.mse_loss, learn_inner_lr=True)
    made.backward(FAMILY.sample(0, 4).to(dtype=torch.float64))
    before = {name: (p.clone(), p.grad.clone()) for name, p in made.named_parameters() if p.grad is not None}
    assert len(before) == 12
    state = torch.get_rng_state()
    evaluate(made, FAMILY, tasks=10)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in made.named_parameters():
        assert torch.equal(p, before[name][0]), name
        assert torch.equal(p.grad, before[name][1]), name
        assert p.requires_grad, name


class Failing:
    """A sampler whose data went away."""

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        raise ValueError("no tasks today")


def test_dropout_is_off_meanwhile():
    made = MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)), F.mse_loss)
    made.model[1].eval()
    modes = [module.training for module in made.modules()]
    state = torch.get_rng_state()
    first, second = (evaluate(made, FAMILY, tasks=10, steps=(0, 3)).values for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in made.modules()] == modes
    assert not all(modes)
    with pytest.raises(ValueError, match="no tasks today"):
        evaluate(made, Failing())
    assert [module.training for module in made.modules()] == modes


def test_works_where_gradients_are_off():
    made = sinusoid_learner()
    with torch.no_grad():
        inside = evaluate(made, FAMILY, tasks=10)
    assert torch.equal(inside.values, evaluate(made, FAMILY, tasks=10).values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": 1}, "at least 2 tasks; got tasks=1"),
        ({"steps": ()}, "one or more numbers"),
        ({"steps": (0, -1)}, "steps must be one or more numbers of inner steps >= 0"),
        ({"confidence": 0.0}, "confidence must be in"),
        ({"confidence": 1.0}, "confidence must be in"),
        ({"confidence": 95}, r"95 % is 0\.95"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(sinusoid_learner(), FAMILY, **arguments)


# at chance before adaptation


def assert_at_chance(learner: MAML, sampler: Any, ways: int, *, tasks: int) -> None:
    """Accuracy before adaptation is 1/N to 4 standard errors: labels are permuted in every task.

    Each task's value has the standard deviation that is measured, and no more than that of a coin for each query.
    """
    result = evaluate(learner, sampler, tasks=tasks, steps=(0,))
    assert result.metric == "accuracy"
    error = float(result.values.std()) / math.sqrt(tasks)
    assert 0 < error < 0.5 / math.sqrt(tasks)
    assert abs(result.mean[0] - 1 / ways) < 4 * error, f"{result.mean[0]:.4f}, chance is {1 / ways}"


@pytest.mark.parametrize("ways", [2, 5, 20])
def test_synthetic_tasks_are_at_chance_before_adaptation(ways):
    made, family = classifier(ways), classes(ways)
    assert_at_chance(made, family, ways, tasks=600)
    assert evaluate(made, family, tasks=50, steps=(20,)).values.shape == (1, 50)


@pytest.mark.parametrize("ways", [5, 20])
@pytest.mark.parametrize("trained", [False, True], ids=["untrained", "trained"])
def test_omniglot_is_at_chance_before_adaptation(ways, trained, data_root):
    model = Conv4(ways, hidden=16, generator=torch.Generator().manual_seed(0))
    made = MAML(model, F.cross_entropy, inner_lr=0.4)
    if trained:
        optimizer = CompositeMomentum(made.parameters(), lr=0.1)
        train(made, optimizer, Omniglot(data_root, ways=ways), iterations=30, meta_batch=4)
    test = Omniglot(data_root, split="test", ways=ways)
    assert_at_chance(made, test, ways, tasks=600 if ways == 5 else 300)
    if trained and ways == 5:
        adapted = evaluate(made, test, tasks=100, steps=(0, 1))
        assert adapted.mean[1] - adapted.halfwidth[1] > 0.3, "and adaptation lifts it well above"


class Counting(MAML):
    """Notes how many tasks each prediction is for."""

    counts: list[int]

    def predict(self, params: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.counts.append(len(x))
        return super().predict(params, x, *args, **kwargs)


def counting(**options: Any) -> Counting:
    model = SinusoidMLP((100, 100), generator=torch.Generator().manual_seed(0)).double()
    learner = Counting(model, F.mse_loss, inner_lr=0.02, **options)
    learner.counts = []
    return learner


@pytest.mark.parametrize("chunk_size", [1, 7, 20, None])
def test_an_evaluation_holds_as_many_tasks_at_a_time_as_the_learners_chunk_size(chunk_size: int | None) -> None:
    learner = counting(chunk_size=chunk_size)
    found = evaluate(learner, FAMILY, tasks=20, steps=(0, 2))
    assert max(learner.counts) == (chunk_size or 20)
    assert sum(learner.counts) == 2 * 20
    batch = FAMILY.with_stream("test").sample(0, 20).to(dtype=torch.float64)
    np.testing.assert_allclose(found.values, looped(learner, batch, (0, 2)), rtol=1e-10)


@pytest.mark.parametrize("steps", [(0,), (0, 1)])
def test_an_evaluation_measures_how_many_large_tasks_it_can_hold(steps: tuple[int, ...]) -> None:
    learner = counting()
    large = Sinusoid(shots=20_000, queries=20_000, seed=3)  # 32 MB of activations for each set of points
    evaluate(learner, large, tasks=10, steps=steps)
    assert max(learner.counts) < 10
    learner.counts.clear()
    evaluate(learner, FAMILY, tasks=10, steps=steps)
    assert max(learner.counts) == 10


def test_an_ensemble_is_evaluated_in_the_chunks_of_its_members() -> None:
    members = [counting(chunk_size=4) for _ in range(2)]
    found = evaluate(Ensemble(members), FAMILY, tasks=10, steps=(1,), metric="loss")
    assert {n for each in members for n in each.counts} == {4, 2}
    alone = evaluate(members[0], FAMILY, tasks=10, steps=(1,), metric="loss")
    torch.testing.assert_close(found.values, alone.values, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapt": ["head"]},
        {"inner_steps": 2, "step_norms": True},
        {"estimator": "implicit", "proximal": "4,iterations=5"},
    ],
)
def test_several_norms_are_those_one_by_one(options):
    model = Conv4(5, hidden=4, image_size=8, generator=torch.Generator().manual_seed(3)).double()
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, **options)
    settings: dict[str, Any] = {"tasks": 7, "steps": (2, 0, 1) if "estimator" not in options else (0, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of proximal problems at their kinks
        found = evaluate_norms(learner, classes(), ("support", "batch"), **settings)
        assert list(found) == ["support", "batch"]
        for norm, together in found.items():
            alone = evaluate(learner, classes(), norm=norm, **settings)
            assert torch.equal(together.values, alone.values)
            assert repr(together) == repr(alone)
    assert not torch.equal(found["batch"].values, found["support"].values)


@pytest.mark.parametrize("norms", [("batch", "frozen"), ()])
def test_norms_that_adapt_differently_are_refused(norms):
    with pytest.raises(ValueError, match="norms must be 'batch' and 'support', or one of them; got"):
        evaluate_norms(classifier(5), classes(), norms)
