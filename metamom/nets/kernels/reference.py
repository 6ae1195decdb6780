"""The operators of `metamom.nets.layers` in plain PyTorch, for every device and dtype. They match kernels.cpp.

Legend: B images of height H, width W and C channels; G groups (tasks) of M positions with C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unfold(images: Tensor) -> Tensor:
    """Extract 3x3 patches with stride 2 and padding 1: ``[B, H, W, C] -> [B, (H+1)//2, (W+1)//2, 9 C]``.

    The last axis runs over the window's rows, its columns, and channels.
    """
    B, H, W, C = images.shape
    padded = F.pad(images, (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, column, channel = padded.stride()
    high, wide = (H + 1) // 2, (W + 1) // 2
    windows = padded.as_strided((B, high, wide, 3, 3, C), (image, 2 * row, 2 * column, row, column, channel))
    return windows.reshape(B, high, wide, 9 * C)


def fold(patches: Tensor, H: int, W: int) -> Tensor:
    """The adjoint of `unfold`, which adds overlapping patches: ``[B, (H+1)//2, (W+1)//2, 9 C] -> [B, H, W, C]``."""
    B, high, wide, _ = patches.shape
    taps = patches.view(B, high, wide, 3, 3, -1)

    def columns(row: int) -> Tensor:
        """Sum row ``row`` of the windows along the image's columns: ``[B, high, W, C]``."""
        even, odd = taps[:, :, :, row, 1], taps[:, :, :, row, 2]
        odd = odd + F.pad(taps[:, :, 1:, row, 0], (0, 0, 0, 1))
        return torch.stack([even, odd], 3).view(B, high, 2 * wide, -1)[:, :, :W]

    odd = columns(2) + F.pad(columns(0)[:, 1:], (0, 0, 0, 0, 0, 1))
    return torch.stack([columns(1), odd], 2).view(B, 2 * high, W, -1)[:, :H]


def moments(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` over positions: ``[G, M, C] -> [G, C]`` each."""
    mean = y.mean(1)
    centred = y - mean.unsqueeze(1)
    return mean, torch.rsqrt((centred * centred).mean(1) + eps)


def norm_relu(y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``relu(gain x + shift)`` of the normalised activations ``x = (y - mean) rstd``.

    Args:
        y: ``[G, M, C]``.
        gain: ``[G, C]``.
        shift: ``[G, C]``.
        eps: added to the variance.

    Returns:
        ``(z [G, M, C], mean [G, C], rstd [G, C])``.
    """
    mean, rstd = moments(y, eps)
    return torch.relu((y - mean.unsqueeze(1)) * (rstd * gain).unsqueeze(1) + shift.unsqueeze(1)), mean, rstd


def _passed(cotangent: Tensor, z: Tensor) -> Tensor:
    """Pass a cotangent through ReLU (where its output z is positive) in one pass over memory."""
    passed: Tensor = torch.ops.aten.threshold_backward(cotangent, z, 0)
    return passed


def norm_relu_backward(
    dz: Tensor, y: Tensor, gain: Tensor, z: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of ``y``, gain and shift from that of ``z``.

    With ``e = dz`` where z > 0 and the projection ``P(e) = e - mean(e) - x mean(e x)``:
    ``dy = gain rstd P(e), dgain = sum(e x), dshift = sum(e)``.
    """
    M = y.shape[1]
    e = _passed(dz, z)
    x = (y - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    dshift, dgain = e.sum(1), (e * x).sum(1)
    projected = e - (dshift / M).unsqueeze(1) - x * (dgain / M).unsqueeze(1)
    return (gain * rstd).unsqueeze(1) * projected, dgain, dshift


def norm_relu_double_backward(
    v: Tensor,
    a: Tensor,
    s: Tensor,
    dz: Tensor,
    y: Tensor,
    gain: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dz, ``y`` and gain from those (v, a, s) of `norm_relu_backward`'s results.

    The function to differentiate is ``<v, gain rstd P(e)> + <a, sum(e x)> + <s, sum(e)>``. P is symmetric, so e gets
    ``gain rstd P(v) + a x + s``, x gets ``h = -gain rstd (mean(e x) v + mean(v x) e) + a e`` and rstd gets
    ``gain <v, P(e)>``. Through ``x = (y - mean) rstd``, y gets ``rstd (P(h) - x gain rstd <v, P(e)> / M)``.
    """
    M = y.shape[1]
    e = _passed(dz, z)
    x = (y - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    v_mean, vx_mean = v.mean(1), (v * x).mean(1)
    e_mean, ex_mean = e.mean(1), (e * x).mean(1)
    inner = (v * e).sum(1) - M * (v_mean * e_mean + vx_mean * ex_mean)  # <v, P(e)>
    scale = gain * rstd
    on_v, on_e = -scale * ex_mean, a - scale * vx_mean  # h = on_v v + on_e e
    level = on_v * v_mean + on_e * e_mean
    slope = on_v * vx_mean + on_e * ex_mean + scale * inner / M

    to_dz = _passed(scale.unsqueeze(1) * v + on_e.unsqueeze(1) * x + (s - scale * v_mean).unsqueeze(1), z)
    h = on_v.unsqueeze(1) * v + on_e.unsqueeze(1) * e
    to_y = rstd.unsqueeze(1) * (h - level.unsqueeze(1) - x * slope.unsqueeze(1))
    return to_dz, to_y, rstd * inner
