"""Features that no inner step changes are computed once for each set, with the results of a plain loop."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from as_in_a_loop import Given, judged_as_in_a_loop, state_of
from problems import assert_close, mean_over_workers
from slow_maml import adapt_task, slow_estimate, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations

from metamom import MAML, TaskBatch, evaluate
from metamom.common.trees import flattened
from metamom.compile.tracing import tracing
from metamom.interop.imports import import_torchvision
from metamom.maml.estimators import ESTIMATORS
from metamom.server.aggregate import unflatten

WAYS, STEPS, ALPHA = 3, 4, 0.3
HEAD = ("head.weight", "head.bias")


class Counted(nn.Module):
    """A layer that counts its calls in a list."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return self.layers(x)


class Net(nn.Module):
    """A counted backbone and a head; subclasses use them in other ways."""

    def __init__(self, *layers: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = Counted(nn.Linear(3, 5), *layers, nn.Tanh())
        self.head = nn.Linear(5, WAYS) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def made(kind: Callable[..., nn.Module] = Net, *args: nn.Module, **kwargs: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(*args, **kwargs).double()
        for p in model.parameters():
            nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.5)
    return model


def batch_of(tasks: int = 4, support: int = 8, queries: int = 5, shape: tuple[int, ...] = (3,)) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)
    sets = []
    for points in (support, queries):
        sets += [torch.randn(tasks, points, *shape, generator=generator, dtype=torch.float64)]
        sets += [torch.arange(points).remainder(WAYS).expand(tasks, points)]
    return TaskBatch(*sets)


def anil(model: nn.Module, **options: object) -> MAML:
    options = {"inner_lr": ALPHA, "inner_steps": STEPS, "adapt": ["head"], "chunk_size": None, **options}
    return MAML(model, F.cross_entropy, **options)


def calls_in(model: nn.Module, run: Callable[[], object]) -> int:
    """How often the backbone is called."""
    model.body.calls.clear()
    run()
    return len(model.body.calls)


