"""What changes over the first iterations of training: the weights of the losses after each inner step, and the order.

Legend: J inner steps, N iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metamom.common.checks import check_whole
from metamom.maml.estimators import ESTIMATORS, Estimator

MOST = 10**12  # iterations


def step_weights(iteration: int, anneal: int, steps: int) -> list[float]:
    """The weights of the query losses after each of J inner steps.

    They are all 1/J at first. Those before the last fall linearly to 0 at iteration N, and the last one has the rest.

    Args:
        iteration: how many there were before, >= 0.
        anneal: N >= 1.
        steps: J >= 1.

    Returns:
        J weights >= 0, which sum to 1.

    Example:
        >>> step_weights(0, 10, 4), step_weights(5, 10, 4), step_weights(10, 10, 4)
        ([0.25, 0.25, 0.25, 0.25], [0.125, 0.125, 0.125, 0.625], [0.0, 0.0, 0.0, 1.0])

    Reference:
        Antoniou, Edwards, Storkey (2019), "How to train your MAML", section 4, multi-step loss optimization; their
        code stops at 0.03/J instead of 0.
    """
    before = max(0.0, 1 - iteration / anneal) / steps
    return [before] * (steps - 1) + [1 - (steps - 1) * before]


class Annealing(nn.Module):
    """Counts the iterations of a learner, for options that depend on them. It is a part of the learner's state.

    Args:
        multi_step: N of `step_weights`; 0 for the loss after the last step only.
        first_order: the number of first iterations without second derivatives.
        steps: J.

    Raises:
        ValueError: for negative numbers.
        TypeError: for anything but whole numbers.
    """

    iteration: Tensor  # int64, for the state dict
    weights: Tensor  # [J], float64: an input of compiled graphs, so it changes in place

    def __init__(self, multi_step: int, first_order: int, steps: int) -> None:
        super().__init__()
        self.multi_step = check_whole("multi_step", multi_step, 0, MOST)
        self.first_order = check_whole("first_order_until", first_order, 0, MOST)
        self.number = 0  # the iteration; reading a tensor would wait for a GPU, and cannot be compiled
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(steps, dtype=torch.float64), persistent=False)
        self.follow(steps)
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    def count(self) -> None:
        """One more iteration is done."""
        self.iteration += 1
        self.number += 1
        self.follow(len(self.weights))

    def follow(self, steps: int) -> None:
        """Compute the weights of this iteration, for J steps."""
        if len(self.weights) != steps:
            self.weights = self.weights.new_zeros(steps)
        if self.number < self.multi_step:
            found = step_weights(self.number, self.multi_step, steps)
            self.weights.copy_(torch.tensor(found, dtype=torch.float64))

    def objective(self) -> Tensor | None:
        """The weights ``[J]``; ``None`` if only the loss after the last step counts."""
        return self.weights if self.number < self.multi_step and len(self.weights) > 1 else None

    def estimator(self, own: Estimator) -> Estimator:
        """The estimator of this iteration."""
        return "first-order" if self.number < self.first_order else own

    def describe(self) -> dict[str, int]:
        """The options that are in use."""
        options = {"multi_step": self.multi_step, "first_order_until": self.first_order}
        return {name: value for name, value in options.items() if value}


def check_annealing(estimator: Estimator, multi_step: int, first_order: int) -> None:
    """Refuse options that the estimator cannot follow.

    Raises:
        ValueError: for tracked estimators, and for ones that have no second derivatives or split the support set.
    """
    if multi_step and ESTIMATORS[estimator].averages is not None:
        raise ValueError(
            f"estimator {estimator!r} has one query loss, at a moving average of adapted weights: leave out "
            f"multi_step={multi_step}, or use estimator='exact'."
        )
    if first_order and estimator != "exact":
        raise ValueError(
            f"first_order_until={first_order} is for estimator 'exact', which begins without second derivatives; got "
            f"{estimator!r}."
        )


def _loaded(annealing: Annealing, keys: object) -> None:
    annealing.number = int(annealing.iteration)
    annealing.follow(len(annealing.weights))
