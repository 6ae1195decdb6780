"""Tests of the fast paths of `metamom.maml.fast_paths.settled`, by vmap and in turn, against the general path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml import chunk_gradient
from metamom.maml.fast_paths import at_once
from metamom.maml.fast_paths.settled import Computed, FastPath
from metamom.maml.under_vmap.batched import over_tasks
from metamom.maml.under_vmap.functions_by_task import may_call_them


def batch(tasks: int = 4) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def one() -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, 5, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(2, (tasks, 5), generator=generator)

    return TaskBatch(*one(), *one())


class Partly(nn.Module):
    """Uses one of its layers for some tasks only, and another one for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out + self.second(x) if x[0, 0] > 0 else out


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    return model


def _images() -> nn.Module:
    """Calls functions that are replaced."""
    layers = [nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Unflatten(1, (1, 1, 3)), nn.ZeroPad2d(1), *layers, nn.Flatten(), nn.LazyLinear(2))


class Remembers(nn.Linear):
    """Leaves a tensor in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "tied": _tied,
    "images": _images,
    "wide": lambda: nn.Sequential(nn.Linear(3, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 2)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)),
    "remembers": lambda: nn.Sequential(Remembers(3, 4), nn.Linear(4, 2)),
    "partly used": Partly,
}
IN_A_LOOP_ONLY = ("partly used",)
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "first order": {"estimator": "first-order"},
    "two steps": {"inner_steps": 2},
    "momentum": {"inner_steps": 2, "inner_optimizer": "momentum:0.9"},
    "adam": {"inner_steps": 2, "inner_optimizer": "adam"},
    "last layers": {"adapt": lambda name: not name.startswith(("0.", "first"))},
}
WAYS = {"vmap": 0, "loop": 1}
CASES = [(name, way) for name in MODELS for way in WAYS if way == "loop" or name not in IN_A_LOOP_ONLY]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The number of each fast path that was taken, and whether it came to its end."""
    calls: list[tuple[int, bool]] = []

    def watched(number: int, path: FastPath) -> FastPath:
        def compute(*args: Any) -> Computed:
            calls.append((number, False))
            found = path.compute(*args)
            calls[-1] = number, True
            return found

        return path._replace(compute=compute)

    paths = [watched(number, path) for number, path in enumerate(chunk_gradient.FAST_PATHS)]
    monkeypatch.setattr(chunk_gradient, "FAST_PATHS", paths)
    return calls


