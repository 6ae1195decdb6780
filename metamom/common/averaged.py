"""Note which parameters have a gradient that workers have averaged over steps, so no optimizer averages it again.

The note belongs to a parameter, not to the tensor in its ``.grad``, which may be scaled, clipped or replaced. It holds
until the gradient is used (`CompositeMomentum.step`), cleared (its ``zero_grad``) or replaced by a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Keyed by the parameter's identity, not its entries; removed with the parameter. The value is the operator's SPEC.
_specs: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()
_in_use = False  # whether there may be a note; torch.compile can read this, and not the dictionary


def note(parameter: Tensor, spec: str) -> None:
    """Note that an operator with its own momentum, with this SPEC, computed the parameter's gradient."""
    global _in_use
    _in_use = True
    _specs[parameter] = spec


def averaged_by(parameters: Iterable[Tensor]) -> str | None:
    """The SPEC of an operator that averaged a gradient of these parameters over steps, if any."""
    if not _in_use:  # the usual case
        return None
    return next((spec for parameter in parameters if (spec := _specs.get(parameter)) is not None), None)


def forget(parameters: Iterable[Tensor]) -> None:
    """Remove the notes on these parameters' gradients."""
    global _in_use
    if _in_use:
        for parameter in parameters:
            _specs.pop(parameter, None)
        _in_use = bool(_specs)
