"""Make the learner of a run of ``metamom.train(run_dir=...)`` again, from its ``config.json``.

The file says how the learner adapts and, for metamom's own models and losses, what they are. Other models and losses
have to be given. `metamom.experiments.python_tasks` does the same for the tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.learner import MAML
from metamom.maml.learners.kinds import make_learner
from metamom.maml.normalisation.norm import as_setting, resolved
from metamom.maml.task_weights import Params
from metamom.nets.models import SMALLEST, Conv4, SinusoidMLP
from metamom.nets.resnet import ResNet12
from metamom.nets.statistics import uses_running_statistics
from metamom.training.plan import describe_loss

MODEL = "model."  # prefixes in a learner's state
STEP_SIZE = "step_sizes.alpha"
STEP_NORMS = "norms_by_step."


def is_python_run(settings: Mapping[str, Any]) -> bool:
    """Whether the settings are those that `metamom.train` derives from its arguments."""
    return isinstance(settings.get("learner"), dict) and isinstance(settings.get("model"), str)


def known_model(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module | None:
    """One of metamom's own models, if the run trained one; sizes come from the weights."""
    weights, text = model_weights(state), settings["model"]
    matrices = [w for w in weights.values() if w.dim() == 2]
    made: nn.Module | None = None
    try:
        if text.startswith("SinusoidMLP(") and len(matrices) > 1:
            made = SinusoidMLP([w.shape[0] for w in matrices[:-1]])
        elif text.startswith("Conv4("):
            made = _conv4(weights, text, settings)
        elif text.startswith("ResNet12("):
            made = _resnet12(weights, text)
    except (LookupError, ValueError):  # a class of the user's with this name
        return None
    return made if str(made) == text else None


