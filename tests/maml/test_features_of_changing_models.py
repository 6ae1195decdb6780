"""Features computed once, of models that change, fail, are shared by threads or compiled."""

from __future__ import annotations

import copy
import threading
from types import MethodType

import pytest
import torch
from as_in_a_loop import state_of
from backbone_and_head import ALPHA, HEAD, STEPS, Net, agrees, anil, batch_of, calls_in
from problems import WAYS, assert_close, randomised
from slow_maml import adapt_task, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from metamom.common.trees import flattened
from metamom.compile.tracing import tracing
from metamom.server.aggregate import unflatten


class Switched(Net):
    """A flag decides whether its output is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.doubles = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.body(x))
        return 2 * out if self.doubles else out


def test_a_model_that_changes():
    model, batch = randomised(Switched()), batch_of()
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

    model = randomised(Sized())
    learner = anil(model)
    for support in (6, 12, 6):
        batch = batch_of(support=support)
        agrees(learner, batch)
        assert calls_in(model, lambda: learner.meta_gradient(batch)) == (2 if support == 6 else STEPS + 1)  # noqa: B023


def test_weights_that_change_during_a_trajectory():
    model, batch = randomised(Net()), batch_of()
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
    model, batch = randomised(Net(head=Failing(5, WAYS))), batch_of()
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
    model, batch = randomised(Net()), batch_of()
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
    model, batch = randomised(Net()).float(), batch_of().to(dtype=torch.float32)
    learner, whole = (anil(model, autocast=torch.bfloat16) for _ in range(2))
    whole._run.heads._unsteady = True
    for _ in range(2):
        found, expected = learner.meta_gradient(batch)[0], whole.meta_gradient(batch)[0]
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=0.02, atol=0.02)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == 2


def test_a_graph_to_compile():
    model, batch = randomised(Net()), batch_of()
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
