"""Suggest a step size, and explain the bound in plain words."""

from __future__ import annotations

from math import inf, isinf
from typing import Literal, NamedTuple

from metamom.theory import checks
from metamom.theory.methods import Method, known, method_step
from metamom.theory.nonconvex import Terms, best_step, max_step, terms_1a

Part = Literal["distance", "bias", "noise"]


class Explanation(NamedTuple):
    """The dominant term of the remaining error. `print` it to read the text.

    Attributes:
        terms: the bound's three terms.
        dominant: the name of the largest.
        text: the explanation in words.
    """

    terms: Terms
    dominant: Part
    text: str

    def __str__(self) -> str:
        return self.text


@checks.as_stated
def suggest_step(
    L: float,
    beta: float = 0.1,
    *,
    delta0: float | None = None,
    K: int | None = None,
    b2: float = 0,
    sigma2: float = 0,
    B: float = 0,
    M: float = 0,
    method: Method | None = None,
) -> float:
    """Suggest a step size that the theory guarantees.

    With ``delta0`` and ``K``, it minimises the bound of Theorem 1A. Otherwise it is the largest that the theorem allows
    (with relative noise M, at most the one at which noise takes half of ``1 - B``). It is safe for the worst function
    and bias with this L; tuning often finds that a several times larger one works. L is the smoothness of the
    meta-objective near the weights that the run visits (`meta_smoothness`).

    Args:
        L: smoothness of f, > 0.
        beta: in (0, 1].
        delta0: ``f(x_0) - f*``, > 0, if known; an upper bound is enough.
        K: number of steps of the run, if known.
        b2, sigma2, B, M: bias and noise as for `bound_1a`; for bias operators, see ``operator.constants(d, ...)``.
        method: error feedback or compressed differences, whose own limit is returned instead (`method_step`); the
            server then has no momentum, ``beta=1``.

    Returns:
        gamma, the ``lr`` of `CompositeMomentum`.

    Raises:
        ValueError: for a number out of its range, only one of delta0 and K, a method with ``beta`` below 1, or one
            without a limit.

    Example:
        >>> round(suggest_step(L=1.0, beta=0.1), 6)
        0.052632
        >>> round(suggest_step(L=1.0, beta=1.0, delta0=1.0, K=200, sigma2=1.0), 6)
        0.1
        >>> round(suggest_step(L=1.0, beta=1.0, method=Method("ef21", alpha_c=0.25)), 6)
        0.133975

    Reference: docs/theory/theorems.md, Theorem 1A; docs/theory/operators.md for methods.
    """
    if method is not None:
        if beta != 1:
            raise ValueError(
                f"the limit of {method.name} is that of plain steps on the server, beta=1; got beta={beta!r}. Momentum "
                "on the server is not covered."
            )
        limit = method_step(method, L)
        if isinf(limit):
            raise ValueError(
                f"{method.name} with normalised steps has no largest step size, so there is none to suggest: any gamma "
                "> 0 converges with the schedules variant_weight and variant_step."
            )
        return limit
    if (delta0 is None) != (K is None):
        raise ValueError("the best step for a run needs both delta0 and K; got one of them. Pass both, or neither.")
    if delta0 is not None and K is not None:
        return best_step(L, beta, delta0, K, b2, sigma2, B, M)
    checks.not_negative(b2=b2, sigma2=sigma2, B=B, M=M)
    left = checks.room(1 - B, "B", "No step size helps: use an estimator with a smaller relative bias.")
    return min(max_step(L, beta), left / (2 * (2 - beta) * L * M) if M > 0 else inf)


