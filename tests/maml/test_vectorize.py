"""Models and losses that vmap cannot batch run task by task, against a plain loop over copies of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate

ALPHA = 0.1


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.layer = kind(3, 5, batch_first=True, **options)
        self.head = nn.Linear(5 * (1 + self.layer.bidirectional), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(3, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for point in x.unbind(1):
            state = self.cell(point, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Features(nn.Module):
    """A layer, then what each test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.then(self.features(x)))


class Item(Features):
    def then(self, z: Tensor) -> Tensor:
        return z * z.sum().item()


class If(Features):
    def then(self, z: Tensor) -> Tensor:
        return 2 * z if z.sum() > 0 else z**2


class Mask(Features):
    def then(self, z: Tensor) -> Tensor:
        out = z.clone()
        out[z > 0] = 3 * z[z > 0]
        return out


class Nonzero(Features):
    def then(self, z: Tensor) -> Tensor:
        return z + z[z.abs() > 0.1].sum()


class Physics(Features):
    """A derivative in the input, as networks that solve differential equations take it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
        return slope.mean((1, 2)).unsqueeze(-1)

    def then(self, z: Tensor) -> Tensor:
        return z


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class OwnFunction(Features):
    def then(self, z: Tensor) -> Tensor:
        return _Cube.apply(z)


class TensorHook(Features):
    def then(self, z: Tensor) -> Tensor:
        if z.requires_grad:
            z.register_hook(lambda g: 2 * g)
        return z


def spectral() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(15, 4)), nn.Linear(4, 1))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 1))
    model[3].register_full_backward_hook(lambda module, into, out: tuple(g if g is None else 2 * g for g in into))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "RNN": (lambda: Recurrent(nn.RNN), "'layer' (RNN)"),
    "GRU": (lambda: Recurrent(nn.GRU), "'layer' (GRU)"),
    "LSTM": (lambda: Recurrent(nn.LSTM), "'layer' (LSTM)"),
    "two layers, both directions": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), "'layer' (LSTM)"),
    ".item()": (Item, "Item itself"),
    "if": (If, "If itself"),
    "assignment by mask": (Mask, "Mask itself"),
    "selection by mask": (Nonzero, "Nonzero itself"),
    "a derivative in the forward": (Physics, "Physics itself"),
    "spectral norm": (spectral, "_SpectralNorm"),
    "an autograd function": (OwnFunction, "OwnFunction itself"),
    "backward hooks": (hooked, "3 (Linear)"),
}


def batch(tasks: int = 3, points: int = 6) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return TaskBatch(*(x for _ in range(2) for x in (draw(tasks, points, 5, 3), draw(tasks, points, 1))))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def adapted(model: nn.Module, x: Tensor, y: Tensor, steps: int = 1) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    for _ in range(steps):
        loss = F.mse_loss(torch.func.functional_call(model, weights, (x,)), y)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        weights = {name: w - ALPHA * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    return weights


def meta_gradient(model: nn.Module, tasks: TaskBatch, steps: int = 1) -> list[Tensor]:
    """The obvious loop; each task's model is restored, since a forward may change its buffers."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    total = [0.0] * len(list(model.parameters()))

    def restore() -> None:
        for name, b in model.named_buffers():
            b.copy_(before[name])

    for x, y, query_x, query_y in zip(*tasks[:4], strict=True):
        weights = adapted(model, x, y, steps)
        restore()
        loss = F.mse_loss(torch.func.functional_call(model, weights, (query_x,)), query_y) / tasks.num_tasks
        restore()
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        total = [a + g for a, g in zip(total, grads, strict=True)]
    return total


def only_warning(caught: list[warnings.WarningMessage]) -> str:
    assert len(caught) == 1, [str(each.message) for each in caught]
    return str(caught[0].message)


@pytest.mark.parametrize("name", MODELS)
def test_what_vmap_cannot_take_runs_in_a_loop(name):
    """The gradient, the gradient after an outer step, adaptation and evaluation; one warning in all of it."""
    model, tasks = made(name), batch()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=1)
        for _ in range(2):
            model.zero_grad()
            learner.backward(tasks)
            expected = meta_gradient(model, tasks)
            for p, g in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
            assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            before = copy.deepcopy(model.state_dict())
        found = learner.adapt(tasks.support_x, tasks.support_y, steps=2)
        for task in range(tasks.num_tasks):
            if name != "spectral norm":  # its power iteration goes on from step to step in a plain loop
                for key, w in adapted(model, tasks.support_x[task], tasks.support_y[task], 2).items():
                    torch.testing.assert_close(found[key][task], w, rtol=1e-10, atol=1e-12)
        assert torch.isfinite(evaluate(learner, _Fixed(tasks), tasks=3).values).all()
    said = only_warning(caught)
    assert MODELS[name][1] in said
    assert "task by task" in said
    assert 'vectorize="loop"' in said


