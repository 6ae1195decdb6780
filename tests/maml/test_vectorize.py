"""Models and losses that vmap cannot batch run task by task, against a plain loop over copies of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from as_in_a_loop import judged_as_in_a_loop
from problems import regression_batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from unbatchable_models import (
    ALPHA,
    MODELS,
    Gradient,
    If,
    Index,
    adapted,
    assert_gradients,
    made,
    meta_gradient,
    sequences,
)

from metamom import MAML


@pytest.mark.parametrize("name", MODELS)
def test_what_vmap_cannot_take_runs_in_a_loop(name):
    """The gradient, the gradient after an outer step, adaptation and evaluation; one warning in all of it."""
    model, tasks = made(name), sequences()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=1)
        for _ in range(2):
            model.zero_grad()
            learner.backward(tasks)
            assert_gradients(model, meta_gradient(model, tasks))
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
    assert len(caught) == 1, [str(each.message) for each in caught]
    said = str(caught[0].message)
    assert caught[0].filename == __file__  # the caller's line
    assert MODELS[name][1] in said
    assert "task by task" in said
    assert 'vectorize="loop"' in said


@pytest.mark.parametrize("name", MODELS)
def test_an_explicit_loop_does_not_warn(name):
    model, tasks = made(name), sequences()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, vectorize="loop").backward(tasks)
    if "spectral norm" not in name:
        assert_gradients(model, meta_gradient(model, tasks, 2))


@pytest.mark.parametrize("name", MODELS)
def test_vmap_alone_refuses(name):
    match = "cannot run under per-task weights|backward hooks of modules do not run|registers a hook|the grad_fn"
    with pytest.raises(ValueError, match=match):
        MAML(made(name), F.mse_loss, inner_lr=ALPHA, vectorize="vmap").backward(sequences())


def test_another_estimator_of_the_same_model_does_not_warn_again():
    tasks = sequences()
    learner = MAML(If().double(), F.mse_loss)
    with pytest.warns(UserWarning, match="task by task"):
        learner.backward(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.like(estimator="first-order").backward(tasks)


def test_a_loss_that_vmap_cannot_take():
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        errors = (predictions - y) ** 2
        return errors[errors < errors.median()].mean()

    tasks = sequences()
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 1)).double()
    with pytest.warns(UserWarning, match="loss_fn cannot run on all tasks at once"):
        MAML(model, loss, inner_lr=ALPHA).backward(tasks)
    assert_gradients(model, meta_gradient(model, tasks, loss_fn=loss))


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
    model, loss, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 1)).double(), HookedLoss().double(), sequences()
    with pytest.raises(ValueError, match=r"backward hooks of modules do not run under vmap.*part \(Tanh\)"):
        MAML(model, loss, inner_lr=ALPHA, vectorize="vmap").backward(tasks)
    learner = MAML(model, loss, inner_lr=ALPHA)
    with pytest.warns(UserWarning, match=r"part \(Tanh\) cannot run .* so the loss runs task by task"):
        learner.backward(tasks)
    assert not learner._vectorization.loops(("model", True))
    both = nn.ModuleDict({"model": model, "loss": loss})
    assert_gradients(both, meta_gradient(model, tasks, loss_fn=loss, leaves=both.parameters()))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_hook_on_every_module_is_not_ignored():
    calls = []
    handle = every_module.register_module_full_backward_hook(lambda module, into, out: calls.append(module))
    try:
        with pytest.warns(UserWarning, match="every module .*cannot run on all tasks at once"):
            MAML(nn.Linear(3, 1).double(), F.mse_loss).backward(regression_batch(tasks=2, dim=3))
    finally:
        handle.remove()
    assert calls


def test_derivatives_by_torch_func_are_right():
    """With every choice; ``chunk_size="auto"`` cannot measure the memory of such a model."""
    model, tasks = Gradient().double(), sequences()
    for vectorize in ("auto", "loop"):
        model.zero_grad()
        MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize=vectorize).backward(tasks)
        assert_gradients(model, meta_gradient(model, tasks))


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
    model, tasks = NETWORKS[name]().double(), sequences(4, 8)
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
            MAML(model, F.mse_loss, vectorize=vectorize).backward(sequences())


def test_a_compiled_model_runs_as_if_it_were_not():
    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 1)).double(), sequences()
    expected = meta_gradient(model, tasks)
    compiled = torch.compile(model)
    for vectorize in ("vmap", "loop"):
        model.zero_grad()
        MAML(compiled, F.mse_loss, inner_lr=ALPHA, vectorize=vectorize).backward(tasks)
        assert_gradients(model, expected)


@pytest.mark.parametrize("name", ["backward hooks", "a hook on a tensor"])
def test_a_graph_without_its_hooks_is_not_compiled(name):
    with pytest.raises(ValueError, match="run without compiling"):
        MAML(made(name), F.mse_loss, vectorize="loop", compile=True).backward(sequences())


@pytest.mark.parametrize("compiled", ["as traced", pytest.param("by TorchInductor", marks=pytest.mark.slow)])
def test_a_loop_compiles(compiled, request):
    if compiled == "as traced":
        request.getfixturevalue("traced")
    model, tasks = Index().double(), sequences(2, 2)
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


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
def test_forward_hooks_that_record_get_tensors_that_can_be_used(late):
    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 1)).double(), sequences()
    expected = meta_gradient(model, tasks)
    learner, kept = MAML(model, F.mse_loss, inner_lr=ALPHA), []

    def keep(module: nn.Module, args: object, out: torch.Tensor) -> None:
        kept.append((module, out.detach()))

    if late:
        for _ in range(3):
            learner.meta_gradient(tasks)
    model[2].register_forward_hook(keep)
    with pytest.warns(UserWarning, match=r"a forward hook of 2 \(Tanh\) cannot run on all tasks at once"):
        learner.backward(tasks)
    assert_gradients(model, expected)
    learner.meta_gradient(tasks)  # without another warning
    tanh = [out for _, out in kept]
    assert len(tanh) >= 2 * 2 * tasks.num_tasks
    assert all(bool((out.abs() <= 1).all()) and len(out) == tasks.query_x.shape[1] for out in tanh)
    copy.deepcopy(tanh)


def test_forward_hooks_that_return_something_run_on_all_tasks_at_once():
    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 1)).double(), sequences()
    model[2].register_forward_hook(lambda module, args, out: 2 * out)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA)
    for _ in range(3):
        model.zero_grad()
        learner.backward(tasks)
        assert_gradients(model, meta_gradient(model, tasks))
    assert not learner._vectorization.looped
