"""How far a run has come, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.checkpoints import CheckpointError
from metamom.distributed import World, digest
from metamom.run_directory import RunDirectory


class DivergedError(ArithmeticError):
    """A loss, a gradient or a weight is no longer finite.

    Args:
        what: is not finite.
        step: at which it was seen.
        remedies: what else there is to try, beside a smaller lr and clipped gradients.

    Attributes:
        step: as given.
    """

    def __init__(self, what: str, step: int, remedies: str = ", a smaller inner_lr, or float64") -> None:
        super().__init__(
            f"{what} is not finite at step {step}. Try a smaller lr, clipped gradients (bias=Clip(1.0), --bias "
            f"clip:1){remedies}; the last good checkpoint, if the run has a directory, is as it was."
        )
        self.step = step


class Progress(NamedTuple):
    """How far a run has come: steps done, seconds they took, best validation."""

    done: int
    seconds: float
    best: float | None


class Saved:
    """A run's state in its checkpoints: the parts by name, of all processes, which process 0 reads and writes."""

    def __init__(
        self, parts: Mapping[str, Any], run: RunDirectory | None, world: World, run_dir: str | Path | None
    ) -> None:
        self.parts = parts
        self.run = run
        self.world = world
        self.path = run_dir

    def restored(self) -> Progress | None:
        """Put the newest good checkpoint into the parts."""
        state = self.world.from_first(lambda: None if self.run is None else self.run.newest_state())
        if state is None:
            return None
        missing = [name for name in self.parts if name not in state]
        if missing:
            raise CheckpointError(
                f"the checkpoints in {self.path} hold no {', '.join(missing)}: another kind of run's."
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoints in {self.path} are of another model or optimizer: {why}") from error
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"][: torch.cuda.device_count()])
        return Progress(state["step"], state["seconds"], state["best"])

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Save the state after ``progress.done`` steps, unless its weights are not good."""
        weights = self.parts["learner"].state_dict()
        if not all(bool(p.isfinite().all()) for p in self.parts["learner"].parameters()):
            raise DivergedError("a weight", progress.done)
        self.world.check_same(
            f"the weights after {progress.done} steps",
            lambda: digest(w for w in weights.values() if isinstance(w, Tensor)),
            "Machines of different kinds round differently: take processes of one kind.",
        )
        if self.path is None:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if "bias" in state:
            state["bias"] = self.parts["bias"].merged(self.world.gather_objects(state["bias"]))
        # a model's own random layers (dropout) draw from torch's generators
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        state |= {"seconds": progress.seconds, "best": progress.best, "rng": rng}
        with self.world.together():
            if self.run is not None:
                self.run.checkpoints.save(progress.done, state, best=is_best)