def agrees(learner: MAML, batch: TaskBatch, workers: int = 1) -> None:
    """The meta-gradients of two calls, of which the first decides whether there is a head, are those of the loop."""
    before = state_of(learner.model)
    for _ in range(2):
        grads, losses = learner.meta_gradient(batch, workers)
        each = [
            slow_meta_gradient(
                copy.deepcopy(learner.model),
                learner.loss_fn,
                part,
                steps=learner.inner_steps,
                inner_lr=ALPHA,
                adapted=learner.adapted,
                learned=learner.step_sizes.learned(),
                first_order=learner.estimator == "first-order",
            )
            for part in batch.split(workers)
        ]
        for i, (expected, _) in enumerate(each):
            assert_close({n: g[i] for n, g in grads.items()}, expected, 1e-10)
        torch.testing.assert_close(losses, torch.cat([found for _, found in each]), rtol=1e-10, atol=1e-10)
    assert state_of(learner.model) == before


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("learn", [False, "tensor"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_backbone_runs_once_for_each_set(frozen, estimator, learn, workers):
    model, batch = made(), batch_of()
    model.body.requires_grad_(not frozen)
    learner = anil(model, estimator=estimator, learn_inner_lr=learn)
    agrees(learner, batch, workers)
    assert calls_in(model, lambda: learner.meta_gradient(batch, workers)) == 2
    assert calls_in(model, lambda: learner.losses(batch)) == 2
    assert calls_in(model, lambda: learner.adapt(batch.support_x, batch.support_y)) == 1
    with torch.no_grad():
        assert calls_in(model, lambda: learner.adapt(batch.support_x, batch.support_y)) == 1
    assert calls_in(model, lambda: [*learner.trajectory(batch.support_x, batch.support_y, steps=7)]) == 1


def test_the_first_meta_gradient_runs_it_once_too():
    model, batch = made(), batch_of()
    assert calls_in(model, lambda: anil(model).meta_gradient(batch)) == 2


def test_one_inner_step_runs_as_ever():
    model, batch = made(), batch_of()
    learner = anil(model, inner_steps=1)
    agrees(learner, batch)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == 2
    assert not learner._run.heads._decided


@pytest.mark.parametrize("fresh", ["same", "fresh"])
@pytest.mark.parametrize("estimator", ["exact", "independent", "cross-fit", "richardson"])
def test_each_inner_batch_has_features_of_its_own(estimator, fresh):
    """Batch statistics of a part are not those of the set."""
    model = made(Net, nn.BatchNorm1d(5, track_running_stats=False))
    learner = anil(model, estimator=estimator, inner_batches=fresh, inner_steps=2, inner_lr=0.05)
    batch = batch_of(support=24)
    for _ in range(2):
        grads, losses = learner.meta_gradient(batch, 2)
        expected, expected_losses = slow_estimate(
            copy.deepcopy(model), F.cross_entropy, batch, estimator, steps=2, fresh=fresh == "fresh", adapted=HEAD,
            inner_lr=0.05,
        )  # fmt: skip
        assert_close(mean_over_workers(grads), expected, 1e-10)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-10)
    sets = {"exact": 1, "independent": 2, "cross-fit": 2, "richardson": 2}[estimator]
    terms = len(ESTIMATORS[estimator].terms)
    steps = 2 if fresh == "fresh" else 1
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == sets * steps + terms


def test_differences_of_gradients_use_no_features():
    model, batch = made(), batch_of(support=12)
    learner = anil(model, estimator="hessian-free", inner_lr=0.05)
    expected, _ = slow_estimate(
        copy.deepcopy(model), F.cross_entropy, batch, "hessian-free", steps=STEPS, inner_lr=0.05, adapted=HEAD
    )
    for _ in range(2):
        assert_close(mean_over_workers(learner.meta_gradient(batch)[0]), expected, 1e-6)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) > 2 * STEPS


@pytest.mark.parametrize("norm", ["batch", "frozen", "support"])
def test_an_evaluation_runs_it_once_for_each_set(norm):
    model = made(Net, nn.BatchNorm1d(5))
    model.body.layers[1].running_var.fill_(2.0)
    model.head = nn.Sequential(nn.Linear(5, WAYS), nn.BatchNorm1d(WAYS)).double()
    learner, batch = anil(model, norm=norm), batch_of()
    steps = (0, 1, 2, 5)
    fewer = evaluate(learner, Given(batch), tasks=4, steps=steps)
    whole = anil(model, norm=norm)
    whole._run.heads._unsteady = True
    every_time = evaluate(whole, Given(batch), tasks=4, steps=steps)
    assert torch.equal(fewer.values, every_time.values)
    few = 1 + (2 if norm == "support" else 1)  # the statistics of the support set are taken again
    assert calls_in(model, lambda: evaluate(learner, Given(batch), tasks=4, steps=steps)) == few
    all_of_them = 5 + 4 * (2 if norm == "support" else 1)
    assert calls_in(model, lambda: evaluate(whole, Given(batch), tasks=4, steps=steps)) == all_of_them


def test_an_evaluation_is_that_of_a_loop():
    learner = anil(made(), adapt=None)
    judged_as_in_a_loop(learner, batch_of(), ALPHA, 1e-10)
    model, batch = made(), batch_of()
    found = evaluate(anil(model), Given(batch), tasks=4, steps=(0, 1, 2, 6))
    for row, steps in enumerate(found.steps):
        for t, (x, y, query_x, query_y) in enumerate(zip(*batch[:4], strict=True)):
            own = adapt_task(
                model, F.cross_entropy, weights_of(model), x, y, steps=steps, inner_lr=lambda name: ALPHA, adapted=HEAD
            )
            right = torch.func.functional_call(model, own, (query_x,)).argmax(1) == query_y
            assert found.values[row, t] == right.double().mean()


