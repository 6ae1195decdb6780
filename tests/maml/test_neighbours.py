"""BOIL, Reptile and ProtoMAML against plain loops over the tasks, in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from problems import assert_close, conv4, image_batch, mean_over_workers
from slow_maml import Params, adapt_task, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.nn import functional as F

import metamom
from metamom import BOIL, MAML, CompositeMomentum, ProtoMAML, Reptile, TaskBatch, evaluate, load, pad, train
from metamom.diagnostics import measure
from metamom.maml.learners.kinds import KINDS, make_learner
from metamom.maml.learners.prototypes import nearest_prototype
from metamom.tasks import Episodes

WAYS, STEPS, ALPHA = 3, 3, 0.3


class Net(nn.Module):
    """A head registered first, an affine normalisation, and scores that pass through another function."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, WAYS)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh())
        self.last = nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.last(self.body(x))
        return features

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.scores(self.features(x)), -1)


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().double()


def tasks(shots: int = 2, queries: int = 2) -> Episodes:
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(60, 3, generator=draws, dtype=torch.float64)
    return Episodes(images, torch.arange(60) % 6, ways=WAYS, shots=shots, queries=queries)


def made(kind: str, **options: Any) -> MAML:
    head = {"head": "scores"} if kind in ("boil", "protomaml") else {}
    return KINDS[kind](net(), F.nll_loss, **{"inner_lr": ALPHA, "inner_steps": STEPS, **head, **options})


def slow_prototypes(model: Net, weights: Params, x: Tensor, y: Tensor) -> Params:
    """The weights with each class's row at twice its prototype, from a copy of the model that stops at its features."""
    body = copy.deepcopy(model)
    body.forward = body.features  # type: ignore[method-assign]
    features = torch.func.functional_call(body, weights, (x,))
    means = [features[y == k].sum(0) / (y == k).sum() for k in range(WAYS)]
    return weights | {
        "scores.weight": torch.stack([2 * mean for mean in means]),
        "scores.bias": torch.stack([-(mean @ mean) for mean in means]),
    }


def slow_protomaml(model: Net, batch: TaskBatch, *, first_order: bool = False) -> tuple[Params, Tensor]:
    weights = weights_of(model)
    total, losses = {n: torch.zeros_like(w) for n, w in weights.items() if not n.startswith("scores")}, []
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        # clones, so that an inner gradient in the body does not flow through the prototypes
        start = {n: w.clone() for n, w in slow_prototypes(model, weights, x, y).items()}
        options = {"steps": STEPS, "inner_lr": lambda name: ALPHA, "adapted": weights, "first_order": first_order}
        end = adapt_task(model, F.nll_loss, start, x, y, **options)  # type: ignore[arg-type]
        loss = F.nll_loss(torch.func.functional_call(model, end, (query_x,)), query_y)
        for name, grad in zip(total, torch.autograd.grad(loss, [weights[n] for n in total]), strict=True):
            total[name] += grad / batch.num_tasks
        losses.append(loss.detach())
    return total, torch.stack(losses)


def slow_reptile(model: Net, batch: TaskBatch, *, joined: bool, parts: int = 1) -> tuple[Params, Tensor]:
    weights = weights_of(model)
    total, losses = {n: torch.zeros_like(w) for n, w in weights.items()}, []
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        if joined:
            x, y = torch.cat([x, query_x]), torch.cat([y, query_y])
        u: Params = dict(weights)
        for j in range(STEPS):
            part = slice(j % parts * len(x) // parts, (j % parts + 1) * len(x) // parts)
            options = {"steps": 1, "inner_lr": lambda name: ALPHA, "adapted": weights, "first_order": True}
            u = adapt_task(model, F.nll_loss, u, x[part], y[part], **options)  # type: ignore[arg-type]
        for name, w in weights.items():
            total[name] += (w - u[name]).detach() / batch.num_tasks
        losses.append(F.nll_loss(torch.func.functional_call(model, u, (query_x,)), query_y).detach())
    return total, torch.stack(losses)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "first-order"])
