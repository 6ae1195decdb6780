"""What processes send each other besides tensors: their errors, and digests of tensors."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(tensors: Iterable[Tensor]) -> str:
    """A short hash of the tensors, which changes if any bit does."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def pack_error(error: Exception) -> bytes:
    """Serialise an error for the other processes: pickled, or rebuilt from its type, message and attributes."""
    if not isinstance(error, StopIteration):  # it would end a generator that raises it
        for content in (error, (type(error), str(error), dict(vars(error)))):
            try:
                packed = pickle.dumps(content)
                copy = unpack_error(packed)
            except Exception:  # noqa: BLE001 - pickling it may raise anything: send its text instead
                continue
            if type(copy) is type(error) and str(copy) == str(error):
                return packed
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def unpack_error(packed: bytes) -> Exception:
    """The error of another process, from its `pack_error`."""
    content = pickle.loads(packed)
    if isinstance(content, Exception):
        return content
    kind, message, attributes = content
    error: Exception = kind.__new__(kind, message)
    error.args = (message,)
    vars(error).update(attributes)
    return error
