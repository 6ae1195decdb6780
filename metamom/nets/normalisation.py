"""Batch normalisation, followed or not by ReLU and max-pooling, with separate statistics for each group (task).

Legend: G groups, N images of each, C channels, M = N H W positions with common statistics, P pooled positions.

Images are ``[G, N, C, H, W]``, and channels-last in memory. A ReLU or pooling that follows is part of the same operator
in the derivatives: cotangents are masked and summed where they are small, after the pooling, and each derivative passes
over the large activations once or twice. Third derivatives use plain autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.nets.convolution import channels_last, channels_second
from metamom.nets.grouped import Grouped

# Groups of at least so many entries are normalised one by one, with PyTorch's operator.
LARGE = 2**14


class Pooling(NamedTuple):
    """The windows of a maximum, as in `torch.nn.functional.max_pool2d`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool


class Normalised(NamedTuple):
    """Normalised activations, and what their derivatives need.

    Attributes:
        y: the activations before, ``[G, N, C, H, W]``.
        gain: ``[G, C]``.
        shift: ``[G, C]``.
        mean: of each group and channel, ``[G, C]``.
        rstd: ``1 / sqrt(variance + eps)``, ``[G, C]``.
        eps: added to the variance.
        slope: of the activation function below 0; 1 if there is none so far.
        value: the result so far, ``[G, N, C, H, W]``.
    """

    y: Tensor
    gain: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    eps: float
    slope: float
    value: Tensor

    def activated(self, slope: float) -> Normalised:
        """Apply ``z if z > 0 else slope * z``."""
        value, _ = _Then.run(*self._inputs(), slope, None, self.eps)
        return self._replace(value=value, slope=slope)

    def pooled(self, pooling: Pooling) -> Tensor:
        """The maximum over windows, ``[G, N, C, H', W']``."""
        value: Tensor = _Then.run(*self._inputs(), self.slope, pooling, self.eps)[0]
        return value

    def _inputs(self) -> tuple[Tensor, ...]:
        return self.y, self.gain, self.shift, self.mean, self.rstd, self.value.detach()


