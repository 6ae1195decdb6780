"""What the theory knows of each method: its step limit, its floor, and their source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from metamom.common.choices import VARIANTS, Variant
from metamom.common.did_you_mean import did_you_mean
from metamom.theory import checks
from metamom.theory.agnostic import variant_powers
from metamom.theory.averages import averaged_limit
from metamom.theory.differences import dasha_step, diana_alpha, diana_step, marina_step
from metamom.theory.double_momentum import ef21_sgd2m_step
from metamom.theory.federated import ef21_p_step, ef21_pp_step
from metamom.theory.feedback import ef14_step
from metamom.theory.feedback_momentum import ef21_sgdm_step


@dataclass(frozen=True)
class Method:
    """A method by the name it has in a SPEC, with the numbers that its step limit needs.

    Args:
        name: ``"ef14"``, ``"ef21"``, ``"ef21-sgdm"``, ``"ef21-sgd2m"``, ``"clip21-sgd2m"``, ``"diana"``, ``"marina"``
            or ``"dasha"``; ``"ef21-p"`` for a compressed message to the workers (``down_bias``); or the ``variant`` of
            a normalised momentum, ``"heavy-ball"``, ``"igt"``, ``"storm"`` or ``"hessian"``, which has no step limit.
        alpha_c: contraction of the operator, in (0, 1] (``operator.contraction(d)``).
        omega: variance of an unbiased operator, >= 0 (``operator.constants(d).M``).
        eta: weight of a new gradient in the workers' averages, in (0, 1].
        server: weight of a message at the server (Clip21-SGD2M), in (0, 1].
        alpha: weight of DIANA's shift; `diana_alpha` by default.
        p: probability of MARINA's whole gradients, in (0, 1].
        L_tilde: root mean square smoothness of the workers' functions; L by default, which is right for equal ones.
        workers: n.
        participation: the share of workers that are present in each step, in (0, 1]; below 1 for EF21 only (EF21-PP).

    Raises:
        ValueError: when used, for an unknown name, a number that is missing, or one out of its range.
    """

    name: str
    alpha_c: float | None = None
    omega: float | None = None
    eta: float | None = None
    server: float | None = None
    alpha: float | None = None
    p: float | None = None
    L_tilde: float | None = None
    workers: int = 1
    participation: float = 1.0

    def number(self, name: str) -> float:
        """One of the numbers.

        Raises:
            ValueError: if it is missing.
        """
        value: float | None = getattr(self, name)
        if value is None:
            raise ValueError(f"the step limit of {self.name} needs {name}; pass Method({self.name!r}, {name}=...).")
        return value


class Known(NamedTuple):
    """The largest safe step size of a method for a smoothness L, what is left in the limit, and where both are from."""

    step: Callable[[Method, float, float], float]
    floor: str
    source: str


OURS = "docs/theory/operators.md"


def _follows(variant: Variant) -> Known:
    """What is known of EF21 with one of the momenta that follow the weights, and steps of one length."""
    weight, step, rate = variant_powers(variant)
    return Known(
        lambda m, L, L_tilde: inf,
        f"no floor of compression or noise with weights t^(-{weight}) and normalised steps of length "
        f"gamma t^(-{step}), with which the mean gradient norm falls as t^(-{rate})",
        "Sadiev et al., arXiv 2511.14501",
    )


KNOWN: dict[str, Known] = {
    "ef14": Known(
        lambda m, L, L_tilde: ef14_step(m.number("alpha_c"), L),
        "a floor of compression that vanishes with gamma",
        f"{OURS}; the method: Seide et al. (2014)",
    ),
    "ef21": Known(
        lambda m, L, L_tilde: ef21_pp_step(m.number("alpha_c"), m.participation, L, L_tilde),
        "no floor of compression with exact gradients, however much the workers differ",
        "Richtárik, Sokolov, Fatkhullin (2021)",
    ),
    "ef21-sgdm": Known(
        lambda m, L, L_tilde: ef21_sgdm_step(m.number("alpha_c"), m.number("eta"), L, L_tilde),
        "no floor of compression; one of gradient noise that vanishes with eta",
        f"{OURS}; the method: Fatkhullin, Tyurin, Richtárik (2023)",
    ),
    "ef21-sgd2m": Known(
        lambda m, L, L_tilde: ef21_sgd2m_step(m.number("alpha_c"), m.number("eta"), L, L_tilde),
        "no floor of compression; one of gradient noise that vanishes with eta",
        f"{OURS}; the method: Fatkhullin, Tyurin, Richtárik (2023)",
    ),
    "clip21-sgd2m": Known(
        lambda m, L, L_tilde: averaged_limit([m.number("eta"), m.number("server")], L),
        "no floor of clipping once nothing is clipped; the limit is the exact one of that phase on quadratics, and not "
        "a guarantee while something is",
        f"{OURS}, 'Averages in turn'; the method: Islamov et al. (2025)",
    ),
    "diana": Known(
        lambda m, L, L_tilde: diana_step(m.number("omega"), _alpha(m), L, L_tilde, m.workers),
        "no floor of compression with exact gradients",
        f"{OURS}; the method: Mishchenko, Gorbunov, Takáč, Richtárik (2019)",
    ),
    "marina": Known(
        lambda m, L, L_tilde: marina_step(m.number("omega"), m.number("p"), L, L_tilde, m.workers),
        "no floor of compression with exact gradients; with a new sample each step its errors add up",
        "Gorbunov, Burlachenko, Li, Richtárik (2021)",
    ),
    "dasha": Known(
        lambda m, L, L_tilde: dasha_step(m.number("omega"), L, L_tilde, m.workers),
        "no floor of compression with exact gradients",
        f"{OURS}; the method: Tyurin, Richtárik (2023)",
    ),
    "ef21-p": Known(
        lambda m, L, L_tilde: ef21_p_step(m.number("alpha_c"), L),
        "no floor of compression with exact gradients, if the messages to the server are whole",
        f"{OURS}; the method: Gruntkowska, Tyurin, Richtárik (2022)",
    ),
    **{variant: _follows(variant) for variant in VARIANTS},
}


def known(method: Method) -> Known:
    """What is known of a method.

    Raises:
        ValueError: for an unknown name.
    """
    if method.name not in KNOWN:
        hint = did_you_mean([method.name], tuple(KNOWN)) or "."
        raise ValueError(f"the theory knows the methods {', '.join(KNOWN)}; got {method.name!r}{hint}")
    return KNOWN[method.name]


@checks.as_stated
def method_step(which: Method, L: float) -> float:
    """The largest step size that the theory allows a method, for a function of smoothness L.

    Args:
        which: the method's name and numbers.
        L: smoothness of f, > 0.

    Returns:
        gamma; infinity for normalised steps.

    Raises:
        ValueError: for an unknown name, a number that is missing, or one out of its range.

    Example:
        >>> round(method_step(Method("ef21", alpha_c=0.25, L_tilde=1.5), L=1.0), 9)
        0.093491562
        >>> round(method_step(Method("ef21", alpha_c=0.5, L_tilde=1.5, participation=0.5), L=1.0), 9)
        0.093491562
    """
    checks.positive(L=L)
    of = known(which)
    checks.weight(participation=which.participation)
    if which.participation < 1 and which.name != "ef21":
        raise ValueError(
            f"the theory knows absent workers with ef21 only; got {which.name} with participation="
            f"{which.participation!r}. Use participation=1."
        )
    return of.step(which, L, L if which.L_tilde is None else which.L_tilde)


def _alpha(method: Method) -> float:
    return diana_alpha(method.number("omega")) if method.alpha is None else method.alpha
