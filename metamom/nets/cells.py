"""Recurrent cells made of functions that batch under `torch.func.vmap`. vmap calls PyTorch's task by task.

It cannot take `torch.lstm_cell` at all: a model with one runs in a loop over the tasks.
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
