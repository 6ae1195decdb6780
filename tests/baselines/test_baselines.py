"""The baselines, each against a slow twin."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metamom.evaluation.tasks
from metamom import MAML, evaluate
from metamom.baselines import FineTuning, FromScratch, LinearProbe, NearestCentroid, Penultimate, standard_baselines
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, Sinusoid

WAYS = 3


def episodes(ways: int = WAYS, shots: int = 4) -> Episodes:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(12, 1, 3, 3, generator=generator)
    images = centres[torch.arange(240) % 12] + 0.8 * torch.randn(240, 1, 3, 3, generator=generator)
    return Episodes(images, torch.arange(240) % 12, ways=ways, shots=shots, queries=6)


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 7), nn.Tanh()).double()


def of_one_task(number: int = 0) -> tuple[Tensor, ...]:
    batch = episodes().with_stream("test").sample(0, number + 1).to(dtype=torch.float64)
    return tuple(x[number] for x in batch[:4])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_nearest_centroid_is_that_of_a_loop(distance):
    network = embedding()
    x, y, queries, _ = of_one_task()
    baseline = NearestCentroid(network, distance=distance)
    state = baseline.adapt(x.unsqueeze(0), y.unsqueeze(0))
    found = baseline.predict(state, queries.unsqueeze(0))[0]
    with torch.no_grad():
        z, q = network(x).numpy(), network(queries).numpy()
    for i, query in enumerate(q):
        for c in range(WAYS):
            centre = np.mean([z[j] for j in range(len(z)) if y[j] == c], axis=0)
            score = -((query - centre) ** 2).sum()
            if distance == "cosine":
                score = query @ centre / np.linalg.norm(query) / np.linalg.norm(centre)
            assert float(found[i, c]) == pytest.approx(score, rel=1e-10)


def newton(z: np.ndarray, y: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """The minimum of the penalised loss by Newton's method with dense derivatives, ``[C, F + 1]``, the bias last."""
    z = np.hstack([z, np.ones((len(z), 1))])
    w, penalty = np.zeros((classes, z.shape[1])), np.full((classes, z.shape[1]), l2)
    penalty[:, -1] = 0
    for _ in range(50):
        scores = z @ w.T
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = (p - np.eye(classes)[y]).T @ z + penalty * w
        hessian = np.zeros((w.size, w.size))
        for row, probability in zip(z, p, strict=True):
            hessian += np.kron(np.diag(probability) - np.outer(probability, probability), np.outer(row, row))
        hessian += np.diag(penalty.ravel()) + 1e-12 * np.eye(w.size)
        w = w - np.linalg.solve(hessian, gradient.ravel()).reshape(w.shape)
    return w


@pytest.mark.parametrize(("l2", "normalize"), [(1.0, True), (0.1, False)])
def test_the_linear_probe_is_newtons_minimum(l2, normalize):
    network = embedding()
    x, y, queries, _ = of_one_task(1)
    baseline = LinearProbe(network, l2=l2, normalize=normalize)
    found = baseline.predict(baseline.adapt(x.unsqueeze(0), y.unsqueeze(0)), queries.unsqueeze(0))[0]
    with torch.no_grad():
        z, q = (network(each).numpy() for each in (x, queries))
    if normalize:
        z, q = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (z, q))
    w = newton(z, y.numpy(), WAYS, l2)
    expected = q @ w[:, :-1].T + w[:, -1]
    found = found.numpy()
    # the same probabilities; a constant may be added to all biases
    np.testing.assert_allclose(
        found - found.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=1e-6
    )


def test_fine_tuning_by_sgd_is_maml_with_all_weights():
    model = SinusoidMLP((10,), generator=torch.Generator().manual_seed(0)).double()
    family, learner = Sinusoid(5, 7), MAML(model, F.mse_loss, inner_lr=0.02)
    tuned = FineTuning(model, F.mse_loss, lr=0.02, optimizer="sgd")
    ours, theirs = (evaluate(each, family, tasks=12, steps=(0, 1, 5)).values for each in (tuned, learner))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_fine_tuning_by_adam_is_a_plain_loop():
    model = embedding().append(nn.Linear(7, WAYS).double())
    x, y, queries, _ = of_one_task()
    baseline = FineTuning(model, F.cross_entropy, lr=0.05)
    before = copy.deepcopy(model.state_dict())
    found = baseline.predict(baseline.adapt(x.unsqueeze(0), y.unsqueeze(0), steps=4), queries.unsqueeze(0))[0]
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(found, plain(queries).detach())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def scratch(seed: int = 0) -> FromScratch:
    return FromScratch(lambda: SinusoidMLP((10,)), F.mse_loss, lr=0.02, optimizer="sgd", seed=seed)


