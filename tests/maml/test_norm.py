"""What normalisation uses: each choice against a plain loop over tasks, in which the layers are written out."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from as_in_a_loop import Given, state_of
from problems import assert_close, generator, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch, evaluate
from metamom.common.choices import NORMS, Norm
from metamom.interop.imports import import_torchvision
from metamom.nets.layers import BatchNormReLU
from metamom.nets.models import Conv4, use_batch_statistics
from metamom.nets.resnet import ResNet12

WAYS, TASKS, INNER_LR = 3, 4, 0.1


class Twin(nn.Module):
    """A normalisation written out: ``(x - mean) / sqrt(variance + eps)`` by the statistics that ``norm`` names."""

    def __init__(self, like: Any, norm: Norm, record: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps
        self.relu = isinstance(like, BatchNormReLU)
        self.running = (like.running_mean, like.running_var) if norm == "frozen" else None
        self.norm, self.record = norm, record

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.relu else x.movedim(1, -1)
        rows = x.reshape(-1, x.shape[-1])
        mean = rows.sum(0) / len(rows)
        variance = ((rows - mean) ** 2).sum(0) / len(rows)
        if self.running is not None:
            mean, variance = self.running
        if self.norm == "support" and self.record["phase"] == "support":
            self.record[self] = mean, variance
        if self.norm == "support" and self.record["phase"] == "queries":
            mean, variance = self.record[self]
        out = (x - mean) / (variance + self.eps) ** 0.5 * self.weight + self.bias
        return out.relu() if self.relu else out.movedim(-1, 1)


class Loop:
    """MAML as a loop over tasks around a copy of ``model`` with its normalisations written out."""

    def __init__(self, model: nn.Module, norm: Norm, loss_fn: Callable[..., Tensor] = F.cross_entropy) -> None:
        self.record: dict[str, Any] = {"phase": None}
        self.norm, self.loss_fn = norm, loss_fn
        self.model = copy.deepcopy(model)
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.modules.batchnorm._BatchNorm, BatchNormReLU)):
                    setattr(parent, name, Twin(child, norm, self.record))

    def adapt(
        self, weights: dict[str, Tensor], x: Tensor, y: Tensor, steps: int, moving: list[str]
    ) -> dict[str, Tensor]:
        self.record["phase"] = None
        for _ in range(steps):
            loss = self.loss_fn(torch.func.functional_call(self.model, weights, (x,)), y)
            grads = torch.autograd.grad(loss, [weights[name] for name in moving], create_graph=True)
            weights = weights | {name: weights[name] - INNER_LR * g for name, g in zip(moving, grads, strict=True)}
        return weights

    def predict(self, weights: dict[str, Tensor], x: Tensor, support_x: Tensor) -> Tensor:
        if self.norm == "support":
            self.record["phase"] = "support"
            torch.func.functional_call(self.model, weights, (support_x,))
            self.record["phase"] = "queries"
        return torch.func.functional_call(self.model, weights, (x,))

    def meta_gradient(
        self, model: nn.Module, batch: TaskBatch, steps: int = 1, adapted: list[str] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
        moving, losses = adapted or list(weights), []
        for x, y, query_x, query_y in zip(*batch[:4], strict=True):
            own = self.adapt(weights, x, y, steps, moving)
            losses.append(self.loss_fn(self.predict(own, query_x, x), query_y))
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()), materialize_grads=True)
        return dict(zip(weights, grads, strict=True)), torch.stack(losses).detach()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics as after training on other data."""
    for i, (name, buffer) in enumerate(model.named_buffers()):
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * draw(*buffer.shape, seed=i))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + draw(*buffer.shape, seed=i) ** 2)
        else:
            buffer.fill_(100 + i)
    return model


def batch_of(*shape: int, queries: int = 2, dtype: torch.dtype = torch.float64) -> TaskBatch:
    sets = []
    for seed, shots in enumerate((2, queries)):
        sets += [draw(TASKS, WAYS * shots, *shape, seed=seed, dtype=dtype), torch.arange(WAYS).repeat(TASKS, shots)]
    return TaskBatch(*sets)