def _conv4(weights: Params, text: str, settings: Mapping[str, Any]) -> nn.Module:
    hidden, channels = weights["features.0.0.weight"].shape[:2]
    ways, inputs = weights["head.weight"].shape
    if "MaxPool2d" not in text:
        return Conv4(ways, channels, hidden)
    size = _image_size(settings.get("sampler"), SMALLEST * math.isqrt(inputs // hidden))
    kept = "features.0.1.running_mean" in weights
    return Conv4(ways, channels, hidden, image_size=size, pooling="max", running_statistics=kept)


def _image_size(described: Any, smallest: int) -> int:
    """The images' size in pixels, from the description of a run's tasks; else the smallest that fits the classifier."""
    if isinstance(described, dict) and described.get("family") == "FixedTasks":
        described = described.get("sampler")
    described = described if isinstance(described, dict) else {}
    for name in ("image_size", "images", "shape"):
        found = described.get(name)
        if isinstance(found, list) and len(found) > 1:
            return int(found[-1])
        if name == "image_size" and isinstance(found, int):
            return found
    return smallest


def _resnet12(weights: Params, text: str) -> nn.Module:
    widths = [weights[f"features.{block}.convs.0.weight"].shape[0] for block in range(4)]
    ways, channels = weights["head.weight"].shape[0], weights["features.0.convs.0.weight"].shape[1]
    dropped = re.search(r"Dropout\(p=([0-9.e-]+)", text)
    kept = "features.0.norms.0.running_mean" in weights
    return ResNet12(ways, channels, widths, drop_rate=float(dropped[1]) if dropped else 0.0, running_statistics=kept)


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
    alpha, adapted = options.get("inner_lr", {}), list(options["adapt"])
    autocast = settings.get("autocast")
    learner = make_learner(
        options.get("kind", "maml"),
        model,
        loss_fn,
        **_step_sizes(alpha, adapted, state),
        inner_steps=_steps_with_own_values(state, alpha.get("kind"), options["inner_steps"]),
        estimator=options["estimator"],
        inner_batches=options.get("inner_batches", "same"),
        tracking=options.get("tracking"),
        proximal=options.get("proximal"),
        adapt=adapted,
        autocast=None if autocast is None else as_dtype(autocast),
        norm=options.get("norm", _norm(settings.get("normalisation"), model)),
        multi_step=options.get("multi_step", 0),
        first_order_until=options.get("first_order_until", 0),
        step_norms=options.get("step_norms", False),
        inner_optimizer=options.get("inner_optimizer"),
        positive_inner_lr=alpha.get("positive", False),
        **{name: options[name] for name in ("head", "train_on") if name in options},
    )
    learner.inner_steps = options["inner_steps"]
    return learner


def _steps_with_own_values(state: Mapping[str, Tensor], learned: Any, steps: int) -> int:
    """The inner steps that the learner was made for; ``steps`` unless it has values for each, which show it.

    ``inner_steps`` may be set later, and does not change how many values there are.
    """
    for name, value in state.items():
        if learned == "tensor-step" and name.startswith(STEP_SIZE):
            return len(value)
        if name.startswith(STEP_NORMS):
            return len(value) - 1
    return steps


def _norm(recorded: Any, model: nn.Module) -> Any:
    """The choice that makes this model normalise as the run's did; ``None`` if its mode says so.

    If the layers of the run were in several modes, those of the model are put into the same.

    Raises:
        ValueError: for a model without these layers.
    """
    if not isinstance(recorded, dict):
        return None if recorded is None or as_setting(resolved(model, None)) == recorded else recorded
    layers = {name: each for name, each in model.named_modules() if uses_running_statistics(each)}
    frozen = set(recorded["frozen"])
    if not frozen <= layers.keys():
        raise ValueError(
            "in this run, these layers normalised by running statistics, which the model does not have: "
            f"{', '.join(sorted(frozen - layers.keys()))}. Give the model of the run."
        )
    for name, each in layers.items():
        each.train(name not in frozen)
    return None


def _step_sizes(alpha: Mapping[str, Any], adapted: list[str], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``inner_lr`` and ``learn_inner_lr``. Of learned step sizes, the state has the values, and shows the kind."""
    own = {name: state.get(f"{STEP_SIZE}:{name.replace('.', ':')}") for name in adapted}
    fixed = {name: value for name, value in alpha.get("fixed", {}).items() if name in own}
    if alpha.get("positive"):  # those are logarithms that were frozen
        fixed = {}
    learned = {name: value for name, value in own.items() if name not in fixed and value is not None}
    shapes = {name: (value.shape, state[MODEL + name].shape) for name, value in learned.items()}
    kind = alpha.get("kind")
    if kind is None and not fixed:
        kind = (
            "scalar" if STEP_SIZE in state
            else "tensor" if all(not size for size, _ in shapes.values())
            else "entry" if all(size == whole for size, whole in shapes.values())
            else None
        )  # fmt: skip
    if kind is not None:
        return {"inner_lr": 0.01, "learn_inner_lr": kind}
    given = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in fixed.items()}
    given |= {name: nn.Parameter(torch.ones_like(value)) for name, value in learned.items()}  # some, or of both shapes
    numbers = {value for value in given.values() if not isinstance(value, Tensor)}
    alike = len(numbers) == 1 and not any(map(torch.is_tensor, given.values()))
    return {"inner_lr": numbers.pop() if alike else given}


def of_adapted(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A learner's state without the step sizes of parameters that were frozen later, which a new learner lacks."""
    names = {f"{STEP_SIZE}:{name.replace('.', ':')}" for name in settings.get("learner", {}).get("adapt", ())}
    return {name: value for name, value in state.items() if not name.startswith(f"{STEP_SIZE}:") or name in names}


def model_weights(state: Mapping[str, Tensor]) -> Params:
    """The model's own weights and buffers in a learner's state."""
    return {name.removeprefix(MODEL): w for name, w in state.items() if name.startswith(MODEL)}


def as_dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype {name!r:.40}.")
    return found