def test_protomaml_agrees_with_a_loop(traced, estimator, compile):
    learner, batch = made("protomaml", estimator=estimator, compile=compile), tasks().sample(0, 4)
    grads, losses = learner.meta_gradient(batch)
    assert len(traced) == compile
    expected, expected_losses = slow_protomaml(net(), batch, first_order=estimator == "first-order")
    assert_close(mean_over_workers(grads), expected)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-12)


def test_protomaml_in_second_order_differs_and_is_the_derivative():
    batch, model = tasks().sample(0, 2), net()
    exact, first = (slow_protomaml(model, batch, first_order=order)[0] for order in (False, True))
    assert max(float((exact[n] - first[n]).abs().max()) for n in exact) > 1e-3
    learner = ProtoMAML(model, F.nll_loss, head="scores", inner_lr=ALPHA, inner_steps=2)
    weight = model.body[0].weight

    def loss(value: Tensor) -> Tensor:
        with torch.no_grad():
            weight.copy_(value)
        return learner.losses(batch).mean().detach()

    before, step = weight.detach().clone(), 1e-5
    grads = learner.meta_gradient(batch).grads["body.0.weight"][0]
    for place in ((0, 0), (4, 2)):
        change = torch.zeros_like(before)
        change[place] = step
        slope = (loss(before + change) - loss(before - change)) / (2 * step)
        torch.testing.assert_close(slope, grads[place], rtol=1e-6, atol=1e-8)
    loss(before)


@pytest.mark.parametrize("train_on", ["all", "support"])
@pytest.mark.parametrize("compile", [False, True])
def test_reptile_agrees_with_a_loop(traced, train_on, compile):
    learner, batch = made("reptile", train_on=train_on, compile=compile), tasks().sample(0, 4)
    grads, losses = learner.meta_gradient(batch)
    assert len(traced) == compile
    expected, expected_losses = slow_reptile(net(), batch, joined=train_on == "all")
    assert_close(mean_over_workers(grads), expected)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-12)


def test_reptile_with_fresh_inner_batches():
    learner, batch = made("reptile", inner_batches="fresh"), tasks(shots=3, queries=3).sample(0, 2)
    expected, _ = slow_reptile(net(), batch, joined=True, parts=STEPS)
    assert_close(mean_over_workers(learner.meta_gradient(batch).grads), expected)
    with pytest.raises(ValueError, match="takes them from 3 equal parts, with every class in each"):
        learner.meta_gradient(tasks(shots=1, queries=1).sample(0, 2))


def test_a_step_of_reptile_is_the_papers():
    """``w <- w + epsilon * mean(u - w)``, by plain SGD of step size epsilon."""
    learner, batch, epsilon = made("reptile"), tasks().sample(0, 4), 0.25
    before, ends = weights_of(net()), []
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        both = torch.cat([x, query_x]).unsqueeze(0), torch.cat([y, query_y]).unsqueeze(0)
        ends.append({name: u[0].detach() for name, u in learner.adapt(*both).items()})
    optimizer = torch.optim.SGD(learner.parameters(), lr=epsilon)
    learner.backward(batch)
    optimizer.step()
    moved = {n: w + epsilon * torch.stack([u[n] - w for u in ends]).mean(0) for n, w in before.items()}
    assert_close(weights_of(learner.model), {n: w.detach() for n, w in moved.items()})


@pytest.mark.parametrize("estimator", ["exact", "first-order", "cross-fit"])
def test_boil_is_maml_that_adapts_the_body(estimator):
    learner, batch = made("boil", estimator=estimator), tasks().sample(0, 4)
    body = [name for name, _ in net().named_parameters() if not name.startswith("scores")]
    assert list(learner.adapted) == body
    same = MAML(net(), F.nll_loss, inner_lr=ALPHA, inner_steps=STEPS, estimator=estimator, adapt=body)
    grads, losses = learner.meta_gradient(batch)
    assert all(torch.equal(grad, same.meta_gradient(batch).grads[name]) for name, grad in grads.items())
    if estimator != "cross-fit":
        options = {"steps": STEPS, "inner_lr": ALPHA, "adapted": body, "first_order": estimator == "first-order"}
        expected, expected_losses = slow_meta_gradient(net(), F.nll_loss, batch, **options)
        assert_close(mean_over_workers(grads), expected)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["boil", "reptile", "protomaml"])
