"""Parameters and gradients to feed optimizers, and their trajectories compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SHAPES = [(3, 2), (5,), (), (2, 3, 1, 2)]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Noise around a quadratic's gradient: it depends on the parameters, so that differences feed back."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (p.detach() * 2 + torch.randn(p.shape, generator=generator)).to(p.dtype)


def run(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 100, dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    """The parameters after every step."""
    params = make_params(dtype)
    optimizer = make(params)
    trace = []
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        trace.append([p.detach().clone() for p in params])
    return trace


def assert_same(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert torch.equal(x, y), f"step {step}, tensor {i}: differs by {(x - y).abs().max()}"
    assert not torch.equal(ours[0][0], ours[-1][0])  # and something happened


def step_once(optimizer: torch.optim.Optimizer, grads: list[float] | float) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, grads if isinstance(grads, list) else [grads] * len(params), strict=True):
        p.grad = torch.full_like(p, g)
    optimizer.step()


def scalar(value: float = 1.0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=dtype))
