"""Diagnose a run that stalls or oscillates from its losses: is it gamma, beta or bias?"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metamom.theory import checks
from metamom.theory.ringing import critical_beta, swinging_step

State = Literal["short", "diverging", "oscillating", "descending", "stalled"]
Cause = Literal["gamma", "beta", "bias", "none", "unknown"]


class Diagnosis(NamedTuple):
    """A guess with its reasons. `print` it to read them.

    Attributes:
        state: what the losses do; "short" if they are too few or too noisy to tell.
        cause: the likely cause; "none" if all is well, "unknown" if the numbers cannot tell.
        text: the reasons, the advice, and what the numbers cannot show.
        period: the period of the oscillation, in steps; None if there is none.
    """

    state: State
    cause: Cause
    text: str
    period: float | None = None

    def __str__(self) -> str:
        return self.text


@checks.as_stated
def diagnose(
    losses: Sequence[float] | Tensor,
    beta: float,
    gamma: float | None = None,
    *,
    grad_sq: float | None = None,
    v_sq: float | None = None,
    sigma2: float | None = None,
    biased: bool | None = None,
    remedy: str = "another estimator or error feedback",
    least: float = 0.0,
    window: int | None = None,
    tolerance: float = 0.01,
) -> Diagnosis:
    """Guess why a loss does not decrease: the step size, beta, or bias.

    If the loss grows or is infinite, the cause is gamma. If it oscillates, the period gives ``gamma lam`` (as on a
    quadratic): up to 1 a larger beta stops it, beyond 1 the cause is gamma. The loss counts as flat if a decrease by a
    tenth in the window, or by as much as since the start, can be excluded. The cause then follows from the mean squares
    of gradients and momentum over the window. Independent noise around a mean of zero has
    ``v_sq = beta/(2-beta) grad_sq``; any excess is a direction that persists over steps. If a direction persists and
    should decrease the loss only a little, gamma is small. If it should have decreased the loss far more, the steps go
    where the loss does not decrease: bias. If no direction persists, noise explains a loss of about
    ``gamma sigma2 / 4``. If that is a large part of the loss, the cause is gamma. If not, the estimates have mean zero:
    because of a bias, if there is a known one, or because the loss is the smallest that this model can reach.

    It cannot know whether a flat loss is the minimum: nothing in a run distinguishes that from a bias that cancels the
    gradient (a larger batch, another estimator or a smaller gamma does). It cannot know whether an oscillation comes
    from the data either (a repeating order of tasks also causes one).

    Args:
        losses: one a step, oldest first.
        beta: in (0, 1].
        gamma: the step size, > 0; None if unknown. Flat losses then stay unexplained.
        grad_sq: mean of ``||g||^2`` over the window, g the gradient given to the momentum step.
        v_sq: mean of ``||v||^2`` over the window.
        sigma2: variance of g, if it was measured; needed for beta = 1, where v is g.
        biased: whether the estimator or the bias operator is known to be biased; None if not known.
        remedy: what lowers that bias, for the text.
        least: a lower bound of the loss; 0 is right for squared errors and cross-entropy.
        window: the number of last steps to use; half of all by default.
        tolerance: a change over the window below this fraction of the loss counts as none.

    Raises:
        ValueError: for a number out of its range, or a window that the history does not fill.

    Example:
        >>> diagnose([2.0**k for k in range(40)], beta=0.1).cause
        'gamma'

    Reference: docs/theory/quadratics.md, "Diagnosis from a loss history".
    """
    checks.weight(beta=beta)
    checks.positive(tolerance=tolerance)
    checks.finite(least=least)
    if window is not None:
        checks.counts(window=window)
    for name, value in {"gamma": gamma, "grad_sq": grad_sq, "v_sq": v_sq, "sigma2": sigma2}.items():
        if value is not None:
            checks.not_negative(**{name: value})
    history = torch.as_tensor(losses, dtype=torch.float64).detach().cpu().flatten()
    window = max(_SHORTEST, len(history) // 2) if window is None else window
    if window < _SHORTEST:
        raise ValueError(f"a window needs {_SHORTEST} steps or more; got {window!r}.")
    if not bool(history.isfinite().all()):
        return Diagnosis("diverging", "gamma", "The loss became infinite or NaN: lower gamma (or clip the gradients).")
    if len(history) < window:
        return Diagnosis("short", "unknown", f"{len(history)} losses are too few for a window of {window} steps.")
    tail = history[-window:]
    change, error, sure, rest = _trend(tail)
    size = max(float(tail.mean()) - least, 1e-300)
    if sure and change > max(tolerance, 0.1) * size:
        return Diagnosis("diverging", "gamma", f"The loss rose by {change:.3g} in {window} steps: lower gamma.")
    period = _period(rest)
    if period is not None and float(rest.std()) > tolerance * size:
        return _swings(period, beta)
    fall = -change
    if sure and fall > tolerance * size:
        return Diagnosis("descending", "none", f"The loss is still falling, by {fall:.3g} in the last {window} steps.")
    said = f"The losses are too noisy over {window} steps: a change of {change:.3g} may be chance."
    noisy = Diagnosis("short", "unknown", said)
    likely = fall > max(_ERRORS * error, _SLOW * size)  # a weaker criterion than the test over pairs of blocks
    if 2 * error > size or likely or fall > _FLAT * size or change > max(2 * error, _FLAT * size):
        return noisy
    parts = _parts(beta, grad_sq, v_sq, sigma2)
    found = _flat(size, fall, window, beta, gamma, parts, biased, remedy)
    pace = -_trend(history)[0] * window / len(history)  # the window's decrease if the history decreased evenly
    may_fall = max(fall, 0.0) + _ERRORS * error > (min(pace, _FLAT * size) if pace > _SLOW * size else _FLAT * size)
    if found.cause != "unknown" and may_fall and not _made_by_noise(size, beta, gamma, parts):
        return noisy  # the gradients show whether noise causes the loss; other causes need a flat loss
    return found


_SHORTEST = 20
_BLOCKS = 8  # number of blocks; block means are nearly independent even if single losses are not
_SURE = 24  # of the 28 pairs of blocks (Kendall's test): twice in 1,000 windows without a trend
_ERRORS = 2.5  # standard errors of a slope from 8 blocks that are more than chance (Student's t, 6 degrees, 95 %)
_SLOW = 0.03  # fraction of the loss: a smaller decrease in a window does not count
_FLAT = 0.1  # fraction of the loss: a loss that decreases by more in a window has not stalled
_SWING_SHARE = 0.7  # fraction of the power around the trend that is within a fifth of one frequency
_FEWEST = 4  # periods in a window; slow noise can look like fewer


def _trend(tail: Tensor) -> tuple[float, float, bool, Tensor]:
    """The fitted line's change over the window, its standard error, whether it is significant, and the residuals."""
    t = torch.linspace(-0.5, 0.5, len(tail), dtype=tail.dtype)
    slope = float((t * tail).sum() / (t * t).sum())
    means = torch.stack([block.mean() for block in tail.tensor_split(_BLOCKS)])
    above = torch.sign(means.unsqueeze(1) - means.unsqueeze(0)).tril().sum()  # rising pairs minus falling pairs
    centres = torch.stack([block.mean() for block in t.tensor_split(_BLOCKS)])
    beside = means - means.mean() - slope * centres
    error = sqrt(float((beside**2).sum()) / (_BLOCKS - 2) / float((centres**2).sum()))
    return slope, error, abs(float(above)) >= _SURE, tail - tail.mean() - slope * t


