"""Which parameters have a gradient that the workers have averaged over steps, so that no optimizer averages it again.

The note is about a parameter, not about the tensor in its ``.grad``: that one may be scaled, clipped or replaced. It
holds until the gradient is used (`CompositeMomentum.step`) or given up (its ``zero_grad``), or another one takes its
place.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# by the parameter itself, not its entries; it goes when the parameter does. The value is the SPEC of the operator.
_specs: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()


def note(parameter: Tensor, spec: str) -> None:
    """Note that an operator with momentum of its own, of this SPEC, made the parameter's gradient."""
    _specs[parameter] = spec


def averaged_by(parameters: Iterable[Tensor]) -> str | None:
    """The SPEC of an operator that averaged the gradient of one of these parameters over steps, if there is any."""
    if not _specs:  # as in most runs
        return None
    return next((spec for parameter in parameters if (spec := _specs.get(parameter)) is not None), None)


def forget(parameters: Iterable[Tensor]) -> None:
    """Forget what was noted of these parameters' gradients."""
    if _specs:
        for parameter in parameters:
            _specs.pop(parameter, None)
