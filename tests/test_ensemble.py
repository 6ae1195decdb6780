"""The mean of several learners' predictions, and the best checkpoints of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metamom
from metamom import MAML, TaskBatch, evaluate, load, train
from metamom.ensemble import Ensemble, ensemble_of
from metamom.loading import LoadedRun
from metamom.tasks import Episodes, Sinusoid


def network(seed: int, out: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(1 if out == 1 else 4, 5), nn.Tanh(), nn.Linear(5, out)).double()


def adapted(learner: MAML, x: Tensor, y: Tensor, query_x: Tensor) -> Tensor:
    """The predictions of one task after two inner steps, by a plain loop."""
    weights = dict(learner.model.named_parameters())
    for _ in range(2):
        loss = learner.loss_fn(torch.func.functional_call(learner.model, weights, (x,)), y)
        grads = torch.autograd.grad(loss, list(weights.values()))
        weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    return torch.func.functional_call(learner.model, weights, (query_x,)).detach()


def test_of_numbers_it_is_the_mean():
    members = [MAML(network(seed), F.mse_loss, inner_lr=0.1) for seed in range(3)]
    sampler = Sinusoid(shots=4, queries=3)
    found = evaluate(Ensemble(members), sampler, tasks=5, steps=(0, 2))
    batch = sampler.with_stream("test").sample(0, 5)
    for t in range(5):
        x, y, query_x, query_y = (field[t].double() for field in batch[:4])
        mean = torch.stack([adapted(member, x, y, query_x) for member in members]).mean(0)
        torch.testing.assert_close(found.values[1, t], F.mse_loss(mean, query_y))


def test_of_classes_it_is_the_mean_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(60, 1, 2, 2, generator=generator), torch.arange(60) // 6
    sampler = Episodes(images, labels, ways=3, shots=1, queries=2)
    members = [MAML(network(seed, 3), F.cross_entropy, inner_lr=0.1) for seed in range(3)]
    batch = sampler.with_stream("test").sample(0, 7).to("cpu", torch.float64)
    right, loss = [], []
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        mean = torch.stack([adapted(member, x, y, query_x).softmax(1) for member in members]).mean(0)
        right.append((mean.argmax(1) == query_y).double().mean())
        loss.append(F.nll_loss(mean.log(), query_y))
    found = evaluate(Ensemble(members), sampler, tasks=7, steps=(2,))
    assert found.metric == "accuracy"
    torch.testing.assert_close(found.values[0], torch.stack(right))
    found = evaluate(Ensemble(members), sampler, tasks=7, steps=(2,), metric="loss")
    torch.testing.assert_close(found.values[0], torch.stack(loss))


class Given(metamom.TaskSampler):
    """The same tasks whatever is asked for."""

    def __init__(self, batch: TaskBatch) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        return self.batch


def on_logits(predicted: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(predicted.squeeze(-1), labels.double())


def on_counts(predicted: Tensor, counts: Tensor) -> Tensor:
    return F.mse_loss(predicted.squeeze(-1), counts.double())


def mean_by_hand(members: list[MAML], batch: TaskBatch, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over the members of what ``of`` makes of their predictions ``[T, Q, ...]``, after one step."""
    each = [learner.predict(learner.adapt(*batch[:2]), batch.query_x) for learner in members]
    return torch.stack([of(predicted.detach()) for predicted in each]).mean(0)