def test_from_scratch_draws_new_weights_for_each_task(monkeypatch):
    family = Sinusoid(5, 7)
    state = torch.get_rng_state()
    first, again = (evaluate(scratch(), family, tasks=13, steps=(0, 2)).values for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    monkeypatch.setattr(metamom.evaluation.tasks, "BLOCK", 4)
    assert torch.equal(evaluate(scratch(), family, tasks=13, steps=(0, 2)).values, first)
    assert not torch.isclose(evaluate(scratch(1), family, tasks=13, steps=(0, 2)).values, first).any()
    x, y = (each[0] for each in family.sample(0, 2)[:2])
    models = [scratch().adapt_task(each, y, 0) for each in (x, x, x + 1)]
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)
    # from there, it trains as fine-tuning does
    tuned = FineTuning(models[0], F.mse_loss, lr=0.02, optimizer="sgd").adapt_task(x, y, 3)
    torch.testing.assert_close(scratch().adapt_task(x, y, 3).state_dict(), tuned.state_dict())


def test_penultimate_features():
    model = Conv4(WAYS, hidden=4)
    x = torch.rand(5, 1, 28, 28)
    z = Penultimate(model)(x)
    torch.testing.assert_close(model.head(z), model(x))
    named = Penultimate(model, "head")
    assert torch.equal(named(x), z)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"has no layer 'heads'; it has .*head"):
        Penultimate(model, "heads")
    with pytest.raises(ValueError, match="has no linear layer"):
        Penultimate(nn.Conv2d(1, 1, 1))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(9)
        self.last = nn.Linear(9, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x.flatten(1)))


def test_normalisation_follows_the_model_or_the_choice():
    x, y, queries, _ = (each.float() if each.is_floating_point() else each for each in of_one_task())
    model = Normed()
    model(x)  # fills the running statistics
    before = copy.deepcopy(model.state_dict())
    for norm, training in ((None, True), (None, False), ("batch", False), ("frozen", True)):
        model.train(training)
        baseline = FineTuning(model, F.cross_entropy, norm=norm)
        found = baseline.predict_task(baseline.adapt_task(x, y, 0), queries)
        by_batch = norm == "batch" or (norm is None and training)
        plain = copy.deepcopy(model).train(by_batch)
        torch.testing.assert_close(found, plain(queries).detach(), rtol=1e-5, atol=1e-6)
        assert model.training is training
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match='norm="batch" or norm="frozen"; got norm="support"'):
        NearestCentroid(model, norm="support")


def test_they_rank_as_one_expects():
    """Classes that are easy to tell apart: whatever uses the support set is well above chance, and repeatable."""
    family, network = episodes(), embedding().float()
    model = nn.Sequential(*network, nn.Linear(7, WAYS))
    for baseline, steps in (
        (NearestCentroid(network), 0),
        (NearestCentroid(Penultimate(model)), 0),
        (LinearProbe(network), 0),
        (FineTuning(model, F.cross_entropy, lr=0.05), 20),
        (FromScratch(lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, WAYS)), F.cross_entropy, lr=0.1), 20),
    ):
        found = evaluate(baseline, family, tasks=40, steps=(steps,))
        assert found.metric == "accuracy"
        assert found.mean[0] > 0.6, baseline
        assert torch.equal(found.values, evaluate(baseline, family, tasks=40, steps=(steps,)).values)
        with torch.inference_mode():
            assert torch.equal(found.values, evaluate(baseline, family, tasks=40, steps=(steps,)).values)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NearestCentroid(3), TypeError, "wanted a model"),
        (lambda: NearestCentroid(embedding(), distance="taxi"), ValueError, "distance must be"),
        (lambda: LinearProbe(embedding(), l2=0), ValueError, "l2 must be > 0"),
        (lambda: FineTuning(embedding(), F.cross_entropy, lr=0), ValueError, "lr is the step size"),
        (lambda: FineTuning(embedding(), F.cross_entropy, optimizer="sdg"), ValueError, "optimizer must be sgd, adam"),
        (lambda: FineTuning(embedding(), 3), TypeError, "loss_fn"),
        (lambda: FromScratch(embedding(), F.cross_entropy), TypeError, "make must be a function"),
        (lambda: FromScratch(lambda: 3, F.cross_entropy), TypeError, "it returned an int"),
        (
            lambda: evaluate(NearestCentroid(nn.Flatten()), Sinusoid(), tasks=4, steps=(0,)),
            TypeError,
            r"needs class indices \[S\] of each task's support set; got \[10, 1\] of torch\.float32",
        ),
        (
            lambda: NearestCentroid(nn.Flatten()).adapt(torch.rand(1, 2, 3), torch.tensor([[0, 2]])),
            ValueError,
            r"at least one point of each class; got \[0, 2\]",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_representations():
    assert repr(NearestCentroid(embedding())) == "NearestCentroid(Sequential, distance='euclidean')"
    assert repr(LinearProbe(embedding())) == "LinearProbe(Sequential, l2=1.0, normalize=True)"
    assert repr(scratch()) == "FromScratch(SinusoidMLP, lr=0.02, optimizer='sgd')"


def test_frozen_weights_leave_nothing_to_train_from_scratch():
    def make() -> SinusoidMLP:
        return SinusoidMLP((4, 4))

    assert list(standard_baselines(MAML(make(), F.mse_loss), classes=False, make=make)) == [
        "fine-tuning",
        "from scratch",
    ]
    model = make()
    model[0].requires_grad_(False)
    assert list(standard_baselines(MAML(model, F.mse_loss), classes=False, make=make)) == ["fine-tuning"]
