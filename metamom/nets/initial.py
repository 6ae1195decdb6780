"""Initial weights from a named generator."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from metamom.nets.layers import BatchNormReLU

Module = TypeVar("Module", bound=nn.Module)


def bare(kind: type[Module], *args: int, **options: int | bool) -> Module:
    """Create a module with uninitialised weights, so that it does not draw from the global generator."""
    return kind(*args, **options, device="meta").to_empty(device="cpu")


def initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    """Glorot-uniform weights and zero biases for linear and convolutional layers."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # draw in index order, whatever the memory layout
            drawn = nn.init.xavier_uniform_(torch.empty(module.weight.shape), generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, BatchNormReLU):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def initialise_residual(model: nn.Module, generator: torch.Generator | None) -> None:
    """He-normal weights by fan-out for convolutions before leaky ReLUs; Glorot-uniform ones for linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