def found(learner: MAML, workers: int) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(5)
    return learner.meta_gradient(batch(), workers=workers)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    model(batch().query_x[0].float())
    return model.double()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_it_agrees_with_the_general_path(name, way, options, ran):
    """The first call takes the general path, with the same weights, tasks and draws."""
    model = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [vars(module).get("last") for module in model.modules()]
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, vectorize=way, **options)
    expected, losses = found(learner, workers=2)
    assert not ran
    grads, again = found(learner, workers=2)
    assert ran == [(WAYS[way], True)]
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=0)
    for key, gradient in expected.items():
        torch.testing.assert_close(
            grads[key], gradient, rtol=1e-10, atol=1e-14, msg=lambda text, key=key: f"{key} {text}"
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    now = [vars(module).get("last") for module in model.modules()]
    assert all(a is b for a, b in zip(now, attributes, strict=True))


def loop_over_tasks(model: nn.Module, tasks: TaskBatch, lr: float) -> dict[str, Tensor]:
    """The mean meta-gradient after one step, by plain autograd."""
    weights = dict(model.named_parameters())
    total = 0
    for x, y, query_x, query_y in zip(*tasks[:4], strict=True):
        inner = F.cross_entropy(functional_call(model, weights, x), y)
        grads = torch.autograd.grad(inner, [*weights.values()], create_graph=True)
        moved = {key: w - lr * grad for (key, w), grad in zip(weights.items(), grads, strict=True)}
        total = total + F.cross_entropy(functional_call(model, moved, query_x), query_y) / len(tasks.query_x)
    return dict(zip(weights, torch.autograd.grad(total, [*weights.values()]), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mlp", "batch norm", "images", "wide"])
def test_it_follows_the_weights_and_the_tasks(name, way, ran):
    model = built(name)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, vectorize=way)
    found(learner, 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1).add_(0.01)
    other = TaskBatch(*(part.flip(0) if part.dim() == 2 else 2 * part for part in batch()[:4]))
    expected = loop_over_tasks(model, other, 0.1)
    grads, _ = learner.meta_gradient(other)
    assert ran == [(WAYS[way], True)]
    for key, gradient in expected.items():
        torch.testing.assert_close(grads[key][0], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_draws_late_is_computed_by_the_general_path(way, ran):
    """From then on, at once; its draws are taken back."""

    class Late(nn.Linear):
        draws = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + 0.0 * torch.rand(2, dtype=x.dtype) if self.draws else out

    learner = MAML(Late(3, 2).double(), F.cross_entropy, vectorize=way)
    first, _ = found(learner, 1)
    number = WAYS[way]
    for finished in ([(number, True)], [(number, True), (number, False)], [(number, True), (number, False)]):
        learner.model.draws = len(finished) == 2
        grads, _ = found(learner, 1)
        assert ran == finished
        torch.testing.assert_close(grads["weight"], first["weight"], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["input", "weight", "buffer"])
def test_a_write_in_place_is_refused_late_too(what, way, ran):
    class Late(nn.Linear):
        writes = False

        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            if self.writes:
                with torch.no_grad():
                    {"input": x, "weight": self.weight, "buffer": self.scale}[what].add_(1.0)
            return super().forward(x) * self.scale

    learner = MAML(Late().double(), F.cross_entropy, vectorize=way)
    found(learner, 1)
    learner.model.writes = True
    if what == "input" and way == "loop":  # each task has its own copy, as a loop may
        found(learner, 1)
    else:
        with pytest.raises(ValueError, match=r"in place|in-place"):
            found(learner, 1)
    assert torch.equal(learner.model.scale, torch.ones(2, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Doubles cannot run on all tasks at once:UserWarning")
@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("steps", [0, 2])
def test_writes_to_inputs_that_start_late_do_not_reach_the_batch(steps, vectorize):
    """Each of ``steps`` meta-gradients was without any: "auto" goes over to the loop with the inputs as they were."""

    class Doubles(nn.Linear):
        writes = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0) if self.writes else 2.0 * x)

    torch.manual_seed(0)
    learner = MAML(Doubles(3, 2).double(), F.cross_entropy, vectorize=vectorize, chunk_size=4)
    kept = batch()
    before = MAML(Doubles(3, 2).double(), F.cross_entropy)
    before.load_state_dict(learner.state_dict())
    for _ in range(steps):
        learner.meta_gradient(batch())
    learner.model.writes = True
    given = batch()
    if vectorize == "vmap":
        with pytest.raises(ValueError, match="changed in place: its input"):
            learner.meta_gradient(given)
    else:
        grads, losses = learner.meta_gradient(given)
        expected, right = before.meta_gradient(kept)
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(losses, right, rtol=1e-10, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(given[:4], kept[:4], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_an_error_is_explained_and_does_not_last(way, ran):
    learner = MAML(nn.Linear(3, 2).double(), F.cross_entropy, vectorize=way)
    found(learner, 1)
    wrong = batch()._replace(query_x=torch.zeros(4, 5, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="the model cannot take inputs of shape"):
        learner.meta_gradient(wrong)
    found(learner, 1)
    assert ran == [(WAYS[way], False), (WAYS[way], True)]


def test_auto_goes_from_vmap_to_the_loop(ran):
    """A model that vmap cannot take from some step on."""

    class Late(nn.Linear):
        reads = False

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            return out * (1.0 if not self.reads or x.sum().item() else 2.0)

    learner = MAML(Late(3, 2).double(), F.cross_entropy)
    first, _ = found(learner, 1)
    learner.model.reads = True
    with pytest.warns(UserWarning, match="task by task"):
        found(learner, 1)
    grads, _ = found(learner, 1)
    assert ran == [(WAYS["vmap"], False), (WAYS["loop"], True)]
    torch.testing.assert_close(grads["weight"], first["weight"], rtol=1e-10, atol=1e-14)


def test_backward_hooks_are_refused_late_too(ran):
    learner = MAML(nn.Linear(3, 2).double(), nn.CrossEntropyLoss(), vectorize="vmap")
    found(learner, 1)
    learner.loss_fn.register_full_backward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="backward hooks of modules do not run under vmap"):
        found(learner, 1)
    assert ran == [(WAYS["vmap"], False)]


def test_features_are_shared_rather_than_computed_in_each_step(ran):
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    model = nn.Sequential(Counted(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    learner = MAML(model, F.cross_entropy, inner_steps=3, adapt=lambda name: name.startswith("2"))
    found(learner, 1)
    calls.clear()
    found(learner, 1)
    assert len(calls) == 2  # on support and query sets
    assert not ran


def test_a_module_named_like_a_function_is_not_that_function():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.embedding(x)
            return out

    class Function(Own):
        def forward(self, x: Tensor) -> Tensor:
            return F.embedding(x, self.embedding.weight, max_norm=1.0)

    assert not may_call_them(Own(), loop=True)
    assert may_call_them(Function(), loop=True)


def _pooled() -> nn.Module:
    """Two blocks; a channel of the first has a negative scale."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(a, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)
        )
        for a in (1, 3)
    ]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0][1].weight[1] = -0.5
    return model


@pytest.mark.parametrize("options", [{}, {"estimator": "first-order"}, {"inner_steps": 3}], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_images_of_one_task_at_a_time_are_computed_without_vmap(size, options, ran, monkeypatch):
    """They agree with a loop of PyTorch's own functions, as those of several tasks do.

    The first call, by vmap, has the same bits: a run that resumes begins with it.
    """
    entered = []

    def watched(function: Any, randomness: str = "error") -> Any:
        entered.append(function)
        return over_tasks(function, randomness)

    monkeypatch.setattr(at_once, "over_tasks", watched)
    torch.manual_seed(3)
    model, labels = _pooled(), torch.tensor([0, 1, 0, 1]).expand(3, 4)
    tasks = TaskBatch(*[torch.randn(3, 4, 1, 5, 5, dtype=torch.float64), labels] * 2)
    expected, _ = MAML(model, F.cross_entropy, inner_lr=0.1, vectorize="loop", **options).meta_gradient(tasks)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, chunk_size=size, **options)
    first, _ = learner.meta_gradient(tasks)
    entered.clear()
    ran.clear()
    found, _ = learner.meta_gradient(tasks)
    assert all(torch.equal(found[name], gradient) for name, gradient in first.items())
    assert ran == [(0, True)] * (3 // size)
    calls = 1 + options.get("inner_steps", 1)
    assert len(entered) == (3 // size) * (1 if size == 1 else 1 + calls)  # the loss, and the model if it is by vmap
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)
