"""Settings of the estimators that adapt by solving a proximal problem, ``min_u L_s(u) + lambda/2 |u - w|^2``.

Importing this module does not import torch, which keeps the help of the command fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from metamom.common.checks import check_number, check_whole, check_word
from metamom.common.did_you_mean import did_you_mean
from metamom.maml.estimators import ESTIMATORS, Estimator, proximal_estimators

Differences = Literal["symmetric", "forward"]
DIFFERENCES: tuple[Differences, ...] = get_args(Differences)
MOST_EVALUATIONS = 1_000_000


@dataclass(frozen=True)
class Proximal:
    """How a proximal problem is solved, and how its solution is differentiated.

    Args:
        strength: lambda > 0. The adapted weights stay the closer to the meta-parameters, the larger it is. It must
            exceed the most negative curvature of the support loss for the problem to have one solution nearby.
        tolerance: > 0. A solve ends when ``|grad|``, of the whole objective, is at most this times its value at the
            start. By default ``eps^(1/2)`` of the weights' dtype, 3.5e-4 in float32 and 1.5e-8 in float64; and
            ``eps^(2/3)`` in ``"perturbed"``, 2.4e-5 and 3.7e-11, since differences amplify errors by 1/nu. A solve
            also ends when rounding stops it.
        iterations: evaluations of the support loss and its gradient that a task may take, >= 1.
        cg_tolerance: > 0, of conjugate gradients in ``"implicit"``: the residual relative to the right-hand side. By
            default ``eps^(1/2)``.
        cg_iterations: Hessian-vector products that a task may take, >= 1.
        nu: > 0, the weight of the query loss in the perturbed problems of ``"perturbed"``. By default ``eps^(1/3)``,
            4.9e-3 in float32, which balances the error of differences with that of rounding.
        differences: of ``"perturbed"``: ``"symmetric"``, with an error of ``O(nu^2)``, or ``"forward"``, ``O(nu)``, for
            one solve less.

    Raises:
        ValueError: for a value out of range.
        TypeError: for one of another type.

    Example:
        >>> Proximal(2.0, iterations=50).spec
        '2,iterations=50'
        >>> as_proximal("2,iterations=50") == Proximal(2.0, iterations=50)
        True

    Reference:
        Rajeswaran, Finn, Kakade, Levine, "Meta-learning with implicit gradients" (2019); El Mahdi Chayti, Jaggi, "A new
        first-order meta-learning algorithm with convergence guarantees", arXiv 2409.03682.
    """

    strength: float = 2.0
    tolerance: float | None = None
    iterations: int = 100
    cg_tolerance: float | None = None
    cg_iterations: int = 100
    nu: float | None = None
    differences: Differences = "symmetric"

    def __post_init__(self) -> None:
        for name in ("strength", "tolerance", "cg_tolerance", "nu"):
            value = getattr(self, name)
            if value is None and name != "strength":
                continue
            shown = "proximal" if name == "strength" else f"{name} of proximal"
            check_number(shown, value)
            if not 0 < float(value) < math.inf:
                raise ValueError(f"{shown} must be > 0 and finite; got {value}.")
            object.__setattr__(self, name, float(value))
        for name in ("iterations", "cg_iterations"):
            value = check_whole(f"{name} of proximal", getattr(self, name), 1, MOST_EVALUATIONS)
            object.__setattr__(self, name, value)
        check_word("differences of proximal", self.differences, DIFFERENCES)

    @property
    def spec(self) -> str:
        """The shortest text for `as_proximal`: the strength, then what differs from the defaults."""
        changed = {e.name: getattr(self, e.name) for e in fields(self)[1:] if getattr(self, e.name) != e.default}
        return ",".join([_shown(self.strength), *(f"{name}={_shown(value)}" for name, value in changed.items())])

    def tolerance_of(self, estimator: Estimator, eps: float) -> float:
        """``tolerance`` of an estimator, for numbers with relative rounding ``eps``."""
        return self.tolerance or eps ** (2 / 3 if ESTIMATORS[estimator].perturbs else 1 / 2)

    def cg_tolerance_of(self, eps: float) -> float:
        """``cg_tolerance`` for numbers with relative rounding ``eps``."""
        return self.cg_tolerance or eps ** (1 / 2)

    def perturbation(self, eps: float) -> float:
        """``nu`` for numbers with relative rounding ``eps``."""
        return self.nu or eps ** (1 / 3)


ProximalLike: TypeAlias = float | str | Proximal


def as_proximal(value: ProximalLike) -> Proximal:
    """Settings from a strength, a text such as ``"2,tolerance=1e-6"``, or themselves.

    Raises:
        ValueError: for a text that is none, or a value out of range.
        TypeError: for any other type.
    """
    if isinstance(value, Proximal):
        return value
    if not isinstance(value, str):
        return Proximal(value)
    first, *others = (part.strip() for part in value.split(","))
    kinds: dict[str, Any] = {each.name: str(each.type) for each in fields(Proximal)[1:]}
    options: dict[str, Any] = {"strength": _parsed(first, float, value)}
    for part in others:
        name, equals, text = (each.strip() for each in part.partition("="))
        if name not in kinds or not equals:
            raise ValueError(
                f"proximal is a strength and options, as in '2,tolerance=1e-6'; got {part!r} in {value!r}. The options "
                f"are {', '.join(kinds)}{did_you_mean([name], kinds)}"
            )
        kind = str if name == "differences" else int if kinds[name] == "int" else float
        options[name] = _parsed(text, kind, value)
    return Proximal(**options)


def check_proximal(
    estimator: Estimator, proximal: object, inner_steps: int, learned: bool, compiled: bool = False
) -> None:
    """Refuse options that an estimator with a proximal problem does not support, and ``proximal`` for the others.

    Args:
        estimator: a known estimator.
        proximal: the option, ``None`` if it was not given.
        inner_steps: J.
        learned: whether inner step sizes are learned.
        compiled: whether meta-gradients must be compiled.

    Raises:
        ValueError: with what to do instead.
    """
    if not ESTIMATORS[estimator].proximal:
        if proximal is not None:
            raise ValueError(
                f"proximal is the strength of the proximal problem in estimators {', '.join(proximal_estimators())}; "
                f"got proximal={proximal!r} with estimator {estimator!r}. Leave it out, or use one of these."
            )
        return
    if inner_steps != 1:
        raise ValueError(
            f"estimator {estimator!r} adapts by solving one proximal problem to a tolerance; got "
            f"inner_steps={inner_steps}. Use inner_steps=1, and limit the solver by "
            "proximal='2,iterations=100,tolerance=1e-4'."
        )
    if learned:
        raise ValueError(
            f"estimator {estimator!r} does not take steps of inner_lr, so learned inner step sizes have no gradient. "
            "Leave out learn_inner_lr, and give inner_lr as a number; or use estimator 'exact'."
        )
    if compiled:
        raise ValueError(
            f"estimator {estimator!r} solves its inner problem until a tolerance is reached, which depends on values "
            "and cannot be compiled. Leave out compile=True (--compile)."
        )


def _parsed(text: str, kind: type, whole: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(
            f"proximal is a strength and options, as in '2,tolerance=1e-6'; {text!r} in {whole!r} is not {what}."
        ) from None


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
