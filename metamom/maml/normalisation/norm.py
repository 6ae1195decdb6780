"""What normalisation uses: the statistics of the current set, running ones, or those of the task's support set.

See `metamom.maml.normalisation.norm_modes` for how the choice takes effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from metamom.common.choices import NORMS, Norm
from metamom.common.modules import modules_of
from metamom.maml.checks.model_checks import scripted_calls
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


def resolved(model: nn.Module, norm: Norm | None) -> Norm | None:
    """What the normalisation of a model uses.

    Args:
        model: layers with running statistics decide if ``norm`` is ``None``: they use them in ``eval()``.
        norm: the caller's choice.

    Returns:
        The choice. ``None`` if there is none and the model has no layer with running statistics: it runs unchanged.

    Raises:
        ValueError: if some of the layers are in ``eval()`` and some are not, if a layer lacks the statistics that
            ``"frozen"`` reads, and for a choice that cannot act on scripted code.
    """
    if norm is None:
        layers = [module for module in modules_of(model) if isinstance(module, _NormBase)]  # fast: for every step
        if not any(map(uses_running_statistics, layers)):
            return None
        norm = _of_mode(model)
    if norm == "frozen":
        lacking = [name for name, module in _named(model) if _lacks_statistics(module)]
        if lacking:
            raise ValueError(
                f'norm="frozen" normalises by running statistics, which these layers do not have: {_list(lacking)}. '
                'Use norm="batch", or norm="support" for predictions that do not depend on the other queries.'
            )
    scripted = [name for name, module in _named(model) if scripted_calls(module, ("batch_norm", "instance_norm"))]
    if scripted:
        raise ValueError(
            f"norm={norm!r} replaces the functions that normalise, and cannot in scripted code: {_list(scripted)}. "
            "Pass the model that torch.jit.script or torch.jit.trace was given."
        )
    return norm


def statistics_used(model: nn.Module, norm: Norm | None) -> Norm | None:
    """As `resolved`, but ``"batch"`` for layers that keep no statistics; ``None`` if no layer normalises a batch."""
    chosen = resolved(model, norm)
    if chosen is None and any(isinstance(module, (_BatchNorm, BatchNormReLU)) for module in model.modules()):
        return "batch"
    return chosen


def _of_mode(model: nn.Module) -> Norm:
    """What layers with running statistics use in PyTorch: those in ``eval()``, else those of the current batch."""
    with locked(model):  # another thread may have put it into evaluation mode for a call
        modes = [(name, module.training) for name, module in _named(model) if uses_running_statistics(module)]
    training, evaluating = ([name for name, mode in modes if mode is wanted] for wanted in (True, False))
    if training and evaluating:
        raise ValueError(
            f"of the layers with running statistics, some are in eval(): {_list(evaluating)}; and some in training "
            f'mode: {_list(training)}. Choose for all of them: norm="frozen" reads the running statistics, '
            'norm="batch" and norm="support" do not.'
        )
    return "batch" if training else "frozen"


def _lacks_statistics(module: nn.Module) -> bool:
    return isinstance(module, BatchNormReLU) or (isinstance(module, _BatchNorm) and not uses_running_statistics(module))


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name or type(module).__name__, module) for name, module in model.named_modules())


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
