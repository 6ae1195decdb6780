"""The optimizers that inner steps follow, as plain values: plain steps, SGD with momentum, or Adam.

The updates themselves are in `metamom.maml.inner_updates`. Importing this module does not import torch, which keeps the
help of the command fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeAlias

from metamom.common.checks import check_number
from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import real, shown
from metamom.maml.estimators import ESTIMATORS, Estimator

NAMES = ("sgd", "momentum", "nesterov", "adam")
EXAMPLES = "sgd, momentum:0.9, nesterov:0.9, adam, or adam:beta1=0.9,beta2=0.999,eps=1e-8,eps_root=0"


@dataclass(frozen=True)
class InnerSGD:
    """Inner steps of `torch.optim.SGD`: plain ones, or with momentum.

    ``b_1 = g_1, b_j = momentum * b_{j-1} + g_j``, and ``u_j = u_{j-1} - alpha * b_j``, or with Nesterov's form
    ``u_j = u_{j-1} - alpha * (g_j + momentum * b_j)``. Not the composite momentum outside, which weighs g_j by beta.

    Args:
        momentum: 0 <= momentum < 1; 0 for plain steps.
        nesterov: whether steps look ahead.

    Raises:
        ValueError: for a momentum out of range, and Nesterov's form without one.
        TypeError: for values of another type.

    Example:
        >>> InnerSGD(0.9).spec, InnerSGD(0.9, nesterov=True).spec, InnerSGD().spec
        ('momentum:0.9', 'nesterov:0.9', 'sgd')
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_number("the momentum of inner steps", self.momentum)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"the momentum of inner steps must be in [0, 1); got {self.momentum}.")
        if self.nesterov and self.momentum == 0:
            raise ValueError("Nesterov's form of inner steps needs a momentum > 0, such as nesterov:0.9; got 0.")
        object.__setattr__(self, "momentum", float(self.momentum))

    @property
    def plain(self) -> bool:
        """Whether these are plain steps."""
        return self.momentum == 0

    @property
    def linear(self) -> bool:
        """Whether the weights are linear in the gradients."""
        return True

    @property
    def spec(self) -> str:
        """The shortest text for `as_inner_optimizer`."""
        return "sgd" if self.plain else f"{'nesterov' if self.nesterov else 'momentum'}:{_text(self.momentum)}"


@dataclass(frozen=True)
class InnerAdam:
    """Inner steps of `torch.optim.Adam`, of size ``inner_lr``.

    ``m_j = beta1 * m_{j-1} + (1 - beta1) * g_j`` and ``v_j = beta2 * v_{j-1} + (1 - beta2) * g_j^2`` from 0, then
    ``u_j = u_{j-1} - alpha * m_j / (1 - beta1^j) / (sqrt(v_j / (1 - beta2^j) + eps_root) + eps)``. Each task has
    moments of its own, which start at 0 in each adaptation.

    Where all gradients of an entry have been exactly 0, m = v = 0. The update has a derivative in the gradient there,
    ``(1 - beta1) / (1 - beta1^j) / eps``, and `metamom.MAML` computes it (automatic differentiation of the square root
    would give 0 times infinity). It is large: about 1/eps for gradients below eps. A larger ``eps``, or ``eps_root``,
    bounds it; with ``eps_root`` > 0 the update has derivatives of every order.

    Args:
        beta1: in [0, 1).
        beta2: in [0, 1).
        eps: > 0, outside of the root.
        eps_root: >= 0, inside of the root. With 0, steps are those of `torch.optim.Adam`.

    Raises:
        ValueError: for a value out of range.
        TypeError: for values of another type.

    Example:
        >>> InnerAdam().spec, InnerAdam(beta1=0.5, eps=1e-6).spec
        ('adam', 'adam:beta1=0.5,eps=1e-06')

    Reference:
        Kingma, Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1; ``eps_root`` as in optax.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            check_number(f"{each.name} of Adam's inner steps", value)
            fits, wanted = {
                "eps": (0 < value < math.inf, "> 0 and finite"),
                "eps_root": (0 <= value < math.inf, ">= 0 and finite"),
            }.get(each.name, (0 <= value < 1, "in [0, 1)"))
            if not fits:
                raise ValueError(f"{each.name} of Adam's inner steps must be {wanted}; got {value}.")
            object.__setattr__(self, each.name, float(value))

    @property
    def plain(self) -> bool:
        """Whether these are plain steps."""
        return False

    @property
    def linear(self) -> bool:
        """Whether the weights are linear in the gradients."""
        return False

    @property
    def spec(self) -> str:
        """The shortest text for `as_inner_optimizer`."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        changed = [f"{e.name}={_text(values[e.name])}" for e in fields(self) if values[e.name] != e.default]
        return f"adam:{','.join(changed)}" if changed else "adam"


