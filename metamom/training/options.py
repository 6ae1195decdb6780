"""The options of a run: the keywords of `metamom.train`, each with its default, range, flag and place in the record.

To add one, add a field to `Options`, and the keyword to `train`. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamom.common.checks import AT_ONCE, MOST, check_number, check_whole
from metamom.common.choices import Aggregate
from metamom.common.flag_types import every, long_count, path, task_count
from metamom.common.kinds import named_type
from metamom.common.options import Flag, declared, either, option, whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from metamom.batch import Sampler
    from metamom.bias import Bias, BiasOperator
    from metamom.diagnostics.while_training import TrackBias
    from metamom.server.down import DownBias
    from metamom.server.participation import Participation
    from metamom.training.callbacks import Callback
    from metamom.training.schedulers import Schedulers


def _evaluate_every(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if (number := check_whole(name, value, -math.inf, MOST)) < 1:
        raise ValueError(f"{name} must be >= 1, or None for the end alone; got {value}.")
    return number


def _clip_grad(name: str, value: Any) -> float | None:
    if value is None:
        return None
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is the largest norm of the gradient, finite and > 0, or None for any; got {value}.")
    return float(value)


def _local_lr(name: str, value: Any) -> float | None:
    if value is None:
        return None
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(
            f"{name} is the step size of local steps, finite and > 0, or None for the optimizer's; got {value}."
        )
    return float(value)


def _worker_weights(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name} are positive numbers, one for each worker, such as [1, 2], or None; got {value!r:.80}."
        )
    for weight in value:
        check_number(f"each of {name}", weight)
    return tuple(float(weight) for weight in value)


def _evaluate_tasks(name: str, value: Any) -> int:
    if (number := check_whole(name, value, -math.inf, AT_ONCE)) < 2:
        raise ValueError(f"a validation needs at least 2 tasks; got {name}={value}.")
    return number


def _keep_checkpoints(name: str, value: Any) -> int:
    if (number := check_whole(name, value, -math.inf)) < 1:
        raise ValueError(f"the newest checkpoint must be kept: {name} must be >= 1; got {value}.")
    return number


def _run_dir(name: str, value: Any) -> Any:
    if not (value is None or isinstance(value, (str, Path))):
        raise TypeError(f"{name} is the path of a directory, or None; got {value!r:.80}.")
    return value


def _label(name: str, value: Any) -> Any:
    if not (value is None or isinstance(value, str)):
        raise TypeError(f"{name} is a text, for the progress, or None to show no progress; got {value!r:.80}.")
    return value


def _free(name: str, value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(each, str) for each in value):
        raise TypeError(f'{name} are names of settings, such as free=("device",); got {value!r:.80}.')
    return value


def _settings(name: str, value: Any) -> Any:
    wanted = f'{name} are JSON values by name, such as {{"lr": 0.1}}'
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{wanted}, or None; got {value!r:.80}.")
    for key, entry in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{wanted}; got the name {key!r:.80}.")
        try:
            json.dumps(entry, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            kind = named_type(entry)
            raise TypeError(
                f"{name} must hold JSON values: None, truth values, numbers, text, lists and dicts of them; got "
                f"{kind} as {key!r} ({error}). Leave it out, or put a number or a text in its place."
            ) from error
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keywords of `metamom.train`, which documents them. ``world`` is a separate argument there.

    The commands' flags for the first four are those of a recipe (`metamom.experiments.options`). An option without a
    check is checked along with the learner, the optimizer and the sampler (`metamom.training.plan`).
    """

    meta_batch: int = option(check=whole(1, AT_ONCE), record="settings")
    workers: int = option(1, check=whole(), record="settings")
    bias: Bias = option(None, record="settings")
    aggregate: Aggregate = option("mean", record="settings")
    attack: str | None = option(None, record="settings", later=True)
    participation: Participation | float | None = option(
        None,
        record="settings",
        later=True,
        as_json=lambda drawn: drawn.described() if hasattr(drawn, "described") else drawn,
    )
    worker_weights: Sequence[float] | None = option(
        None, check=_worker_weights, record="settings", later=True, as_json=lambda weights: weights and [*weights]
    )
    local_steps: int = option(1, check=whole(1, MOST), record="settings", later=True)
    local_lr: float | None = option(None, check=_local_lr, record="settings", later=True)
    down_bias: DownBias | BiasOperator | str | None = option(
        None,
        record="settings",
        later=True,
        as_json=lambda down: down.operator.spec if hasattr(down, "operator") else down,
    )
    track_bias: TrackBias | None = option(
        None,
        record="length",
        as_json=lambda plan: [int(plan.every), int(plan.draws)],
        later=True,
        flag=Flag(
            "bias",
            "measure the bias every N iterations, into metrics.jsonl; training itself does not change",
            "off",
            type=every,
            metavar="every=N",
            commands=("train",),
        ),
    )
    clip_grad: float | None = option(None, check=_clip_grad, record="settings", later=True)
    schedulers: Schedulers = option((), record="settings")
    validation: Sampler | None = option(None, record="settings")
    iterations: int = option(
        check=whole(1, MOST),
        record="length",
        flag=Flag("run", "total number, including those before a resume", type=long_count),
    )
    evaluate_tasks: int = option(
        100,
        check=_evaluate_tasks,
        record="length",
        flag=Flag("run", "tasks for each validation", default=200, type=task_count),
    )
    run_dir: str | Path | None = option(
        None,
        check=_run_dir,
        compared=lambda options: options.run_dir is not None,
        flag=Flag("run", "where the run goes", "a new folder in runs/", type=path, metavar="RUN"),
    )
    resume: bool = option(
        False,
        check=either,
        compared=lambda options: options.resume,
        flag=Flag("run", "continue the run in --run-dir, or start it"),
    )
    evaluate_every: int | None = option(
        None,
        check=_evaluate_every,
        record="length",
        compared=lambda options: options.evaluate_every if options.validation is not None else 0,
        flag=Flag(
            "run",
            "iterations between validations",
            "only at the end",
            type=long_count,
            metavar="N",
            commands=("train",),
        ),
    )
    checkpoint_every: int = option(
        500,
        check=whole(1, MOST),
        record="length",
        flag=Flag("run", "iterations between checkpoints", type=long_count, metavar="N", commands=("train",)),
    )
    keep_checkpoints: int = option(
        3,
        check=_keep_checkpoints,
        flag=Flag(
            "run",
            "newest checkpoints to keep, besides the best; evaluate --ensemble chooses among them",
            type=task_count,
            metavar="N",
            commands=("train",),
        ),
    )
    settings: Mapping[str, Any] | None = option(None, check=_settings)
    free: Collection[str] = option((), check=_free)
    callbacks: Callback | Sequence[Callback] | None = option(())
    tensorboard: bool = option(
        False,
        check=either,
        flag=Flag("run", "write TensorBoard files into the run directory", commands=("train",)),
    )
    label: str | None = option("train", check=_label)

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """The options among some keywords; those that are missing take their defaults."""
        return cls(**{each.name: keywords[each.name] for each in declared(cls) if each.name in keywords})

    def in_range(self) -> Self:
        """Check every option, and those that depend on each other, and convert NumPy's numbers.

        Raises:
            TypeError: for an argument of the wrong type, and for settings that are not JSON values.
            ValueError: for an argument out of range, or one that needs a ``run_dir``.
        """
        checks = {each.name: each.option.check for each in declared(self) if each.option.check is not None}
        plain = replace(self, **{name: check(name, getattr(self, name)) for name, check in checks.items()})
        if plain.workers < 1 or plain.meta_batch % plain.workers:
            raise ValueError(
                f"the number of workers must divide the meta-batch of {plain.meta_batch} tasks; got {plain.workers}."
            )
        if (plain.resume or plain.tensorboard) and plain.run_dir is None:
            raise ValueError("resume and tensorboard need a run_dir to read from and write to.")
        return plain

    def recorded(self, record: str) -> dict[str, Any]:
        """The options in a part of ``config.json``: the ``"settings"``, or the ``"length"`` as JSON values."""
        found = {}
        for each in declared(self):
            value = getattr(self, each.name)
            if each.option.record == record and not (each.option.later and value == each.default):
                found[each.name] = value if each.option.as_json is None else each.option.as_json(value)
        return found

    def compared(self) -> dict[str, Any]:
        """What processes must agree on besides the recorded options, or instead of them, by name."""
        return {each.name: each.option.compared(self) for each in declared(self) if each.option.compared is not None}
