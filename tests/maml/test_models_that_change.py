"""Models that are not what they were when their learner was made, and what they carry from call to call."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from metamom import MAML, TaskBatch, evaluate
from metamom.tasks import LinearRegression

BATCH = regression_batch(tasks=3)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def as_in_a_loop(learner: MAML) -> None:
    expected, _ = slow_meta_gradient(learner.model, F.mse_loss, BATCH, inner_lr=0.1)
    grads = learner.meta_gradient(BATCH).grads
    assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


# ---- other modules, other trainable parameters


def unfreeze(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(True)


def freeze(model: nn.Sequential) -> None:
    model[2].requires_grad_(False)


def append(model: nn.Sequential) -> None:
    model.append(nn.Linear(1, 1).double())


def remove(model: nn.Sequential) -> None:
    del model[1]


def normalise(model: nn.Sequential) -> None:
    weight_norm(model[0])


def append_running_statistics(model: nn.Sequential) -> None:
    model.append(nn.BatchNorm1d(1).double())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of weight_norm
@pytest.mark.parametrize("change", [unfreeze, freeze, append, remove, normalise, append_running_statistics])
def test_a_learner_follows_its_model(change):
    model = net()
    model[0].weight.requires_grad_(change is not unfreeze)
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    as_in_a_loop(learner)
    change(model)
    as_in_a_loop(learner)
    assert list(learner.adapted) == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("first", ["adapt", "trajectory", "evaluate", "like"])
def test_the_first_call_after_a_change_follows_it(first):
    """Whatever it is: new parameters adapt at once."""
    learner, sampler = MAML(net(), F.mse_loss, inner_lr=0.1), LinearRegression(2, 4)
    learner.adapt(*BATCH[:2])
    learner.model[0] = nn.Sequential(nn.Linear(2, 4)).double()  # type: ignore[operator]
    other = MAML(copy.deepcopy(learner.model), F.mse_loss, inner_lr=0.1)
    found, wanted = (
        {
            "adapt": lambda each: each.adapt(*BATCH[:2]),
            "trajectory": lambda each: list(each.trajectory(*BATCH[:2], steps=2))[-1],
            "evaluate": lambda each: {"": evaluate(each, sampler, tasks=4, norm="batch").values},
            "like": lambda each: each.like().adapt(*BATCH[:2]),
        }[first](each)
        for each in (learner, other)
    )
    assert list(found) == list(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_parameters_that_are_named_stay_the_only_ones():
    model = net()
    learner = MAML(model, F.mse_loss, inner_lr=0.1, adapt=["2"])
    append(model)
    learner.backward(BATCH)
    assert learner.adapted == ("2.weight", "2.bias")


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, lambda model: model.requires_grad_(False), "all 4 of its parameters are frozen"),
        ({"adapt": ["2"]}, freeze, r"\['2'\] is none of 0\.weight, 0\.bias"),
        ({"adapt": ["2"]}, remove, r"\['2'\] is none of 0\.weight, 0\.bias, 1\.weight"),
        (
            {"learn_inner_lr": "tensor"},
            append,
            r"new trainable parameters without an inner step size: 3\.weight, 3\.bias",
        ),
        ({"norm": "frozen"}, lambda model: model.append(nn.BatchNorm1d(1, track_running_stats=False)), "not have: 3"),
        (
            {},
            lambda model: model[1].register_full_backward_hook(lambda module, *gradients: None),
            r"backward hooks of modules do not run under vmap.*1 \(Tanh\)",
        ),
        ({}, lambda model: model[2].register_full_backward_pre_hook(lambda module, *gradients: None), r"2 \(Linear\)"),
    ],
)
def test_changes_that_a_learner_cannot_follow(options, change, message):
    model = net()
    learner = MAML(model, F.mse_loss, vectorize="vmap", **options)
    learner.backward(BATCH)
    change(model)
    for call in (learner.backward, learner.losses, lambda batch: learner.adapt(batch.support_x, batch.support_y)):
        with pytest.raises(ValueError, match=message):
            call(BATCH)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = net()
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode\(\) cannot be trained: 0\.weight"):
        MAML(model, F.mse_loss)


class Phased(nn.Module):
    """Uses a layer, behind a cut, from its second phase on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.phase = nn.Linear(2, 1), nn.Linear(2, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if self.phase == 0 else self.first(x) + self.second(x).detach()


def test_a_parameter_that_was_not_used_may_be_cut_off_later():
    model = Phased().double()
    learner = MAML(model, F.mse_loss)
    learner.backward(BATCH)
    model.phase = 1
    with pytest.raises(ValueError, match=r"depends on second\.weight, second\.bias, but no gradient reaches them"):
        learner.backward(BATCH)


# ---- what is carried from call to call


class Average(nn.Module):
    """Subtracts a mean, of all calls or of this one, kept in a buffer or an attribute."""

    def __init__(self, buffer: bool, running: bool) -> None:
        super().__init__()
        self.layer, self.running = nn.Linear(2, 1), running
        mean = torch.zeros((), dtype=torch.float64)
        if buffer:
            self.register_buffer("mean", mean)
        else:
            self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.mean = 0.9 * self.mean + 0.1 * h.mean().detach() if self.running else h.mean().detach()
        return h - self.mean


@pytest.mark.parametrize("buffer", [True, False])
def test_a_running_statistic_is_refused(buffer):
    with pytest.raises(ValueError, match="the model's forward reads and replaces mean"):
        MAML(Average(buffer, running=True).double(), F.mse_loss).backward(BATCH)


@pytest.mark.parametrize("buffer", [True, False])
def test_a_statistic_of_this_call_is_fine(buffer):
    torch.manual_seed(0)
    model = Average(buffer, running=False).double()
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    as_in_a_loop(learner)
    assert float(model.mean) in (0.0, pytest.approx(float(model.mean)))


class Skipping(nn.Module):
    """Skips its first layer or not, as some generator says."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(2, 2), nn.Linear(2, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) if self.draw() < 0.5 else x)


@pytest.mark.parametrize(("draw", "name"), [(random.random, "Python's"), (np.random.rand, "NumPy's")])
def test_draws_that_are_not_torchs_are_reported(draw, name):
    """And what a model skips by chance is no cut graph."""
    for seed in range(10):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        learner = MAML(Skipping(draw).double(), F.mse_loss)
        with pytest.warns(UserWarning, match=f"draws from {name} generator, once for all tasks"):
            learner.backward(BATCH)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            learner.backward(BATCH)


# ---- copies


@pytest.mark.parametrize("adapt", [None, ["2"], lambda name: name.startswith("2")], ids=["all", "names", "predicate"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_copies_adapt_the_same(copied, adapt):
    learner = MAML(net(), F.mse_loss, adapt=adapt)
    learner.backward(BATCH)
    other = copied(learner)
    assert other.adapted == learner.adapted
    assert torch.equal(other.losses(BATCH), learner.losses(BATCH))


class KeepsLater(nn.Module):
    """Starts to keep an activation once it is told to, as an attribute, in a list or in a dict."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where, self.keeps = nn.Linear(3, 1), where, False
        self.kept: list[torch.Tensor] = []
        self.by_name: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        if self.keeps and self.where == "attribute":
            self.act = out
        elif self.keeps and self.where == "list":
            self.kept.append(out)
        elif self.keeps:
            self.by_name["out"] = out
        return out * 2


@pytest.mark.parametrize("where", ["attribute", "list", "dict"])
def test_a_model_that_starts_to_keep_activations_is_left_without_them(where):
    model = KeepsLater(where).double()
    draw = torch.Generator().manual_seed(0)
    tasks = TaskBatch(*(torch.randn(4, 5, d, generator=draw, dtype=torch.float64) for d in (3, 1, 3, 1)))
    learner = MAML(model, F.mse_loss, inner_lr=0.05)
    for _ in range(3):
        wanted = learner.meta_gradient(tasks).grads
    model.keeps = True
    for _ in range(3):
        found = learner.meta_gradient(tasks).grads
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-14)
        assert not hasattr(model, "act")
        assert not model.kept
        assert not model.by_name
        copy.deepcopy(model)
