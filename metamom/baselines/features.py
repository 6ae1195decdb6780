"""The features that a network's last linear layer gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metamom.common.kinds import named_type
from metamom.maml.running.run_by_task import call


class Penultimate(nn.Module):
    """The features ``[N, F]`` of a classifier: what its last linear layer gets.

    Args:
        model: runs as a whole, up to the end.
        layer: the name of a layer, to take its input instead.

    Example:
        >>> from metamom.nets import Conv4
        >>> Penultimate(Conv4(5, hidden=8))(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 8])
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        if layer is not None and layer not in dict(model.named_modules()):
            known = ", ".join(name for name, _ in model.named_modules() if name)
            raise ValueError(f"the model has no layer {layer!r}; it has {known}.")
        if layer is None and not any(isinstance(module, nn.Linear) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has no linear layer: name the layer that gets the features, layer=."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The features of the last call of the layer."""
        seen: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[:] = inputs[:1]

        layers: list[nn.Module] = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        if self.layer is not None:
            layers = [self.model.get_submodule(self.layer)]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        if not seen or not isinstance(seen[0], Tensor):
            raise ValueError("the model did not call the layer that gets its features with a tensor.")
        return seen[0].flatten(1)


def features_of(embedding: nn.Module, x: Any) -> Tensor:
    """Features ``[N, F]`` of points ``[N, ...]``, without a graph.

    Raises:
        ValueError: for anything but one vector a point.
    """
    with torch.no_grad():
        found = call(embedding, x)
    if not isinstance(found, Tensor) or found.dim() < 2:
        got = list(found.shape) if isinstance(found, Tensor) else named_type(found)
        raise ValueError(f"an embedding must return features [N, F]; got {got}.")
    return found.flatten(1)
