"""Step-size limits, error bounds and closed forms, as functions; statements and proofs in docs/theory/index.md.

`suggest_step`, `explain` and `diagnose` are for practitioners. The bounds follow by theorem, then the closed forms, one
module each: `designs`, `regression`, `wishart`, `quadratic`, `fixed_points`. Bias operators provide their constants,
``operator.constants(d, workers=n, zeta2=...)``; pass them as ``bound_1a(..., **constants._asdict())``. Functions raise
ValueError for numbers out of range, and TypeError for anything but a number.
"""

from metamom.theory import decentral, designs, fixed_points, quadratic, regression, wishart
from metamom.theory.agnostic import Powers, variant_powers, variant_step, variant_weight
from metamom.theory.averages import averaged_floor, averaged_limit
from metamom.theory.composite import (
    bias_bound,
    bias_bound_steps,
    composite_constants,
    first_order_constants,
    mean_square_bound,
    meta_smoothness,
)
from metamom.theory.deviation import bound_1b, bound_1b_schedule, max_step_1b, phi0_1b, theta_star
from metamom.theory.diagnose import Diagnosis, diagnose
from metamom.theory.differences import (
    bound_dasha,
    bound_diana,
    bound_marina,
    dasha_step,
    dasha_weight,
    diana_alpha,
    diana_step,
    marina_step,
)
from metamom.theory.double_momentum import DoubleStart, bound_ef21_sgd2m, ef21_sgd2m_step
from metamom.theory.federated import bound_ef21_p, bound_ef21_pp, ef21_p_step, ef21_pp_step
from metamom.theory.feedback import bound_ef14, bound_ef21, clip21_inactive, clip21_steps, ef14_step, ef21_step
from metamom.theory.feedback_momentum import Start, bound_ef21_sgdm, ef21_sgdm_step
from metamom.theory.methods import Method, method_step
from metamom.theory.nonconvex import Terms, best_step, bound_1a, delta0_from, max_step, terms_1a
from metamom.theory.normalized import bound_1c
from metamom.theory.pl import LinearRate, max_step_2a, rate_2a, rate_2a_affine, rate_2b, rate_2b_bias
from metamom.theory.ringing import critical_beta, swinging_step
from metamom.theory.stationary import Stationary, stable_limit, stationary
from metamom.theory.suggest import Explanation, explain, suggest_step
from metamom.theory.tracking import bound_tracking, inner_floor, moml_kappa, scsc_kappa, tracking_step

__all__ = [
    "Diagnosis",
    "DoubleStart",
    "Explanation",
    "LinearRate",
    "Method",
    "Powers",
    "Start",
    "Stationary",
    "Terms",
    "averaged_floor",
    "averaged_limit",
    "best_step",
    "bias_bound",
    "bias_bound_steps",
    "bound_1a",
    "bound_1b",
    "bound_1b_schedule",
    "bound_1c",
    "bound_dasha",
    "bound_diana",
    "bound_ef14",
    "bound_ef21",
    "bound_ef21_p",
    "bound_ef21_pp",
    "bound_ef21_sgd2m",
    "bound_ef21_sgdm",
    "bound_marina",
    "bound_tracking",
    "clip21_inactive",
    "clip21_steps",
    "composite_constants",
    "critical_beta",
    "dasha_step",
    "dasha_weight",
    "decentral",
    "delta0_from",
    "designs",
    "diagnose",
    "diana_alpha",
    "diana_step",
    "ef14_step",
    "ef21_p_step",
    "ef21_pp_step",
    "ef21_sgd2m_step",
    "ef21_sgdm_step",
    "ef21_step",
    "explain",
    "first_order_constants",
    "fixed_points",
    "inner_floor",
    "marina_step",
    "max_step",
    "max_step_1b",
    "max_step_2a",
    "mean_square_bound",
    "meta_smoothness",
    "method_step",
    "moml_kappa",
    "phi0_1b",
    "quadratic",
    "rate_2a",
    "rate_2a_affine",
    "rate_2b",
    "rate_2b_bias",
    "regression",
    "scsc_kappa",
    "stable_limit",
    "stationary",
    "suggest_step",
    "swinging_step",
    "terms_1a",
    "theta_star",
    "tracking_step",
    "variant_powers",
    "variant_step",
    "variant_weight",
    "wishart",
]
