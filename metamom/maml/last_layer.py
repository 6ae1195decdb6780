"""The last layer of a model, its head."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from metamom.common.kinds import named_type
from metamom.maml.checks.model_checks import check_kind


def head_name(model: nn.Module, head: str | None, learner: str) -> str:
    """The name of a model's head: as given, else the last module, in the order of registration, with own parameters.

    Args:
        model: the model.
        head: the name of a module of it.
        learner: what needs it, for errors.

    Raises:
        TypeError: for anything but a name.
        ValueError: for an unknown module, or one without trainable parameters; or if no trainable parameter is left
            for the body.

    Example:
        >>> head_name(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), None, "BOIL")
        '2'
    """
    check_kind(model)
    if head is not None and not isinstance(head, str):
        raise TypeError(f"head must be the name of a module of the model, such as 'head'; got {named_type(head)}.")
    owners = [
        name
        for name, module in model.named_modules()
        if any(p is not None and p.requires_grad for p in module._parameters.values())
    ]
    layers = list(dict.fromkeys(_layer_of(model, name) for name in owners))
    found = layers[-1] if head is None else head
    if not any(_within(name, found) for name in layers):
        raise ValueError(
            f"head must name a module of the model that has trainable parameters; {found!r} is none of "
            f"{', '.join(map(repr, layers))}, and contains none of them."
        )
    if all(_within(name, found) for name in layers):
        raise ValueError(
            f"{learner} needs a model with a body before its head; all trainable parameters are in {found!r}. Name a "
            "smaller module with head=, or use MAML."
        )
    return found


def parameters_within(model: nn.Module, head: str) -> set[str]:
    """The names of the parameters of a module, as ``model.named_parameters()`` calls them."""
    own = {id(p) for p in model.get_submodule(head).parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


def _layer_of(model: nn.Module, owner: str) -> str:
    """The name of the layer that a module with parameters belongs to: of a parametrization, the layer that has it."""
    layer, found, _ = f".{owner}".partition(".parametrizations.")
    if found and is_parametrized(model.get_submodule(layer[1:])):
        return layer[1:]
    return owner


def _within(name: str, place: str) -> bool:
    return name == place or not place or name.startswith(f"{place}.")
