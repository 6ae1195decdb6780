"""Ensembles: of given learners (`Ensemble`), and of the best checkpoints of a run (`ensemble_of`)."""

from __future__ import annotations

import copy
import math

from metamom.common.checks import check_whole
from metamom.evaluation.ensemble import Ensemble
from metamom.loading import LoadedRun
from metamom.training.checkpoints import Checkpoints, load

__all__ = ["Ensemble", "ensemble_of"]

MOST = 1000  # members


def ensemble_of(run: LoadedRun, size: int) -> tuple[Ensemble, list[int]]:
    """The checkpoints of a run with the best validations, as an ensemble.

    Args:
        run: from `metamom.load`.
        size: how many checkpoints, >= 1.

    Returns:
        The ensemble, and the numbers of steps before its checkpoints, the best first.

    Raises:
        ValueError: for a run that has kept fewer checkpoints with a validation that is a number.

    Example:
        >>> ensemble, steps = ensemble_of(metamom.load("runs/omniglot"), 3)  # doctest: +SKIP
        >>> metamom.evaluate(ensemble, sampler)  # doctest: +SKIP
    """
    from metamom.experiments.saved import learner_state, load_learner

    size = check_whole("the size of an ensemble", size, 1, MOST)
    checkpoints = Checkpoints(run.path / "checkpoints")
    kept = {step: checkpoints.path(step) for step in checkpoints.steps()}
    best_step, best = run.step, checkpoints.best
    if best.exists():
        state = load(best)
        best_step = int(state["step"])
        kept.setdefault(best_step, best)
    found = {line["step"] + 1: line["validation"] for line in run.metrics if "validation" in line}
    values = {step: value for step, value in found.items() if not math.isnan(value)}  # NaN has no order
    known = [step for step in kept if step in values]
    if len(known) < size:
        raise ValueError(
            f"an ensemble of {size} needs as many checkpoints with a validation; the run in {run.path} has kept "
            f"{len(known)}. Train with --evaluate-every and --checkpoint-every the same, and --keep-checkpoints as "
            "large as the number of validations."
        )
    better = -1 if _higher_is_better(run) else 1
    chosen = sorted(known, key=lambda step: (better * values[step], -step))[:size]
    members = []
    for step in chosen:
        learner, where = copy.deepcopy(run.learner), f"the checkpoint {kept[step]}"
        load_learner(learner, learner_state(load(kept[step]), where), where)
        members.append(learner)
    return Ensemble(members), chosen


def _higher_is_better(run: LoadedRun) -> bool:
    """Whether validations are accuracies: where training reports an accuracy, they are."""
    return any(line.get("accuracy") is not None for line in run.metrics)