def whole_numbers(*shape: int, below: int, seed: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def test_one_logit_a_point_gives_the_mean_probability():
    """Labels are whole numbers, and predictions are no scores of classes."""
    members = [MAML(network(seed), on_logits, inner_lr=0.1) for seed in range(3)]
    x = torch.linspace(-2, 2, 40, dtype=torch.float64).view(4, 10, 1)
    y = whole_numbers(4, 10, below=2, seed=0)
    batch = TaskBatch(x, y, x.flip(0), y)
    mean = mean_by_hand(members, batch, torch.sigmoid).squeeze(-1)
    found, single = (evaluate(each, Given(batch), tasks=4, steps=(1,)) for each in (Ensemble(members), members[0]))
    assert found.metric == single.metric == "accuracy"
    torch.testing.assert_close(found.values[0], ((mean > 0.5) == y).double().mean(1))
    found = evaluate(Ensemble(members), Given(batch), tasks=4, steps=(1,), metric="loss")
    wanted = F.binary_cross_entropy(mean, y.double(), reduction="none").mean(1)
    torch.testing.assert_close(found.values[0], wanted, rtol=1e-12, atol=0)


def test_whole_numbers_that_are_no_classes():
    members = [MAML(network(seed), on_counts, inner_lr=0.01) for seed in range(3)]
    x, y = torch.linspace(-2, 2, 40, dtype=torch.float64).view(4, 10, 1), whole_numbers(4, 10, below=9, seed=0)
    batch = TaskBatch(x, y, x.flip(0), y)
    found = evaluate(Ensemble(members), Given(batch), tasks=4, steps=(1,))
    wanted = (mean_by_hand(members, batch, lambda predicted: predicted).squeeze(-1) - y).square().mean(1)
    torch.testing.assert_close(found.values[0], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ignored", [-100, 1])
def test_scores_of_pixels_have_their_classes_in_the_second_axis(ignored):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    members = [MAML(nn.Conv2d(1, 3, 3, padding=1).double(), loss, inner_lr=0.1) for _ in range(3)]
    x = torch.randn(4, 5, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    y = whole_numbers(4, 5, 6, 6, below=3, seed=1)
    batch = TaskBatch(x, y, x.flip(0), y)
    mean, counts = mean_by_hand(members, batch, lambda predicted: predicted.softmax(2)), y != ignored
    found = evaluate(Ensemble(members), Given(batch), tasks=4, steps=(1,))
    right = ((mean.argmax(2) == y) & counts).flatten(1).sum(1) / counts.flatten(1).sum(1)
    torch.testing.assert_close(found.values[0], right.double(), rtol=1e-6, atol=0)
    found = evaluate(Ensemble(members), Given(batch), tasks=4, steps=(1,), metric="loss")
    wanted = torch.stack([loss(mean[t].log(), y[t]) for t in range(4)])
    torch.testing.assert_close(found.values[0], wanted, rtol=1e-12, atol=0)


class Named(nn.Module):
    """Returns its output under a name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = network(seed)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"values": self.net(x)}


def test_outputs_with_a_name_keep_it():
    """The loss takes them as the model returns them."""
    nets = [Named(seed) for seed in range(2)]
    members = [MAML(net, lambda out, y: F.mse_loss(out["values"], y), inner_lr=0.1) for net in nets]
    bare = [MAML(net.net, F.mse_loss, inner_lr=0.1) for net in nets]
    found, wanted = (
        evaluate(Ensemble(each), Sinusoid(shots=4), tasks=4, steps=(0, 1)).values for each in (members, bare)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_one_member_is_itself_with_any_statistics():
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))
    learner = MAML(net, F.mse_loss, inner_lr=0.1)
    for options in ({}, {"norm": "support"}, {"inner_lr": 0.02}):
        alone, found = (
            evaluate(each, Sinusoid(shots=4), tasks=4, steps=(0, 1), **options)
            for each in (learner, Ensemble([learner]))
        )
        torch.testing.assert_close(found.values, alone.values)
        assert found.normalised == alone.normalised


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve steps with a validation and a checkpoint every two, of which the newest four and the best are kept."""
    folder = tmp_path_factory.mktemp("ensemble") / "run"
    learner = MAML(network(0).float(), F.mse_loss, inner_lr=0.02)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
    train(
        learner, optimizer, Sinusoid(shots=4), iterations=12, meta_batch=2, validation=Sinusoid(shots=4),
        evaluate_every=2, evaluate_tasks=20, checkpoint_every=2, keep_checkpoints=4, run_dir=folder,
    )  # fmt: skip
    return load(folder, model=lambda: network(0).float())


def test_the_best_of_the_kept_checkpoints(run):
    ensemble, steps = ensemble_of(run, 3)
    validations = {line["step"] + 1: line["validation"] for line in run.metrics if "validation" in line}
    kept = {6, 8, 10, 12} | {min(validations, key=validations.get)}
    assert steps == sorted(kept, key=validations.get)[:3]
    assert run.step == steps[0]
    for p, q in zip(ensemble.learners[0].parameters(), run.learner.parameters(), strict=True):
        assert torch.equal(p, q)
    values = evaluate(ensemble, Sinusoid(shots=4), tasks=6, steps=(1,)).values
    single = [evaluate(each, Sinusoid(shots=4), tasks=6, steps=(1,)).values for each in ensemble.learners]
    assert (values <= torch.stack(single).mean(0) + 1e-6).all()  # the squared error is convex


def test_validations_that_diverged_are_no_members(run, monkeypatch):
    """NaN compares as neither larger nor smaller, so it would disturb the order."""
    logged = run.metrics
    for bad in (8, 12):
        lines = [line | ({"validation": math.nan} if line["step"] + 1 == bad else {}) for line in logged]
        monkeypatch.setattr(LoadedRun, "metrics", lines)
        _, steps = ensemble_of(run, 3)
        validations = {line["step"] + 1: line["validation"] for line in lines if "validation" in line}
        kept = {6, 8, 10, 12, run.step} - {bad}
        assert steps == sorted(kept, key=validations.get)[:3]


def test_more_members_than_checkpoints(run):
    with pytest.raises(ValueError, match=r"has kept \d\. Train with"):
        ensemble_of(run, 9)
    with pytest.raises(ValueError, match="the size of an ensemble must be >= 1"):
        ensemble_of(run, 0)


def test_mistakes():
    with pytest.raises(ValueError, match="at least one learner"):
        Ensemble([])
    with pytest.raises(TypeError, match=r"of metamom\.MAML; got"):
        Ensemble([nn.Linear(1, 1)])


def test_statistics_are_named_if_the_members_share_them():
    images = Episodes(torch.rand(60, 1, 8, 8), torch.arange(60) % 6, ways=3, shots=1, queries=2)
    batch, support = (MAML(metamom.nets.Conv4(3, image_size=8), F.cross_entropy, norm=n) for n in ("batch", "support"))
    for members, said in (([batch, batch], ["batch statistics"]), ([batch, support], [])):
        assert evaluate(Ensemble(members), images, tasks=2, steps=(0,)).normalised == said