class Functional(nn.Module):
    """Calls the function itself, with the statistics of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        norm, x = self.norm, self.body(x)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)
        return self.head(torch.tanh(x))


MAKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, WAYS)), (4,)),
    "2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2),
            nn.BatchNorm2d(3, momentum=None), nn.LeakyReLU(), nn.Flatten(), nn.Linear(12, WAYS),
        ),
        (1, 8, 8),
    ),
    "3d": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, WAYS)
        ),
        (1, 3, 3, 3),
    ),
    "functional": (Functional, (4,)),
    "Conv4": (lambda: Conv4(WAYS, hidden=4), (1, 28, 28)),
    "Conv4 with max-pooling": (
        lambda: Conv4(WAYS, hidden=4, image_size=16, pooling="max", running_statistics=True), (1, 16, 16)
    ),
    "ResNet12": (lambda: ResNet12(WAYS, 1, (2, 3, 4, 5), running_statistics=True), (1, 16, 16)),
}  # fmt: skip
SCALES = {"Conv4 with max-pooling": 0.5, "ResNet12": 0.3}  # of weights, so that "frozen" activations stay small
CASES = [(name, norm) for name in MAKE for norm in NORMS if (name, norm) != ("Conv4", "frozen")]


def case(name: str, queries: int = 2) -> tuple[nn.Module, TaskBatch]:
    make, shape = MAKE[name]
    model = with_statistics(randomised(make()))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(SCALES.get(name, 1.0))
    return model, batch_of(*shape, queries=queries)


class LoopOfFunctional(Loop):
    def __init__(self, model: nn.Module, norm: Norm) -> None:
        super().__init__(model, norm)
        self.model = nn.Sequential()
        self.model.body, self.model.norm, self.model.head = (
            copy.deepcopy(model.body),
            Twin(copy.deepcopy(model.norm), norm, self.record),
            copy.deepcopy(model.head),
        )
        written = self.model
        self.model.forward = lambda x: written.head(torch.tanh(written.norm(written.body(x))))


def loop(name: str, model: nn.Module, norm: Norm) -> Loop:
    return (LoopOfFunctional if name == "functional" else Loop)(model, norm)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_two_meta_steps_are_those_of_a_loop_and_leave_the_statistics(name, norm, training):
    model, batch = case(name)
    model.train(training)
    slow, before = loop(name, model, norm), (state_of(model), {n: b.clone() for n, b in model.named_buffers()})
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, inner_steps=2, norm=norm)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1)
    for _ in range(2):
        expected, losses = slow.meta_gradient(model, batch, steps=2)
        found = learner.meta_gradient(batch, workers=2)
        assert_close({n: g.mean(0) for n, g in found.grads.items()}, expected, 1e-9)
        torch.testing.assert_close(found.losses, losses)
        torch.testing.assert_close(learner.losses(batch), losses, check_dtype=False)
        optimizer.zero_grad()
        learner.backward(batch)
        optimizer.step()
    assert state_of(model) == before[0]
    assert all(torch.equal(b, before[1][n]) for n, b in model.named_buffers())


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_predictions_and_evaluation_are_those_of_a_loop(name, norm):
    model, batch = case(name)
    slow, learner = loop(name, model, norm), MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm="batch")
    before, buffers = state_of(model), {n: b.clone() for n, b in model.named_buffers()}
    weights = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    rows = []
    for steps in (0, 2):
        adapted = [slow.adapt(weights, x, y, steps, list(weights)) for x, y in zip(*batch[:2], strict=True)]
        expected = torch.stack(
            [slow.predict(own, x, s) for own, x, s in zip(adapted, batch.query_x, batch.support_x, strict=True)]
        ).detach()
        other = learner.like(norm=norm)
        params = other.adapt(batch.support_x, batch.support_y, steps=steps)
        predictions = other.predict(params, batch.query_x, support_x=batch.support_x)
        torch.testing.assert_close(predictions.detach(), expected)
        rows.append((expected.argmax(2) == batch.query_y).double().mean(1))
    found = evaluate(learner, Given(batch), tasks=TASKS, steps=(0, 2), norm=norm)
    torch.testing.assert_close(found.values, torch.stack(rows))
    assert found.norm == norm
    assert learner.norm == "batch"
    assert evaluate(learner, Given(batch), tasks=TASKS, steps=(0,)).norm == "batch"
    assert state_of(model) == before
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_the_choices_differ():
    model, batch = case("2d")
    losses = [MAML(model, F.cross_entropy, norm=norm).meta_gradient(batch).losses for norm in NORMS]
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(losses, losses[1:] + losses[:1], strict=True))


@pytest.mark.parametrize("norm", ["frozen", "support"])
def test_a_query_alone_has_the_logits_that_it_has_among_others(norm):
    model, batch = case("2d", queries=5)
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm=norm)
    params = learner.adapt(batch.support_x, batch.support_y)
    among = learner.predict(params, batch.query_x, support_x=batch.support_x)
    for at in (slice(0, 1), slice(7, 8), slice(3, 9)):
        alone = learner.predict(params, batch.query_x[:, at], support_x=batch.support_x)
        torch.testing.assert_close(alone, among[:, at], rtol=1e-12, atol=1e-12)


# ---- a pretrained backbone


def published(model: nn.Module) -> dict[str, Tensor]:
    """Random weights in the layout of torchvision's files: a plain dict, in which layers have no count of batches."""
    state = {n: 0.1 * draw(*t.shape, seed=i, dtype=t.dtype) for i, (n, t) in enumerate(model.state_dict().items())}
    state |= {n: 0.5 + t**2 for n, t in state.items() if n.endswith("running_var")}
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
def test_a_pretrained_resnet_with_an_adapted_head():
    resnet18 = import_torchvision().models.resnet18
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18()
        weights = published(model)
        model.load_state_dict(weights)
        model.fc = nn.Linear(512, WAYS)
    model.double().eval()
    batch = batch_of(3, 32, 32, queries=25)
    few = TaskBatch(*(x[:2] for x in batch[:2]), *(x[:2, 7:12] for x in batch[2:4]))
    before = {n: t.clone() for n, t in model.state_dict().items() if n not in dict(model.named_parameters())}
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, adapt=["fc"])
    head = ["fc.weight", "fc.bias"]
    expected, losses = Loop(model, "frozen").meta_gradient(model, few, adapted=head)
    found = learner.meta_gradient(few)
    assert_close({n: g[0] for n, g in found.grads.items()}, expected, 1e-9)
    torch.testing.assert_close(found.losses, losses)
    assert learner.adapted == tuple(head)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    for norm in ("frozen", "support"):
        other = learner.like(norm=norm)
        params = other.adapt(batch.support_x[:2], batch.support_y[:2])
        among, alone = (
            other.predict(params, x, support_x=batch.support_x[:2]).detach() for x in (batch.query_x[:2], few.query_x)
        )
        torch.testing.assert_close(alone, among[:, 7:12], rtol=1e-9, atol=1e-9)
    back = resnet18(num_classes=WAYS).double().eval()
    back.load_state_dict(learner.model.state_dict())
    torch.testing.assert_close(back(few.query_x[0]), model(few.query_x[0]), rtol=0, atol=0)


