"""Make the learner and the tasks of a run of ``metamom.train(run_dir=...)`` again, from its ``config.json``.

The file says how the learner adapts and, for metamom's own models, losses and tasks, what they are. Other models and
losses have to be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import tasks
from metamom.batch import TaskSampler
from metamom.experiments.recipes import Recipe
from metamom.maml.estimators import support_parts
from metamom.maml.learner import MAML
from metamom.maml.loss_readings import LossFn
from metamom.maml.norm import resolved
from metamom.maml.task_weights import Params
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks.normalize import check_constants
from metamom.tasks.preprocessing import Preprocessing
from metamom.training.plan import describe_loss

MODEL = "model."  # prefixes in a learner's state
STEP_SIZE = "step_sizes.alpha"


def is_python_run(settings: Mapping[str, Any]) -> bool:
    """Whether the settings are those that `metamom.train` derives from its arguments."""
    return isinstance(settings.get("learner"), dict) and isinstance(settings.get("model"), str)


def known_model(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module | None:
    """One of metamom's own models, if the run trained one; sizes come from the weights."""
    weights = {name.removeprefix(MODEL): w for name, w in state.items() if name.startswith(MODEL)}
    matrices = [w for w in weights.values() if w.dim() == 2]
    made: nn.Module | None = None
    if settings["model"].startswith("SinusoidMLP(") and len(matrices) > 1:
        made = SinusoidMLP([w.shape[0] for w in matrices[:-1]])
    elif settings["model"].startswith("Conv4(") and {"head.weight", "features.0.0.weight"} <= weights.keys():
        hidden, channels = weights["features.0.0.weight"].shape[:2]
        made = Conv4(weights["head.weight"].shape[0], channels, hidden)
    return made if str(made) == settings["model"] else None


def known_loss(settings: Mapping[str, Any]) -> LossFn | None:
    """One of PyTorch's losses without further arguments than the settings show, if the run trained with one."""
    described = settings.get("loss")
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        return None
    name = described["name"]
    function = getattr(F, name, None) if re.fullmatch(r"\w+", name) else None
    made: Any = function if callable(function) else None
    kind = getattr(nn, name.partition("(")[0], None)
    if isinstance(kind, type) and issubclass(kind, nn.Module) and issubclass(kind, nn.modules.loss._Loss):
        try:
            made = kind()
        except TypeError:
            return None
        for each, value in described.items():
            if each not in ("name", "training") and hasattr(made, each):
                setattr(made, each, value)
    return made if made is not None and describe_loss(made) == described else None


def learner_of(settings: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module, loss_fn: LossFn) -> MAML:
    """A learner around ``model`` with the options of the run; its weights are not loaded yet.

    Raises:
        ValueError: for settings that do not describe a learner, and where they do not fit the model.
    """
    options = settings["learner"]
    alpha = options.get("inner_lr", {})
    fixed, learned = alpha.get("fixed", {}), alpha.get("learned", [])
    adapted = list(options["adapt"])
    autocast = settings.get("autocast")
    return MAML(
        model,
        loss_fn,
        inner_lr=_inner_lr(fixed, adapted),
        inner_steps=options["inner_steps"],
        estimator=options["estimator"],
        inner_batches=options.get("inner_batches", "same"),
        tracking=options.get("tracking"),
        learn_inner_lr=_learned(learned, state),
        adapt=adapted,
        autocast=None if autocast is None else as_dtype(autocast),
        norm=options.get("norm", _norm(settings.get("normalisation"), model)),
    )


def _norm(recorded: Any, model: nn.Module) -> Any:
    """The choice that makes this model normalise as the run's did; ``None`` if its mode says so already."""
    try:
        return None if recorded is None or resolved(model, None) == recorded else recorded
    except ValueError:  # layers in several modes
        return recorded


def _inner_lr(fixed: Mapping[str, Any], adapted: list[str]) -> Any:
    """The fixed step sizes; of learned ones, the state has the values."""
    if set(fixed) != set(adapted):
        return 0.01
    values = {name: torch.tensor(v) if isinstance(v, list) else v for name, v in fixed.items()}
    numbers = {v for v in values.values() if not isinstance(v, Tensor)}
    return numbers.pop() if len(numbers) == 1 and not any(map(torch.is_tensor, values.values())) else values


