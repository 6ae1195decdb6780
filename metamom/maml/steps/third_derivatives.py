"""Normalisations whose third derivatives are right, for Hessian-vector products of meta-losses.

The third derivatives of `torch.nn.functional.batch_norm`, ``layer_norm`` and ``instance_norm`` are wrong in torch 2.13:
their second derivatives leave something out of the next graph. PresentTasks they are made of elementary functions.

Legend: N points, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class ThirdDerivatives(TorchFunctionMode):
    """Replaces these functions while it is active, with the same values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        composed = _COMPOSED.get(func)
        return func(*args, **(kwargs or {})) if composed is None else composed(*args, **(kwargs or {}))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, of ``[N, C, ...]``."""
    if running_mean is not None or not training:  # with running statistics it is linear
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    others = [axis for axis in range(input.dim()) if axis != 1]
    return _scaled(_normalised(input, others, eps), weight, bias, [1, -1] + [1] * (input.dim() - 2))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`, of ``[N, C, ...]``."""
    if running_mean is not None or not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    shape = [1, -1] + [1] * (input.dim() - 2)
    return _scaled(_normalised(input, list(range(2, input.dim())), eps), weight, bias, shape)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    last = [-axis for axis in range(len(normalized_shape), 0, -1)]
    return _scaled(_normalised(input, last, eps), weight, bias, list(normalized_shape))


def _normalised(x: Tensor, axes: list[int], eps: float) -> Tensor:
    away = x - x.mean(axes, keepdim=True)
    return away * torch.rsqrt(away.square().mean(axes, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _torch_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return layer_norm(input, normalized_shape, weight, bias, eps)


_COMPOSED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.instance_norm: _torch_instance_norm,
    torch.layer_norm: _torch_layer_norm,
}