@pytest.mark.parametrize("late", [False, True])
def test_published_weights_load_with_statistics_turned_off(late):
    make, shape = MAKE["2d"]
    model = make()
    weights, x = published(model), batch_of(*shape, dtype=torch.float32).query_x[0]
    if not late:
        model.load_state_dict(weights)
    use_batch_statistics(use_batch_statistics(model))
    if late:
        model.load_state_dict(weights)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    for training in (True, False):
        model.train(training)(x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    back = make().eval()
    back.load_state_dict(model.state_dict())
    assert not torch.allclose(back(x), model(x))
    torch.testing.assert_close(back.train()(x), model(x))


def test_a_state_of_an_earlier_version_lacks_statistics_that_are_turned_off():
    model, _ = case("2d")
    use_batch_statistics(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict({n: torch.zeros_like(p) for n, p in model.named_parameters()})
    assert all(not p.any() for p in model.parameters())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


# ---- which one it is


def test_the_model_says_which():
    model, batch = case("2d")
    frozen, by_batch = (MAML(model, F.cross_entropy, norm=n).meta_gradient(batch).losses for n in ("frozen", "batch"))
    learner = MAML(model, F.cross_entropy)
    assert learner.norm is None
    assert torch.equal(learner.meta_gradient(batch).losses, by_batch)
    assert evaluate(learner, Given(batch), tasks=TASKS, steps=(1,)).norm == "batch"  # though that runs in eval()
    model.eval()
    assert torch.equal(learner.meta_gradient(batch).losses, frozen)
    assert evaluate(learner, Given(batch), tasks=TASKS, steps=(1,)).norm == "frozen"
    use_batch_statistics(model)
    assert torch.equal(learner.meta_gradient(batch).losses, by_batch)
    learner.norm = "support"
    assert not torch.allclose(learner.meta_gradient(batch).losses, by_batch)
    assert learner.describe()["norm"] == "support"
    assert copy.deepcopy(learner).norm == learner.like(estimator="first-order").norm == "support"
    learner.norm = None
    assert "norm" not in learner.describe()


def test_a_hand_written_frozen_layer_stays_frozen_unless_asked():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, WAYS)
            self.register_buffer("mean", torch.full((5,), 0.5))
            self.register_buffer("variance", torch.full((5,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.batch_norm(self.body(x), self.mean, self.variance))

    model, batch = randomised(Fixed()), batch_of(4)
    default, frozen, by_batch = (
        MAML(model, F.cross_entropy, norm=norm).meta_gradient(batch).losses for norm in (None, "frozen", "batch")
    )
    torch.testing.assert_close(default, frozen)
    assert not torch.allclose(default, by_batch)


def mixed() -> nn.Module:
    model, _ = case("2d")
    model[1].eval()
    return model


@pytest.mark.parametrize(
    ("make", "norm", "message"),
    [
        (
            mixed,
            None,
            r"some are in eval\(\): 1; and some in training mode: 5\. Choose for all of them: norm=\"frozen\"",
        ),
        (lambda: Conv4(WAYS), "frozen", r"layers do not have: features\.0\.1, features\.1\.1.*norm=\"batch\""),
        (lambda: use_batch_statistics(case("2d")[0]), "frozen", r"do not have: 1, 5\."),
        (lambda: case("2d")[0], "running", r'"batch", "frozen", "support", or None.*got \'running\''),
        (lambda: case("2d")[0], True, r"got True"),
    ],
)
def test_choices_that_are_refused(make, norm, message):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        MAML(model, F.cross_entropy, norm=norm)
    assert state_of(model) == before


def test_an_attribute_and_an_evaluation_are_checked_as_the_constructor_is():
    learner, batch = MAML(Conv4(WAYS), F.cross_entropy), batch_of(1, 28, 28, dtype=torch.float32)
    for norm, message in (("frozen", "layers do not have: features"), ("mine", "got 'mine'")):
        with pytest.raises(ValueError, match=message):
            learner.norm = norm
        with pytest.raises(ValueError, match=message):
            evaluate(learner, Given(batch), tasks=TASKS, norm=norm)
    assert learner.norm is None


def test_a_mixed_model_trains_with_a_choice_and_is_refused_when_it_becomes_one():
    model, batch = case("2d")
    learner = MAML(model, F.cross_entropy)
    model[1].eval()
    with pytest.raises(ValueError, match="Choose for all of them"):
        learner.backward(batch)
    frozen = MAML(model, F.cross_entropy, norm="frozen").meta_gradient(batch).losses
    assert torch.equal(frozen, MAML(model.eval(), F.cross_entropy).meta_gradient(batch).losses)


def test_frozen_functions_need_statistics():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.batch_norm(x, None, None, training=True))

    learner = MAML(Bare().double(), F.cross_entropy, norm="frozen")
    with pytest.raises(ValueError, match="calls batch_norm without them"):
        learner.backward(batch_of(4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_scripted_normalisation_is_refused_with_a_choice():
    model = nn.Sequential(torch.jit.script(MAKE["1d"][0]().eval()), nn.Linear(WAYS, WAYS))
    for norm in NORMS:
        with pytest.raises(ValueError, match=r"cannot in scripted code: 0, 0\.1\. Pass the model"):
            MAML(model, F.cross_entropy, norm=norm)
    MAML(model, F.cross_entropy)


def test_support_statistics_need_the_support_set():
    model, batch = case("1d")
    learner = MAML(model, F.cross_entropy, norm="support")
    params = learner.adapt(batch.support_x, batch.support_y)
    with pytest.raises(ValueError, match=r"predict\(params, x, support_x=\.\.\.\)"):
        learner.predict(params, batch.query_x)
    with pytest.raises(ValueError, match="tasks"):
        learner.predict(params, batch.query_x, support_x=batch.support_x[:1])


@pytest.mark.parametrize("more", ["support", "queries"])
def test_support_statistics_need_the_same_calls(more):
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            extra = (len(x) > WAYS * 2) == (more == "queries")
            return self.head(self.norm(self.norm(x)) if extra else self.norm(x))

    batch = batch_of(4, queries=3)
    with pytest.raises(ValueError, match="more often on one of them"):
        MAML(Uneven().double(), F.cross_entropy, norm="support").backward(batch)


# ---- with the other options


def test_a_layer_that_is_called_twice_has_the_statistics_of_each_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.tanh(self.norm(self.body(x)))))

    class Apart(nn.Module):
        def __init__(self, twice: Twice) -> None:
            super().__init__()
            self.body, self.norm, self.head = twice.body, twice.norm, twice.head
            self.again = nn.BatchNorm1d(4)
            self.again.weight, self.again.bias = twice.norm.weight, twice.norm.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.tanh(self.norm(self.body(x)))))

    model, batch = randomised(Twice()), batch_of(4)
    found = MAML(model, F.cross_entropy, norm="support").meta_gradient(batch)
    expected = MAML(Apart(model).double(), F.cross_entropy, norm="support").meta_gradient(batch)
    assert_close(found.grads, expected.grads, 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_instance_normalisation(norm):
    """Running statistics if they are frozen, else those of each instance, and so the same for one query or many."""
    layer = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = with_statistics(randomised(nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(36, WAYS))))
    own = copy.deepcopy(model).train(norm != "frozen")
    if norm != "frozen":
        own[1].track_running_stats, own[1].running_mean, own[1].running_var = False, None, None
    batch = batch_of(1, 5, 5)
    found = MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm=norm).meta_gradient(batch)
    loop = Loop(own, "batch")
    expected, losses = loop.meta_gradient(own, batch)
    assert_close({n: g[0] for n, g in found.grads.items()}, expected, 1e-9)
    torch.testing.assert_close(found.losses, losses)


