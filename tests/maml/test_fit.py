"""`MAML.fit` and `MAML.fit_predict`: one task, and a module that needs no learner."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate
from metamom.maml.checks.batch_checks import NonFiniteDataError
from metamom.maml.checks.not_finite import NonFiniteStepError
from metamom.maml.normalisation.norm import resolved
from metamom.nets.layers import BatchNormReLU
from metamom.nets.models import Conv4, SinusoidMLP, use_batch_statistics

WAYS = 3


class Normed(nn.Module):
    """Batch normalisation with running statistics, instance normalisation, and dropout."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4, **options)
        self.second = nn.Conv2d(4, 4, 3)
        self.each = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.head(self.drop(torch.tanh(self.each(self.second(x))).mean((-2, -1))))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5 * name.endswith("var"))
    return model


def images(points: int = 9, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(points + 4, 1, 12, 12, generator=generator, dtype=torch.float64)
    return x[:points], torch.arange(points) % WAYS, x[points:]


def line(points: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.linspace(-2, 2, points, dtype=torch.float64).unsqueeze(-1)
    return x, torch.sin(x), x[:4] + 0.1


def through_adapt(
    learner: MAML, x: Tensor, y: Tensor, queries: Tensor, steps: int | None = None, norm: str | None = None
) -> Tensor:
    """The same by the functional path: a batch of one task."""
    frozen = resolved(learner.model, learner.norm) == "frozen"
    learner = learner.like(norm=norm or ("frozen" if frozen else "support"))
    adapted = learner.adapt(x.unsqueeze(0), y.unsqueeze(0), steps=steps)
    support = x.unsqueeze(0) if learner.norm == "support" else None
    return learner.predict(adapted, queries.unsqueeze(0), support_x=support)[0].detach()


LEARNERS = {
    "MLP": lambda: MAML(seeded(SinusoidMLP), F.mse_loss, inner_lr=0.05, inner_steps=3),
    "learned step sizes": lambda: MAML(seeded(SinusoidMLP), F.mse_loss, inner_lr=0.05, learn_inner_lr=True),
    "ANIL": lambda: MAML(seeded(lambda: Conv4(WAYS, hidden=4)), F.cross_entropy, inner_lr=0.1, adapt=["head"]),
    "Conv4": lambda: MAML(seeded(lambda: Conv4(WAYS, hidden=4)), F.cross_entropy, inner_lr=0.1),
    "Conv4, support": lambda: MAML(
        seeded(lambda: Conv4(WAYS, hidden=4)), F.cross_entropy, inner_lr=0.1, norm="support"
    ),
    **{
        f"running statistics, {norm}": lambda norm=norm: MAML(
            seeded(Normed).eval(), F.cross_entropy, inner_lr=0.1, inner_steps=2, norm=norm
        )
        for norm in ("batch", "support", "frozen", None)
    },
    **{
        f"hidden statistics, {norm}": lambda norm=norm: MAML(
            use_batch_statistics(seeded(Normed).eval()), F.cross_entropy, inner_lr=0.1, norm=norm
        )
        for norm in ("batch", "support", None)
    },
    "no statistics, support": lambda: MAML(
        seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(),
                                     nn.Linear(256, WAYS))).eval(),
        F.cross_entropy, inner_lr=0.1, norm="support",
    ),
    "loop": lambda: MAML(seeded(SinusoidMLP), F.mse_loss, inner_lr=0.05, vectorize="loop"),
}  # fmt: skip


def data_for(learner: MAML) -> tuple[Tensor, Tensor, Tensor]:
    return line() if isinstance(learner.model, SinusoidMLP) else images()


@pytest.fixture(params=LEARNERS)
def learner(request) -> MAML:
    return LEARNERS[request.param]()


