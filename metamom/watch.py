"""Watches a run's losses, and says once what is likely to hold it up."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch.linalg import vector_norm
from torch.optim import Optimizer

from metamom.bias import BiasOperator
from metamom.optim import CompositeMomentum
from metamom.theory import diagnose

FIRST = 400  # steps before the first look; the next ones at twice as many
EVERY = 8  # steps between two measurements of the momentum


class StallWarning(UserWarning):
    """A loss that stalls or swings, and the likely cause."""


class Watch:
    """Looks at the second half of the losses after 400, 800, 1,600, ... steps, by `metamom.theory.diagnose`.

    It changes nothing in the run and costs a norm of v in every eighth step. Runs of another optimizer than
    `CompositeMomentum`, of several groups, or with normalised steps are not judged.

    Args:
        optimizer: of the run.
        operator: of the workers' gradients.
    """

    def __init__(self, optimizer: Optimizer, operator: BiasOperator | None) -> None:
        self.optimizer = optimizer
        self.biased = _biased(operator, [p.numel() for group in optimizer.param_groups for p in group["params"]])
        self.losses: list[float] = []
        self.squares: list[tuple[int, float, float]] = []  # step, ||g||^2, ||v||^2
        self.next = FIRST
        groups = optimizer.param_groups
        self.judges = isinstance(optimizer, CompositeMomentum) and len(groups) == 1 and not groups[0]["normalize"]

    def look(self, loss: float, grad_norm: float) -> None:
        """Take in a step that is done; may warn, once."""
        if not self.judges:
            return
        self.losses.append(loss)
        done = len(self.losses)
        if done % EVERY == 0:
            norms = [float(vector_norm(state["momentum"])) for state in self.optimizer.state.values()]
            self.squares.append((done, grad_norm**2, sum(norm**2 for norm in norms)))
        if done < self.next:
            return
        self.next *= 2
        late = [(g, v) for step, g, v in self.squares if step > done // 2]
        grad_sq, v_sq = (sum(values) / len(late) for values in zip(*late, strict=True))
        group = self.optimizer.param_groups[0]
        found = diagnose(self.losses, group["beta"], float(group["lr"]), grad_sq=grad_sq, v_sq=v_sq, biased=self.biased)
        if found.state in ("stalled", "oscillating") and found.cause not in ("none", "unknown"):
            self.judges = False
            warnings.warn(f"after {done} steps: {found} (likely cause: {found.cause})", StallWarning, stacklevel=2)


def _biased(operator: BiasOperator | None, sizes: Sequence[int]) -> bool | None:
    """Whether an operator is known to bias the gradients; error feedback takes its bias away in time."""
    if operator is None or operator.feeds_back:
        return None
    try:
        constants = operator.constants(sum(sizes), zeta2=1.0, sizes=sizes)
    except ValueError:  # none are known
        return True
    return None if constants.B == constants.b2 == 0 else True