@checks.as_stated
def explain(
    L: float,
    beta: float,
    gamma: float,
    delta0: float,
    K: float,
    b2: float,
    sigma2: float,
    B: float = 0,
    M: float = 0,
    method: Method | None = None,
) -> Explanation:
    """Explain which term of Theorem 1A's bound dominates, and which parameter lowers it.

    The bound is a worst case. The error itself may be smaller, and its largest part may be a different one.

    The arguments are those of `bound_1a`, and a ``method`` to take instead: its largest gamma and its floor are added.

    Returns:
        The terms, the name of the largest, and the text.

    Raises:
        ValueError: as `bound_1a` does.

    Example:
        >>> explain(L=1.0, beta=0.5, gamma=0.1, delta0=1.0, K=10_000, b2=0.2, sigma2=0.1).dominant
        'bias'

    Reference: docs/theory/theorems.md, Theorem 1A and Proposition 1.
    """
    terms = terms_1a(L, beta, gamma, delta0, K, b2, sigma2, B, M)
    parts: dict[Part, float] = {"distance": terms.distance, "bias": terms.bias, "noise": terms.noise}
    dominant: Part = max(parts, key=lambda name: parts[name])
    steps = "In the limit" if isinf(K) else f"After {K} steps"
    total = terms.total
    added = [] if method is None else [_method(method, L, gamma)]
    if total == 0:
        text = f"{steps} the bound on the mean of ||grad f||^2 is 0: nothing limits convergence."
        return Explanation(terms, dominant, " ".join([text, *added]))
    shares = ", ".join(f"{_NAMES[name]} {part:.3g} ({part / total:.0%})" for name, part in parts.items())
    lines = [f"{steps} the mean of ||grad f||^2 is at most {total:.3g}: {shares}."]
    if dominant == "bias":
        lines.append(_bias(B))
    elif dominant == "noise":
        lines.append(_noise(L, beta, gamma, delta0, K, b2, sigma2, B, M))
    else:
        lines.append(_distance(L, beta, gamma, terms, K))
    if B > 0:
        lines.append(f"The relative bias B={B:g} multiplies every term by 1/(1 - B) = {1 / (1 - B):.3g} or more.")
    return Explanation(terms, dominant, " ".join(lines + added))


def _method(method: Method, L: float, gamma: float) -> str:
    """What a method would change."""
    limit, of = method_step(method, L), known(method)
    if isinf(limit):
        return f"With {method.name}: {of.floor}; no gamma is too large ({of.source})."
    fits = "is within it" if gamma <= limit else "is beyond it"
    return (
        f"With {method.name}: {of.floor}; its largest gamma, with plain steps on the server, is {limit:.3g}, and "
        f"gamma={gamma:.3g} {fits} ({of.source})."
    )


_NAMES: dict[Part, str] = {"distance": "initial distance", "bias": "bias", "noise": "noise"}


def _bias(B: float) -> str:
    """Advice about the bias: only another estimator helps."""
    return (
        "Bias dominates: gamma, beta, more steps and more workers do not lower it. Another estimator does. For inner "
        "mini-batches, use larger ones, independent Hessian batches, cross-fit, Richardson or a moving average "
        "(MOML, SCSC); for compression and clipping, use error feedback (EF21, EF21-SGDM, Clip21) or a weaker "
        "operator."
    )


def _noise(
    L: float, beta: float, gamma: float, delta0: float, K: float, b2: float, sigma2: float, B: float, M: float
) -> str:
    """Advice about the noise: a smaller step, or less noise."""
    text = "Noise dominates: it falls with gamma, and as 1/n with the number of workers or tasks per step."
    if not isinf(K) and delta0 > 0:
        best = best_step(L, beta, delta0, int(K), b2, sigma2, B, M)
        bound = terms_1a(L, beta, best, delta0, K, b2, sigma2, B, M).total
        if best < 0.99 * gamma:
            text += f" The best gamma for this K is {best:.3g}, with a bound of {bound:.3g}."
        else:
            text += " A smaller gamma would cost more in the initial distance than it gains, unless K is raised too."
    return text + " A smaller beta alone does not lower it at this gamma; it lowers the largest gamma."


def _distance(L: float, beta: float, gamma: float, terms: Terms, K: float) -> str:
    """Advice about the distance: more steps, or longer ones."""
    limit = max_step(L, beta)
    text = f"The initial distance dominates: more steps lower it (10 times as many: {terms.distance / 10:.3g})"
    text += ", and so does a larger gamma"
    if gamma < 0.99 * limit:
        return f"{text}, up to {limit:.3g} for this beta."
    if beta < 1:
        return f"{text}, which here needs a larger beta: the limit is beta/((2-beta)L), now {limit:.3g}."
    return f"{text}, but gamma={gamma:.3g} is the largest that the theorem allows."