@pytest.mark.parametrize(
    ("estimator", "inner_batches", "points"),
    [("independent", "same", slice(0, 3)), ("exact", "fresh", slice(0, 6)), ("hessian-free", "fresh", slice(0, 6))],
)
def test_the_support_statistics_are_of_the_points_that_give_the_inner_gradients(estimator, inner_batches, points):
    model, wide = MAKE["1d"][0](), batch_of(4, queries=4)
    model = with_statistics(randomised(model))
    halves = 1 if estimator == "exact" else 2
    turns = 2 if inner_batches == "fresh" else 1
    support = torch.cat([wide.support_x, wide.query_x], 1)[:, : 3 * halves * turns]
    labels = torch.cat([wide.support_y, wide.query_y], 1)[:, : 3 * halves * turns]
    batch = TaskBatch(support, labels, wide.query_x, wide.query_y)
    learner = MAML(
        model, F.cross_entropy, inner_lr=INNER_LR, inner_steps=turns, estimator=estimator, inner_batches=inner_batches,
        norm="support",
    )  # fmt: skip
    slow, weights = Loop(model, "support"), {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    for t, loss in enumerate(learner.meta_gradient(batch).losses):
        own = weights
        for turn in range(turns):
            part = slice(3 * turn, 3 * turn + 3)
            own = slow.adapt(own, support[t, part], labels[t, part], 1, list(own))
        out = slow.predict(own, batch.query_x[t], support[t, points])
        torch.testing.assert_close(loss, F.cross_entropy(out, batch.query_y[t]).detach())


@pytest.mark.parametrize("norm", NORMS)
def test_chunks_and_random_layers(norm):
    model, batch = case("1d")
    model.append(nn.Dropout(0.5)).append(nn.Linear(WAYS, WAYS).double())
    found = []
    for chunk_size in (None, 1, 3):
        learner = MAML(model, F.cross_entropy, chunk_size=chunk_size, norm=norm)
        for _ in range(2):  # the first call finds out that the model draws
            torch.manual_seed(0)
            grads = learner.meta_gradient(batch).grads
        found.append(grads)
    for other in found[1:]:
        assert_close(found[0], other, 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16(norm):
    make, shape = MAKE["2d"]
    model, batch = with_statistics(randomised(make())).float(), batch_of(*shape, dtype=torch.float32)
    half, full = (
        MAML(model, F.cross_entropy, norm=norm, autocast=dtype).meta_gradient(batch).losses
        for dtype in (torch.bfloat16, None)
    )
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.05)
    assert not torch.equal(half, full)


def test_parameters_without_a_use_are_checked_with_the_support_set():
    """One query alone has no statistics of its own."""
    model = with_statistics(randomised(MAKE["1d"][0]()))
    model.unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model.forward = lambda x: nn.Sequential(*list(model.children())).forward(x)
    batch = batch_of(4)
    one = TaskBatch(batch.support_x, batch.support_y, batch.query_x[:, :1], batch.query_y[:, :1])
    grads, losses = MAML(model, F.cross_entropy, norm="support").meta_gradient(one)
    assert not grads["unused"].any()
    assert losses.isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        MAML(model, F.cross_entropy, norm="batch").meta_gradient(one)


def test_exported_models():
    model, batch = case("1d")
    model.eval()
    points = ({0: torch.export.Dim("points", min=2)},)
    exported = torch.export.export(model, (batch.support_x[0],), dynamic_shapes=points).module()
    for norm in NORMS:
        ours, theirs = (MAML(each, F.cross_entropy, norm=norm).meta_gradient(batch) for each in (model, exported))
        assert_close(dict(zip(ours.grads, theirs.grads.values(), strict=True)), ours.grads, 1e-12)


def test_threads_that_choose_differently():
    model, batch = case("2d")
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR)

    def values(norm: Norm) -> Tensor:
        return evaluate(learner, Given(batch), tasks=TASKS, steps=(0, 1, 2), norm=norm).values

    expected = [values(norm) for norm in NORMS]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(values, NORMS * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


@pytest.mark.parametrize("estimator", ["moml", "scsc"])
def test_tracked_estimators(estimator):
    """A first visit is an inner step, as that of independent batches; later ones go on from it."""
    model, batch = case("1d", queries=3)
    batch = batch._replace(task_ids=torch.arange(TASKS))
    tracked, plain = (MAML(model, F.cross_entropy, norm="support", estimator=e) for e in (estimator, "independent"))
    first, expected = tracked.meta_gradient(batch), plain.meta_gradient(batch)
    assert_close(first.grads, expected.grads, 1e-12)
    torch.testing.assert_close(tracked.meta_gradient(batch).losses, first.losses)  # the same points and weights


def test_names_are_listed_in_short():
    model = nn.Sequential(*[nn.BatchNorm1d(4, track_running_stats=False) for _ in range(7)])
    with pytest.raises(ValueError, match=re.escape("0, 1, 2, 3, 4 and 2 more.")):
        MAML(model, F.cross_entropy, norm="frozen")


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] in ("2d", "Conv4")])
def test_compiled_graphs(traced, name, norm):
    model, batch = case(name)
    eager, compiled = (MAML(model, F.cross_entropy, norm=norm, compile=c) for c in (False, True))
    for _ in range(2):  # a graph reads the running statistics in each call
        found = compiled.meta_gradient(batch)
        expected = eager.meta_gradient(batch)
        assert_close(found.grads, expected.grads, 1e-11)
        torch.testing.assert_close(found.losses, expected.losses)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(1)
    assert len(traced) == 1
    compiled.norm = "support" if norm == "batch" else "batch"
    assert not torch.allclose(compiled.meta_gradient(batch).losses, expected.losses)
    assert len(traced) == 2


@pytest.mark.slow
def test_a_compiled_graph_of_each_choice():
    model, batch = case("1d")
    for norm in NORMS:
        found, expected = (
            MAML(model, F.cross_entropy, norm=norm, compile=c).meta_gradient(batch).grads for c in (True, False)
        )
        assert_close(found, expected, 1e-11)
