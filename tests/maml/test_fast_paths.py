"""The paths that are taken because they are fast give the gradients of a plain loop, and are taken."""

from __future__ import annotations

import pytest
import torch
from as_in_a_loop import check
from model_zoo import Problem
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from metamom import MAML, TaskBatch
from metamom.maml.running import loop_preferred, run_by_task
from metamom.maml.running.loop_preferred import convolutions_faster_in_a_loop, faster_in_a_loop
from metamom.maml.under_vmap.batched import over_tasks
from metamom.nets.kernels import convolutions as kernels_of_convolutions
from metamom.nets.kernels import normalisations


class Words(nn.Module):
    """An embedding, a recurrent layer that vmap cannot take, and a classifier of the last state."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, **options)
        self.layer, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        states, _ = self.layer(self.table(words))
        return self.head(states[:, -1])


class Bilinear(nn.Module):
    """A bilinear layer of two halves of its input, with or without a bias, on points and on sequences of them."""

    def __init__(self, *, bias: bool, sequences: bool) -> None:
        super().__init__()
        self.layer, self.head, self.sequences = nn.Bilinear(2, 2, 5, bias=bias), nn.Linear(5, 3), sequences

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = [half.unsqueeze(1) if self.sequences else half for half in x.split(2, -1)]
        return self.head(torch.tanh(self.layer(*halves))).flatten(1)


def mlp(wrap) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(4, 6)), nn.Tanh(), wrap(nn.Linear(6, 3)))


def images(norm) -> nn.Module:
    convs = nn.Conv2d(2, 4, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1, groups=2), norm(), nn.ReLU()
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(36, 3))


def convolutions(count: int, *parts: nn.Module, groups: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolutions with batch normalisation of two channels, other ``parts``, and a classifier."""
    blocks = [
        nn.Sequential(nn.Conv2d(2, 2, 3, stride, 1, groups=groups), nn.BatchNorm2d(2, track_running_stats=False))
        for _ in range(count)
    ]
    return nn.Sequential(*blocks, *parts, nn.Flatten(), nn.LazyLinear(3) if stride > 1 else nn.Linear(32, 3))