def test_two_steps_of_momentum_in_workers_with_a_bias(kind):
    """The second step too, on every way to compute it; the bare model's buffers and mode stay."""
    found = []
    for options in ({}, {"chunk_size": 1}, {"vectorize": "loop"}):
        learner = made(kind, **options)
        optimizer = CompositeMomentum(learner.parameters(), lr=0.1, beta=0.5)
        for step in range(2):
            optimizer.zero_grad()
            learner.backward(tasks().sample(step, 4), workers=2, bias="ef21:topk:50%")
            optimizer.step()
        assert learner.model.training
        found.append({name: p.detach().clone() for name, p in learner.model.named_parameters()})
    for other in found[1:]:
        assert_close(found[0], other)
    assert all(not torch.equal(found[0][name], p) for name, p in learner.meta_parameters().items() if p.grad is None)


@pytest.mark.parametrize("kind", ["boil", "reptile", "protomaml"])
def test_each_worker_has_the_mean_over_its_own_tasks(kind):
    learner, batch = made(kind), tasks().sample(0, 4)
    grads, _ = learner.meta_gradient(batch, workers=2)
    for i, part in enumerate(batch.split(2)):
        assert_close({n: g[i] for n, g in grads.items()}, mean_over_workers(learner.meta_gradient(part).grads))


@pytest.mark.parametrize("kind", ["boil", "reptile", "protomaml"])
def test_the_model_does_not_change(kind):
    learner = made(kind)
    before = copy.deepcopy(learner.model.state_dict())
    learner.meta_gradient(tasks().sample(0, 2))
    evaluate(learner, tasks(), tasks=4, steps=(0, 2))
    learner.fit(*(field[0] for field in tasks().sample(0, 1)[:2]))
    after = learner.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "forward" not in learner.model.scores.__dict__  # type: ignore[operator]


def test_protomaml_before_any_step_is_a_prototypical_network():
    learner, batch = made("protomaml"), tasks().sample(0, 3)
    adapted = learner.adapt(batch.support_x, batch.support_y, steps=0)
    predicted = learner.predict(adapted, batch.query_x)
    for t in range(3):
        x, y, query = batch.support_x[t], batch.support_y[t], net().features(batch.query_x[t])
        prototypes = torch.stack([net().features(x)[y == k].mean(0) for k in range(WAYS)])
        distances = (query.unsqueeze(1) - prototypes).square().sum(-1)
        torch.testing.assert_close(predicted[t], F.log_softmax(-distances, -1), rtol=1e-10, atol=1e-12)
    module = learner.fit(batch.support_x[0], batch.support_y[0], steps=0, norm="batch")
    torch.testing.assert_close(module(batch.query_x[0]), predicted[0], rtol=1e-10, atol=1e-12)


def test_the_unused_head_is_no_meta_parameter():
    learner = made("protomaml", learn_inner_lr="tensor")
    assert not any(name.startswith("scores") for name in learner.meta_parameters())
    assert "inner_lr.scores.weight" in learner.meta_parameters()
    learner.backward(tasks().sample(0, 2))
    assert learner.model.scores.weight.grad is None  # type: ignore[union-attr]
    assert bool(learner.meta_parameters()["inner_lr.scores.weight"].grad)


