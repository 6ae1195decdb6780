"""Models and losses that vmap cannot batch run task by task, against a plain loop over copies of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from as_in_a_loop import judged_as_in_a_loop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from metamom import MAML, TaskBatch

ALPHA = 0.1
CHECKPOINT = checkpointing.CheckpointFunction


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


class Slope(Features):
    """A derivative in a weight, without a thought of `torch.no_grad`."""

    def then(self, z: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(z.sum(), self.layer.weight, create_graph=True)
        return z + slope.sum()


class Jacobian(Features):
    def then(self, z: Tensor) -> Tensor:
        return z + torch.autograd.functional.jacobian(lambda z: torch.tanh(z).sum(0), z, create_graph=True).sum()


class Gradient(Features):
    """By `torch.func`, whose transforms nest with vmap; over a normalisation with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def then(self, z: Tensor) -> Tensor:
        return z + torch.func.grad(lambda z: torch.tanh(self.norm(z)).sum())(z)


class List(Features):
    def then(self, z: Tensor) -> Tensor:
        return z * sum(self.layer.weight.flatten().tolist())


class Array(Features):
    def then(self, z: Tensor) -> Tensor:
        return z * float(self.layer.weight.detach().numpy().max())


class Index(Features):
    def then(self, z: Tensor) -> Tensor:
        out = torch.zeros(z.shape[0], 4, dtype=z.dtype)
        out[:, 1] = z[:, 0]
        return out


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
        z.register_hook(lambda g: 2 * g)
        return z


class NodeHook(Features):
    def then(self, z: Tensor) -> Tensor:
        z.grad_fn.register_hook(lambda into, out: tuple(g if g is None else 2 * g for g in into))
        return z


class MultiHook(Features):
    def then(self, z: Tensor) -> Tensor:
        torch.autograd.graph.register_multi_grad_hook([z], lambda gradients: None)
        return z


class Changing(Features):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x[x > 1] = 1.0
        return super().forward(x.mul_(2))

    def then(self, z: Tensor) -> Tensor:
        return z


def spectral(norm: Callable[[nn.Module], nn.Module] = nn.utils.parametrizations.spectral_norm) -> nn.Module:
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(15, 4)), nn.Linear(4, 1))


def hooked_before() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 1))
    model[2].register_full_backward_pre_hook(lambda module, out: tuple(g / 2 for g in out))
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 1))
    model[3].register_full_backward_hook(lambda module, into, out: tuple(g if g is None else 2 * g for g in into))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "RNN": (lambda: Recurrent(nn.RNN), "'layer' (RNN)"),
    "GRU": (lambda: Recurrent(nn.GRU), "'layer' (GRU)"),
    "LSTM": (lambda: Recurrent(nn.LSTM), "'layer' (LSTM)"),
    "two layers, both directions": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), "'layer' (LSTM)"),
    "LSTMCell": (lambda: Cell(nn.LSTMCell), "'cell' (LSTMCell)"),
    ".item()": (Item, "Item itself"),
    ".tolist()": (List, "List itself"),
    ".numpy()": (Array, "Array itself"),
    "if": (If, "If itself"),
    "assignment by mask": (Mask, "Mask itself"),
    "assignment by index": (Index, "Index itself"),
    "selection by mask": (Nonzero, "Nonzero itself"),
    "a derivative in the forward": (Physics, "Physics itself"),
    "a derivative in a weight": (Slope, "Slope itself"),
    "a Jacobian in the forward": (Jacobian, "Jacobian itself"),
    "spectral norm": (spectral, "_SpectralNorm"),
    "old spectral norm": (lambda: spectral(nn.utils.spectral_norm), "'1' (Linear)"),
    "an autograd function": (OwnFunction, "OwnFunction itself"),
    "backward hooks": (hooked, "3 (Linear)"),
    "backward pre-hooks": (hooked_before, "2 (Tanh)"),
    "a hook on a tensor": (TensorHook, "TensorHook itself"),
    "a hook on a node": (NodeHook, "NodeHook itself"),
    "a hook on several tensors": (MultiHook, "MultiHook itself"),
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
            if "spectral norm" not in name:  # its power iteration goes on from step to step in a plain loop
                for key, w in adapted(model, tasks.support_x[task], tasks.support_y[task], 2).items():
                    torch.testing.assert_close(found[key][task], w, rtol=1e-10, atol=1e-12)
        if name != "old spectral norm":  # it leaves a weight with a graph, so it cannot be copied
            judged_as_in_a_loop(learner, tasks, ALPHA, 1e-9)
    said = only_warning(caught)
    assert MODELS[name][1] in said
    assert "task by task" in said
    assert 'vectorize="loop"' in said


