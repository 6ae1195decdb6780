"""How private clipped and noisy messages are, by Opacus' accountant."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

from metamom.bias.base import BiasOperator
from metamom.bias.clip import Clip
from metamom.bias.compose import Compose
from metamom.bias.double_momentum import Clip21SGD2M
from metamom.bias.feedback_base import ErrorFeedback
from metamom.bias.function import as_operator
from metamom.bias.marina import MARINA
from metamom.bias.noise import GaussianNoise
from metamom.common.checks import check_number


def noise_multiplier(operator: BiasOperator) -> float:
    """The noise's deviation over the sensitivity of a message, ``sigma / (2 tau)``.

    Two gradients clipped to norm tau differ by at most 2 tau, whatever a worker's data are.

    Raises:
        ValueError: for an operator that does not clip whole messages and then add Gaussian noise.
    """
    if isinstance(operator, Clip21SGD2M) and operator.noise:
        return operator.noise / (2 * operator.max_norm)
    inner = operator.operator if isinstance(operator, ErrorFeedback) and not isinstance(operator, MARINA) else operator
    for first, second in pairwise(inner.operators) if isinstance(inner, Compose) else ():
        if isinstance(first, Clip) and not first.per_tensor and isinstance(second, GaussianNoise):
            return second.sigma / (2 * first.max_norm)
    raise ValueError(
        f"{operator.spec} does not bound what a message reveals: take clip21-sgd2m:TAU:noise=SIGMA, or an operator "
        "with clip:TAU+noise:SIGMA in a row."
    )


def privacy_spent(operator: BiasOperator | str, steps: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy of one worker's messages in a run.

    It is local privacy: for each worker, towards anyone who sees all its messages (the server too), if all its data are
    replaced by others. The messages of a run are ``steps`` Gaussian mechanisms in a row, each with noise of
    ``sigma / (2 tau)`` times its sensitivity; no amplification by sampling is claimed. It needs noise that nobody can
    draw again, so a secret ``seed``, and takes floating-point numbers for real ones.

    Args:
        operator: `Clip21SGD2M` with noise, or an operator with clipping and `GaussianNoise` in a row
            (``"clip:1+noise:0.1"``), also within error feedback.
        steps: the number of messages of a worker, >= 1.
        delta: in (0, 1), well below one over the number of people.

    Returns:
        epsilon, an upper bound that is less than 0.02 above the smallest one.

    Raises:
        ImportError: without Opacus (``pip install "metamom[privacy]"``).
        TypeError: for anything but an operator.
        ValueError: for another operator, or a number out of range.

    Example:
        >>> privacy_spent("clip21-sgd2m:1:noise=10", steps=100, delta=1e-5)  # doctest: +SKIP
        10.007...

    Reference:
        Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy", 2021, as in Opacus' ``PRVAccountant``.
    """
    given = as_operator(operator)
    if given is None:
        raise TypeError("privacy_spent takes an operator with clipping and noise; got None.")
    multiplier = noise_multiplier(given)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is the number of a worker's messages, a whole number >= 1; got {steps!r}.")
    check_number("delta", delta)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1); got {delta}.")
    try:
        accountants = import_module("opacus.accountants")
    except ImportError as error:
        raise ImportError(
            'privacy_spent asks Opacus, which is not installed: pip install "metamom[privacy]".'
        ) from error
    accountant = accountants.PRVAccountant()
    accountant.history = [(multiplier, 1.0, steps)]  # noise, share of the data in each message, number of messages
    return float(accountant.get_epsilon(delta=delta))
