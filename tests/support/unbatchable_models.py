"""Models that vmap cannot batch, and the plain loop over tasks that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from problems import regression_batch
from slow_maml import LossFn, Params, adapt_task
from small_models import recurrent
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import TaskBatch

ALPHA = 0.1


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
    "RNN": (recurrent(nn.RNN, 3, 5), "'cell' (RNN)"),
    "GRU": (recurrent(nn.GRU, 3, 5), "'cell' (GRU)"),
    "LSTM": (recurrent(nn.LSTM, 3, 5), "'cell' (LSTM)"),
    "two layers, both directions": (recurrent(nn.LSTM, 3, 5, num_layers=2, bidirectional=True), "'cell' (LSTM)"),
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


def sequences(tasks: int = 3, points: int = 6) -> TaskBatch:
    """Inputs of five steps of three numbers, and a number for each."""
    return regression_batch(1, tasks=tasks, support=points, query=points, dim=(5, 3))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def adapted(model: nn.Module, x: Tensor, y: Tensor, steps: int = 1, loss_fn: LossFn = F.mse_loss) -> Params:
    weights = dict(model.named_parameters())
    return adapt_task(model, loss_fn, weights, x, y, steps=steps, inner_lr=lambda name: ALPHA, adapted=weights)


def meta_gradient(
    model: nn.Module,
    tasks: TaskBatch,
    steps: int = 1,
    loss_fn: LossFn = F.mse_loss,
    leaves: Iterable[Tensor] | None = None,
) -> list[Tensor]:
    """The obvious loop; each task's model is restored, since a forward may change its buffers.

    Args:
        leaves: what to differentiate by; the model's parameters by default.
    """
    before = {name: b.clone() for name, b in model.named_buffers()}
    leaves = list(model.parameters() if leaves is None else leaves)
    total = [torch.zeros_like(leaf) for leaf in leaves]

    def restore() -> None:
        for name, b in model.named_buffers():
            b.copy_(before[name])

    for x, y, query_x, query_y in zip(*tasks[:4], strict=True):
        weights = adapted(model, x, y, steps, loss_fn)
        restore()
        loss = loss_fn(torch.func.functional_call(model, weights, (query_x,)), query_y) / tasks.num_tasks
        restore()
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        total = [a + g for a, g in zip(total, grads, strict=True)]
    return total


def assert_gradients(model: nn.Module, expected: list[Tensor]) -> None:
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
