"""Questions about tensors that may be inside of `torch.func.vmap`."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def suitable(*tensors: Tensor) -> bool:
    """Whether metamom's own operators take these tensors: one dtype, on a CPU, without autocast."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in DTYPES
        and not torch.is_autocast_enabled("cpu")
        and all(x.dtype is first.dtype and x.device == first.device for x in tensors)
    )


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient in one of these tensors, which may be inside vmap, may be wanted."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        while tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def version(tensor: Tensor) -> int | None:
    """The number of changes in place so far, of the tensor or of any view of it; unknown in inference mode."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return None if tensor.is_inference() else tensor._version
