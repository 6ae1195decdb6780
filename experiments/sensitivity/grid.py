"""Run the fields of a grid one after the other, and store each outcome as soon as it is known."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from metamom.batch import Sampler
from metamom.bias import NonFiniteError, parse
from metamom.common.files import write_atomically
from metamom.common.schema import read_record
from metamom.evaluation import evaluate
from metamom.experiments.sensitivity.methods import METHODS, methods_at
from metamom.experiments.sensitivity.settings import SETTINGS, Setting

PLAN = ("iterations", "evaluate_every", "validation_tasks", "meta_batch", "workers")


class Field(NamedTuple):
    """The coordinates of a run: a setting, a level of bias, a method, its step size, beta and seed."""

    setting: str
    level: str
    method: str
    lr: float
    beta: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        errors: at each validation, the first for the initial weights; up to the last that was finite.
        diverged: whether a gradient or an error was not finite, or the last error exceeds the first.
    """

    errors: tuple[float, ...]
    diverged: bool

    def steps_to(self, target: float, every: int) -> float:
        """Iterations until a validation was at or below the target; infinite if never."""
        return next((every * i for i, error in enumerate(self.errors) if error <= target), math.inf)


def fields(name: str) -> Iterator[Field]:
    """All of a setting's grids, seed by seed; a seed's learner is compiled once and reused."""
    setting = SETTINGS[name]
    for seed in range(setting.seeds):
        for level in setting.levels:
            for key, method in methods_at(setting.methods, level).items():
                for lr in method.grid(setting.lr_scale, setting.lr_count):
                    for beta in setting.betas:
                        yield Field(name, level, key, lr, beta, seed)


class Trainer:
    """Runs of one setting with one learner, reset to its initial weights before each run.

    Args:
        setting: what to train.
        root: the folder of the data; ``None`` to look where the samplers do.
    """

    def __init__(self, setting: Setting, root: str | None = None) -> None:
        self._setting, self._root = setting, root
        self._learner = setting.learner(0, setting.compiled)
        self._seed: int | None = None

    def run(self, field: Field) -> Outcome:
        """Train once, from the initial weights of the field's seed."""
        setting, method = self._setting, METHODS[field.method]
        self._begin(field.seed)
        spec = method.bias(field.level, field.beta)
        assert spec is not None
        operator = parse(spec)
        optimizer = method.optimizer(self._learner.parameters(), field.lr, field.beta)
        errors = [self._validate()]
        for k in range(setting.iterations):
            optimizer.zero_grad()
            try:
                batch = self._training.sample(k, setting.meta_batch)
                self._learner.backward(batch, workers=setting.workers, bias=operator)
            except NonFiniteError:
                return Outcome(tuple(errors), True)
            optimizer.step()
            if (k + 1) % setting.evaluate_every == 0:
                error = self._validate()
                if not math.isfinite(error):
                    return Outcome(tuple(errors), True)
                errors.append(error)
        return Outcome(tuple(errors), errors[-1] > errors[0])

    def _begin(self, seed: int) -> None:
        """The initial weights and the tasks of a seed."""
        if seed != self._seed:
            self._seed = seed
            self._training, self._validation = self._setting.tasks(seed, self._root)
            self._start = copy.deepcopy(self._setting.learner(seed, False).state_dict())
        self._learner.load_state_dict(self._start)

    def _validate(self) -> float:
        seen = evaluate(
            self._learner, self._validation, tasks=self._setting.validation_tasks, steps=(1,), stream="validation"
        )
        return seen.mean[0] if seen.metric == "loss" else 1 - seen.mean[0]

    _training: Sampler
    _validation: Sampler
    _start: dict[str, torch.Tensor]


@dataclass(frozen=True)
class KeptRun(Outcome):
    """A run in the file of outcomes: its `Field` and its `Outcome`."""

    setting: str
    level: str
    method: str
    lr: float
    beta: float
    seed: int


@dataclass(frozen=True)
class Kept:
    """The contents of the file of outcomes."""

    plan: dict[str, int | float]
    runs: list[KeptRun]


def search(name: str, path: Path, *, root: str | None = None) -> dict[Field, Outcome]:
    """Run every field of a setting that is not in the file yet.

    Args:
        name: the setting's name.
        path: the file of outcomes, rewritten after each run.
        root: the folder of the data.

    Raises:
        ValueError: if the file is damaged, or its runs have other lengths or batches than the setting.
    """
    setting = SETTINGS[name]
    plan = {key: getattr(setting, key) for key in PLAN}
    known = _read(path, plan)
    wanted = list(fields(name))
    missing = [field for field in wanted if field not in known]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(setting, root)
        for field in tqdm(missing, desc=name, unit="run", disable=None):
            known[field] = trainer.run(field)
            runs = [{**at._asdict(), **asdict(outcome)} for at, outcome in known.items()]
            write_atomically(path, json.dumps({"plan": plan, "runs": runs}, indent=0).encode())
    return {field: known[field] for field in wanted}


def _read(path: Path, plan: dict[str, float]) -> dict[Field, Outcome]:
    """The outcomes in a file, none if there is no file."""
    if not path.exists():
        return {}
    there = read_record(Kept, path)
    if there.plan != plan:
        raise ValueError(
            f"{path} holds runs of another plan: wanted {plan}; got {there.plan}. Move it away, or choose another "
            "--run-dir."
        )
    return {
        Field(run.setting, run.level, run.method, run.lr, run.beta, run.seed): Outcome(run.errors, run.diverged)
        for run in there.runs
    }