@pytest.mark.parametrize("norm", ["batch", "support"])
@pytest.mark.parametrize("kind", ["boil", "reptile", "protomaml"])
def test_evaluation_of_another_norm_and_step_size(kind, norm):
    """As by `MAML.like`, which makes a learner of the same kind."""
    learner = made(kind)
    other = made(kind, norm=norm, inner_lr=0.1)
    found = evaluate(learner, tasks(), tasks=6, steps=(0, 2), norm=norm, inner_lr=0.1)
    assert torch.equal(found.values, evaluate(other, tasks(), tasks=6, steps=(0, 2)).values)
    assert type(learner.like(norm=norm)) is type(learner)
    assert learner.like(norm=norm).describe().items() >= {"kind": kind}.items()


def test_norm_support_of_reptile_normalises_by_what_it_adapted_on():
    """Of one inner step at alpha = 0 nothing moves, so the gradient is zero; the loss has the joined statistics."""
    learner, batch = made("reptile", norm="support", inner_lr=1e-12), tasks().sample(0, 2)
    losses = learner.meta_gradient(batch).losses
    for t in range(2):
        both = torch.cat([batch.support_x[t], batch.query_x[t]])
        scores = net()(both)[batch.support_x.shape[1] :]
        torch.testing.assert_close(losses[t], F.nll_loss(scores, batch.query_y[t]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["reptile", "protomaml"])
def test_padded_tasks_are_as_tasks_alone(kind):
    options: dict[str, Any] = {"norm": None}
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, WAYS)).double()
    learner = KINDS[kind](model, F.cross_entropy, inner_lr=ALPHA, inner_steps=2, **options)
    each = [tasks(shots=shots, queries=queries).sample(0, 1) for shots, queries in ((1, 2), (2, 1))]
    alone = [mean_over_workers(learner.meta_gradient(one).grads) for one in each]
    both = mean_over_workers(learner.meta_gradient(pad(each)).grads)
    assert_close(both, {name: (alone[0][name] + alone[1][name]) / 2 for name in both})


def test_conv4_and_its_kernels():
    """The head is found, and the network's own layers give its features; float64, against plain autograd by vmap."""
    model, batch = conv4(), image_batch()
    learner = ProtoMAML(model, F.cross_entropy, inner_lr=0.1)
    assert learner.head == "head"
    value, gradient = [], mean_over_workers(learner.meta_gradient(batch).grads)
    for options in ({"vectorize": "loop"}, {"chunk_size": 1}):
        other = ProtoMAML(model, F.cross_entropy, inner_lr=0.1, **options)
        value.append(other.meta_gradient(batch).losses)
        assert_close(mean_over_workers(other.meta_gradient(batch).grads), gradient)
    torch.testing.assert_close(*value, rtol=1e-10, atol=1e-12)


def test_prototypes_of_masked_points():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, generator=draws, dtype=torch.float64)
    labels, mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 4] = mask[1, 0] = False
    head = nearest_prototype(features, labels, 2, mask)
    for t in range(2):
        for k in range(2):
            mean = features[t][mask[t] & (labels[t] == k)].mean(0)
            torch.testing.assert_close(head.weight[t, k], 2 * mean)
            torch.testing.assert_close(head.bias[t, k], -mean.square().sum())


@pytest.mark.parametrize("kind", ["boil", "reptile", "protomaml"])
def test_a_run_of_train_resumes_and_loads(kind, tmp_path):
    def go(iterations: int, folder: str, **options: Any) -> MAML:
        learner = made(kind)
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
        train(learner, optimizer, tasks(), iterations=iterations, meta_batch=2, run_dir=tmp_path / folder, **options)
        return learner

    whole = go(4, "whole")
    go(2, "parts")
    parts = go(4, "parts", resume=True)
    assert all(torch.equal(whole.state_dict()[n], w) for n, w in parts.state_dict().items())
    run = load(tmp_path / "whole", model=net())
    assert type(run.learner) is KINDS[kind]
    assert run.learner.describe() == whole.describe()
    assert torch.equal(
        evaluate(run.learner, tasks(), tasks=4).values,  # also of the weights
        evaluate(whole, tasks(), tasks=4).values,
    )


