"""Constants of composite gradients: smoothness of the meta-objective, bias and error of MAML's estimators.

Legend: ``f_i(w) = L_i(u_i)``, ``u_i = w - alpha grad L_i(w)``; grad L_i is L-Lipschitz, its Hessian rho-Lipschitz;
``E ||grad l - grad L_i||^2 <= sigma_g^2`` and ``E ||(hess l - hess L_i) y||^2 <= sigma_h^2 ||y||^2`` for one sample's
loss l; m_in, m_h, m_out samples in the inner, Hessian and outer batches.
"""

from __future__ import annotations

from math import inf, sqrt

from metamom.bias.constants import Constants
from metamom.theory import checks


@checks.as_stated
def meta_smoothness(L: float, rho: float, alpha: float, outer_grad: float, *, convex: bool = False) -> float:
    """The smoothness of MAML's objective near w: ``L (1 + alpha L)^2 + alpha rho ||grad L_i(u_i)||``.

    For convex L_i with ``alpha <= 1/L``: ``L + alpha rho ||grad L_i(u_i)||``. It grows with the gradient, so use the
    largest gradient of the run to get L for `max_step`. Assumed: one exact inner step; L_i L-smooth with a
    rho-Lipschitz Hessian.

    Args:
        L: smoothness of the tasks' losses, > 0.
        rho: Lipschitz constant of their Hessians, >= 0 (0 for quadratics).
        alpha: inner step size, >= 0.
        outer_grad: ``||grad L_i(u_i)||``, >= 0; at most ``(1 + alpha L) ||grad L_i(w)||``.
        convex: whether the tasks' losses are convex.

    Raises:
        ValueError: for a number out of its range, or a convex case with ``alpha > 1/L``.

    Example:
        >>> meta_smoothness(L=1.0, rho=2.0, alpha=0.5, outer_grad=3.0)
        5.25

    Reference: docs/theory/maml.md, "Smoothness of the meta-objective"; of the form of Fallah, Mokhtari, Ozdaglar
    (2020).
    """
    checks.positive(L=L)
    checks.not_negative(rho=rho, alpha=alpha, outer_grad=outer_grad)
    if convex and alpha * L > 1:
        raise ValueError(f"the convex case needs alpha <= 1/L = {1 / L:.6g}; got alpha={alpha!r}. Pass convex=False.")
    return (L if convex else L * (1 + alpha * L) ** 2) + alpha * rho * outer_grad


@checks.as_stated
def bias_bound(L: float, rho: float, alpha: float, sigma_g: float, m: int, *, sigma_h: float | None = None) -> float:
    """A bound on the norm of the bias of one-step MAML from inner batches of m.

    Independent Hessian batch: ``(1 + alpha L) min(rho alpha^2 sigma_g^2 / (2m), L alpha sigma_g / sqrt(m))``. Hessian
    on the inner batch (the usual MAML, estimator "exact"): that and ``alpha^2 L sigma_h sigma_g / m``. O(1/m) needs a
    Lipschitz Hessian. The usual estimator is biased for f, but unbiased for the m-shot objective
    ``E_S L_i(w - alpha grad L_S(w))``: say which one a floor refers to.
    Assumed: one inner step, independent samples, a separate outer batch, the population's loss L-smooth with a
    rho-Lipschitz Hessian.

    Args:
        L: smoothness of the task's loss, > 0.
        rho: Lipschitz constant of its Hessian, >= 0; ``math.inf`` if it has none.
        alpha: inner step size, > 0.
        sigma_g: standard deviation of one sample's gradient, >= 0.
        m: inner batch.
        sigma_h: standard deviation of one sample's Hessian if the Hessian is taken on the inner batch, else None.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> bias_bound(L=1.0, rho=0.0, alpha=0.5, sigma_g=1.0, m=5, sigma_h=2.0)
        0.1

    Reference: docs/theory/maml.md, "Bias of the estimators".
    """
    checks.positive(L=L, alpha=alpha)
    checks.not_negative(sigma_g=sigma_g, sigma_h=sigma_h or 0.0)
    checks.counts(m=m)
    if not rho >= 0:
        raise ValueError(f"rho must be >= 0, or math.inf where the Hessian is not Lipschitz; got {rho!r}.")
    smooth = inf if rho == inf else rho * (alpha * sigma_g) ** 2 / (2 * m)
    curvature = (1 + alpha * L) * min(smooth, L * alpha * sigma_g / sqrt(m))
    return curvature + alpha**2 * L * (sigma_h or 0.0) * sigma_g / m


@checks.as_stated
def bias_bound_steps(
    L: float, rho: float, alpha: float, sigma_g: float, m: int, steps: int, outer_grad: float
) -> float:
    """A bound on the norm of the bias for J inner steps with fresh batches of m and independent Hessian batches.

    ``(1+alpha L)^J L D_J + alpha rho (1+alpha L)^{J-1} ||grad L(u_J)|| sum_{j<J} D_j``, where
    ``D_j^2 = alpha^2 sigma_g^2/m ((1+alpha L)^{2j} - 1) / ((1+alpha L)^2 - 1)``. It is O(1/sqrt(m)) and loose: on
    quadratics the bias is 0. Assumed: as for `bias_bound`, with a separate inner batch for each step.

    Args:
        L, rho, alpha, sigma_g, m: as for `bias_bound`, rho finite.
        steps: J.
        outer_grad: ``||grad L(u_J)||`` after J exact steps, >= 0.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(bias_bound_steps(L=1.0, rho=0.0, alpha=0.5, sigma_g=1.0, m=4, steps=1, outer_grad=1.0), 9)
        0.375

    Reference: docs/theory/maml.md, "Several inner steps".
    """
    checks.positive(L=L, alpha=alpha)
    checks.not_negative(rho=rho, sigma_g=sigma_g, outer_grad=outer_grad)
    checks.counts(m=m, steps=steps)
    grow = 1 + alpha * L
    spread = [alpha * sigma_g * sqrt(sum(grow ** (2 * i) for i in range(j)) / m) for j in range(steps + 1)]
    return grow**steps * L * spread[-1] + alpha * rho * grow ** (steps - 1) * outer_grad * sum(spread[:-1])


