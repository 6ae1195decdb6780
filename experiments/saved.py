"""Load a learner from the run directory it was trained in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from metamom.common.weights import differences
from metamom.experiments.recipes import Recipe
from metamom.maml.learner import MAML
from metamom.training.checkpoints import CheckpointError, CheckpointFormatError, Checkpoints, load
from metamom.training.directory import read_config
from metamom.training.restore import checked_head, load_parts

Which = Literal["best", "newest"]


class SavedRun(NamedTuple):
    """A run read from disk: its recipe, its learner, and the number of steps it was trained for."""

    recipe: Recipe
    learner: MAML
    step: int


def load_run(path: str | Path, which: Which = "best", *, device: str = "cpu") -> SavedRun:
    """Read a run of ``metamom train``.

    Args:
        path: the run directory.
        which: ``"best"`` by validation where there is one, else the newest; or ``"newest"``.
        device: the device to load the learner on, whatever it was trained on.

    Raises:
        ValueError: if there is no run, or it was made by another version or with another model.
        CheckpointError: if it has no usable checkpoint.
    """
    recipe = recipe_of(read_config(path)["settings"], path, device)
    state, step = read_state(path, which)
    learner, where = recipe.learner(initial=False), f"the checkpoint in {path}"
    load_learner(learner, learner_state(state, where), where)
    return SavedRun(recipe, learner, step)


def recipe_of(settings: dict[str, Any], path: str | Path, device: str) -> Recipe:
    """The recipe of a run of ``metamom train``, for this device and not compiled."""
    return replace(Recipe.from_settings(settings, f"the run in {path}"), device=device, compile=False)


def read_state(path: str | Path, which: Which = "best") -> tuple[dict[str, Any], int]:
    """The contents of a run's checkpoint, and the number of steps before it.

    Raises:
        CheckpointError: if it has no usable checkpoint.
    """
    checkpoints = Checkpoints(Path(path) / "checkpoints")
    if which == "best" and checkpoints.best.exists():
        try:
            state: dict[str, Any] | None = load(checkpoints.best)
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{error} The newest one may be intact: --checkpoint newest.") from error
    else:
        state = checkpoints.load_newest()
    if state is None:
        raise CheckpointError(f"the run in {path} has no checkpoint yet.")
    step, _ = checked_head(state, f"the checkpoint in {path}")
    return state, step


def learner_state(state: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The learner's state in a checkpoint.

    Raises:
        CheckpointError: if it has none.
    """
    found = state.get("learner")
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} holds no learner: another kind of run wrote it.")
    return found


def load_learner(learner: MAML, weights: Mapping[str, Any], where: str, *, given: bool = False) -> None:
    """Load a learner's state, all of it or nothing.

    Args:
        learner: around the run's model, or one of the caller's.
        weights: from `learner_state`.
        where: the origin of the state, for errors.
        given: whether the caller has made the model.

    Raises:
        ValueError: for a state that does not fit.
    """
    if given:
        check_fit(learner.state_dict(), weights, where)
    misfit = "belongs to another model than " + ("the one given" if given else "its config.json")
    load_parts({"learner": learner}, {"learner": weights}, where, misfit=misfit)


def check_fit(wanted: Mapping[str, Any], weights: Mapping[str, Any], where: str) -> None:
    """Refuse a model with other names or shapes.

    Raises:
        ValueError: listing what differs.
    """
    tensors = ({n: w for n, w in each.items() if isinstance(w, Tensor)} for each in (wanted, weights))
    if found := differences(*tensors):
        raise ValueError(
            f"{where} belongs to another model than the one given. In the checkpoint, {'; '.join(found)}. Pass the "
            "model that the run was trained with."
        )