@pytest.mark.parametrize("kind", ["boil", "reptile", "protomaml"])
def test_a_copy_is_the_same_learner(kind):
    learner, batch = made(kind), tasks().sample(0, 2)
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert_close(other.meta_gradient(batch).grads, learner.meta_gradient(batch).grads)


def test_public_names():
    assert {metamom.BOIL, metamom.Reptile, metamom.ProtoMAML, metamom.MAML} == set(KINDS.values())
    assert metamom.maml.BOIL is BOIL


class Scaled(nn.Module):
    """Scores times a number: a parameter without an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.scores = nn.Linear(3, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scale * self.scores(x)
        return scores


def test_reptile_moves_numbers_too():
    torch.manual_seed(0)
    learner, batch = (
        Reptile(Scaled().double(), F.cross_entropy, inner_lr=ALPHA, inner_steps=STEPS),
        tasks().sample(0, 4),
    )
    both = [torch.cat([a, b], 1) for a, b in zip(batch[:2], batch[2:4], strict=True)]
    ends = learner.adapt(*both)
    wanted = {name: (w - ends[name]).mean(0) for name, w in learner.model.named_parameters()}
    assert_close(mean_over_workers(learner.meta_gradient(batch, workers=2).grads), wanted)


def test_a_head_that_is_replaced():
    """By one for fewer classes, with parameters of other names."""
    few = tasks().sample(0, 4)
    few = few._replace(support_y=few.support_y % 2, query_y=few.query_y % 2)
    learner, head = made("protomaml"), nn.Linear(4, 2).double()
    learner.model.scores = head
    expected = made("protomaml")
    expected.model.scores = copy.deepcopy(head)
    expected = ProtoMAML(expected.model, F.nll_loss, head="scores", inner_lr=ALPHA, inner_steps=STEPS)
    assert_close(learner.meta_gradient(few).grads, expected.meta_gradient(few).grads)
    boil = made("boil")
    body = boil.adapted
    boil.model.scores = nn.Sequential(nn.Linear(4, 2)).double()
    assert "scores.0.weight" in boil.meta_gradient(few).grads
    assert boil.adapted == body


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def normalised(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def test_a_head_with_normalised_weights_is_one_layer():
    """Its direction and length are parameters of a module inside of it, registered after its bias."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), normalised(nn.Linear(4, WAYS)))
    learner = BOIL(net, F.cross_entropy)
    assert learner.head == "2"
    assert list(learner.adapted) == ["0.weight", "0.bias"]