class _Fixed:
    """A sampler of one batch."""

    def __init__(self, tasks: TaskBatch) -> None:
        self.tasks = tasks

    def sample(self, step: int, num_tasks: int) -> TaskBatch:
        return self.tasks.part(0, num_tasks)


@pytest.mark.parametrize("name", MODELS)
def test_an_explicit_loop_does_not_warn(name):
    model, tasks = made(name), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, vectorize="loop").backward(tasks)
    if name != "spectral norm":
        for p, g in zip(model.parameters(), meta_gradient(model, tasks, 2), strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_vmap_alone_refuses(name):
    match = "backward hooks" if name == "backward hooks" else "cannot run under per-task weights"
    with pytest.raises(ValueError, match=match):
        MAML(made(name), F.mse_loss, inner_lr=ALPHA, vectorize="vmap").backward(batch())


def test_a_hook_on_a_tensor_runs():
    model, tasks = TensorHook().double(), batch()
    MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize="loop").backward(tasks)
    for p, g in zip(model.parameters(), meta_gradient(model, tasks), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_a_loss_that_vmap_cannot_take():
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        errors = (predictions - y) ** 2
        return errors[errors < errors.median()].mean()

    tasks = batch()
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 1)).double()
    with pytest.warns(UserWarning, match="loss_fn cannot run on all tasks at once"):
        MAML(model, loss, inner_lr=ALPHA).backward(tasks)
    total = [0.0, 0.0]
    for x, y, query_x, query_y in zip(*tasks[:4], strict=True):
        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(loss(model(x), y), list(weights.values()), create_graph=True)
        moved = {name: w - ALPHA * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        query = loss(torch.func.functional_call(model, moved, (query_x,)), query_y) / 3
        total = [a + g for a, g in zip(total, torch.autograd.grad(query, list(weights.values())), strict=True)]
    for p, g in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.ReLU(), nn.Linear(8, 1)),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.Dropout(0.5), nn.Linear(8, 1)),
    "attention": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Flatten(), nn.Linear(40, 1)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 1),
    ),
    "embedding": lambda: nn.Sequential(_Codes(), nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(60, 1)),
}  # fmt: skip


class _Codes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).long().clamp(-4, 4) + 4


@pytest.mark.parametrize("estimator", ["exact", "first-order", "hessian-free", "cross-fit"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loop_is_vmap(name, estimator):
    """Random draws and all: a task's draws depend on its number only."""
    if (name, estimator) == ("dropout", "hessian-free"):
        return  # refused: finite differences need a model that does not draw
    torch.manual_seed(0)
    model, tasks = NETWORKS[name]().double(), batch(4, 8)
    found = []
    for options in ({"vectorize": "vmap"}, {"vectorize": "loop"}, {"vectorize": "loop", "chunk_size": 3}):
        learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, estimator=estimator, **options)
        torch.manual_seed(5)
        grads, losses = learner.meta_gradient(tasks, workers=2)
        found.append(([*grads.values(), losses], torch.rand(())))
    for other, drawn in found[1:]:
        assert torch.equal(drawn, found[0][1])
        for a, b in zip(found[0][0], other, strict=True):
            # finite differences divide rounding errors by a small step
            rtol, atol = (1e-6, 1e-7) if estimator == "hessian-free" else (1e-9, 1e-10)
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_mistakes_are_the_users_own():
    """An error of the model itself is raised without a warning."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(14, 1)).double()
    for vectorize in ("auto", "loop"):
        with pytest.raises(ValueError, match=r"cannot take inputs of shape \[6, 5, 3\].*in_features=14"):
            MAML(model, F.mse_loss, vectorize=vectorize).backward(batch())


def test_checkpoints_are_refused():
    class Checkpointed(Features):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

        def then(self, z: Tensor) -> Tensor:
            return z

    for vectorize in ("auto", "loop"):
        with pytest.raises(ValueError, match=r"torch\.utils\.checkpoint runs a part of the model"):
            MAML(Checkpointed().double(), F.mse_loss, vectorize=vectorize).backward(batch())


def test_wrong_values():
    with pytest.raises(ValueError, match='vectorize must be "auto", "vmap" or "loop"; got \'fast\''):
        MAML(nn.Linear(1, 1), F.mse_loss, vectorize="fast")
    learner = MAML(nn.Linear(1, 1), F.mse_loss)
    with pytest.raises(ValueError, match="got None"):
        learner.vectorize = None
    learner.vectorize = "loop"
    assert learner.like().vectorize == "loop"