def _learned(learned: list[str], state: Mapping[str, Tensor]) -> Any:
    """What ``learn_inner_lr`` was, from the shapes of the learned step sizes."""
    sizes = [w for name, w in state.items() if name.startswith(STEP_SIZE)]
    if not learned or not sizes:
        return False
    if STEP_SIZE in state:
        return "scalar"
    return "tensor" if all(w.dim() == 0 for w in sizes) else "entry"


def model_weights(state: Mapping[str, Tensor]) -> Params:
    """The model's own weights and buffers in a learner's state."""
    return {name.removeprefix(MODEL): w for name, w in state.items() if name.startswith(MODEL)}


def task_family(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the run's family of tasks: of fixed tasks, that of the family they are from."""
    described = settings.get("sampler")
    if isinstance(described, dict) and described.get("family") == "FixedTasks":
        described = described.get("sampler")
    return described if isinstance(described, dict) else {}


def known_sampler(
    settings: Mapping[str, Any], split: str, *, root: str | None = None, **asked: Any
) -> TaskSampler | None:
    """The run's family of tasks, if it is metamom's own and needs no data but what can be found on disk.

    Args:
        settings: the run's.
        split: of the tasks, or a stream of the family's seed.
        root: of the data.
        **asked: arguments of the family to replace: ways, shots, queries, seed.
    """
    described = task_family(settings)
    kinds = (tasks.Sinusoid, tasks.LinearRegression, tasks.Quadratic, tasks.Omniglot)
    kind: Any = next((kind for kind in kinds if kind.__name__ == described.get("family")), None)
    if kind is None:
        return None
    arguments = {name: _argument(name, value) for name, value in described.items() if name != "family"}
    on_disk = {"root": root} if kind is tasks.Omniglot else {}
    try:
        made: TaskSampler = kind(**arguments, **on_disk)
    except TypeError:  # large arrays, which settings hold by digest
        return None
    if made.describe() != described:
        return None
    if unknown := asked.keys() - arguments.keys():
        raise ValueError(f"tasks of {kind.__name__} have no {', '.join(sorted(unknown))}.")
    if on_disk:
        return kind(**{**arguments, **asked, "split": split}, **on_disk)  # type: ignore[no-any-return]
    return kind(**{**arguments, **asked}).with_stream(split)  # type: ignore[no-any-return]


def preprocessing_of(settings: Mapping[str, Any]) -> Preprocessing | None:
    """How image files become inputs, of a run on `metamom.tasks.ImageFolder`; ``None`` for another run."""
    described = task_family(settings)
    if described.get("family") != "ImageFolder":
        return None
    given = described["normalize"]
    constants = None if given is None else check_constants((given["mean"], given["std"]), described["channels"])
    return Preprocessing(described["image_size"], described["channels"], constants)


def recipe_of_tasks(settings: Mapping[str, Any]) -> Recipe | None:
    """A recipe with the tasks, estimator, workers and bias of a run, if the command can train on those tasks."""
    described, options = settings.get("sampler"), settings["learner"]
    if not isinstance(described, dict):
        return None
    fixed = described if described.get("family") == "FixedTasks" else {}
    within = described.get("sampler", described)
    chosen = {
        "task": str(within.get("family")).lower(),
        **{name: within[name] for name in ("ways", "queries", "seed", "dtype") if name in within},
        **{name: options[name] for name in ("inner_steps", "inner_batches", "estimator") if name in options},
        **{name: settings[name] for name in ("workers", "meta_batch", "bias", "aggregate") if name in settings},
        **({"fixed_tasks": fixed["n"], "order": fixed["order"]} if fixed else {}),
    }
    try:
        parts = support_parts(chosen["estimator"], chosen["inner_steps"], chosen["inner_batches"])
        made = Recipe(**chosen, shots=within["shots"] // parts)
        return made if made.sampler().describe() == described else None
    except (ValueError, TypeError, LookupError, OSError):  # not tasks of the command
        return None


def _argument(name: str, value: Any) -> Any:
    if name == "dtype":
        return as_dtype(value)
    return tuple(value) if isinstance(value, list) and name != "alphabets" else value


def as_dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype {name!r:.40}.")
    return found