MISTAKES = {
    "boil has no adapt": (lambda: made("boil", adapt=["last"]), "leave adapt out"),
    "no such head": (lambda: made("boil", head="scorse"), "'scorse' is none of 'scores', 'body.0'"),
    "a head of another kind": (lambda: made("boil", head=3), "head must be the name of a module"),
    "no body": (lambda: BOIL(nn.Linear(2, 2), F.mse_loss), "needs a model with a body before its head"),
    "a head that is all": (lambda: made("boil", head=""), "needs a model with a body"),
    "reptile has no estimator": (lambda: made("reptile", estimator="exact"), "so estimator does not apply"),
    "reptile learns no step sizes": (lambda: made("reptile", learn_inner_lr=True), "so learn_inner_lr does not apply"),
    "reptile adapts all": (lambda: made("reptile", adapt=["last"]), "all trainable parameters adapt"),
    "reptile has no losses by step": (lambda: made("reptile", multi_step=5), "so multi_step does not apply"),
    "reptile learns no step sizes that are given": (
        lambda: made("reptile", inner_lr=torch.tensor(0.1, dtype=torch.float64, requires_grad=True)),
        "an inner_lr that requires a gradient would not be learned",
    ),
    "train_on": (lambda: made("reptile", train_on="queries"), "train_on must be"),
    "a loss that learns": (
        lambda: Reptile(net(), nn.Bilinear(1, 1, 1)),
        "loss_fn has trainable parameters, which inner steps do not move",
    ),
    "protomaml estimators": (lambda: made("protomaml", estimator="cross-fit"), "estimators exact and first-order"),
    "protomaml fresh": (lambda: made("protomaml", inner_batches="fresh"), "inner_batches must be 'same'"),
    "protomaml head": (lambda: made("protomaml", head="body"), "'body' is a Sequential"),
    "protomaml head of normalised weights": (
        lambda: ProtoMAML(nn.Sequential(nn.Linear(2, 2), normalised(nn.Linear(2, 2))), F.cross_entropy),
        "'1' is a Linear that computes its weights from others",
    ),
    "protomaml head without a bias": (
        lambda: ProtoMAML(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), F.cross_entropy),
        "'1' is a Linear without a bias",
    ),
    "protomaml tied head": (lambda: ProtoMAML(tied(), F.cross_entropy), "shares them .* model, as 0.weight: give"),
    "protomaml adapts its head": (lambda: made("protomaml", adapt=["last"]), "adapt must include it: scores.bias"),
    "no such kind": (lambda: make_learner("mamll", net(), F.nll_loss), "kind must be"),
    "no bias meter": (lambda: measure(made("reptile"), tasks()), "measured for the meta-gradients of MAML"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("kind", ["boil", "protomaml"])
def test_parts_of_maml_plus_plus(kind):
    """Normalisations by inner step start as the model's own, and a weight of 0 on earlier losses changes nothing."""
    batch, plain = tasks().sample(0, 2), made(kind)
    by_step = made(kind, step_norms=True, adapt=None)
    assert not any(name.startswith("body.1.") for name in (*by_step.adapted, *by_step.meta_parameters()))
    assert "step_norms.body.1.weight" in by_step.meta_parameters()
    other = by_step.like(norm="batch")
    assert_close(other.meta_gradient(batch).grads, by_step.meta_gradient(batch).grads)
    annealed = made(kind, multi_step=1)
    annealed.backward(batch)
    torch.testing.assert_close(annealed.meta_gradient(batch).losses, plain.meta_gradient(batch).losses)
    before = [made(kind, **options).adapt(*batch[:2], steps=0) for options in ({}, {"step_norms": True})]
    assert all(torch.equal(before[0][name], w) for name, w in before[1].items() if name in before[0])


def test_a_run_with_normalisations_by_step_resumes(tmp_path):
    """The model's own scales and offsets get no gradient, so an optimizer has no state of them."""
    for iterations in (1, 2):
        learner = made("maml", step_norms=True)
        optimizer = CompositeMomentum(learner.parameters(), lr=0.1)
        train(learner, optimizer, tasks(), iterations=iterations, meta_batch=2, run_dir=tmp_path, resume=True)


def test_options_set_later_are_checked():
    with pytest.raises(ValueError, match="estimator does not apply"):
        made("reptile").estimator = "exact"
    with pytest.raises(ValueError, match="estimators exact and first-order"):
        made("protomaml").estimator = "richardson"
    learner = made("protomaml")
    learner.estimator = "first-order"
    expected, _ = slow_protomaml(net(), batch := tasks().sample(0, 2), first_order=True)
    assert_close(mean_over_workers(learner.meta_gradient(batch).grads), expected)


def test_support_sets_without_a_class_are_refused():
    learner, batch = made("protomaml"), tasks().sample(0, 3)
    labels = batch.support_y.clone()
    labels[1][labels[1] == 2] = 0
    message = "needs a support point of each of the 3 classes that the head 'scores' has; task 1 has none of class 2"
    for call in (
        lambda: learner.meta_gradient(batch._replace(support_y=labels)),
        lambda: learner.adapt(batch.support_x, labels),
        lambda: evaluate(learner, tasks(), tasks=4, steps=(0,)) and learner.adapt(batch.support_x, labels, steps=0),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"support_y must be class indices \[T, S\], integers; got torch.float64"):
        learner.adapt(batch.support_x, batch.support_x)
