"""Stop a run whose validation no longer improves."""

from __future__ import annotations

import math
from typing import Any

from metamom.common.checks import check_number, check_whole
from metamom.common.numbers import counted
from metamom.evaluation import Evaluation
from metamom.training.callbacks import Callback, RunState


class EarlyStopping(Callback):
    """Stop after ``patience`` validations in a row without improvement.

    The best weights are those of ``checkpoints/best.pt``. The state is saved with every checkpoint: a resumed run stops
    where an uninterrupted one would, and a stopped run stays stopped until ``patience`` is larger.

    Args:
        patience: validations without improvement, >= 1.
        min_delta: how much better than the best one a validation must be, >= 0. An accuracy must rise, a loss fall.

    Raises:
        TypeError: for options of the wrong type.
        ValueError: for options out of range.

    Example:
        >>> EarlyStopping(patience=5, min_delta=0.001)
        EarlyStopping(patience=5, min_delta=0.001)
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = check_whole("patience, the number of validations to wait,", patience, 1)
        check_number("min_delta", min_delta)
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be >= 0 and finite; got {min_delta}.")
        self.min_delta = float(min_delta)
        self.best: float | None = None
        self.waited = 0

    def on_start(self, state: RunState) -> None:
        if state.step == 0:
            self.best, self.waited = None, 0
        self._stop_if_over(state)

    def on_validation(self, state: RunState) -> None:
        assert state.validation is not None
        if self._improves(state.validation):
            self.best, self.waited = state.validation.mean[0], 0
        else:
            self.waited += 1
        self._stop_if_over(state)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: for a state that no `EarlyStopping` has saved.
        """
        best, waited = state["best"], check_whole("'waited' of EarlyStopping", state["waited"], 0)
        if not (best is None or isinstance(best, float)) or best != best:
            raise ValueError(f"'best' of EarlyStopping should be a number or None; got {best!r:.80}.")
        self.best, self.waited = best, waited

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self.patience}, min_delta={self.min_delta:g})"

    def _improves(self, validation: Evaluation) -> bool:
        value = validation.mean[0]
        if math.isnan(value) or self.best is None:
            return not math.isnan(value)
        gain = value - self.best if validation.metric == "accuracy" else self.best - value
        return gain > self.min_delta

    def _stop_if_over(self, state: RunState) -> None:
        if self.waited >= self.patience:
            best = "none" if self.best is None else f"{self.best:.4g}"
            state.stop(f"no better validation than {best} in the last {counted(self.waited, 'validation')}")
