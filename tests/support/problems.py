"""Small models, batches and comparisons that the tests of meta-gradients share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.experiments.speed.rows import PlainConv4
from metamom.nets.models import Conv4, SinusoidMLP

WAYS = 3


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((-2, -1)))


class BatchNormNet(nn.Sequential):
    def __init__(self) -> None:
        norm = nn.BatchNorm2d(3, track_running_stats=False)
        super().__init__(
            nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, WAYS, bias=False)
        )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))


def layer_norm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1))


REGRESSION = {"MLP": mlp, "MLP with LayerNorm": layer_norm_mlp}
CLASSIFICATION = {
    "Conv4": (lambda: Conv4(WAYS, hidden=4), 28),
    "BatchNorm2d": (BatchNormNet, 8),
    "GroupNorm": (GroupNormNet, 8),
}
MODELS = [*REGRESSION, *CLASSIFICATION]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 with every parameter drawn, so that affine weights of 1 and biases of 0 hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 + (1.0 if p.dim() == 1 else 0.0))
    return model


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression_batch(
    seed: int = 0,
    *,
    tasks: int = 4,
    support: int = 5,
    query: int = 3,
    dim: int | tuple[int, ...] = 2,
    dtype: torch.dtype = torch.float64,
) -> TaskBatch:
    """Inputs of ``dim`` numbers, or of this shape, and a number for each."""
    shape = (dim,) if isinstance(dim, int) else dim
    sizes = [(tasks, n, *each) for n in (support, query) for each in (shape, (1,))]
    return TaskBatch(*(torch.randn(s, generator=generator(seed + i)).to(dtype) for i, s in enumerate(sizes)))


def image_batch(
    seed: int = 0,
    *,
    tasks: int = 2,
    size: int = 28,
    shots: tuple[int, int] = (1, 2),
    dtype: torch.dtype = torch.float64,
) -> TaskBatch:
    """Noise in WAYS classes; ``shots`` of each in support and query sets."""
    sizes = [(tasks, WAYS * n, 1, size, size) for n in shots]
    xs = [torch.rand(s, generator=generator(seed + i)).to(dtype) for i, s in enumerate(sizes)]
    ys = [torch.arange(WAYS).repeat(tasks, n) for n in shots]
    return TaskBatch(xs[0], ys[0], xs[1], ys[1])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def labelled_batch(
    *shape: int,
    tasks: int = 4,
    support: int = 2 * WAYS,
    queries: int = 2 * WAYS,
    dtype: torch.dtype = torch.float64,
) -> TaskBatch:
    """Inputs ``[T, N, *shape]`` of noise, with labels that count through WAYS classes."""
    sets = []
    for seed, points in enumerate((support, queries)):
        sets += [noise(tasks, points, *shape, seed=seed, dtype=dtype)]
        sets += [torch.arange(points).remainder(WAYS).repeat(tasks, 1)]
    return TaskBatch(*sets)


def problem(name: str) -> tuple[nn.Module, nn.Module, TaskBatch]:
    if name in REGRESSION:
        return randomised(REGRESSION[name]()), nn.MSELoss(), regression_batch()
    make, size = CLASSIFICATION[name]
    return randomised(make()), nn.CrossEntropyLoss(), image_batch(2, tasks=4, size=size, shots=(2, 3))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal up to rounding: to ``tolerance`` times the largest entry of the whole gradient."""
    assert list(ours) == list(theirs)
    theirs = {name: g.detach() for name, g in theirs.items()}
    scale = max(float(g.abs().max()) for g in theirs.values() if g.numel())
    assert 0 < scale < 1e6
    for name in ours:
        assert ours[name].shape == theirs[name].shape, f"{name}: {ours[name].shape} != {theirs[name].shape}"
        error = float((ours[name].detach() - theirs[name]).abs().max()) if ours[name].numel() else 0.0
        assert error <= tolerance * scale, f"{name} differs by {error}, at a scale of {scale}"


def mean_over_workers(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.mean(0) for name, g in grads.items()}


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The distance of two gradients in units of the second's norm."""
    assert list(ours) == list(theirs)
    a, b = (torch.cat([g.double().flatten() for g in grads.values()]) for grads in (ours, theirs))
    return float((a - b).norm() / b.norm())


def conv4(hidden: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Conv4:
    return Conv4(WAYS, hidden=hidden, generator=generator(seed)).to(dtype)


def plain_conv4(of: Conv4) -> PlainConv4:
    """The same network in PyTorch's own layers, with the same weights."""
    plain = PlainConv4(WAYS, of.head.in_features).to(of.head.weight.dtype)
    plain.load_state_dict(of.state_dict())
    return plain


def small(**options: Any) -> MAML:
    """A learner of three layers."""
    return MAML(SinusoidMLP((4,), generator=generator(0)).double(), F.mse_loss, **options)


def small_batch(seed: int = 0, *, tasks: int = 2, dtype: torch.dtype = torch.float64) -> TaskBatch:
    """A batch for `small`."""
    return regression_batch(seed, tasks=tasks, dim=1, dtype=dtype)
