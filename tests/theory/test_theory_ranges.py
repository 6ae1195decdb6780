"""Every public function of `metamom.theory` raises what its docstring says, whatever numbers it is given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from metamom import theory
from metamom.theory import checks, designs, fixed_points, quadratic, regression, wishart

E = torch.eye(2)
G = designs.Gaussian(E)
A = {"L": 1.0, "beta": 0.5, "gamma": 0.05, "delta0": 1.0, "K": 100, "b2": 0.1, "sigma2": 0.2, "B": 0.1, "M": 0.1}
D = {"omega": 2.0, "L": 1.0, "L_tilde": 1.0, "workers": 4}
VALID: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (theory.best_step, {"L": 1.0, "beta": 0.5, "delta0": 1.0, "K": 100, "b2": 0.1, "sigma2": 0.2, "B": 0.1, "M": 0.1}),
    (theory.bias_bound, {"L": 1.0, "rho": 1.0, "alpha": 0.1, "sigma_g": 1.0, "m": 4, "sigma_h": 1.0}),
    (
        theory.bias_bound_steps,
        {"L": 1.0, "rho": 1.0, "alpha": 0.1, "sigma_g": 1.0, "m": 4, "steps": 2, "outer_grad": 1.0},
    ),
    (theory.bound_1a, A),
    (theory.terms_1a, A),
    (theory.explain, A),
    (theory.explain, {**A, "sigma2": 100.0}),
    (
        theory.bound_1b,
        {"L": 1.0, "beta": 0.5, "gamma": 0.05, "phi0": 1.0, "K": 100, "b2": 0.1, "sigma2": 0.2, "B": 0.1, "M": 0.1},
    ),
    (
        theory.bound_1b,
        {
            "L": 1.0,
            "beta": 0.5,
            "gamma": 0.05,
            "phi0": 1.0,
            "K": 100,
            "b2": 0.1,
            "sigma2": 0.2,
            "B": 0.1,
            "M": 0.1,
            "theta": 0.5,
        },
    ),
    (
        theory.bound_1c,
        {"L": 1.0, "beta": 0.5, "gamma": 0.05, "delta0": 1.0, "grad0": 1.0, "K": 100, "b": 0.1, "sigma2": 0.2},
    ),
    (
        theory.bound_ef14,
        {
            "alpha_c": 0.5,
            "L": 1.0,
            "gamma": 0.05,
            "delta0": 1.0,
            "K": 100,
            "zeta2": 0.1,
            "b2": 0.1,
            "sigma_w2": 0.1,
            "workers": 4,
        },
    ),
    (
        theory.bound_ef21,
        {"alpha_c": 0.5, "L": 1.0, "L_tilde": 1.0, "gamma": 0.05, "delta0": 1.0, "start_error_sq": 1.0, "K": 100},
    ),
    (
        theory.bound_ef21_pp,
        {
            "alpha_c": 0.5,
            "p": 0.5,
            "L": 1.0,
            "L_tilde": 1.0,
            "gamma": 0.05,
            "delta0": 1.0,
            "start_error_sq": 1.0,
            "K": 100,
        },
    ),
    (theory.ef21_pp_step, {"alpha_c": 0.5, "p": 0.5, "L": 1.0, "L_tilde": 1.0}),
    (theory.bound_ef21_p, {"alpha_c": 0.5, "L": 1.0, "gamma": 0.05, "delta0": 1.0, "K": 100}),
    (theory.ef21_p_step, {"alpha_c": 0.5, "L": 1.0}),
    (theory.averaged_limit, {"weights": [0.1, 0.5], "L": 1.0}),
    (theory.averaged_floor, {"lam": [1.0, 0.5], "sigma2": [0.1, 0.1], "weights": [0.1, 0.5], "gamma": 0.1}),
    (theory.ef21_sgd2m_step, {"alpha_c": 0.5, "eta": 0.1, "L": 1.0, "L_tilde": 1.0}),
    (
        theory.bound_ef21_sgd2m,
        {
            "alpha_c": 0.5,
            "eta": 0.1,
            "L": 1.0,
            "L_tilde": 1.0,
            "gamma": 0.001,
            "delta0": 1.0,
            "K": 100,
            "sigma_w2": 0.1,
            "workers": 4,
        },
    ),
    (theory.method_step, {"which": theory.Method("ef21", alpha_c=0.5), "L": 1.0}),
    (theory.bound_dasha, {**D, "gamma": 0.01, "delta0": 1.0, "mean_error_sq": 1.0, "worker_error_sq": 1.0, "K": 100}),
    (theory.bound_diana, {**D, "alpha": 0.2, "gamma": 0.01, "delta0": 1.0, "shift_error_sq": 1.0, "K": 100}),
    (theory.bound_marina, {**D, "p": 0.2, "gamma": 0.01, "delta0": 1.0, "K": 100}),
    (theory.dasha_step, D),
    (theory.dasha_weight, {"omega": 2.0}),
    (theory.diana_alpha, {"omega": 2.0}),
    (theory.diana_step, {**D, "alpha": 0.2}),
    (theory.marina_step, {**D, "p": 0.2}),
    (
        theory.bound_ef21_sgdm,
        {
            "alpha_c": 0.5,
            "eta": 0.1,
            "L": 1.0,
            "L_tilde": 1.0,
            "gamma": 0.001,
            "delta0": 1.0,
            "K": 100,
            "sigma_w2": 0.1,
            "workers": 4,
        },
    ),
    (
        theory.bound_tracking,
        {
            "method": "moml",
            "L": 1.0,
            "beta": 0.5,
            "gamma": 0.001,
            "delta0": 1.0,
            "K": 100,
            "kappa": 1.0,
            "floor": 0.1,
            "sigma2": 0.1,
            "Lambda": 1.0,
            "b_u": 0.2,
            "start_error_sq": 1.0,
        },
    ),
    (
        theory.bound_tracking,
        {
            "method": "scsc",
            "L": 1.0,
            "beta": 0.5,
            "gamma": 0.001,
            "delta0": 1.0,
            "K": 100,
            "kappa": 1.0,
            "floor": 0.1,
            "sigma2": 0.1,
            "Lambda": 1.0,
            "b_u": 0.2,
            "start_error_sq": 1.0,
        },
    ),
    (theory.clip21_inactive, {"tau": 1.0, "gamma": 0.1, "L_max": 1.0, "estimate_norm": 1.0}),
    (theory.clip21_steps, {"tau": 1.0, "distance": 5.0}),
    (
        theory.composite_constants,
        {
            "C_J": 1.0,
            "C_F": 1.0,
            "L_F": 1.0,
            "sigma_F2": 1.0,
            "sigma_g2": 1.0,
            "sigma_J2": 1.0,
            "m_F": 2,
            "m_g": 2,
            "m_J": 2,
        },
    ),
    (theory.critical_beta, {"step": 0.5}),
    (theory.delta0_from, {"delta0": 1.0, "beta": 0.5, "gamma": 0.1, "start_error_sq": 1.0, "start_grad_sq": 1.0}),
    (
        theory.diagnose,
        {
            "losses": [1.0] * 100,
            "beta": 0.5,
            "gamma": 0.1,
            "grad_sq": 1.0,
            "v_sq": 0.5,
            "sigma2": 0.5,
            "least": 0.0,
            "window": 50,
            "tolerance": 0.01,
        },
    ),
    (theory.ef14_step, {"alpha_c": 0.5, "L": 1.0}),
    (theory.ef21_sgdm_step, {"alpha_c": 0.5, "eta": 0.1, "L": 1.0, "L_tilde": 1.0}),
    (theory.ef21_step, {"alpha_c": 0.5, "L": 1.0, "L_tilde": 1.0}),
    (theory.first_order_constants, {"L": 1.0, "alpha": 0.1, "zeta2": 1.0}),
    (theory.inner_floor, {"method": "moml", "Lambda": 1.0, "b_u": 0.2, "alpha": 0.1, "sigma_g2": 1.0, "m": 4}),
    (theory.inner_floor, {"method": "scsc", "Lambda": 1.0, "b_u": 0.2, "alpha": 0.1, "sigma_g2": 1.0, "m": 4}),
    (theory.max_step, {"L": 1.0, "beta": 0.5}),
    (theory.max_step_1b, {"L": 1.0, "beta": 0.5, "form": "exact", "theta": 0.5}),
    (theory.max_step_1b, {"L": 1.0, "beta": 0.5, "form": "simple"}),
    (theory.max_step_1b, {"L": 1.0, "beta": 0.5, "form": "half"}),
    (theory.max_step_2a, {"L": 1.0, "beta": 0.5}),
    (
        theory.mean_square_bound,
        {
            "L": 1.0,
            "alpha": 0.1,
            "Lambda": 1.0,
            "sigma_g2": 1.0,
            "sigma_h2": 1.0,
            "outer_grad_sq": 1.0,
            "m_in": 2,
            "m_h": 2,
            "m_out": 2,
            "sigma_out2": 1.0,
        },
    ),
    (theory.meta_smoothness, {"L": 1.0, "rho": 1.0, "alpha": 0.1, "outer_grad": 1.0}),
    (theory.moml_kappa, {"Lambda": 1.0, "L_g": 1.0, "b_u": 0.2}),
    (theory.phi0_1b, {"delta0": 1.0, "beta": 0.5, "gamma": 0.1, "start_error_sq": 1.0, "theta": 0.5}),
    (theory.rate_2a, {"L": 1.0, "mu": 0.1, "beta": 0.5, "gamma": 0.01, "b2": 0.1, "sigma2": 0.1}),
    (
        theory.rate_2a_affine,
        {"L": 1.0, "mu": 0.1, "beta": 0.5, "gamma": 0.01, "b2": 0.1, "sigma2": 0.1, "B": 0.1, "M": 0.1, "theta": 0.4},
    ),
    (theory.rate_2b, {"L": 1.0, "mu": 0.1, "beta": 0.5, "gamma": 0.01, "b2": 0.1, "sigma2": 0.1}),
    (theory.rate_2b, {"L": 1.0, "mu": 0.1, "beta": 0.5, "gamma": 0.01, "b2": 0.1, "sigma2": 0.1, "at": "z"}),
    (theory.rate_2b_bias, {"L": 1.0, "mu": 0.1, "beta": 0.5, "gamma": 0.01, "b2": 0.1}),
    (theory.scsc_kappa, {"Lambda": 1.0, "b_u": 0.2, "alpha": 0.1, "sigma_h2": 1.0, "m": 4}),
    (theory.stable_limit, {"lam_max": 1.0, "beta": 0.5}),
    (theory.stationary, {"lam": 1.0, "sigma2": 0.1, "bias": 0.1, "beta": 0.5, "gamma": 0.1}),
    (
        theory.suggest_step,
        {"L": 1.0, "beta": 0.5, "delta0": 1.0, "K": 100, "b2": 0.1, "sigma2": 0.1, "B": 0.1, "M": 0.1},
    ),
    (theory.suggest_step, {"L": 1.0, "beta": 0.5, "b2": 0.1, "sigma2": 0.1, "B": 0.1, "M": 0.1}),
    (theory.swinging_step, {"beta": 0.5, "period": 10.0}),
    (theory.theta_star, {"L": 1.0, "beta": 0.5, "gamma": 0.05}),
    (theory.tracking_step, {"L": 1.0, "beta": 0.5, "kappa": 1.0}),
    (
        theory.bound_1b_schedule,
        {
            "L": 1.0,
            "betas": [0.5, 0.5],
            "gammas": [0.05, 0.05],
            "phi0": 1.0,
            "b2": 0.1,
            "sigma2": 0.1,
            "B": 0.1,
            "M": 0.1,
        },
    ),
    (theory.LinearRate(0.1, 0.1, 0.1).bound, {"phi0": 1.0, "K": 10}),
    (designs.Waves, {"low": -5.0, "high": 5.0}),
    (quadratic.population, {"A": E, "alpha": 0.1, "steps": 2}),
    (quadratic.first_order, {"A": E, "alpha": 0.1, "steps": 2}),
    (quadratic.coupled, {"A": E, "alpha": 0.1, "hessian_var": 0.1, "m": 4}),
    (quadratic.variance_additive, {"A": E, "alpha": 0.1, "noise_var": 0.1, "m_in": 2, "m_out": 2}),
    (quadratic.quartic, {"a": 1.0, "c": 0.1, "w": 1.0, "alpha": 0.1, "noise_var": 0.1, "m": 4}),
    (regression.population, {"design": G, "alpha": 0.1, "steps": 2}),
    (regression.coupled, {"design": G, "alpha": 0.1, "m": 4, "points": 10, "share": 0.5}),
    (regression.first_order, {"design": G, "alpha": 0.1, "steps": 2}),
    (regression.fresh_batches, {"design": G, "alpha": 0.1, "m": 4, "steps": 2}),
    (wishart.moment, {"k": 2, "d": 3, "m": 4}),
    (wishart.same_batch, {"alpha": 0.1, "d": 3, "m": 4, "steps": 2}),
    (wishart.full_reuse, {"alpha": 0.1, "d": 3, "m": 4, "steps": 2}),
    (
        wishart.variance_independent,
        {"alpha": 0.1, "d": 3, "delta_sq": 1.0, "sigma2": 1.0, "m_in": 2, "m_h": 2, "m_out": 2},
    ),
    (wishart.variance_coupled, {"alpha": 0.1, "d": 3, "delta_sq": 1.0, "sigma2": 1.0, "m": 2, "m_out": 2}),
    (theory.variant_powers, {"variant": "igt"}),
    (theory.variant_step, {"variant": "storm", "t": 10, "gamma": 0.1}),
    (theory.variant_weight, {"variant": "hessian", "t": 10}),
]

NAMES = ("method", "form", "at", "variant")  # arguments that are one of a few words
NUMBERS: tuple[Any, ...] = (
    -1, 0, 0.0, -0.5, 2.5, math.nan, math.inf, -math.inf, 1e308, 1e200, 1e-308, 5e-324, True, 10**400,
)  # fmt: skip
NO_NUMBERS: tuple[Any, ...] = ("wrong", "1", None, [1.0], {"x": 1})
OPTIONAL = {
    (function.__name__, name)
    for function, arguments in VALID
    for name in arguments
    if "None" in str(getattr(function, "__annotations__", {}).get(name))
}


def ids(case: tuple[Callable[..., Any], dict[str, Any]]) -> str:
    function, arguments = case
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}({', '.join(arguments)})"


each_case = pytest.mark.parametrize("case", VALID, ids=ids)


@each_case
def test_numbers_out_of_range_are_a_value_error(case: tuple[Callable[..., Any], dict[str, Any]]) -> None:
    """And a result is a number: no NaN comes out."""
    function, arguments = case
    function(**arguments)
    for name, good in arguments.items():
        for bad in NUMBERS if isinstance(good, (int, float)) else ():
            try:
                result = function(**{**arguments, name: bad})
            except ValueError as error:
                said = str(error)
                assert re.search(r"; got |leaves the floating-point range|needs|known", said), (name, bad, said)
            else:
                numbers = result if isinstance(result, tuple) else (result,)
                assert not any(isinstance(x, float) and math.isnan(x) for x in numbers), (name, bad)


@each_case
def test_what_is_no_number_is_a_type_error_that_names_it(case: tuple[Callable[..., Any], dict[str, Any]]) -> None:
    function, arguments = case
    for name, good in arguments.items():
        for bad in NO_NUMBERS:
            if (bad is None and (function.__name__, name) in OPTIONAL) or (isinstance(good, list) and bad == [1.0]):
                continue
            if (function, name) == (theory.stationary, "lam") or (
                not isinstance(bad, str) and function is theory.stationary
            ):
                continue  # numbers or vectors
            error = ValueError if name in NAMES else TypeError
            with pytest.raises(error, match=f"^{name} must be "):
                function(**{**arguments, name: bad})


def test_the_table_has_every_public_function() -> None:
    tested = {function.__name__ for function, _ in VALID} | {"linear", "fixed_point", "bias_floor"}
    for module in (theory, designs, quadratic, regression, wishart, fixed_points):
        for name, thing in vars(module).items():
            public = callable(thing) and not isinstance(thing, type) and not name.startswith("_")
            if public and getattr(thing, "__module__", "").startswith("metamom.theory"):
                assert name in tested, name


def test_whole_numbers_may_be_floats() -> None:
    assert wishart.moment(2.0, d=3.0, m=5.0) == wishart.moment(2, d=3, m=5)
    assert torch.equal(quadratic.population(E, 0.1, steps=2.0).gain, quadratic.population(E, 0.1, steps=2).gain)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        quadratic.population(E, 0.1, steps=2.5)


def test_words_that_mean_nothing_are_refused() -> None:
    """They were taken for another word."""
    with pytest.raises(ValueError, match="form must be one of 'sharp', 'simple'; got 'blunt'"):
        theory.rate_2a(L=1, mu=0.1, beta=0.5, gamma=0.01, b2=0, sigma2=0, form="blunt")
    with pytest.raises(ValueError, match="at must be one of 'z', 'x'; got 'y'"):
        theory.rate_2b(L=1, mu=0.1, beta=0.5, gamma=0.01, b2=0, sigma2=0, at="y")


def test_numbers_of_tensors_and_of_numpy_will_do() -> None:
    limit = theory.max_step(L=2.0, beta=0.5)
    assert float(theory.max_step(L=torch.tensor(2.0, dtype=torch.float64), beta=0.5)) == limit
    assert theory.max_step(L=torch.tensor(2.0).numpy()[()], beta=0.5) == limit


def test_a_function_keeps_its_signature_and_its_words() -> None:
    @checks.as_stated
    def half(x: float) -> float:
        """Half of it."""
        return x / 2

    assert half(x=3) == 1.5
    assert half.__doc__ == "Half of it."
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        half()
