"""The error for a training run that has diverged."""

from __future__ import annotations


class DivergedError(ArithmeticError):
    """A loss, a gradient or a weight is not finite.

    Args:
        what: the value that is not finite.
        step: the step at which it occurred.
        remedies: further advice, besides a smaller lr and clipped gradients.

    Attributes:
        step: as given; ``None`` in your own loop, from `metamom.MAML.backward`.
    """

    step: int | None

    def __init__(self, what: str, step: int, remedies: str = ", a smaller inner_lr, or float64") -> None:
        super().__init__(
            f"{what} is not finite at step {step}. Try a smaller lr, clipped gradients (bias=Clip(1.0), --bias "
            f"clip:1){remedies}; the last good checkpoint, if the run has a directory, is unchanged."
        )
        self.step = step