def test_the_module_predicts_as_the_learner_does(learner):
    x, y, queries = data_for(learner)
    for steps in (None, 0, 4):
        expected = through_adapt(learner, x, y, queries, steps)
        model = learner.fit(x, y, steps)
        assert type(model) is type(learner.model)
        assert not model.training
        torch.testing.assert_close(model(queries).detach(), expected, rtol=1e-10, atol=1e-10)
        found = learner.fit_predict(x, y, queries, steps)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_prediction_does_not_depend_on_the_other_points(learner):
    x, y, queries = data_for(learner)
    model = learner.fit(x, y)
    together = model(queries)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in queries]), together, rtol=1e-9, atol=1e-9)
    by_learner = torch.cat([learner.fit_predict(x, y, one[None]) for one in queries])
    torch.testing.assert_close(by_learner, together.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "running statistics, frozen"])
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_the_caller_may_choose_the_statistics(name, norm):
    learner = LEARNERS[name]()
    x, y, queries = data_for(learner)
    expected = through_adapt(learner, x, y, queries, norm=norm)
    model = learner.fit(x, y, norm=norm)
    torch.testing.assert_close(model(queries).detach(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(learner.fit_predict(x, y, queries, norm=norm), expected, rtol=1e-10, atol=1e-10)
    if norm == "batch" and any(isinstance(each, (nn.BatchNorm2d, BatchNormReLU)) for each in model.modules()):
        assert not torch.allclose(model(queries[:1]), expected[:1]), "transductive"


def test_only_known_statistics_can_be_chosen():
    x, y, _ = line()
    learner = LEARNERS["MLP"]()
    with pytest.raises(ValueError, match="norm must be"):
        learner.fit(x, y, norm="layer")
    with pytest.raises(ValueError, match='norm="frozen" normalises by running statistics'):
        LEARNERS["Conv4"]().fit(*images()[:2], norm="frozen")


def test_nothing_of_the_learner_changes_or_is_kept(learner):
    x, y, queries = data_for(learner)
    before = copy.deepcopy(learner.state_dict())
    state = torch.get_rng_state()
    model = learner.fit(x, y)
    expected = model(queries).detach()
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in learner.state_dict().values()}
    assert not shared
    assert all(p.grad is None and p.is_leaf for p in model.parameters())
    with torch.no_grad():
        for p in learner.parameters():
            p.zero_()
    assert torch.equal(model(queries), expected)


@pytest.mark.parametrize("name", ["MLP", "running statistics, support"])
def test_the_learner_can_be_freed(name):
    learner = LEARNERS[name]()
    x, y, queries = data_for(learner)
    model = learner.fit(x, y)
    alive = weakref.ref(learner.model)
    del learner
    gc.collect()
    assert alive() is None
    assert torch.isfinite(model(queries)).all()


def test_the_module_works_anywhere(learner):
    x, y, queries = data_for(learner)
    model = learner.fit(x, y)
    expected = model(queries).detach()
    with torch.inference_mode():
        assert torch.equal(model(queries), expected)
    with torch.no_grad():
        assert torch.equal(model(queries), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(queries), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(queries), expected)
    assert torch.equal(copy.deepcopy(model)(queries), expected)
    copy.deepcopy(model).load_state_dict(model.state_dict())
    torch.testing.assert_close(model.float()(queries.float()).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "loop"])
