"""Other people's models against a loop over tasks: the gradient, a second step, and the model afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from model_zoo import (
    FIRST_ORDER,
    FIRST_ORDER_TORCHVISION,
    LEARN2LEARN,
    REFUSED,
    SMALL_TORCHVISION,
    TORCHVISION,
    ZOO,
    Of,
    Problem,
    images,
    problem,
)  # fmt: skip
from problems import assert_close
from slow_maml import adapt_by_copies, called_with, meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_modules import module_db

from metamom import MAML, CompositeMomentum, TaskBatch
from metamom.estimators import Estimator

INNER_LR = 0.05
SMALL = 0.001  # for the inputs of PyTorch's own tests, which are up to 9, and for deep networks
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.* is deprecated:FutureWarning",
    "ignore:There is a performance drop because we have not yet implemented:UserWarning",  # vmap goes through a loop
    "ignore:Lazy modules are a new feature:UserWarning",
    "ignore:enable_nested_tensor is True:UserWarning",
)


def state_of(model: nn.Module) -> list[tuple[str, object]]:
    """Every tensor where it is registered, as the object that it is, and every mode."""
    return [
        *((name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)),
        *((name, type(p)) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)),
        *((name, module.training) for name, module in model.named_modules()),
    ]


def check(
    case: Problem, steps: int = 1, estimator: Estimator = "exact", inner_lr: float = INNER_LR, tolerance: float = 1e-9
) -> None:
    """Two meta-steps, and an adaptation, are those of a loop, and leave the model as it was."""
    model, loss_fn, batch = case
    before, buffers = state_of(model), {name: b.clone() for name, b in model.named_buffers()}
    learner = MAML(model, loss_fn, inner_lr=inner_lr, inner_steps=steps, estimator=estimator)
    first_order = estimator == "first-order"
    params = [p for p in learner.parameters() if p.requires_grad]
    optimizer = CompositeMomentum(params, lr=inner_lr, beta=1.0)
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            expected = meta_gradient_by_copies(
                model, loss_fn, batch, steps=steps, inner_lr=inner_lr, first_order=first_order
            )
        optimizer.zero_grad()
        learner.backward(batch)
        assert_close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected, tolerance)
        optimizer.step()
    with sdpa_kernel(SDPBackend.MATH):
        weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            adapted = learner.adapt(batch.support_x, batch.support_y)
            predictions = learner.predict(adapted, batch.query_x)
        for t in range(batch.num_tasks):
            own = adapt_by_copies(
                model,
                loss_fn,
                weights,
                batch.support_x[t],
                batch.support_y[t],
                steps=steps,
                inner_lr=inner_lr,
                first_order=first_order,
            )
            torch.testing.assert_close(
                predictions[t], called_with(model, own, batch.query_x[t]).detach(), rtol=tolerance, atol=tolerance
            )
    assert state_of(model) == before
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("name", ZOO)
def test_a_model_trains_as_in_a_loop(name):
    check(ZOO[name]())


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_model_without_second_derivatives_trains_by_first_order(name):
    check(FIRST_ORDER[name](), estimator="first-order")


@pytest.mark.parametrize("name", [n for i, n in enumerate(ZOO) if i % 4 == 0])
def test_a_model_trains_as_in_a_loop_over_two_inner_steps(name):
    check(ZOO[name](), steps=2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_right_is_refused(name):
    make, said = REFUSED[name]
    model, loss_fn, batch = make()
    before = state_of(model)
    with pytest.raises((ValueError, TypeError), match=said):
        MAML(model, loss_fn, inner_lr=INNER_LR).backward(batch)
    assert state_of(model) == before


def test_the_zoo_is_large():
    assert len(ZOO) >= 40


def test_old_weight_norm_is_as_the_new_one():
    """Its hook leaves the weight in an attribute, which a copy of the model cannot have."""
    new = ZOO["weight norm"]()
    old = problem(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.utils.weight_norm(nn.Linear(6, 6)),
                                        nn.Linear(6, 1)), images(4), 0)  # fmt: skip
    names = {"2.weight_g": "2.parametrizations.weight.original0", "2.weight_v": "2.parametrizations.weight.original1"}
    with torch.no_grad():
        for name, p in old.model.named_parameters():
            p.copy_(new.model.get_parameter(names.get(name, name)))
    left = old.model[2].weight
    learner = MAML(old.model, F.mse_loss, inner_lr=INNER_LR)
    for _ in range(2):
        found = learner.meta_gradient(old.batch).grads
        expected = MAML(new.model, F.mse_loss, inner_lr=INNER_LR).meta_gradient(old.batch).grads
        assert_close(found, {name: expected[names.get(name, name)] for name in found})
        assert old.model[2].weight is left


def test_what_a_model_keeps_of_a_call_is_taken_back():
    def run(self: Of, x: Tensor) -> Tensor:
        self.seen = self.first(x)
        return self.last(self.seen)

    model, loss_fn, batch = problem(lambda: Of(run, first=nn.Linear(4, 6), last=nn.Linear(6, 1)), images(4), 0)
    learner = MAML(model, loss_fn, inner_lr=INNER_LR)
    for _ in range(2):
        learner.meta_gradient(batch)
        assert not hasattr(model, "seen")
    copy.deepcopy(model)
    model(batch.query_x[0])
    kept = model.seen
    learner.meta_gradient(batch)
    assert model.seen is kept


# ---- every layer that PyTorch's own tests know, with one tensor in and one out


class Around(nn.Module):
    """Something to adapt on both sides of a layer, so that layers without parameters are seen too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.1)), nn.Parameter(torch.tensor(0.2))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x * self.scale if x.is_floating_point() else x)
        return (out * self.scale + self.shift) / 10