# ---- heads


class Nested(Net):
    """The smallest module with the adapted parameters is inside the head."""

    def __init__(self) -> None:
        super().__init__(head=nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, WAYS)), nn.LogSoftmax(-1)))


HEADS = {
    "two layers": (lambda: Net(head=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, WAYS))), ["head"]),
    "its last layer": (lambda: Net(head=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, WAYS))), ["head.2"]),
    "inside a module": (Nested, ["head.1"]),
    "a bias": (Net, ["head.bias"]),
    "weight norm": (lambda: Net(head=parametrizations.weight_norm(nn.Linear(5, WAYS))), ["head"]),
    "nn.Sequential": (lambda: nn.Sequential(Counted(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, WAYS)), ["1"]),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
def test_heads(kind):
    make, adapt = HEADS[kind]
    model, batch = made(make), batch_of()
    agrees(anil(model, adapt=adapt), batch, 2)
    counted = next(module for module in model.modules() if isinstance(module, Counted))
    counted.calls.clear()
    anil(model, adapt=adapt).meta_gradient(batch)
    assert len(counted.calls) == 2


# ---- models without a separate head


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return self.head(z) + self.head(2 * z)


class TwiceInARow(Net):
    def __init__(self) -> None:
        super().__init__(head=nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.head(self.body(x))))


class Scaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) / 2


class Doubled(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.body(x))
        out *= 2
        return out


class Normed(Net):
    """Reads the head's weight for the features, without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * self.head.weight.detach().norm())


class Regularised(Net):
    """The features depend on the head's weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + self.head.weight.mean(0))


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.head.weight, self.head.bias)