class Noisy(nn.Module):
    """Convolutions that draw, in a module that is not PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutions(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + torch.randn_like(x))


MODELS = {
    "spectral norm in eval()": (lambda: mlp(spectral_norm).eval(), (4,)),
    "weight norm": (lambda: mlp(weight_norm), (4,)),
    "batch normalisation": (lambda: images(lambda: nn.BatchNorm2d(4, track_running_stats=False)), (2, 6, 6)),
    "group normalisation": (lambda: images(lambda: nn.GroupNorm(2, 4)), (2, 6, 6)),
    "three convolutions": (lambda: convolutions(3), (2, 4, 4)),
    "a recurrent layer": (Words, None),
    "a bilinear layer": (lambda: Bilinear(bias=True, sequences=False), (4,)),
    "a bilinear layer of sequences": (lambda: Bilinear(bias=False, sequences=True), (4,)),
    "an embedding with counts": (lambda: Words(scale_grad_by_freq=True), None),
}


def problem(name: str, tasks: int = 3, points: int = 4) -> Problem:
    make, shape = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().double()
    xs = [
        torch.randint(7, (tasks, points, 5), generator=generator)
        if shape is None
        else torch.randn(tasks, points, *shape, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]
    ys = [torch.randint(3, (tasks, points), generator=generator) for _ in range(2)]
    return Problem(model, F.cross_entropy, TaskBatch(xs[0], ys[0], xs[1], ys[1]))


@pytest.fixture
def everything(monkeypatch) -> None:
    """The thresholds above which the fast paths are taken, at 0."""
    monkeypatch.setattr(loop_preferred, "SMALLEST", 0)
    monkeypatch.setattr(kernels_of_convolutions, "FEW", 0)
    for name in ("LARGE", "LARGE_BACKWARD", "LARGE_OF_ALL"):
        monkeypatch.setattr(normalisations, name, 0)


@pytest.mark.filterwarnings("ignore:module 'layer':UserWarning")
@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_are_those_of_a_plain_loop(name, estimator, everything):
    check(problem(name), estimator=estimator, tolerance=1e-10)


@pytest.mark.parametrize("name", ["spectral norm in eval()", "weight norm"])
def test_auto_runs_such_a_model_in_a_loop_without_a_warning(name, everything, monkeypatch, recwarn):
    calls = []
    monkeypatch.setattr(
        run_by_task, "one_by_one", lambda *args, one=run_by_task.one_by_one: (calls.append(1), one(*args))[1]
    )
    case = problem(name)
    MAML(case.model, case.loss_fn, inner_lr=0.1).backward(case.batch)
    assert calls
    assert not [warning for warning in recwarn if "task by task" in str(warning.message)]
    calls.clear()
    MAML(case.model, case.loss_fn, inner_lr=0.1, vectorize="vmap").backward(case.batch)
    assert not calls


def test_which_models_are_faster_in_a_loop():
    def of(model: nn.Module, points: int, *, adapted: bool = True) -> bool:
        return faster_in_a_loop(model, dict(model.named_parameters()) if adapted else (), points)

    spectral, normed = spectral_norm(nn.Linear(128, 128)), nn.Sequential(weight_norm(nn.Linear(128, 128)))
    assert not of(spectral, 5)  # in training, its buffers change
    assert of(spectral.eval(), 5)
    assert not of(spectral, 5, adapted=False)
    assert not of(spectral_norm(nn.Linear(127, 128)).eval(), 5)
    # factors of 2 x 16 rows of 128 + 128 numbers are half of a matrix
    assert [of(normed, points) for points in (5, 16, 17)] == [False, False, True]
    assert not of(nn.Linear(128, 128), 500)
    assert not of(weight_norm(nn.Conv2d(64, 64, 3)), 500)


def test_which_convolutions_are_faster_in_a_loop():
    def of(model: nn.Module, tasks: int, adapted=lambda name: True) -> bool:
        names = [name for name, _ in model.named_parameters() if adapted(name)]
        return convolutions_faster_in_a_loop(model, names, tasks)

    few, deep, deepwise = convolutions(3), convolutions(8), convolutions(8, groups=2)
    assert [of(few, tasks) for tasks in (1, 4, 5, 17)] == [True, True, False, False]
    assert [of(deep, tasks) for tasks in (1, 4, 5, 16, 17)] == [True, True, True, True, False]
    assert [of(deepwise, tasks) for tasks in (4, 5)] == [True, False]
    assert not of(convolutions(2), 1)
    assert not of(few, 4, lambda name: name.startswith("4"))  # the head alone
    assert not of(convolutions(3, nn.Dropout(0.1)), 4)
    assert not of(convolutions(3, stride=2), 4)
    pools = nn.MaxPool2d(1), nn.AvgPool2d(1)
    assert [of(convolutions(3, *pools, *rest), 4) for rest in ((), (nn.PReLU(),))] == [False, True]
    assert [of(convolutions(8, *pools, *rest), 5) for rest in ((), (nn.MaxPool2d(1),))] == [False, False]


def test_first_order_convolutions_run_in_a_loop(monkeypatch):
    calls = []
    monkeypatch.setattr(
        run_by_task, "one_by_one", lambda *args, one=run_by_task.one_by_one: (calls.append(1), one(*args))[1]
    )
    case = problem("three convolutions")
    for options, expected in (
        ({"estimator": "first-order"}, True),
        ({"estimator": "first-order", "vectorize": "vmap"}, False),
        ({}, False),
    ):
        calls.clear()
        MAML(case.model, case.loss_fn, inner_lr=0.1, **options).backward(case.batch)
        assert bool(calls) is expected


def test_a_network_found_to_draw_draws_the_same_in_both():
    case = problem("three convolutions")
    model = Noisy().double()
    found = []
    for vectorize in ("auto", "vmap", "loop"):
        learner = MAML(model, case.loss_fn, inner_lr=0.1, estimator="first-order", vectorize=vectorize)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append([learner.meta_gradient(case.batch).grads for _ in range(3)])
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            for name, grad in theirs.items():
                torch.testing.assert_close(ours[name], grad, rtol=1e-10, atol=1e-12)


class TestOverTasks:
    """`over_tasks` is `torch.func.vmap`."""

    @staticmethod
    def both(function, *args, randomness="error"):
        return over_tasks(function, randomness)(*args), torch.func.vmap(function, randomness=randomness)(*args)

    def test_structures_and_results_without_tasks(self):
        x, w = torch.arange(6.0).view(3, 2), {"w": torch.arange(12.0).view(3, 2, 2), "none": {}}

        def function(own, x):
            return {"y": x @ own["w"], "rest": (x.sum(), torch.ones(2))}, [x]

        ours, theirs = self.both(function, w, x)
        torch.testing.assert_close(ours, theirs)
        assert ours[0]["rest"][1].shape == (3, 2)

    def test_gradients(self):
        x = torch.arange(6.0).view(3, 2).requires_grad_()
        ours, theirs = self.both(lambda x: x.sin().prod(), x)
        a, b = (torch.autograd.grad(out.sum(), x, create_graph=True)[0] for out in (ours, theirs))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), x)[0] for each in (a, b)))

    def test_random_numbers(self):
        x = torch.zeros(3, 2)
        with pytest.raises(RuntimeError, match="randomness error mode"):
            over_tasks(lambda x: x + torch.rand(2))(x)
        with torch.random.fork_rng():
            found = over_tasks(lambda x: x + torch.rand(2), "different")(x)
            assert len(found.unique()) == 6
            assert len(over_tasks(lambda x: x + torch.rand(2), "same")(x).unique()) == 2

    def test_errors_leave_the_level(self):
        def refuse(x):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            over_tasks(refuse)(torch.zeros(2))
        assert not torch._C._are_functorch_transforms_active()
        with pytest.raises(ValueError, match="same size in the mapped dimension"):
            over_tasks(lambda a, b: a + b)(torch.zeros(2), torch.zeros(3))
        with pytest.raises(ValueError, match="needs tensors as results; got int"):
            over_tasks(lambda a: (a, 1))(torch.zeros(2))
