"""How the inner solves of a learner went: numbers of the last ones, and a warning for those that fell short.

Legend: T tasks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

from metamom.common.numbers import counted
from metamom.common.user_code import users_level
from metamom.maml.implicit.conjugate_gradients import Solved
from metamom.maml.implicit.lbfgs import Minimum
from metamom.maml.implicit.proximal import Proximal

INEXACT = 0.1  # the relative error of a meta-gradient of differences that is worth a warning
GREW = 1000.0  # times that the gradient of a problem without a minimum grows
FAR = 0.3  # the distance to the solution, relative to how far the weights moved, that is worth a warning

_FIXED: ContextVar[str | None] = ContextVar("fixed", default=None)


@contextmanager
def settings_fixed(cure: str) -> Iterator[None]:
    """Say in warnings what to do where the settings of the solvers cannot be changed."""
    token = _FIXED.set(cure)
    try:
        yield
    finally:
        _FIXED.reset(token)


class InnerSolve(NamedTuple):
    """How a proximal problem was solved for T tasks.

    Attributes:
        evaluations: of the support loss and its gradient, ``[T]``.
        residual: the norm of the objective's gradient at the end, relative to that at the start, ``[T]``.
        solved: whether the tolerance was reached, or the limit of rounding, ``[T]``.
    """

    evaluations: Tensor
    residual: Tensor
    solved: Tensor


class Solves:
    """The last inner solves of a learner, chunk by chunk. It warns of each kind of failure once.

    Attributes:
        inner: the last proximal problem; ``None`` before the first.
        implicit: the last systems of conjugate gradients, of ``"implicit"``.
    """

    def __init__(self) -> None:
        self.inner: InnerSolve | None = None
        self.implicit: Solved | None = None
        self._warned: set[str] = set()
        self._trying = False

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Neither keep nor warn of what is computed within, to measure its memory."""
        self._trying = True
        try:
            yield
        finally:
            self._trying = False

    def most(self, iterations: int) -> int:
        """``iterations``, or 2 to measure memory, which does not depend on them."""
        return min(iterations, 2) if self._trying else iterations

    def note(self, found: Minimum, moved: Tensor, settings: Proximal) -> None:
        """Keep how the proximal problem was solved, and warn if it was not.

        Args:
            found: the minimum.
            moved: how far the weights moved, ``[T]``.
            settings: of the solver. A tolerance that the user has chosen is taken as meant.
        """
        if self._trying:
            return
        residual = found.gradient / found.first.where(found.first > 0, 1)
        solved = found.solved() | ~found.first.isfinite()  # what is not finite is an error of its own
        self.inner = InnerSolve(found.evaluations, residual, solved)
        self.check(solved, residual, settings)
        off = found.gradient / settings.strength / moved.where(moved > 0, 1)  # the most, if the loss is convex there
        inexact = solved & (moved > 0) & (off > FAR)
        if settings.tolerance is None and bool(inexact.any()):
            self._warn(
                "inexact",
                f"the proximal problem was not solved exactly enough in {_share(inexact)}: where it is as flat as its "
                f"proximal term, the adapted weights may be off by {float(off[inexact].max()):.2g} times how far they "
                "moved. Ill-conditioned losses can do this.",
                f"Use a larger proximal (now {settings.strength:g}), float64 or a smaller tolerance.",
            )

    def check(self, solved: Tensor, residual: Tensor, settings: Proximal) -> None:
        """Warn of tasks whose proximal problem is not solved.

        Args:
            solved: ``[T]`` booleans.
            residual: relative, ``[T]``.
            settings: of the solver.
        """
        grew = ~solved & (residual > GREW)
        if not self._trying and bool(grew.any()):
            self._warn(
                "unbounded",
                f"the proximal problem was not solved in {_share(grew)}: its gradient grew to "
                f"{float(residual[grew].max()):.2g} times what it was, so it may have no minimum.",
                f"Use a larger proximal (now {settings.strength:g}); or, with estimator='perturbed', a smaller nu.",
            )
        elif not self._trying and not bool(solved.all()):
            self._warn(
                "inner",
                f"the proximal problem was not solved to its tolerance in {_share(~solved)} within "
                f"{settings.iterations} evaluations: its gradient fell to {float(residual[~solved].max()):.2g} of "
                "what it was, so the adapted weights and the meta-gradient are approximate. Kinks, as of ReLU, can "
                "keep a gradient from vanishing.",
                f"Otherwise, use a larger proximal (now {settings.strength:g}), more iterations or a larger "
                f"tolerance: proximal='{settings.strength:g},iterations={2 * settings.iterations},tolerance=1e-3'.",
            )

    def note_perturbed(self, error: Tensor, size: Tensor, settings: Proximal) -> None:
        """Warn of meta-gradients that are differences of solutions which are not exact enough for them.

        A tolerance that the user has chosen is taken as meant.

        Args:
            error: how far the meta-gradients may be off because of that, ``[T]``.
            size: their norms, ``[T]``.
            settings: of the solver.
        """
        inexact = error > INEXACT * size
        silent = self._trying or settings.tolerance is not None or "unbounded" in self._warned
        if not silent and bool(inexact.any()):
            share = float((error[inexact] / size[inexact]).max())
            most = f"{share:.2g} of their norm" if math.isfinite(share) else "more than their norm"
            self._warn(
                "perturbed",
                f"the proximal problem was not solved exactly enough for differences in {_share(inexact)}: the "
                f"meta-gradients may be off by {most}. Kinks, as of ReLU, and ill-conditioned losses can do this.",
                "Use a larger proximal or nu, float64, or estimator='implicit': "
                f"proximal='{settings.strength:g},nu=0.01'.",
            )

    def note_implicit(self, found: Solved, tolerance: float, settings: Proximal) -> None:
        """Keep how conjugate gradients went, and warn if they fell short."""
        if self._trying:
            return
        self.implicit = found
        if bool(found.negative.any()):
            self._warn(
                "negative",
                f"conjugate gradients met negative curvature in {_share(found.negative)}: the adapted weights are no "
                "minimum of the proximal problem there, and the meta-gradient is approximate.",
                f"Use a larger proximal (now {settings.strength:g}).",
            )
        short = (found.residual > tolerance) & ~found.negative
        if bool(short.any()):
            self._warn(
                "conjugate gradients",
                f"conjugate gradients did not reach their tolerance, {tolerance:.2g}, in {_share(short)} within "
                f"{settings.cg_iterations} products: the residual is up to {float(found.residual[short].max()):.2g}, "
                "so the meta-gradient is approximate.",
                f"Use a larger proximal (now {settings.strength:g}), or raise cg_iterations or cg_tolerance: "
                f"proximal='{settings.strength:g},cg_iterations={2 * settings.cg_iterations}'.",
            )

    def _warn(self, kind: str, text: str, cure: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{text} {_FIXED.get() or cure} (Further cases are not shown.)", stacklevel=users_level())


def _share(tasks: Tensor) -> str:
    return f"{int(tasks.sum())} of {counted(len(tasks), 'task')}"
