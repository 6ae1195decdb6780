"""Recurrent cells made of functions that batch under `torch.func.vmap`.

vmap calls PyTorch's own task by task, and cannot take `torch.lstm_cell` at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def replacements(linear: Linear) -> dict[Callable[..., Any], Callable[..., Any]]:
    """By PyTorch's function, the same one made of ``linear`` and functions of entries."""

    def both(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None, b_h: Tensor | None) -> Tensor:
        return linear(x, w_x, b_x) + linear(h, w_h, b_h)

    def tanh_cell(
        x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
    ) -> Tensor:
        return both(x, h, w_x, w_h, b_x, b_h).tanh()

    def relu_cell(
        x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
    ) -> Tensor:
        return both(x, h, w_x, w_h, b_x, b_h).relu()

    def gru_cell(
        x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
    ) -> Tensor:
        reset_x, update_x, new_x = linear(x, w_x, b_x).chunk(3, -1)
        reset_h, update_h, new_h = linear(h, w_h, b_h).chunk(3, -1)
        new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
        return new + (update_x + update_h).sigmoid() * (h - new)

    return {
        torch.rnn_tanh_cell: tanh_cell,
        torch.rnn_relu_cell: relu_cell,
        torch.gru_cell: gru_cell,
    }


def lstm_cell(
    linear: Linear,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch.lstm_cell` made of ``linear`` and functions of entries: the hidden state and the cell's."""
    add, keep, new, show = (linear(x, w_x, b_x) + linear(h, w_h, b_h)).chunk(4, -1)
    c = keep.sigmoid() * c + add.sigmoid() * new.tanh()
    return show.sigmoid() * c.tanh(), c


def fits(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, *biases: Tensor | None) -> bool:
    """Whether the arguments are those of a cell, of one dtype and device: ``x [N, in]``, ``h [N, hidden]``, weights."""
    given = [x, h, w_x, w_h, *(b for b in biases if b is not None)]
    if torch.is_autocast_enabled(x.device.type) or any((t.dtype, t.device) != (x.dtype, x.device) for t in given):
        return False
    if not (x.dtype.is_floating_point and x.dim() == h.dim() == w_x.dim() == w_h.dim() == 2):
        return False
    gates, hidden = w_h.shape
    sizes = x.shape[1] == w_x.shape[1] and w_x.shape[0] == gates and h.shape == (x.shape[0], hidden)
    return sizes and all(b.shape == (gates,) for b in given[4:])