def test_the_module_can_be_exported(name):
    learner = LEARNERS[name]()
    x, y, queries = data_for(learner)
    model = learner.fit(x, y)
    exported = torch.export.export(model, (queries,)).module()
    torch.testing.assert_close(exported(queries), model(queries), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_module_moves_to_a_gpu(learner):
    x, y, queries = data_for(learner)
    model = learner.fit(x, y)
    there = copy.deepcopy(model).to("cuda")(queries.cuda())
    torch.testing.assert_close(there.cpu(), model(queries), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", [True, False])
def test_fitting_works_under_inference_mode(learner, mode):
    x, y, queries = data_for(learner)
    expected = learner.fit_predict(x, y, queries)
    with torch.inference_mode(mode), torch.no_grad():
        there = x.clone(), y.clone(), queries.clone()
        model = learner.fit(*there[:2])
        assert torch.equal(learner.fit_predict(*there), expected)
    assert not any(t.is_inference() for t in model.state_dict().values())
    torch.testing.assert_close(model(queries).detach(), expected, rtol=1e-10, atol=1e-10)
    (model(queries).square().sum()).backward()  # it can be trained further


def test_predictions_are_those_of_an_evaluation():
    learner = MAML(seeded(Normed), F.cross_entropy, inner_lr=0.1, norm="support")
    x, y, queries = images()
    labels = torch.tensor([0, 1, 2, 0])

    class One:
        def sample(self, step: int, num_tasks: int) -> TaskBatch:
            each = (x, y, queries, labels)
            return TaskBatch(*(t.unsqueeze(0).expand(num_tasks, *t.shape) for t in each))

    found = evaluate(learner, One(), tasks=2, steps=(3,))
    model = learner.fit(x, y, steps=3)
    right = (model(queries).argmax(-1) == labels).double().mean()
    assert found.mean[0] == pytest.approx(float(right))


def test_trees_and_losses_without_targets():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(torch.cat([a, b], dim=-1))

    learner = MAML(seeded(Two), lambda out: out.square().mean(), inner_lr=0.1)
    tree = {"a": torch.rand(5, 1).double(), "b": torch.rand(5, 2).double()}
    model = learner.fit(tree, None)
    torch.testing.assert_close(model(**tree).detach(), learner.fit_predict(tree, None, tree))
    assert learner.fit(tree, None)(**tree).square().mean() < learner.model(**tree).square().mean()


def test_inputs_come_to_the_model():
    x, y, queries = line()
    learner = MAML(SinusoidMLP(), F.mse_loss)
    assert learner.fit(x, y)(queries.float()).dtype == torch.float32  # float64 points, float32 weights
    with pytest.raises(
        TypeError, match=r"support_x must be a tensor, the points of one task \[N, \.\.\.\]; got a list"
    ):
        learner.fit(x.tolist(), y)
    with pytest.raises(ValueError, match="the same points"):
        learner.fit(x, y[:3])
    with pytest.raises(ValueError, match="single number"):
        learner.fit(x, torch.tensor(1.0))


def test_a_derivative_in_the_forward():
    """A physics-informed network differentiates in its inputs, whether or not the caller wants gradients."""

    class Pinn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(1, 8), nn.Linear(8, 1)

        def forward(self, x):
            x = x.detach().requires_grad_()
            u = self.head(torch.tanh(self.body(x)))
            return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    learner = MAML(Pinn(), F.mse_loss, inner_lr=0.1, inner_steps=2, vectorize="loop")
    x, y, query = torch.randn(3, 5, 1)
    adapted = {name: w[0] for name, w in learner.adapt(x[None], y[None]).items()}
    wanted = torch.func.functional_call(learner.model, adapted, (query,))
    torch.testing.assert_close(learner.fit(x, y)(query), wanted)
    torch.testing.assert_close(learner.fit_predict(x, y, query), wanted)


def test_weight_normalisation_in_attributes():
    with pytest.warns(FutureWarning, match="weight_norm"):
        made = nn.utils.weight_norm(nn.Linear(1, 4))
    model = nn.Sequential(made, nn.Tanh(), nn.Linear(4, 1)).double()
    learner = MAML(model, F.mse_loss, inner_lr=0.1, vectorize="loop")
    x, y, queries = line()
    learner.model(x)  # leaves a tensor with a graph behind
    model = learner.fit(x, y)
    torch.testing.assert_close(model(queries).detach(), learner.fit_predict(x, y, queries))


@pytest.mark.parametrize("name", ["MLP", "Conv4"])
def test_data_that_is_not_finite(name):
    learner = LEARNERS[name]()
    x, y, queries = data_for(learner)
    x[4].flatten()[0] = torch.nan
    for fitting in (lambda: learner.fit(x, y), lambda: learner.fit_predict(x, y, queries)):
        with pytest.raises(NonFiniteDataError, match=r"support_x has NaN .* in 1 of \d+ points, first in point 4, "):
            fitting()


def test_steps_that_are_too_large():
    x, y, queries = line()
    learner = MAML(seeded(SinusoidMLP), F.mse_loss, inner_lr=1e9, inner_steps=50)
    for fitting in (lambda: learner.fit(x, y), lambda: learner.fit_predict(x, y, queries)):
        with pytest.raises(NonFiniteStepError, match=r"not finite after 50 inner steps, although the data is"):
            fitting()
    with pytest.raises(NonFiniteDataError, match="support_y has NaN or infinite values in 1 of 10 points"):
        learner.fit(x, y.index_fill(0, torch.tensor(2), torch.inf))


class Functional(nn.Module):
    """Normalises by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.batch_norm(self.layer(x), None, None, training=True))


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x))


def test_statistics_that_no_layer_can_keep():
    x, y, queries = line()
    learner = MAML(seeded(Functional), F.mse_loss, norm="support")
    with pytest.raises(ValueError, match="the model calls batch_norm itself"):
        learner.fit(x, y)
    assert torch.equal(learner.fit_predict(x, y, queries), through_adapt(learner, x, y, queries))
    twice = MAML(seeded(Twice), F.mse_loss, norm="support")
    with pytest.raises(ValueError, match="calls norm 2 times"):
        twice.fit(x, y)
    assert torch.isfinite(twice.fit_predict(x, y, queries)).all()
    for norm in ("batch", None):  # also a learner that leaves the choice to the model
        learner.norm = norm
        with pytest.raises(ValueError, match='pass norm="batch", by which a prediction depends on the other points'):
            learner.fit(x, y)
        transductive = learner.fit_predict(x, y, queries, norm="batch")
        torch.testing.assert_close(learner.fit(x, y, norm="batch")(queries).detach(), transductive)
        torch.testing.assert_close(
            learner.fit_predict(x, y, queries[:1]), through_adapt(learner, x, y, queries, norm="support")[:1]
        )


# a batch of tasks, or one task


ONE_TASK = r"the points of one task\. Use learner\.fit\(support_x, support_y\)"


@pytest.mark.parametrize(
    ("make", "x", "y"),
    [
        (SinusoidMLP, (10, 1), (10, 1)),
        (SinusoidMLP, (10, 1), (10,)),
        (lambda: nn.Linear(3, 3), (10, 3), (10, 3)),
        (lambda: nn.Linear(3, 1), (10, 3), (10, 1)),
        (lambda: nn.Linear(3, 1), (10, 3), (10,)),
        (lambda: nn.Embedding(9, 1), (10,), (10, 1)),
    ],
)
def test_adapt_refuses_the_points_of_one_task(make, x, y):
    learner = MAML(make(), F.mse_loss)
    points = torch.zeros(x, dtype=torch.long) if isinstance(learner.model, nn.Embedding) else torch.rand(x)
    with pytest.raises(ValueError, match=ONE_TASK):
        learner.adapt(points, torch.rand(y))
    learner.fit(points, torch.rand(10, 1) if len(y) < 2 else torch.rand(y))
    learner.adapt(points.unsqueeze(0), torch.rand(1, 10, y[1] if len(y) > 1 else 1))


def test_adapt_refuses_labels_of_one_task():
    learner = MAML(Conv4(WAYS, hidden=4), F.cross_entropy)
    x, y, _ = images()
    with pytest.raises(ValueError, match=ONE_TASK):
        learner.adapt(x.float(), y)
    grey = MAML(nn.Sequential(nn.Conv2d(1, 4, 12), nn.Flatten(-3)), F.mse_loss)
    with pytest.raises(ValueError, match=ONE_TASK):  # [1, 12, 12] is an image to a convolution
        grey.adapt(x.float(), torch.rand(9, 1))


def test_adapt_takes_batches_of_any_size():
    learner = MAML(nn.Linear(1, 1), F.mse_loss)
    for tasks, points in ((1, 1), (1, 5), (5, 1), (3, 3)):
        adapted = learner.adapt(torch.rand(tasks, points, 1), torch.rand(tasks, points, 1))
        assert adapted["weight"].shape == (tasks, 1, 1)
    ids = MAML(nn.Embedding(9, 1), F.mse_loss)
    assert ids.adapt(torch.zeros(4, 3, dtype=torch.long), torch.rand(4, 3, 1))["weight"].shape == (4, 9, 1)


def test_checking_is_done_once_and_changes_nothing():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape)
            return super().forward(x)

    learner = MAML(nn.Sequential(Counting(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)), F.mse_loss)
    x, y = torch.rand(2, 1, 1), torch.rand(2, 1, 1)
    state, before = torch.get_rng_state(), copy.deepcopy(learner.state_dict())
    learner.adapt(x, y, steps=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
    first = len(calls)
    learner.adapt(x, y, steps=0)
    assert (first, len(calls)) == (1, 1)


def test_representations():
    learner = MAML(SinusoidMLP(), F.mse_loss, inner_lr=0.05, inner_steps=2)
    assert repr(learner) == (
        "MAML(SinusoidMLP of 1,761 parameters, mse_loss, inner_lr=0.05, inner_steps=2, estimator='exact')"
    )
    learner = MAML(Conv4(5), nn.CrossEntropyLoss(), adapt=["head"], norm="support", learn_inner_lr=True)
    assert repr(learner) == (
        "MAML(Conv4 of 112,005 parameters, CrossEntropyLoss, inner_lr='learned (entry)', inner_steps=1, "
        "estimator='exact', adapt=('head.weight', 'head.bias'), norm='support')"
    )
    parts = {"multi_step": 3, "first_order_until": 4, "step_norms": True, "positive_inner_lr": True}
    learner = MAML(Conv4(5), F.cross_entropy, inner_steps=2, learn_inner_lr="tensor-step", **parts)
    assert repr(learner) == (
        "MAML(Conv4 of 112,005 parameters, cross_entropy, inner_lr='learned (tensor-step)', inner_steps=2, "
        "positive_inner_lr=True, estimator='exact', multi_step=3, first_order_until=4, step_norms=True)"
    )
    learner = MAML(SinusoidMLP(), F.mse_loss, estimator="moml", tracking=0.25)
    assert repr(learner).endswith("estimator='moml', tracking=0.25)")
    learner = MAML(SinusoidMLP(), F.mse_loss, inner_steps=2, inner_batches="fresh")
    assert repr(learner).endswith("estimator='exact', inner_batches='fresh')")
