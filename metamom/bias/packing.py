"""Pack small digits into bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def digits_in_byte(base: int) -> int:
    """How many digits of this base fit into a byte; at least one."""
    count = 1
    while base ** (count + 1) <= 256:
        count += 1
    return count


def packed_bytes(d: int, base: int) -> int:
    """The number of bytes for d digits."""
    if base > 256:
        return d * _whole(base).itemsize
    return -(-d // digits_in_byte(base))


def pack(digits: Tensor, base: int) -> Tensor:
    """Pack digits ``[d]`` in 0..base-1 (int64) into bytes, as many digits in each as fit."""
    if base > 256:
        whole = digits - base // 2  # centred on zero
        return whole.to(_whole(base)).view(torch.uint8)
    each = digits_in_byte(base)
    rows = torch.nn.functional.pad(digits, (0, -len(digits) % each)).view(-1, each)
    weights = torch.tensor([base**i for i in range(each)], device=digits.device)
    return (rows * weights).sum(1).to(torch.uint8)


def unpack(message: Tensor, d: int, base: int) -> Tensor:
    """Unpack the digits ``[d]`` (int64) from the bytes of `pack`."""
    if base > 256:
        return message.clone().view(_whole(base)).to(torch.int64) + base // 2
    weights = torch.tensor([base**i for i in range(digits_in_byte(base))], device=message.device)
    digits = torch.arange(256, device=message.device)[:, None] // weights % base  # a table for all bytes:
    return digits.index_select(0, message.int()).reshape(-1)[:d]  # dividing each entry takes 10 times as long


def _whole(base: int) -> torch.dtype:
    return torch.int16 if base <= 2**16 else torch.int32
