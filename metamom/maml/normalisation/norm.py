"""What normalisation uses: the statistics of the current set, running ones, or those of the task's support set.

See `metamom.maml.normalisation.norm_modes` for how the choice takes effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from metamom.common.choices import NORMS, Norm, Normalised
from metamom.common.code import names_one
from metamom.common.modules import modules_of, named_modules_of
from metamom.maml.checks.model_checks import scripted_calls
from metamom.maml.normalisation.norm_modes import AnyNorm, ByLayer
from metamom.maml.running.swapping import locked
from metamom.nets.layers import BatchNormReLU
from metamom.nets.statistics import uses_running_statistics


def check_norm(norm: object) -> None:
    """Refuse an unknown choice.

    Raises:
        ValueError: with the known ones.
    """
    if norm is not None and not (isinstance(norm, str) and norm in NORMS):
        choices = ", ".join(f'"{name}"' for name in NORMS)
        raise ValueError(f"norm must be {choices}, or None for what the model's mode says; got {norm!r}.")


def resolved(model: nn.Module, norm: Norm | None) -> AnyNorm | None:
    """What the normalisation of a model uses.

    Args:
        model: layers with running statistics decide if ``norm`` is ``None``: they use them in ``eval()``.
        norm: the caller's choice.

    Returns:
        The choice; a `ByLayer` if there is none and the layers differ. ``None`` if there is none and the model has no
        layer with running statistics: it runs unchanged.

    Raises:
        ValueError: if a layer lacks the statistics that ``"frozen"`` reads, and for a choice that cannot act on
            scripted code.
    """
    uses: AnyNorm | None = norm
    if norm is None:
        layers = [module for module in modules_of(model) if isinstance(module, _NormBase)]  # fast: for every step
        if not any(map(uses_running_statistics, layers)):
            return None
        uses = _of_mode(model)
    elif norm == "frozen":
        lacking = [name for name, module in _named(model) if _lacks_statistics(module)]
        if lacking:
            raise ValueError(
                f'norm="frozen" normalises by running statistics, which these layers do not have: {_list(lacking)}. '
                'Use norm="batch", or norm="support" for predictions that do not depend on the other queries.'
            )
    scripted = [name for name, module in _named(model) if scripted_calls(module, ("batch_norm", "instance_norm"))]
    if scripted:
        raise ValueError(
            f"norm={as_setting(uses)!r} replaces the functions that normalise, and cannot in scripted code: "
            f"{_list(scripted)}. Pass the model that torch.jit.script or torch.jit.trace was given."
        )
    return uses


def name_of(uses: AnyNorm) -> Normalised:
    """The word for it in results; ``"mixed"`` if layers differ."""
    return uses if not isinstance(uses, ByLayer) else "mixed" if uses.frozen else uses.others


def as_setting(uses: AnyNorm | None) -> str | dict[str, Any] | None:
    """The same as a JSON value, with the names of the frozen layers if layers differ."""
    if isinstance(uses, ByLayer) and uses.frozen:
        return {"frozen": sorted(uses.frozen), "others": uses.others}
    return None if uses is None else name_of(uses)


def of_support(uses: AnyNorm | None) -> bool:
    """Whether a normalisation of queries needs the support set."""
    return (uses.others if isinstance(uses, ByLayer) else uses) == "support"


def for_single_points(uses: AnyNorm | None) -> AnyNorm:
    """The same with the statistics of the support set in place of those of the current set."""
    return "frozen" if uses == "frozen" else uses._replace(others="support") if isinstance(uses, ByLayer) else "support"


def statistics_used(model: nn.Module, norm: Norm | None) -> Normalised | None:
    """As `resolved`, but ``"batch"`` for layers that keep no statistics; ``None`` if no layer normalises a batch."""
    chosen = resolved(model, norm)
    if chosen is None:
        normalises = any(isinstance(module, (_BatchNorm, BatchNormReLU)) for module in model.modules())
        return "batch" if normalises else None
    return name_of(chosen)


def _of_mode(model: nn.Module) -> AnyNorm:
    """What layers use in PyTorch: their running statistics in ``eval()``, else those of the current batch."""
    with locked(model):  # another thread may have put it into evaluation mode for a call
        named = named_modules_of(model)
        frozen = {name for name, each in named.items() if uses_running_statistics(each) and not each.training}
    by_functions = any(map(_calls_functions, named.values()))
    if not frozen:
        return ByLayer(frozenset()) if by_functions else "batch"
    others = by_functions or any(
        _lacks_statistics(each) or (uses_running_statistics(each) and name not in frozen)
        for name, each in named.items()
    )
    return ByLayer(frozenset(frozen)) if others else "frozen"


def _calls_functions(module: nn.Module) -> bool:
    """Whether code of a module that is no layer of normalisation names its functions, which say what they use."""
    return not isinstance(module, _NormBase) and names_one(module, "batch_norm", "instance_norm")


def _lacks_statistics(module: nn.Module) -> bool:
    return isinstance(module, BatchNormReLU) or (isinstance(module, _BatchNorm) and not uses_running_statistics(module))


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name or type(module).__name__, module) for name, module in model.named_modules())


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