@checks.as_stated
def mean_square_bound(
    L: float,
    alpha: float,
    Lambda: float,
    sigma_g2: float,
    sigma_h2: float,
    outer_grad_sq: float,
    *,
    m_in: int,
    m_h: int,
    m_out: int,
    sigma_out2: float | None = None,
) -> float:
    """A bound on ``E ||g - grad f_i||^2`` of one-step MAML; the Hessian batch is the inner batch or independent of it.

    ``Lambda sigma_out2/m_out + 2 Lambda L^2 alpha^2 sigma_g2/m_in + 2 alpha^2 sigma_h2/m_h ||grad L_i(u_i)||^2``. A
    mean over n tasks divides the variance by n, but not the bias. Assumed: as for `bias_bound`, with the outer batch
    independent of the others.

    Args:
        L: smoothness of the task's loss, > 0.
        alpha: inner step size, > 0.
        Lambda: a bound on ``||I - alpha hess||^2`` over all Hessian batches, > 0.
        sigma_g2: variance of one sample's gradient at w, >= 0.
        sigma_h2: variance of one sample's Hessian, >= 0.
        outer_grad_sq: ``||grad L_i(u_i)||^2``, >= 0.
        m_in, m_h, m_out: sizes of the batches.
        sigma_out2: mean variance of one sample's gradient after the noisy inner step; sigma_g2 by default.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> mean_square_bound(1.0, 0.5, 1.0, 4.0, 0.0, 1.0, m_in=4, m_h=4, m_out=8)
        1.0

    Reference: docs/theory/maml.md, "Bias of the estimators".
    """
    checks.positive(L=L, alpha=alpha, Lambda=Lambda)
    sigma_out2 = sigma_g2 if sigma_out2 is None else sigma_out2
    checks.not_negative(sigma_g2=sigma_g2, sigma_h2=sigma_h2, outer_grad_sq=outer_grad_sq, sigma_out2=sigma_out2)
    checks.counts(m_in=m_in, m_h=m_h, m_out=m_out)
    inner = 2 * Lambda * (L * alpha) ** 2 * sigma_g2 / m_in
    return Lambda * sigma_out2 / m_out + inner + 2 * alpha**2 * sigma_h2 / m_h * outer_grad_sq


@checks.as_stated
def first_order_constants(L: float, alpha: float, zeta2: float) -> Constants:
    """First-order MAML with exact inner steps: ``B = kappa^2``, ``b2 = kappa^2 zeta2``.

    ``kappa = alpha L/(1 - alpha L)``. It does not depend on the batch size: larger batches do not help.
    Assumed: L-smooth task losses, one inner step.

    Args:
        L: smoothness of the tasks' losses, > 0.
        alpha: inner step size, in (0, 1/(2L)).
        zeta2: ``1/n sum ||grad f_i - grad f||^2 <= zeta2``.

    Returns:
        The constants of the bias; ``.floor`` is ``kappa^2 zeta2 / (1 - kappa^2)``.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> round(first_order_constants(L=2.0, alpha=0.1, zeta2=2.0).floor, 9)
        0.133333333

    Reference: docs/theory/maml.md, "Bias of the estimators".
    """
    checks.positive(L=L, alpha=alpha)
    checks.not_negative(zeta2=zeta2)
    if alpha * L >= 0.5:
        raise ValueError(
            f"first-order MAML needs alpha < 1/(2L) = {0.5 / L:.6g}; got alpha={alpha!r}, which makes B >= 1."
        )
    kappa2 = (alpha * L / (1 - alpha * L)) ** 2
    return Constants(kappa2, kappa2 * zeta2, 0.0, 0.0)


@checks.as_stated
def composite_constants(
    C_J: float,
    C_F: float,
    L_F: float,
    sigma_F2: float,
    sigma_g2: float,
    sigma_J2: float,
    *,
    m_F: int,
    m_g: int,
    m_J: int,
) -> Constants:
    """Constants for any ``f_i = F_i(g_i(w))`` with mini-batch estimates ``J^T grad F(g)``. All error counts as bias.

    ``b2 = C_J^2 sigma_F2/m_F + 2 C_J^2 L_F^2 sigma_g2/m_g + 2 C_F^2 sigma_J2/m_J``. Assumed: outer batch independent
    of the others, ``||J|| <= C_J`` in every batch, ``||grad F|| <= C_F``, grad F is L_F-Lipschitz.

    Args:
        C_J, C_F, L_F: as above, >= 0.
        sigma_F2, sigma_g2, sigma_J2: one sample's variances of grad F, g and J (in norm), >= 0.
        m_F, m_g, m_J: sizes of the batches.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> composite_constants(1, 1, 1, 4, 4, 0, m_F=4, m_g=8, m_J=8).b2
        2.0

    Reference: docs/theory/maml.md, "Bias of the estimators".
    """
    checks.not_negative(C_J=C_J, C_F=C_F, L_F=L_F, sigma_F2=sigma_F2, sigma_g2=sigma_g2, sigma_J2=sigma_J2)
    checks.counts(m_F=m_F, m_g=m_g, m_J=m_J)
    b2 = C_J**2 * (sigma_F2 / m_F + 2 * L_F**2 * sigma_g2 / m_g) + 2 * C_F**2 * sigma_J2 / m_J
    return Constants(0.0, b2, 0.0, 0.0)
