"""Layers that are fast with per-task weights: convolution as patches and one batched product, normalisation with ReLU.

They work on channels-last images ``[N, H, W, C]``. Under `torch.func.vmap` the tasks become one more axis of a batched
matrix product, without a loop over tasks or a grouped convolution. First and second derivatives are written out, with
few passes over memory. Third derivatives use plain autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from metamom.nets import kernels
from metamom.nets.convolution import convolve
from metamom.nets.grouped import Grouped, OfTwo
from metamom.nets.kernels.convolutions import Geometry
from metamom.nets.normalisation import normalise

_STRIDED = Geometry(stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1)


class StridedConv(nn.Conv2d):
    """A 3x3 convolution of stride 2 and padding 1 without bias, ``[N, H, W, C] -> [N, (H+1)//2, (W+1)//2, C']``.

    Its weights are `torch.nn.Conv2d`'s, ``[C', C, 3, 3]``; only the images are channels-last.

    Args:
        in_channels: C.
        out_channels: C'.
        device: of the weights.
    """

    def __init__(self, in_channels: int, out_channels: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, bias=False, device=device)
        # stored in memory as [3, 3, C, C'], the matrix that multiplies patches, so that no step has to copy it
        self.weight = nn.Parameter(self.weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Channels-last in, channels-last out."""
        if images.dim() != 4 or images.shape[-1] != self.in_channels:
            raise ValueError(
                f"StridedConv wants images [N, H, W, {self.in_channels}], channels last; got {tuple(images.shape)}."
            )
        images, weight = self._cast(images), self._cast(self.weight)
        if not kernels.are_native(images):
            return convolve(images.unsqueeze(0), weight.unsqueeze(0), None, _STRIDED).squeeze(0)
        # in a compiled graph, products of patches can be joined (metamom.nets.products)
        patches: Tensor = _Unfold.run(images)
        # [9 C, C'] with rows in the order of the patches' last axis; a view
        weight = weight.permute(2, 3, 1, 0).reshape(-1, self.out_channels)
        out: Tensor = _Product.run(patches.flatten(0, 2).unsqueeze(0), weight.unsqueeze(0))
        return out.view(*patches.shape[:3], self.out_channels)

    @staticmethod
    def _cast(x: Tensor) -> Tensor:
        """Cast a product's factor as autocast would. It is done here so that derivatives see the cast too."""
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class BatchNormReLU(nn.Module):
    """Normalisation by the statistics of the current batch, then ReLU, over the last axis of ``[N, ..., C]``.

    Args:
        channels: C.
        eps: added to the variance.
        device: of the weights.
    """

    running_mean: Tensor  # only after `fix`
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device))
        self.bias = nn.Parameter(torch.zeros(channels, device=device))

    def fix(self, mean: Tensor, variance: Tensor) -> None:
        """Normalise by these statistics ``[C]`` from now on, which become buffers."""
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", variance.clone())

    def extra_repr(self) -> str:
        """The text that ``print`` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """Statistics are taken over all axes but the last."""
        if x.dim() < 2 or x.shape[-1] != len(self.weight):
            raise ValueError(f"BatchNormReLU wants [N, ..., {len(self.weight)}], channels last; got {tuple(x.shape)}.")
        if "running_mean" not in self._buffers:
            return batch_norm_relu(x, self.weight, self.bias, self.eps)
        wide = x.to(self.running_mean.dtype)
        scale = torch.rsqrt(self.running_var + self.eps) * self.weight
        return torch.addcmul(self.bias, wide - self.running_mean, scale).relu().to(x.dtype)


def batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The function of `BatchNormReLU`; like PyTorch's own, modes can replace it (`torch.overrides`)."""
    if has_torch_function((x, weight, bias)):
        replaced: Tensor = handle_torch_function(batch_norm_relu, (x, weight, bias), x, weight, bias, eps)
        return replaced
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # 16 bits are too few for statistics
    gain, shift = weight.to(wide.dtype).unsqueeze(0), bias.to(wide.dtype).unsqueeze(0)
    if kernels.are_native(wide):
        z, _, _ = _NormReLU.run(wide.reshape(1, -1, x.shape[-1]), gain, shift, eps)
    else:
        z = normalise(wide.reshape(1, 1, -1, 1, x.shape[-1]), gain, shift, eps).activated(0.0).value
    out: Tensor = z.view(x.shape).to(x.dtype)
    return out


class _Unfold(Grouped):
    @staticmethod
    def forward(images: Tensor) -> Tensor:
        return kernels.unfold(images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.size = inputs[0].shape[1:3]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        to_images: Tensor = _Fold.run(cotangent, *ctx.size)
        return to_images


class _Fold(Grouped):
    @staticmethod
    def forward(patches: Tensor, H: int, W: int) -> Tensor:
        return kernels.fold(patches, H, W)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return _Unfold.run(cotangent), None, None


class _Product(OfTwo):
    """``a @ b``: ``[G, M, K], [G, K, N] -> [G, M, N]``.

    Its first and second derivatives are products of the same three kinds, each with a contiguous result.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        to_a = _ProductWithTransposed.run(c, b) if ctx.needs_input_grad[0] else None
        to_b = _ProductOfTransposed.run(a, c) if ctx.needs_input_grad[1] else None
        return to_a, to_b


class _ProductWithTransposed(OfTwo):
    """``c @ bᵀ``: ``[G, M, N], [G, K, N] -> [G, M, K]``."""

    @staticmethod
    def forward(c: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(c, b.mT)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
        c, b = ctx.saved_tensors
        to_c = _Product.run(a, b) if ctx.needs_input_grad[0] else None
        to_b = _ProductOfTransposed.run(a, c) if ctx.needs_input_grad[1] else None
        return to_c, to_b


class _ProductOfTransposed(OfTwo):
    """``aᵀ @ c``: ``[G, M, K], [G, M, N] -> [G, K, N]``."""

    @staticmethod
    def forward(a: Tensor, c: Tensor) -> Tensor:
        return torch.bmm(a.mT, c)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, c = ctx.saved_tensors
        to_a = _ProductWithTransposed.run(c, b) if ctx.needs_input_grad[0] else None
        to_c = _Product.run(a, b) if ctx.needs_input_grad[1] else None
        return to_a, to_c


class _NormReLU(Grouped):
    """``(z, mean, rstd)`` of `kernels.norm_relu`; mean and rstd are for the derivatives of z alone."""

    @staticmethod
    def forward(y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm_relu(y, gain, shift, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, gain, _, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(y, gain, *output)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_NormReLUBackward.run(dz, *ctx.saved_tensors, ctx.eps), None


class _NormReLUBackward(Grouped):
    @staticmethod
    def forward(
        dz: Tensor, y: Tensor, gain: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.norm_relu_backward(dz, y, gain, z, mean, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor | None, ...]:
        dz, y, gain, z, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a third derivative, recompute everything from y with plain autograd
            mean, rstd = kernels.reference.moments(y, ctx.eps)
            double_backward = kernels.reference.norm_relu_double_backward
        else:
            double_backward = kernels.norm_relu_double_backward
        to_dz, to_y, to_gain = double_backward(v, a, s, dz, y, gain, z, mean, rstd)
        return to_dz, to_y, to_gain, None, None, None, None