InnerOptimizer: TypeAlias = InnerSGD | InnerAdam
InnerOptimizerLike: TypeAlias = str | InnerOptimizer | None


def as_inner_optimizer(value: InnerOptimizerLike) -> InnerOptimizer:
    """An inner optimizer from its SPEC, or from itself; ``None`` stands for plain steps.

    Raises:
        ValueError: for a text that is none, or a value out of range.
        TypeError: for any other type.

    Example:
        >>> as_inner_optimizer("momentum:0.9")
        InnerSGD(momentum=0.9, nesterov=False)
    """
    if value is None:
        return InnerSGD()
    if isinstance(value, (InnerSGD, InnerAdam)):
        return value
    if not isinstance(value, str):
        raise TypeError(f"inner_optimizer must be a text, such as {EXAMPLES}; got {value!r:.80}.")
    name, colon, rest = (part.strip() for part in value.partition(":"))
    if name == "sgd" and not colon:
        return InnerSGD()
    if name == "adam":
        return InnerAdam(**_options(rest, value) if colon else {})
    if name in ("momentum", "nesterov") and colon:
        return InnerSGD(_number(rest, value), nesterov=name == "nesterov")
    if name in ("momentum", "nesterov"):
        raise ValueError(f"inner_optimizer {name!r} needs its momentum: {name}:0.9.")
    near = did_you_mean([name], NAMES)
    raise ValueError(f"inner_optimizer must be {EXAMPLES}; got {shown(value)}{near or '.'}")


def check_inner_optimizer(estimator: Estimator, optimizer: InnerOptimizer) -> None:
    """Refuse an inner optimizer that the estimator cannot follow.

    Raises:
        ValueError: for all but plain steps with proximal and tracked estimators; and for Adam with estimators that take
            the Hessian from points of its own.
    """
    if optimizer.plain:
        return
    record, got = ESTIMATORS[estimator], f"got inner_optimizer={optimizer.spec!r}"
    if record.proximal:
        raise ValueError(
            f"estimator {estimator!r} adapts by solving a proximal problem, not by steps of an optimizer; {got}. Leave "
            "it out, or use estimator 'exact'."
        )
    if record.averages is not None:
        raise ValueError(
            f"estimator {estimator!r} averages the results of one plain inner step; {got}. Leave it out, or use "
            "estimator 'exact'."
        )
    separate = any(each.along != each.hessian for term in record.terms for each in term.adaptations)
    if separate and not optimizer.linear:
        raise ValueError(
            f"estimator {estimator!r} multiplies by Hessians of other points than the gradient's, which is defined for "
            f"steps that are linear in the gradient; {got}. Use estimator 'exact' or 'first-order', or momentum:0.9."
        )


def _options(text: str, whole: str) -> dict[str, float]:
    known = [each.name for each in fields(InnerAdam)]
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (each.strip() for each in part.partition("="))
        if name not in known or not equals or name in found:
            raise ValueError(
                f"inner_optimizer {shown(whole)}: wanted options of adam once each, as in adam:beta1=0.9,eps=1e-6; got "
                f"{part!r:.60}. They are {', '.join(known)}{did_you_mean([name], known) or '.'}"
            )
        found[name] = _number(number, whole)
    return found


def _number(text: str, whole: str) -> float:
    try:
        return real(text)
    except ValueError as error:
        raise ValueError(f"inner_optimizer {shown(whole)}: {error}") from None


def _text(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