@pytest.mark.parametrize("name", MODELS)
def test_an_explicit_loop_does_not_warn(name):
    model, tasks = made(name), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, vectorize="loop").backward(tasks)
    if "spectral norm" not in name:
        for p, g in zip(model.parameters(), meta_gradient(model, tasks, 2), strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_vmap_alone_refuses(name):
    match = "cannot run under per-task weights|backward hooks of modules do not run|registers a hook|the grad_fn"
    with pytest.raises(ValueError, match=match):
        MAML(made(name), F.mse_loss, inner_lr=ALPHA, vectorize="vmap").backward(batch())


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


def assert_gradients(model: nn.Module, expected: list[Tensor]) -> None:
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


class Checkpointed(Features):
    """Two checkpoints, which can be switched off: a plain loop would recompute with the model's own weights."""

    checkpointed = True

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def then(self, z: Tensor) -> Tensor:
        if not self.checkpointed:
            return torch.tanh(self.head.weight * z)
        return checkpoint(lambda z: torch.tanh(self.head.weight * z), z, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_parts_run_once(use_reentrant):
    model, tasks = Checkpointed(use_reentrant).double(), batch()
    with pytest.warns(UserWarning, match="cannot run on all tasks at once .*task by task"):
        MAML(model, F.mse_loss, inner_lr=ALPHA).backward(tasks)
    model.checkpointed = False
    assert_gradients(model, meta_gradient(model, tasks))
    assert checkpointing.CheckpointFunction is CHECKPOINT  # PyTorch's own again
    model.checkpointed, x = True, torch.ones(2, 5, 3, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()


def test_a_checkpointed_loss_runs_once():
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        return checkpoint(F.mse_loss, predictions, y, use_reentrant=False)

    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 1)).double(), batch()
    MAML(model, loss, inner_lr=ALPHA, vectorize="loop").backward(tasks)
    assert_gradients(model, meta_gradient(model, tasks))


class StochasticDepth(nn.Module):
    """As torchvision's: it draws in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.5) if self.training else x


@pytest.mark.parametrize("layer", [nn.RReLU(0.1, 0.9), StochasticDepth()], ids=["RReLU", "StochasticDepth"])
def test_draws_are_those_of_a_loop_and_of_the_task(layer):
    """What is drawn is recorded, and the plain loop multiplies by it. Chunks do not change the draws."""
    factors: list[Tensor] = []

    def record(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        factors.append(torch.where(given[0] == 0, 1.0, out / given[0]).detach())

    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), layer, nn.Linear(4, 1)).double(), batch()
    found = []
    for options in ({"chunk_size": None}, {"chunk_size": 1}, {"chunk_size": 2, "vectorize": "loop"}):
        torch.manual_seed(3)
        learner = MAML(model, F.mse_loss, inner_lr=ALPHA, **options)
        learner.vectorize = "loop"
        found.append(learner.meta_gradient(tasks).grads)
    for grads in found[1:]:
        for name, g in grads.items():
            torch.testing.assert_close(g, found[0][name], rtol=1e-12, atol=1e-14)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, chunk_size=None)
    with pytest.warns(UserWarning, match="cannot run on all tasks at once .*task by task"):
        learner.meta_gradient(tasks)
    model[2].register_forward_hook(record)
    learner.backward(tasks)
    of_support, of_query = factors[-6:-3], factors[-3:]
    assert not torch.equal(of_query[0], of_query[1])
    plain = nn.Sequential(nn.Flatten(), model[1], _Times(), model[3])
    plain[2].factors = [f for pair in zip(of_support, of_query, strict=True) for f in pair]
    assert_gradients(model, meta_gradient(plain, tasks))


def test_a_model_that_is_random_in_training_is_batched_in_evaluation():
    model, tasks = nn.Sequential(nn.Linear(3, 4), StochasticDepth(), nn.Linear(4, 1)).double(), small()
    learner = MAML(model, F.mse_loss)
    with pytest.warns(UserWarning, match="so the model runs task by task"):
        learner.meta_gradient(tasks)
    model.eval()
    learner.meta_gradient(tasks)
    assert learner._vectorization.looped == {("model", True)}


class _Times(nn.Module):
    factors: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.pop(0)


def test_a_model_that_changes_its_input_gets_a_copy():
    model, tasks = Changing().double(), batch()
    kept = [x.clone() for x in tasks[:4]]
    MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize="loop").backward(tasks)
    assert all(torch.equal(a, b) for a, b in zip(kept, tasks[:4], strict=True))
    assert_gradients(model, meta_gradient(model, TaskBatch(*kept)))


@pytest.mark.parametrize("adapt", [None, ["head"]])
def test_a_parameter_that_is_changed_in_place_is_refused_before_it_is_changed(adapt):
    class Shrinking(Features):
        def then(self, z: Tensor) -> Tensor:
            with torch.no_grad():
                self.layer.weight.mul_(0.5)
            return z

    model = Shrinking().double()
    before = model.layer.weight.detach().clone()
    with pytest.raises(ValueError, match="in place"):
        MAML(model, F.mse_loss, adapt=adapt, vectorize="loop").backward(batch())
    assert torch.equal(model.layer.weight, before)


def test_derivatives_by_torch_func_are_right():
    """With every choice; ``chunk_size="auto"`` cannot measure the memory of such a model."""
    model, tasks = Gradient().double(), batch()
    for vectorize in ("auto", "loop"):
        model.zero_grad()
        MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize=vectorize).backward(tasks)
        assert_gradients(model, meta_gradient(model, tasks))


class HookedLoss(nn.Module):
    """A loss with a learned scale, and a part with a backward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.part = nn.Tanh()
        self.part.register_full_backward_hook(lambda module, into, out: (2 * into[0],))

    def forward(self, predictions: Tensor, y: Tensor) -> Tensor:
        return self.scale * (self.part(predictions) - y).square().mean()


def test_hooks_of_a_loss_run_and_the_model_stays_batched():
    model, loss, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 1)).double(), HookedLoss().double(), batch()
    with pytest.raises(ValueError, match=r"backward hooks of modules do not run under vmap.*part \(Tanh\)"):
        MAML(model, loss, inner_lr=ALPHA, vectorize="vmap").backward(tasks)
    learner = MAML(model, loss, inner_lr=ALPHA)
    with pytest.warns(UserWarning, match=r"part \(Tanh\) cannot run .* so the loss runs task by task"):
        learner.backward(tasks)
    assert not learner._vectorization.loops(("model", True))
    both = nn.ModuleDict({"model": model, "loss": loss})
    total = [torch.zeros_like(p) for p in both.parameters()]
    for x, y, query_x, query_y in zip(*tasks[:4], strict=True):
        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(loss(model(x), y), list(weights.values()), create_graph=True)
        moved = {name: w - ALPHA * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        query = loss(torch.func.functional_call(model, moved, (query_x,)), query_y) / 3
        total = [a + g for a, g in zip(total, torch.autograd.grad(query, list(both.parameters())), strict=True)]
    assert_gradients(both, total)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_hook_on_every_module_is_not_ignored():
    calls = []
    handle = every_module.register_module_full_backward_hook(lambda module, into, out: calls.append(module))
    try:
        with pytest.warns(UserWarning, match="every module .*cannot run on all tasks at once"):
            MAML(nn.Linear(3, 1).double(), F.mse_loss).backward(small())
    finally:
        handle.remove()
    assert calls


def small() -> TaskBatch:
    return TaskBatch(*(x for _ in range(2) for x in (torch.ones(2, 4, 3).double(), torch.ones(2, 4, 1).double())))


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_a_loss_must_not_draw(vectorize):
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(predictions + torch.randn_like(predictions), y)

    with pytest.raises(ValueError, match=r"In the model's forward, draw with"):
        MAML(nn.Linear(3, 1).double(), loss, vectorize=vectorize).backward(small())


def test_finite_differences_refuse_draws_in_a_loop():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    for _ in range(2):
        with pytest.raises(ValueError, match="must not draw random numbers"):
            MAML(model, F.mse_loss, estimator="hessian-free", vectorize="loop").backward(small())


def test_results_of_different_shapes_are_refused():
    class Selected(Features):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0, 0] > 0])

        def then(self, z: Tensor) -> Tensor:
            return z

    with pytest.raises(ValueError, match="every task must give results of one shape"):
        MAML(Selected().double(), F.mse_loss, vectorize="loop").predict(
            {name: p.expand(3, *p.shape) for name, p in Selected().double().named_parameters()}, batch().query_x
        )


