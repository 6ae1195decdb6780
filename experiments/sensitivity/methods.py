"""The compared optimizers: each turns gamma, beta and a level of bias into a way to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor
from torch.optim import Adam, Optimizer, RMSprop

from metamom.optim import CompositeMomentum

Params = Iterable[Tensor]


class Method(NamedTuple):
    """An outer optimizer.

    Attributes:
        title: for tables and figures.
        optimizer: made from parameters, gamma and beta (1 for no momentum).
        lrs: its grid of step sizes, before a setting's scale.
        bias: the operator for a level of bias and beta; ``None`` if the method does not apply at that level.
        scaled: whether the setting's scale applies to its step sizes.
    """

    title: str
    optimizer: Callable[[Params, float, float], Optimizer]
    lrs: tuple[float, ...]
    bias: Callable[[str, float], str | None] = lambda level, beta: level
    scaled: bool = True

    def grid(self, scale: float, count: int) -> tuple[float, ...]:
        """The ``count`` smallest step sizes."""
        return tuple(round(lr * (scale if self.scaled else 1), 12) for lr in self.lrs[:count])


def _around(kind: str) -> Callable[[str, float], str | None]:
    """Error feedback around a level's operator, if it has one."""
    return lambda level, beta: None if level == "none" else f"{kind.format(beta=beta)}:{level}"


def _momentum(params: Params, lr: float, beta: float) -> Optimizer:
    return CompositeMomentum(params, lr=lr, beta=beta)


def _normalised(params: Params, lr: float, beta: float) -> Optimizer:
    return CompositeMomentum(params, lr=lr, beta=beta, normalize=True)


def _adam(params: Params, lr: float, beta: float) -> Optimizer:
    return Adam(params, lr=lr, betas=(1 - beta, 0.999))


def _rmsprop(params: Params, lr: float, beta: float) -> Optimizer:
    """Torch's momentum is a sum; times beta it is an average, and gamma means the same for every beta."""
    return RMSprop(params, lr=lr * beta, momentum=1 - beta)


LRS = (0.03, 0.1, 0.3, 1.0, 3.0)
ADAPTIVE_LRS = (0.0003, 0.001, 0.003, 0.01, 0.03)

METHODS = {
    "momentum": Method("momentum; plain meta-SGD at β = 1", _momentum, LRS),
    "normalised": Method("normalised momentum", _normalised, LRS),
    "adam": Method("Adam, β₁ = 1 − β", _adam, ADAPTIVE_LRS, scaled=False),
    "rmsprop": Method("RMSprop with momentum", _rmsprop, ADAPTIVE_LRS, scaled=False),
    "ef14": Method("EF14 and momentum", _momentum, LRS, _around("ef14")),
    "ef21": Method("EF21 and momentum", _momentum, LRS, _around("ef21")),
    "ef21-sgdm": Method(
        "EF21-SGDM: momentum on the workers", lambda params, lr, beta: _momentum(params, lr, 1.0), LRS,
        _around("ef21-sgdm({beta})"),
    ),
}  # fmt: skip


def methods_at(names: Iterable[str], level: str) -> dict[str, Method]:
    """The methods that apply at a level of bias: error feedback needs an operator."""
    return {name: METHODS[name] for name in names if METHODS[name].bias(level, 1.0) is not None}
