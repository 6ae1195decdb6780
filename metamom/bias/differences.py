"""Compressed differences instead of gradients: DIANA and DASHA, for unbiased operators."""

from __future__ import annotations

from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.checks import check_weight
from metamom.bias.feedback import EF21
from metamom.bias.feedback_base import Rows
from metamom.bias.spelling import Row, spelled_around
from metamom.common.numbers import short
from metamom.optim import momentum_update_


@spelled_around(
    "diana",
    "A on the difference from a shift that learns",
    Row("`diana(0.1):A`", "`DIANA(A, alpha=0.1)`", "unbiased for an unbiased A, whose noise vanishes", "A's"),
    argument="ALPHA",
)
class DIANA(EF21):
    """Compress the difference from a shift: ``c_i = C(g_i - h_i)``, the server has ``h_i + c_i``.

    Worker and server move the shift, ``h_i <- h_i + alpha c_i``. For an unbiased C (Rand-K scaled, QSGD, MLMC) the
    estimate stays unbiased, and its noise goes to zero as the shifts approach the gradients at the solution, however
    much the workers differ. The theory takes ``alpha <= 1/(1 + omega)`` (`metamom.theory.diana_alpha`). With alpha = 1
    it is EF21.

    Args:
        operator: C, or its SPEC.
        alpha: weight of the message in the shift, 0 < alpha <= 1.

    Raises:
        ValueError: for alpha out of range.

    Reference:
        docs/theory/operators.md; Mishchenko, Gorbunov, Takáč, Richtárik, "Distributed learning with compressed gradient
        differences", 2019, arXiv 1901.09269, algorithm 1 without its proximal step and server momentum (that is the
        optimizer's beta).
    """

    allows_absent = False  # with absent workers, an unbiased estimate weights the messages differently

    def __init__(self, operator: BiasOperator | str, alpha: float = 0.1) -> None:
        super().__init__(operator)
        self.alpha = check_weight("DIANA", "alpha", alpha)

    def _updated(self, before: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        return before + change, before + self.alpha * change

    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        out = kept["estimate"] + sent
        return out, {**kept, "estimate": kept["estimate"].add_(sent, alpha=self.alpha)}

    def __repr__(self) -> str:
        return f"DIANA({self.operator!r}, alpha={self.alpha!r})"

    @property
    def spec(self) -> str:
        """``diana(ALPHA):SPEC``."""
        return f"diana({short(self.alpha)}):{self.operator.spec}"


@spelled_around(
    "dasha",
    "A on changes of the gradient; with ETA, of its momentum",
    Row("`dasha(0.1):A`", "`DASHA(A, a=0.1)`", "biased estimates, no floor for an unbiased A", "A's"),
    Row("`dasha(0.1,0.3):A`", "`DASHA(A, a=0.1, eta=0.3)`", "the same of the workers' momentum", "A's"),
    argument="W,ETA",
    least=1,
)
class DASHA(EF21):
    """Compress the change of the worker's gradient, with a correction towards it.

    ``c_i = C(v_i - v_i^- - a (h_i - v_i^-))``, ``h_i <- h_i + c_i``, where ``v_i^-`` is v_i of the step before, and
    ``v_i = (1 - eta) v_i^- + eta g_i``: the gradient itself for eta = 1. All start at zero. C should be unbiased
    (Rand-K scaled, QSGD, MLMC); the theory takes ``a = 1/(2 omega + 1)`` (`metamom.theory.dasha_weight`). With a = 1
    it is EF21, or EF21-SGDM with momentum.

    The operator sees one gradient a step. For DASHA-MVR, pass it the workers' STORM estimate, which takes the gradients
    of one sample at both points, with eta = 1.

    Args:
        operator: C, or its SPEC.
        a: weight of the correction, 0 < a <= 1.
        eta: weight of the new gradient in the workers' momentum, 0 < eta <= 1. Below 1 the server has no momentum,
            ``beta = 1`` (`train` requires it).

    Raises:
        ValueError: for a or eta out of range.

    Reference:
        docs/theory/operators.md; Tyurin, Richtárik, "DASHA: Distributed Nonconvex Optimization with Communication
        Compression and Optimal Oracle Complexity", 2023, arXiv 2202.01268, algorithm 1 (its h and g are v and h here).
    """

    names = ("estimate", "momentum")
    allows_absent = False  # DASHA-PP sends other messages

    def __init__(self, operator: BiasOperator | str, a: float = 0.1, eta: float = 1.0) -> None:
        super().__init__(operator)
        self.a, self.eta = check_weight("DASHA", "a", a), check_weight("DASHA", "eta", eta)

    @property
    def carries_momentum(self) -> bool:  # type: ignore[override]
        """Whether eta < 1."""
        return self.eta < 1

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        before = kept["momentum"]
        momentum = rows if self.eta == 1 else momentum_update_(before.clone(), rows, self.eta)
        # a = 1 leaves v - h without rounding, as EF21
        behind = kept["estimate"] if self.a == 1 else before + self.a * (kept["estimate"] - before)
        return momentum - behind, {**kept, "momentum": momentum}

    def __repr__(self) -> str:
        return f"DASHA({self.operator!r}, a={self.a!r}, eta={self.eta!r})"

    @property
    def spec(self) -> str:
        """``dasha(W):SPEC``, or ``dasha(W,ETA):SPEC``."""
        numbers = [self.a] if self.eta == 1 else [self.a, self.eta]
        return f"dasha({','.join(map(short, numbers))}):{self.operator.spec}"