def _period(rest: Tensor) -> float | None:
    """The period of an oscillation that stands out of the noise and repeats often enough."""
    power = torch.fft.rfft(rest).abs().square()[1:]  # cycles per window: 1, 2, ...
    if not float(power.sum()) > 0:
        return None
    cycles = torch.arange(1, len(power) + 1)
    peak = int(power[_FEWEST - 1 :].argmax()) + _FEWEST
    near = (cycles - peak).abs() <= max(1, peak // 5)
    share = float(power[near].sum() / power.sum())
    by_chance = float(near.sum()) / len(power)
    if share < max(_SWING_SHARE, 3 * by_chance):
        return None
    return len(rest) / float((cycles[near] * power[near]).sum() / power[near].sum())


def _swings(period: float, beta: float) -> Diagnosis:
    """Decide which parameter stops the oscillation."""
    text = f"The loss oscillates with a period of {period:.3g} steps."
    if beta == 1:
        remedy = (
            " Plain SGD oscillates where gamma times the curvature exceeds 1: lower gamma, unless the data have this "
            "period."
        )
        return Diagnosis("oscillating", "gamma", text + remedy, period)
    step = swinging_step(beta, 2 * period)  # the loss oscillates twice as fast as the weights around their minimum
    r = sqrt(1 - beta)
    factor = step * (1 + r) / (1 - r)
    text += f" On a quadratic that is gamma times curvature = {step:.3g} at beta={beta:g}."
    if step > 1:
        text += " Even plain SGD would overshoot the minimum there: lower gamma"
        return Diagnosis(
            "oscillating", "gamma", f"{text}, by a factor of {factor:.3g} to stop the oscillation.", period
        )
    text += (
        f" The momentum carries the weights past the minimum: beta >= {critical_beta(step):.2g} stops this at the "
        f"same gamma (a gamma {factor:.3g} times smaller would too, but it is slower)."
    )
    if period >= 2 and swinging_step(beta, max(period, 2)) > 1:
        text += (
            " If the weights oscillate with the same period as the loss (away from a minimum), gamma is too "
            "large instead."
        )
    return Diagnosis("oscillating", "beta", text, period)


def _parts(beta: float, grad_sq: float | None, v_sq: float | None, sigma2: float | None) -> tuple[float, float] | None:
    """The variance of the gradients, and the square of their persistent direction, if known."""
    if sigma2 is not None:
        kept = grad_sq - sigma2 if grad_sq is not None else 0.0
        return sigma2, max(kept, 0.0)
    if grad_sq is None or v_sq is None or beta == 1:
        return None
    noise = min(max((grad_sq - v_sq) / (1 - beta / (2 - beta)), 0.0), grad_sq)
    return noise, grad_sq - noise


def _made_by_noise(size: float, beta: float, gamma: float | None, parts: tuple[float, float] | None) -> bool:
    """Whether the gradients have no persistent direction, and their noise explains over a quarter of the loss."""
    if gamma is None or parts is None:
        return False
    noise, kept = parts
    return kept <= beta / (2 - beta) * noise and gamma * noise / 4 > size / 4


def _flat(
    size: float,
    fall: float,
    window: int,
    beta: float,
    gamma: float | None,
    parts: tuple[float, float] | None,
    biased: bool | None,
    remedy: str,
) -> Diagnosis:
    """Diagnose a flat loss: gamma, bias, or the minimum."""
    head = f"The loss has stalled: it changed by {-fall:.3g} in {window} steps, from a level of {size:.3g}."
    if gamma is None or parts is None:
        wanted = "gamma, grad_sq and v_sq" if beta < 1 else "gamma, grad_sq and sigma2 (for beta=1)"
        suspect = f" The gradients are known to be biased, so suspect the bias first: try {remedy}." if biased else ""
        ask = f" Losses alone cannot tell noise, bias and the minimum apart: pass {wanted}."
        return Diagnosis("stalled", "bias" if biased else "unknown", head + suspect + ask)
    noise, kept = parts
    expected = gamma * kept * window  # the decrease from steps along a gradient with this square
    if kept > beta / (2 - beta) * noise:
        head += f" The gradients have a persistent direction (squared mean about {kept:.3g})"
        if expected > 4 * max(fall, 0.0) + 0.1 * size:
            why = f" that should have lowered the loss by {expected:.3g}: it does not point downhill."
            if biased is False:
                smaller = " Without bias, the valley is too narrow for the steps: try a smaller gamma."
                return Diagnosis("stalled", "gamma", head + why + smaller)
            likely = f" Likely bias: try {remedy}. Or the valley is narrow: try a smaller gamma."
            return Diagnosis("stalled", "bias", head + why + likely)
        return Diagnosis("stalled", "gamma", f"{head}, and the steps are small: raise gamma.")
    explained = gamma * noise / 4
    head += f" The gradients have no persistent direction; their noise explains about {explained:.3g} of the loss."
    if _made_by_noise(size, beta, gamma, parts):
        lower = " Likely noise at this gamma: lower gamma, or average over more tasks or workers. Beta will not help."
        return Diagnosis("stalled", "gamma", head + lower)
    if biased is False:
        return Diagnosis("stalled", "unknown", head + " Without bias, that looks like the best this model can do here.")
    if biased:
        return Diagnosis("stalled", "bias", f"{head} Likely bias, or the best that this model can do: try {remedy}.")
    either = (
        " It is bias, or the best that this model can do: a larger inner batch or another estimator would show which."
    )
    return Diagnosis("stalled", "unknown", head + either)