class ScaledLinear(nn.Linear):
    def forward(self, z: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(z)


class Keyword(Net):
    def __init__(self) -> None:
        super().__init__(head=ScaledLinear(5, WAYS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x), scale=2.0)


class InplaceLinear(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.add_(1))


class Inplace(Net):
    """The head writes to the features."""

    def __init__(self) -> None:
        super().__init__(head=InplaceLinear(5, WAYS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(2 * self.body(x))


class LeavesTensors(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.body(x)
        return self.head(self.features)


class Shifted(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.number = 0

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * self.number


class Passes(Net):
    """Gives the head something besides its input."""

    def __init__(self) -> None:
        super().__init__(head=Shifted(5, WAYS))

    def forward(self, x: Tensor) -> Tensor:
        self.head.number = len(x)
        return self.head(self.body(x))


class Reports(Net):
    """Counts its calls in a number, which another model might use."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        return super().forward(x)


class ReadsValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return self.head(z) if z.sum() > 0 else self.head(-z)


class Gradient(Net):
    """The output is a derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: self.head(z).square().sum())(self.body(x))[:, :WAYS]


class Vmapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.head)(self.body(x))


class WithoutGraph(Net):
    """Adds a part without a gradient; the head runs in both."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        with torch.no_grad():
            shift = self.head(z).mean()
        return self.head(z) + shift


class Guarded(Net):
    """Its head runs under a dtype of its own."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
            return self.head(z)


def hooked(where: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Net()
        part = model.get_submodule(where)
        part.register_forward_hook(lambda module, args, out: 2 * out)
        return model

    return make


REFUSED = {
    **{
        kind.__name__: kind
        for kind in (
            Twice, TwiceInARow, Scaled, Doubled, Normed, Regularised, Functional, Keyword, Inplace, LeavesTensors,
            Passes, Reports, ReadsValues, Gradient, Vmapped, WithoutGraph, Guarded,
        )
    },
    "a hook on the head": hooked("head"),
    "a hook on the backbone": hooked("body"),
    "a hook on the model": hooked(""),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:the model cannot run on all tasks at once", "ignore:.*task by task")
def test_other_models_run_as_a_whole(kind):
    model, batch = made(REFUSED[kind]), batch_of()
    learner = anil(model)
    agrees(learner, batch, 2)
    agrees(learner, batch)
    assert not any(head for _, head in learner._run.heads._decided.values())


def test_a_tied_weight():
    """The weight that the head shares with the backbone is adapted in both."""
    model = made(lambda: Net(nn.Linear(5, 5), head=nn.Linear(5, 5)))
    model.body.layers[1].weight = model.head.weight
    learner = anil(model, adapt=["body.layers.1.weight", "head.bias"])
    agrees(learner, batch_of())
    assert not any(head for _, head in learner._run.heads._decided.values())


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(x, weight):
        return x * weight.detach().norm()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].detach().norm(), None

    generate_vmap_rule = True


class OwnFunction(Net):
    """Reads the head's weight where PyTorch's functions cannot see it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Custom.apply(self.body(x), self.head.weight))


def test_a_weight_read_by_an_autograd_function():
    learner = anil(made(OwnFunction))
    agrees(learner, batch_of())
    assert not any(head for _, head in learner._run.heads._decided.values())


def test_a_model_that_draws():
    """The draws of each call stay those of a run of the whole model."""
    model, batch = made(Net, nn.Dropout(0.5)), batch_of()
    learner, whole = anil(model), anil(model)
    whole._run.heads._unsteady = True
    for _ in range(2):
        found = []
        for each in (learner, whole):
            torch.manual_seed(3)
            found.append(each.meta_gradient(batch)[0])
        assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1
    model.eval()
    agrees(learner, batch)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == 2


@pytest.mark.filterwarnings("ignore:the model draws from Python")
def test_a_model_that_draws_from_another_generator():
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) * random.choice([1.0, 2.0]))

    model, batch = made(Random), batch_of()
    learner = anil(model)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1


def test_a_global_hook_sees_every_call():
    model, batch = made(), batch_of()
    learner, seen = anil(model), []
    agrees(learner, batch)
    hook = every_module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1
    finally:
        hook.remove()
    assert seen.count(model.body) == STEPS + 1


# ---- models that change


class Switched(Net):
    """A flag decides whether its output is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.doubles = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.body(x))
        return 2 * out if self.doubles else out


def test_a_model_that_changes():
    model, batch = made(Switched), batch_of()
    learner = anil(model)
    for doubles in (False, True, False):
        model.doubles = doubles
        agrees(learner, batch)
        assert calls_in(model, lambda: learner.meta_gradient(batch)) == (STEPS + 1 if doubles else 2)
    hook = model.head.register_forward_hook(lambda module, args, out: 3 * out)
    agrees(learner, batch)
    hook.remove()
    model.head = nn.Linear(5, WAYS).double()
    agrees(learner, batch)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == 2
    model.body.layers.append(nn.Tanh())
    agrees(learner, batch)
    model.body.layers.append(nn.Dropout(0.5))
    learner.meta_gradient(batch)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1
    model.eval()
    agrees(learner, batch)
    model.head.forward = MethodType(lambda self, z: 2 * F.linear(z, self.weight), model.head)
    agrees(learner, batch)
    assert "forward" in vars(model.head)


def test_a_model_that_looks_at_the_size_of_a_set():
    class Sized(Net):
        def forward(self, x: Tensor) -> Tensor:
            z = self.body(x)
            return self.head(z if len(x) < 10 else z + self.head.weight.mean(0))

    model = made(Sized)
    learner = anil(model)
    for support in (6, 12, 6):
        batch = batch_of(support=support)
        agrees(learner, batch)
        assert calls_in(model, lambda: learner.meta_gradient(batch)) == (2 if support == 6 else STEPS + 1)  # noqa: B023


def test_weights_that_change_during_a_trajectory():
    model, batch = made(), batch_of()
    steps = anil(model).trajectory(batch.support_x, batch.support_y, steps=4)
    first = [next(steps) for _ in range(3)][-1]
    with torch.no_grad():
        model.body.layers[0].weight *= 2
    start = copy.deepcopy(model)
    found = next(steps)
    for t in range(batch.num_tasks):
        weights = weights_of(start) | {name: u[t] for name, u in first.items()}
        own = adapt_task(
            start, F.cross_entropy, {n: w.detach().requires_grad_() for n, w in weights.items()},
            batch.support_x[t], batch.support_y[t], steps=1, inner_lr=lambda name: ALPHA, adapted=HEAD,
        )  # fmt: skip
        for name, u in found.items():
            torch.testing.assert_close(u[t], own[name].detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3])
def test_errors_leave_the_model_as_it_was(error, call):
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(1)
            if len(seen) == call:
                raise error("stop")
            return super().forward(x)

    seen = [1] * 10
    model, batch = made(lambda: Net(head=Failing(5, WAYS))), batch_of()
    learner, before = anil(model), state_of(model)
    agrees(learner, batch)
    for fresh in (learner, anil(model)):
        seen.clear()
        with pytest.raises(error, match="stop"):
            fresh.meta_gradient(batch)
        seen += [1] * 10
        assert state_of(model) == before
        agrees(fresh, batch)


def test_threads_that_share_a_model():
    model, batch = made(), batch_of()
    learner = anil(model)
    expected = {name: u.detach() for name, u in learner.adapt(batch.support_x, batch.support_y).items()}
    wrong = []

    def work() -> None:
        for _ in range(10):
            for name, u in learner.adapt(batch.support_x, batch.support_y).items():
                if not torch.equal(u.detach(), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in vars(model.head)


def test_autocast():
    """The head gets what it would get in a run of the whole model."""
    model, batch = made().float(), batch_of().to(dtype=torch.float32)
    learner, whole = (anil(model, autocast=torch.bfloat16) for _ in range(2))
    whole._run.heads._unsteady = True
    for _ in range(2):
        found, expected = learner.meta_gradient(batch)[0], whole.meta_gradient(batch)[0]
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=0.02, atol=0.02)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == 2


def test_a_graph_to_compile():
    model, batch = made(), batch_of()
    learner = anil(model)
    learner.meta_gradient(batch.part(0, 1))  # as before compiling
    weights = {name: p.detach() for name, p in learner.meta_parameters().items()}

    form, fields = flattened((*batch[:4], None, None))

    def of(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(weights, tensors, strict=False))
        return learner._gradients.eager(given, {}, 1, 1 / 4, form, *tensors[-4:])

    with tracing():
        graph = make_fx(of)(*weights.values(), *fields)
    assert sum(node.target is torch.ops.aten.tanh.default for node in graph.graph.nodes) == 2
    losses, _, flat = graph(*weights.values(), *fields)
    expected, expected_losses = slow_meta_gradient(
        copy.deepcopy(model), F.cross_entropy, batch, steps=STEPS, inner_lr=ALPHA, adapted=HEAD
    )
    assert_close({n: g[0] for n, g in unflatten(flat, weights).items()}, expected, 1e-10)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-10)


# ---- a pretrained network


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
def test_a_resnet_with_an_adapted_head():
    resnet18 = import_torchvision().models.resnet18
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18(num_classes=WAYS).double().eval()
    model.requires_grad_(False).fc.requires_grad_(True)
    calls, conv = [], model.conv1.forward
    model.conv1.forward = lambda x: (calls.append(1), conv(x))[1]
    batch = batch_of(tasks=2, support=WAYS, queries=WAYS, shape=(3, 32, 32))
    learner = anil(model, adapt=["fc"])
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads, losses = learner.meta_gradient(batch)
    assert len(calls) == 2
    expected, expected_losses = slow_meta_gradient(
        model, F.cross_entropy, batch, steps=STEPS, inner_lr=ALPHA, adapted=learner.adapted
    )
    assert_close(mean_over_workers(grads), expected, 1e-10)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
