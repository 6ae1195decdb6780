"""Watch a run's losses, and warn once with the likely cause if they stall."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.linalg import vector_norm
from torch.optim import Optimizer

from metamom.bias import BiasOperator, Layout
from metamom.common.choices import FOLLOWING
from metamom.common.user_code import users_level
from metamom.maml.estimators import ESTIMATORS, Estimator
from metamom.optim import CompositeMomentum
from metamom.theory import diagnose

FIRST = 400  # steps before the first check; each further check at twice as many
EVERY = 8  # steps between two measurements of the momentum
FADING = 0.5  # ratio of ||v||^2 in the second half to the first; a run below it is still converging


class StallWarning(UserWarning):
    """The loss stalls or oscillates; the message names the likely cause."""


class StallMonitor:
    """Checks the second half of the losses after 400, 800, 1,600, ... steps with `metamom.theory.diagnose`.

    It does not change the run, and costs one norm of v every eighth step. With beta = 1, v equals g. Then it also keeps
    the gradient until the next measurement, and estimates the noise from the product of the two. It skips runs with
    another optimizer than `CompositeMomentum`, with several parameter groups, with normalised steps, or
    with a momentum that follows the weights.

    Args:
        optimizer: the run's optimizer.
        operator: the operator on the workers' gradients.
        estimator: the meta-gradient estimator; ``"exact"`` is unbiased for the loss that a run reports (the loss after
            a step on its own inner batch).
    """

    def __init__(
        self, optimizer: Optimizer, operator: BiasOperator | None = None, estimator: Estimator | None = None
    ) -> None:
        self.optimizer = optimizer
        sizes = Layout(p.shape for group in optimizer.param_groups for p in group["params"])
        self.biased = _biased(operator, estimator, sizes)
        self.remedy = _remedy(operator, estimator)
        self.losses: list[float] = []
        self.squares: list[tuple[int, float, float, float | None]] = []  # step, ||g||^2, ||v||^2, <g, earlier g>
        self.earlier: list[Tensor] | None = None
        self.next = FIRST
        groups = optimizer.param_groups
        ours = isinstance(optimizer, CompositeMomentum) and optimizer.variant not in FOLLOWING
        self.judges = ours and len(groups) == 1 and not groups[0]["normalize"]

    def update(self, loss: float, grad_norm: float) -> None:
        """Record a completed step. Warns at most once."""
        if not self.judges:
            return
        self.losses.append(loss)
        done = len(self.losses)
        group = self.optimizer.param_groups[0]
        if done % EVERY == 0:
            momenta = [state["momentum"] for state in self.optimizer.state.values()]
            v_sq = sum(float(vector_norm(v)) ** 2 for v in momenta)
            self.squares.append((done, grad_norm**2, v_sq, self._product(momenta) if group["beta"] == 1 else None))
        if done < self.next:
            return
        self.next *= 2
        late = [(g, v, product) for step, g, v, product in self.squares if step > done // 2]
        grad_sq = sum(g for g, _, _ in late) / len(late)
        v_sq = sum(v for _, v, _ in late) / len(late)
        products = [product for _, _, product in late if product is not None]
        sigma2 = max(grad_sq - sum(products) / len(products), 0.0) if products and group["beta"] == 1 else None
        found = diagnose(
            self.losses, group["beta"], float(group["lr"]), grad_sq=grad_sq, v_sq=v_sq, sigma2=sigma2,
            biased=self.biased, remedy=self.remedy,
        )  # fmt: skip
        half = len(late) // 2
        converging = sum(v for _, v, _ in late[half:]) < FADING * sum(v for _, v, _ in late[:half])
        if found.state == "stalled" and converging:
            return  # it converges slowly, or to a nonzero loss
        if found.state in ("stalled", "oscillating") and found.cause not in ("none", "unknown"):
            self.judges = False
            warnings.warn(
                f"after {done} steps: {found} (likely cause: {found.cause})", StallWarning, stacklevel=users_level()
            )

    def _product(self, gradients: list[Tensor]) -> float | None:
        """The product of these gradients with those of the last measurement, which have independent noise."""
        earlier, self.earlier = self.earlier, [g.clone() for g in gradients]
        if earlier is None or len(earlier) != len(gradients):
            return None
        return sum(float((a * b).sum()) for a, b in zip(earlier, self.earlier, strict=True))


def _is_biased(estimator: Estimator | None) -> bool:
    return estimator is not None and ESTIMATORS[estimator].biased is True


def _remedy(operator: BiasOperator | None, estimator: Estimator | None) -> str:
    """Advice that lowers the known bias, or may lower it."""
    cures = ['the estimator "exact"'] * _is_biased(estimator)
    if operator is not None and not (operator.feeds_back and not operator.keeps_start):
        cures.append(operator.remedy)
    return ", or ".join(cures) or "another estimator or error feedback"


def _biased(operator: BiasOperator | None, estimator: Estimator | None, sizes: Sequence[int]) -> bool | None:
    """Whether the gradients are biased, if known. Error feedback removes an operator's bias over time."""
    if _is_biased(estimator):
        return True
    if operator is None:
        return None if estimator is None else ESTIMATORS[estimator].biased
    if operator.feeds_back and not operator.keeps_start:
        return None
    try:
        constants = operator.constants(sum(sizes), zeta2=1.0, sizes=sizes)
    except ValueError:  # no constants are known
        return True
    return None if constants.B == constants.b2 == 0 else True
