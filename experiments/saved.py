"""Load a learner from the run directory it was trained in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    learner = recipe.learner(initial=False)
    load_parts(
        {"learner": learner}, state, f"the checkpoint in {path}", misfit="belongs to another model than its config.json"
    )
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