def layers() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Layers as PyTorch's tests make them, one after the other: what it is, itself, an input and its output."""
    for info in module_db:
        for number, given in enumerate(
            info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=False)
        ):
            made, called = given.constructor_input, given.forward_input
            if called is None or len(called.args) != 1 or called.kwargs or not isinstance(called.args[0], Tensor):
                continue
            torch.manual_seed(0)
            x = called.args[0].detach()
            layer = info.module_cls(*made.args, **made.kwargs).double().eval()
            out = layer(x)
            batched = isinstance(out, Tensor) and min(x.dim(), out.dim()) > 1 and len(out) == len(x) > 0
            if batched and out.is_floating_point():
                yield f"{info.module_cls.__name__} {number}", layer, x, out


def tried(layer: nn.Module, x: Tensor, out: Tensor) -> str | None:
    """``""`` where it trains as in a loop; what it is refused with; ``None`` where the loop itself ends in NaN."""
    generator = torch.Generator().manual_seed(2)

    def points() -> Tensor:
        each = [x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        if not x.is_floating_point():
            each = [x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape) for _ in range(2)]
        return torch.stack(each)

    def targets() -> Tensor:
        return torch.randn(2, *out.shape, generator=generator, dtype=torch.float64)

    case = Problem(Around(layer).double(), F.mse_loss, TaskBatch(points(), targets(), points(), targets()))
    with sdpa_kernel(SDPBackend.MATH):
        grads = meta_gradient_by_copies(*case, inner_lr=SMALL)
    if not all(bool(g.isfinite().all()) for g in grads.values()):  # such as a root of negative means
        return None
    try:
        check(case, inner_lr=SMALL)
    except ValueError as error:
        return str(error)
    return ""


def sweep() -> tuple[set[str], dict[str, str]]:
    """The kinds of layers that train as in a loop, and those that are refused with a reason."""
    done: set[str] = set()
    refused: dict[str, str] = {}
    for name, layer, x, out in layers():
        kind = name.split()[0]
        said = tried(layer, x, out)
        if said:
            refused[kind] = said
        elif said == "":
            done.add(kind)
    return done, refused


def test_every_layer_of_pytorch_trains_as_in_a_loop():
    done, refused = sweep()
    assert len(done) >= 60, sorted(done)
    assert all("running statistics" in said for said in refused.values()), refused


# ---- libraries of models


@pytest.mark.parametrize("name", LEARN2LEARN)
def test_models_of_learn2learn_train_as_in_a_loop(name):
    check(LEARN2LEARN[name]())


@pytest.mark.parametrize(
    "name", [name if name in SMALL_TORCHVISION else pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION]
)
def test_models_of_torchvision_train_as_in_a_loop(name):
    estimator: Estimator = "first-order" if name in FIRST_ORDER_TORCHVISION else "exact"
    check(TORCHVISION[name](), estimator=estimator, inner_lr=SMALL, tolerance=1e-7)  # they are deep
