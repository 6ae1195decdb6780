"""The progress of a run, and its state in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.common.diverged import DivergedError as DivergedError
from metamom.common.numbers import counted, plural
from metamom.distributed import World, digest
from metamom.training.checkpoints import CheckpointError
from metamom.training.directory import RunDirectory
from metamom.training.restore import checked_generators, checked_head, load_parts


class Progress(NamedTuple):
    """The progress of a run.

    Attributes:
        done: completed steps.
        seconds: that they took.
        best: the best validation.
        unvalidated: the metrics of the last step, if its validation is due or under way; they are not logged yet.
    """

    done: int
    seconds: float
    best: float | None
    unvalidated: dict[str, Any] | None = None

    @property
    def logged(self) -> int:
        """The number of steps in ``metrics.jsonl``."""
        return self.done - (self.unvalidated is not None)


class Saved:
    """A run's state in its checkpoints: the parts of all processes, by name. Process 0 reads and writes them."""

    def __init__(
        self,
        parts: Mapping[str, Any],
        run: RunDirectory | None,
        world: World,
        run_dir: str | Path | None,
        workers: int | None = None,
    ) -> None:
        self.parts = parts
        self.run = run
        self.world = world
        self.path = run_dir
        self.workers = workers

    def restored(self, iterations: int) -> Progress | None:
        """Load the newest good checkpoint into the parts: all of it, or nothing.

        Raises:
            ValueError: if the run has already done more than ``iterations``.
            CheckpointError: for a checkpoint that does not match these parts, naming what is wrong.
        """
        state = self.world.broadcast_object(lambda: None if self.run is None else self.run.newest_state())
        if state is None:
            return None
        where = f"the checkpoints in {self.path}"
        step, seconds = checked_head(state, where)
        if "best" not in state:
            raise CheckpointError(f"there is no 'best' in {where}: the best validation so far, or None.")
        best, line = state["best"], state.get("unvalidated")
        if not (line is None or (isinstance(line, dict) and line.get("step") == step - 1)):
            raise CheckpointError(f"{where} should hold the metrics of step {step - 1}, or nothing, as 'unvalidated'.")
        progress = Progress(step, seconds, best, line)
        if not (best is None or isinstance(best, float)) or best != best:
            raise CheckpointError(f"{where} should hold the best validation, or None, as 'best'; got {best!r:.80}.")
        if best is None and self.world.broadcast_object(
            lambda: self.run is not None and self.run.has_validated(progress.logged)
        ):
            raise CheckpointError(
                f"{where} should hold the best validation as 'best', for metrics.jsonl has validations before step "
                f"{step}; got None."
            )
        if iterations < step:
            raise ValueError(
                f"the run in {self.path} has done {step} {plural(step, 'iteration')}, more than the total of "
                f"{iterations}. Pass iterations (--iterations) above {step} to go on, or take another "
                "directory for a shorter run."
            )
        state = {"callbacks": {}, **state}  # a run without callbacks saves none
        generators = checked_generators(state.get("rng"), where)
        entries = sum(p.numel() for p in self.parts["learner"].meta_parameters().values())
        load_parts(self.parts, state, where, entries=entries, workers=self.workers, step=step, calls=step)
        torch.set_rng_state(generators.cpu)
        if generators.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(generators.cuda[: torch.cuda.device_count()])
        return progress

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Save the state after ``progress.done`` steps, unless its weights are invalid."""
        weights = self.parts["learner"].state_dict()
        if not all(bool(p.isfinite().all()) for p in self.parts["learner"].parameters()):
            raise DivergedError("a weight", progress.done)
        self.world.check_same(
            f"the weights after {counted(progress.done, 'step')}",
            lambda: digest(w for w in weights.values() if isinstance(w, Tensor)),
            "Machines of different kinds round differently: use machines of one kind.",
        )
        if self.path is None:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if "bias" in state:
            state["bias"] = self.parts["bias"].gather(self.world.gather_objects(state["bias"]))
        # a model's random layers (dropout) draw from torch's generators
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        state |= {"seconds": progress.seconds, "best": progress.best, "rng": rng}
        with self.world.together():
            if self.run is not None:
                if progress.unvalidated is None:
                    self.run.checkpoints.save(progress.done, state, best=is_best)
                else:
                    state["unvalidated"] = progress.unvalidated
                    self.run.checkpoints.save_unvalidated(progress.done, state)
