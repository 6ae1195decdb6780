"""The nodes' gradients, written side by side into rows.

c nodes (a chunk), m images each, d parameters, flattened in the order of ``model.parameters()``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Seen(NamedTuple):
    """The nodes' metrics before the update: mean loss ``[c]`` and number of correct predictions ``[c]``."""

    loss: Tensor
    hits: Tensor


class Gradients(Protocol):
    """Gradients of the nodes' mean cross-entropies at the model's parameters."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, out: Tensor) -> Seen:
        """Write the gradients for images ``x [c, m, ...]`` and labels ``y [c, m]`` to ``out [c, d]``."""
        ...


def gradients_in_order(model: nn.Module, x: Tensor, y: Tensor, out: Tensor) -> Seen:
    """Compute one node after the other, so that running statistics of a model in training mode follow the nodes."""
    parameters = list(model.parameters())
    losses, hits = [], []
    for images, labels, row in zip(x, y, out, strict=True):
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)], out=row)
        losses.append(loss.detach())
        hits.append((logits.detach().argmax(-1) == labels).sum())
    return Seen(torch.stack(losses), torch.stack(hits))


@torch.no_grad()
def gradients_together(model: nn.Module, x: Tensor, y: Tensor, out: Tensor) -> Seen:
    """Compute all nodes at once, for a `Sequential` of a `Flatten` and linear layers with a `ReLU` between each two.

    All images go forward and back in the same matrix products; only the weights' gradients are separate
    products for each node, ``D_i^T H_i``, written straight to their place.
    """
    layers = _linear_layers(model)
    c, m = y.shape
    h = x.reshape(c * m, -1)
    inputs = []
    for number, layer in enumerate(layers):
        inputs.append(h)
        h = F.linear(h, layer.weight, layer.bias)
        if number + 1 < len(layers):
            h.relu_()
    target = y.reshape(-1, 1)
    log_p = h.log_softmax(-1)
    loss = -log_p.gather(1, target).view(c, m).mean(1)
    hits = (h.argmax(-1) == y.flatten()).view(c, m).sum(1)
    back = log_p.exp_()  # d loss / d logits: (p - one-hot) / m
    back.scatter_add_(1, target, back.new_full((1, 1), -1.0).expand_as(target)).div_(m)
    places = iter(reversed(out.split_with_sizes([p.numel() for p in model.parameters()], dim=1)))
    for number, (layer, h) in reversed(list(enumerate(zip(layers, inputs, strict=True)))):
        node_back = back.view(c, m, -1)
        torch.sum(node_back, 1, out=next(places))
        torch.bmm(node_back.mT, h.view(c, m, -1), out=next(places).view(c, *layer.weight.shape))
        if number:
            back = torch.ops.aten.threshold_backward(back @ layer.weight, h, 0)
    return Seen(loss, hits)


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    modules = list(model.children())
    assert isinstance(modules[0], nn.Flatten)
    assert all(isinstance(activation, nn.ReLU) for activation in modules[2::2])
    layers = [layer for layer in modules[1::2] if isinstance(layer, nn.Linear) and layer.bias is not None]
    assert 2 * len(layers) == len(modules)
    return layers
