"""Models in which the adapted parameters are not a separate head run as a whole, in every inner step."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from backbone_and_head import STEPS, Net, agrees, anil, batch_of, calls_in
from problems import WAYS, randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module


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
    model, batch = randomised(REFUSED[kind]()), batch_of()
    learner = anil(model)
    agrees(learner, batch, 2)
    agrees(learner, batch)
    assert not any(head for _, head in learner._run.heads._decided.values())


def test_a_tied_weight():
    """The weight that the head shares with the backbone is adapted in both."""
    model = randomised(Net(nn.Linear(5, 5), head=nn.Linear(5, 5)))
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
    learner = anil(randomised(OwnFunction()))
    agrees(learner, batch_of())
    assert not any(head for _, head in learner._run.heads._decided.values())


def test_a_model_that_draws():
    """The draws of each call stay those of a run of the whole model."""
    model, batch = randomised(Net(nn.Dropout(0.5))), batch_of()
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

    model, batch = randomised(Random()), batch_of()
    learner = anil(model)
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1
    assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1


def test_a_global_hook_sees_every_call():
    model, batch = randomised(Net()), batch_of()
    learner, seen = anil(model), []
    agrees(learner, batch)
    hook = every_module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        assert calls_in(model, lambda: learner.meta_gradient(batch)) == STEPS + 1
    finally:
        hook.remove()
    assert seen.count(model.body) == STEPS + 1