def normalise(y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Normalised:
    """Normalise ``[G, N, C, H, W]`` by the statistics of each group and channel. ``gain``, ``shift``: ``[G, C]``."""
    value, mean, rstd = _Norm.run(y, gain, shift, eps)
    return Normalised(y, gain, shift, mean, rstd, eps, 1.0, value)


class _Norm(Grouped):
    """``(z, mean, rstd)``; mean and rstd are for the derivatives of z alone."""

    @staticmethod
    def forward(y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows(y)
        if rows[0].numel() >= LARGE:
            images = channels_second(channels_last(y))
            each = [
                torch.native_batch_norm(own, g, s, None, None, True, 0.0, eps)
                for own, g, s in zip(images, gain, shift, strict=True)
            ]
            z = torch.stack([one[0].permute(0, 2, 3, 1) for one in each]) if len(each) > 1 else _alone(each[0][0])
            return channels_second(z), torch.stack([one[1] for one in each]), torch.stack([one[2] for one in each])
        mean, rstd = _moments(rows, eps)
        scale = gain * rstd
        return _images(torch.addcmul(_over(shift - mean * scale), rows, _over(scale)), y), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, gain, _, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(y, gain, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        y, gain, mean, rstd = ctx.saved_tensors
        return *_NormBackward.run(dz, y, gain, mean, rstd, None, None, 1.0, ctx.eps), None


class _Then(Grouped):
    """``(z, places)``: the activation function or the pooling of normalised activations ``before``."""

    @staticmethod
    def forward(
        y: Tensor,
        gain: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        before: Tensor,
        slope: float,
        pooling: Pooling | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        if pooling is None:
            z = F.relu(before) if slope == 0 else F.leaky_relu(before, slope)
            return z, y.new_empty(y.shape[0], 0)
        images = channels_second(channels_last(before)).flatten(0, 1)
        z, places = torch.ops.aten.max_pool2d_with_indices(images, *pooling)
        return z.unflatten(0, y.shape[:2]), places.unflatten(0, y.shape[:2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, gain, _, mean, rstd, _, ctx.slope, ctx.pooling, ctx.eps = inputs
        z, places = output
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(y, gain, mean, rstd, z, places)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *tensors, places = ctx.saved_tensors
        found = _NormBackward.run(dz, *tensors, None if ctx.pooling is None else places, ctx.slope, ctx.eps)
        return *found, None, None, None, None, None, None


class _NormBackward(Grouped):
    """Cotangents of ``y``, gain and shift."""

    @staticmethod
    def forward(
        dz: Tensor,
        y: Tensor,
        gain: Tensor,
        mean: Tensor,
        rstd: Tensor,
        z: Tensor | None,
        places: Tensor | None,
        slope: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return norm_backward(dz, y, gain, mean, rstd, z, places, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.slope, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor | None, ...]:
        dz, y, gain, mean, rstd, z, places = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a third derivative, recompute everything from y with plain autograd
            mean, rstd = _moments(_rows(y), ctx.eps)
        found = norm_double_backward(v, a, s, dz, y, gain, mean, rstd, z, places, ctx.slope)
        return *found, None, None, None, None, None, None


def norm_backward(
    dz: Tensor,
    y: Tensor,
    gain: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor | None,
    places: Tensor | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of ``y``, gain and shift from that of the result ``z``.

    With ``x = (y - mean) rstd``, the cotangent e of ``gain x + shift``, and the projection
    ``P(e) = e - mean(e) - x mean(e x)``: ``dy = gain rstd P(e), dgain = sum(e x), dshift = sum(e)``. If there is a
    pooling, e is 0 but at the P ``places`` that it chose, so it is kept and summed as ``[G, P, C]``.
    """
    rows = _rows(y)
    M = rows.shape[1]
    e, there = _passed(dz, z, slope), _chosen(rows, y, places)
    dshift = e.sum(1)
    dgain = rstd * ((e * there).sum(1) - mean * dshift)
    scale = gain * rstd
    on_y = -scale * rstd * dgain / M
    dy = torch.addcmul(_over(-scale * dshift / M - on_y * mean), rows, _over(on_y))
    return _images(_add(dy, e, scale, y, places), y), dgain, dshift


def norm_double_backward(
    v: Tensor,
    a: Tensor,
    s: Tensor,
    dz: Tensor,
    y: Tensor,
    gain: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor | None,
    places: Tensor | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dz, ``y`` and gain from those (v, a, s) of `norm_backward`'s results.

    The derivation is that of `metamom.nets.kernels.reference.norm_relu_double_backward`: e gets
    ``gain rstd P(v) + a x + s``, and y gets ``rstd (P(h) - x gain rstd <v, P(e)> / M)`` with
    ``h = -gain rstd (mean(e x) v + mean(v x) e) + a e``.
    """
    rows, V = _rows(y), _rows(v)
    M = rows.shape[1]
    e, there = _passed(dz, z, slope), _chosen(rows, y, places)
    v_mean = V.sum(1) / M
    vx_mean = rstd * ((V * rows).sum(1) / M - mean * v_mean)
    v_there, x_there = _chosen(V, y, places), (there - _over(mean)) * _over(rstd)
    e_mean, ex_mean = e.sum(1) / M, (e * x_there).sum(1) / M
    scale = gain * rstd
    to_e = _over(scale) * (v_there - _over(v_mean) - x_there * _over(vx_mean)) + _over(a) * x_there + _over(s)
    to_dz = _images(_masked(to_e, None if z is None else _rows(z), slope), dz)
    inner = (v_there * e).sum(1) - M * (v_mean * e_mean + vx_mean * ex_mean)  # <v, P(e)>
    on_v, on_e = -scale * ex_mean, a - scale * vx_mean
    level, on_x = on_v * v_mean + on_e * e_mean, on_v * vx_mean + on_e * ex_mean + scale * inner / M
    on_y = -rstd * rstd * on_x
    to_y = torch.addcmul(_over(-rstd * level - on_y * mean), rows, _over(on_y))
    to_y = to_y.addcmul_(V, _over(rstd * on_v))
    return to_dz, _images(_add(to_y, e, rstd * on_e, y, places), y), rstd * inner


def _moments(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = rows.mean(1)
    centred = rows - _over(mean)
    return mean, torch.rsqrt((centred * centred).mean(1) + eps)


def _rows(x: Tensor) -> Tensor:
    """``[G, N, C, H, W]`` as ``[G, M, C]``."""
    return channels_last(x).flatten(1, 3)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """``[G, M, C]`` as images of the shape of ``like``."""
    G, N, C, H, W = like.shape
    return channels_second(rows.view(G, N, H, W, C))


def _alone(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).unsqueeze(0)


def _over(of_channels: Tensor) -> Tensor:
    """``[G, C]`` as ``[G, 1, C]``."""
    return of_channels.unsqueeze(1)


def _masked(e: Tensor, z: Tensor | None, slope: float) -> Tensor:
    """Multiply rows by the derivative of the activation function, given its output."""
    if z is None or slope == 1:
        return e
    if slope == 0:
        relu: Tensor = torch.ops.aten.threshold_backward(e, z, 0)
        return relu
    leaky: Tensor = torch.ops.aten.leaky_relu_backward(e, z, slope, True)
    return leaky


def _passed(dz: Tensor, z: Tensor | None, slope: float) -> Tensor:
    """The cotangent before the activation function, as rows."""
    return _masked(_rows(dz), None if z is None else _rows(z), slope)


def _places(places: Tensor) -> Tensor:
    """The places that a pooling chose, as rows ``[G N, H' W', C]`` of numbers in 0..HW-1."""
    return channels_last(places).flatten(0, 1).flatten(1, 2)


def _chosen(rows: Tensor, y: Tensor, places: Tensor | None) -> Tensor:
    """Rows ``[G, P, C]`` at the places that a pooling chose; all rows without one."""
    if places is None:
        return rows
    G, N, C, H, W = y.shape
    return rows.view(G * N, H * W, C).gather(1, _places(places)).view(G, -1, C)


def _add(rows: Tensor, e: Tensor, factor: Tensor, y: Tensor, places: Tensor | None) -> Tensor:
    """Add ``factor * e`` to rows in place, at the places that a pooling chose."""
    if places is None:
        return rows.addcmul_(e, _over(factor))
    G, N, C, H, W = y.shape
    added = (e * _over(factor)).view(G * N, -1, C)
    return rows.view(G * N, H * W, C).scatter_add_(1, _places(places), added).view(rows.shape)