def test_another_estimator_of_the_same_model_does_not_warn_again():
    tasks = batch()
    learner = MAML(If().double(), F.mse_loss)
    with pytest.warns(UserWarning, match="task by task"):
        learner.backward(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.like(estimator="first-order").backward(tasks)


def test_a_compiled_model_runs_as_if_it_were_not():
    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 1)).double(), batch()
    expected = meta_gradient(model, tasks)
    compiled = torch.compile(model)
    for vectorize in ("vmap", "loop"):
        model.zero_grad()
        MAML(compiled, F.mse_loss, inner_lr=ALPHA, vectorize=vectorize).backward(tasks)
        assert_gradients(model, expected)


@pytest.mark.parametrize("name", ["backward hooks", "a hook on a tensor"])
def test_a_graph_without_its_hooks_is_not_compiled(name):
    with pytest.raises(ValueError, match="run without compiling"):
        MAML(made(name), F.mse_loss, vectorize="loop", compile=True).backward(batch())


def test_a_loop_compiles():
    model, tasks = Index().double(), batch(2, 2)
    MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize="loop", compile=True).backward(tasks)
    assert_gradients(model, meta_gradient(model, tasks))


def test_wrong_values():
    with pytest.raises(ValueError, match='vectorize must be "auto", "vmap" or "loop"; got \'fast\''):
        MAML(nn.Linear(1, 1), F.mse_loss, vectorize="fast")
    learner = MAML(nn.Linear(1, 1), F.mse_loss)
    with pytest.raises(ValueError, match="got None"):
        learner.vectorize = None
    learner.vectorize = "loop"
    assert learner.like().vectorize == "loop"
