"""Batch normalisation of each group, with activation function and pooling, and two derivatives, in plain PyTorch.

Legend: G groups (tasks), N images of each, C channels, M = N H W positions with common statistics, P pooled positions.

Images are channels-last, ``[G, N, H, W, C]``. They match kernels.cpp.

Each channel has statistics of its own, or the channels form ``sets`` that share theirs, as in group normalisation;
kernels.cpp does not have those. Statistics are ``[G, C]`` in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Statistics of groups of at least so many entries are computed one by one, with PyTorch's operator.
LARGE = 2**14
# Images of all groups with at least so many entries leave the caches: they are passed over one by one.
MANY = 2**21
# The same for their derivatives, and the least entries of all groups for PyTorch's group normalisation.
LARGE_BACKWARD, LARGE_OF_ALL = 2**16, 2**18
WIDE, LARGE_IMAGE = 8, 2**17  # channels of a set, entries of an image: the least for PyTorch's group normalisation


class Chosen(NamedTuple):
    """The places that a pooling chose, as `maximum` finds them.

    Attributes:
        entries: numbers in 0..HWC-1, the entries of each image, ``[G, N, H'W'C]``.
        there: the activations before the normalisation at these entries, ``[G, N, H', W', C]``; ``None`` to read them.
    """

    entries: Tensor
    there: Tensor | None


def norm(y: Tensor, gain: Tensor, shift: Tensor, eps: float, sets: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each group.

    Args:
        y: ``[G, N, H, W, C]``.
        gain: ``[G, C]``.
        shift: ``[G, C]``.
        eps: added to the variance.
        sets: the number of sets of channels; 0 for statistics of each channel.

    Returns:
        ``(gain x + shift, mean [G, C], rstd [G, C])`` for ``x = (y - mean) rstd``.
    """
    if sets and _suits_group_norm(y, sets):
        return _group_norm(y, gain, shift, eps, sets)
    mean, rstd = statistics(y, eps, sets)
    return affine(y, gain, shift, mean, rstd), mean, rstd


def _suits_group_norm(y: Tensor, sets: int) -> bool:
    """Whether PyTorch's group normalisation is faster: it is slow for narrow sets, except of large images."""
    width = y.shape[4] // sets
    wide = width >= WIDE or (2 * width >= WIDE and y[0].numel() >= LARGE_IMAGE)
    return y.shape[1] == 1 and y.numel() >= LARGE_OF_ALL and wide


def _group_norm(y: Tensor, gain: Tensor, shift: Tensor, eps: float, sets: int) -> tuple[Tensor, Tensor, Tensor]:
    """`norm` of groups of one image each, ``[G, 1, H, W, C]``, in two passes."""
    G, _, H, W, C = y.shape
    images = y.squeeze(1).permute(0, 3, 1, 2)
    x, mean, rstd = torch.native_group_norm(images, None, None, G, C, H * W, sets, eps)
    rows = x.permute(0, 2, 3, 1).reshape(G, H * W, C)
    z = torch.addcmul(_over(shift), rows, _over(gain)).view(y.shape)
    return z, mean.repeat_interleave(C // sets, 1), rstd.repeat_interleave(C // sets, 1)


def activate(
    y: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, before: Tensor, slope: float
) -> Tensor:
    """``z if z > 0 else slope * z`` of the normalised activations z, which are ``before``."""
    return F.relu(before) if slope == 0 else F.leaky_relu(before, slope)


def pool(
    y: Tensor,
    gain: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    before: Tensor,
    slope: float,
    windows: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """Pool normalised activations by their maximum.

    Args:
        y: before the normalisation, with gain, shift, mean, rstd and slope of what was done to it.
        gain: ``[G, C]``.
        shift: ``[G, C]``.
        mean: ``[G, C]``.
        rstd: ``[G, C]``.
        before: the result of that, ``[G, N, H, W, C]``.
        slope: of the activation function below 0; 1 for none.
        windows: kernel, stride, padding and dilation, two numbers each.
        ceil_mode: as in `torch.nn.functional.max_pool2d`.

    Returns:
        ``(maxima, places)``, ``[G, N, H', W', C]``; places are numbers in 0..HW-1.
    """
    images = before.flatten(0, 1).permute(0, 3, 1, 2)
    pairs = [list(windows[i : i + 2]) for i in (0, 2, 4, 6)]
    found = torch.ops.aten.max_pool2d_with_indices(images, *pairs, ceil_mode)
    z, places = (x.permute(0, 2, 3, 1).contiguous().unflatten(0, y.shape[:2]) for x in found)
    return z, places


def statistics(y: Tensor, eps: float, sets: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` of each group, ``[G, C]``, for ``y [G, N, H, W, C]``."""
    if sets or y[0].numel() < LARGE:
        return moments(_rows(y), eps, sets)
    each = [torch.batch_norm_update_stats(own.permute(0, 3, 1, 2), None, None, 0.0) for own in y]
    return torch.stack([one[0] for one in each]), torch.rsqrt(torch.stack([one[1] for one in each]) + eps)


def affine(y: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """``gain x + shift`` of the normalised activations x, from those before, ``y [G, N, H, W, C]``."""
    scale = gain * rstd
    return torch.addcmul(_over(shift - mean * scale), _rows(y), _over(scale)).view(y.shape)


def write(y: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, slope: float, value: Tensor) -> None:
    """Write `affine`, activated, to ``value``, which is contiguous."""
    scale = gain * rstd
    torch.addcmul(_over(shift - mean * scale), _rows(y), _over(scale), out=value.flatten(1, 3))
    _activated(value, slope)


def maximum(
    y: Tensor,
    gain: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    slope: float,
    windows: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, activate and pool, in the other order where that gives the same: few entries are then normalised.

    With a positive gain, the normalised maximum is that of the normalised activations. Otherwise all of them are
    normalised first, as `pool` gets them.

    Returns:
        ``(maxima, there, entries)``: the result, ``[G, N, H', W', C]``, and what `Chosen` has.
    """
    C = y.shape[4]
    rising = bool((gain * rstd > 0).all())
    before = y if rising else _activated(affine(y, gain, shift, mean, rstd), slope)
    found, at = pool(y, gain, shift, mean, rstd, before, slope, windows, ceil_mode)
    places = torch.add(torch.arange(C, device=at.device), at, alpha=C).flatten(2)
    if rising:
        return _activated(affine(found, gain, shift, mean, rstd), slope), found, places
    return found, _chosen(_rows(y), y, Chosen(places, None)).view(found.shape), places


def _activated(z: Tensor, slope: float) -> Tensor:
    """Apply ``z if z > 0 else slope * z`` in place."""
    if slope == 1:
        return z
    return z.relu_() if slope == 0 else F.leaky_relu_(z, slope)


def norm_backward(
    dz: Tensor,
    y: Tensor,
    gain: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor | None,
    places: Tensor | Chosen | None,
    slope: float,
    sets: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of ``y``, gain and shift from that of the result ``z``.

    With ``x = (y - mean) rstd``, the cotangent e of ``gain x + shift``, and the projection
    ``P(e) = e - mean(e) - x mean(e x)``: ``dy = gain rstd P(e), dgain = sum(e x), dshift = sum(e)``. If there is a
    pooling, e is 0 except at the P ``places`` that it chose, so it is kept and summed as ``[G, P, C]``.
    Channels that share statistics share the means in P, in which each one's e counts times its gain.
    """
    if not sets and places is None and y[0].numel() >= LARGE_BACKWARD and not torch.is_grad_enabled():
        return _batch_norm_backward(_passed(dz, z, slope).view(y.shape), y, gain, mean, rstd)
    rows = _rows(y)
    M = rows.shape[1]
    e, there = _passed(dz, z, slope), _there(rows, y, places)
    dshift = e.sum(1)
    dgain = rstd * ((e * there).sum(1) - mean * dshift)
    scale = gain * rstd
    on_y = _shared(-scale * rstd * dgain / M, sets)
    level = _shared(-scale * dshift / M, sets) - on_y * mean
    if isinstance(places, Chosen) and y.numel() >= MANY and not torch.is_grad_enabled():
        return _image_by_image(y, level, on_y, e * _over(scale), places.entries), dgain, dshift
    dy = torch.addcmul(_over(level), rows, _over(on_y))
    return _add(dy, e, scale, y, places).view(y.shape), dgain, dshift


def _image_by_image(y: Tensor, level: Tensor, on_y: Tensor, added: Tensor, places: Tensor) -> Tensor:
    """``level + on_y y``, and ``added [G, P, C]`` at the entries of `Chosen`, while an image is in the cache."""
    out = torch.empty_like(y)
    for target, images, a, b, own, at in zip(out, y, level, on_y, added.view(places.shape), places, strict=True):
        for image, before, more, to in zip(target, images, own, at, strict=True):
            torch.addcmul(a, before, b, out=image).view(-1).scatter_add_(0, to, more)
    return out


def _batch_norm_backward(
    e: Tensor, y: Tensor, gain: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_backward` from the cotangent of ``gain x + shift``, group by group with PyTorch's operator."""
    each = [
        torch.ops.aten.native_batch_norm_backward(
            c.permute(0, 3, 1, 2), own.permute(0, 3, 1, 2), g, None, None, m, r, True, 0.0, [True] * 3
        )
        for c, own, g, m, r in zip(e, y, gain, mean, rstd, strict=True)
    ]
    dy, dgain, dshift = (list(parts) for parts in zip(*each, strict=True))
    return torch.stack([one.permute(0, 2, 3, 1) for one in dy]), torch.stack(dgain), torch.stack(dshift)


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
    places: Tensor | Chosen | None,
    slope: float,
    sets: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of dz, ``y`` and gain from those (v, a, s) of `norm_backward`'s results.

    The derivation is that of `metamom.nets.kernels.reference.norm_relu_double_backward`: e gets
    ``gain rstd P(v) + a x + s``, and y gets ``rstd (P(h) - x gain rstd <v, P(e)> / M)`` with
    ``h = -gain rstd (mean(e x) v + mean(v x) e) + a e``.
    """
    rows, V = _rows(y), _rows(v)
    M = rows.shape[1]
    e, there = _passed(dz, z, slope), _there(rows, y, places)
    v_mean = V.sum(1) / M
    vx_mean = _shared(rstd * ((V * rows).sum(1) / M - mean * v_mean), sets)
    v_mean = _shared(v_mean, sets)
    v_there, e_mean = _chosen(V, y, places), e.sum(1) / M
    ex_mean = rstd * ((e * there).sum(1) / M - mean * e_mean)
    scale = gain * rstd
    on_there = (a - scale * vx_mean) * rstd
    to_e = torch.addcmul(_over(s - scale * v_mean - on_there * mean), there, _over(on_there))
    to_e = _plus(to_e, v_there, scale)
    to_dz = _masked(to_e, None if z is None else _rows(z), slope).view(dz.shape)
    inner = (v_there * e).sum(1) - M * (v_mean * e_mean + vx_mean * ex_mean)  # <v, P(e)>
    on_v, on_e = _shared(-scale * ex_mean, sets), a - scale * vx_mean
    level = on_v * v_mean + _shared(on_e * e_mean, sets)
    on_x = on_v * vx_mean + _shared(on_e * ex_mean, sets) + _shared(scale * inner / M, sets)
    on_y = -rstd * rstd * on_x
    to_y = torch.addcmul(_over(-rstd * level - on_y * mean), rows, _over(on_y))
    to_y = _plus(to_y, V, rstd * on_v)
    return to_dz, _add(to_y, e, rstd * on_e, y, places).view(y.shape), rstd * inner


def moments(rows: Tensor, eps: float, sets: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` over positions: ``[G, M, C] -> [G, C]`` each."""
    mean = _shared(rows.mean(1), sets)
    centred = rows - _over(mean)
    return mean, torch.rsqrt(_shared((centred * centred).mean(1), sets) + eps)


def _shared(of_channels: Tensor, sets: int) -> Tensor:
    """The means over the channels of each set, for each of its channels, ``[G, C]``."""
    if not sets:
        return of_channels
    each = of_channels.reshape(len(of_channels), sets, -1)
    return each.mean(2, keepdim=True).expand_as(each).flatten(1)


def _rows(x: Tensor) -> Tensor:
    """``[G, N, H, W, C]`` as ``[G, M, C]``."""
    return x.flatten(1, 3)


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


def _there(rows: Tensor, y: Tensor, places: Tensor | Chosen | None) -> Tensor:
    """The same as `_chosen` of y, which `Chosen` may have kept."""
    kept = places.there if isinstance(places, Chosen) else None
    return _chosen(rows, y, places) if kept is None else _rows(kept)


def _chosen(rows: Tensor, y: Tensor, places: Tensor | Chosen | None) -> Tensor:
    """Rows ``[G, P, C]`` at the places that a pooling chose; all rows without one."""
    if places is None:
        return rows
    G, N, H, W, C = y.shape
    if isinstance(places, Chosen):
        return rows.flatten().index_select(0, _among_all(places.entries, H * W * C)).view(G, -1, C)
    return rows.view(G * N, H * W, C).gather(1, places.view(G * N, -1, C)).view(G, -1, C)


def _add(rows: Tensor, e: Tensor, factor: Tensor, y: Tensor, places: Tensor | Chosen | None) -> Tensor:
    """Add ``factor * e`` to rows, at the places that a pooling chose."""
    if places is None:
        return _plus(rows, e, factor)
    G, N, H, W, C = y.shape
    if isinstance(places, Chosen):
        entries = rows.view(-1)
        put = entries.scatter_add if torch.is_grad_enabled() else entries.scatter_add_
        return put(0, _among_all(places.entries, H * W * C), (e * _over(factor)).view(-1)).view(rows.shape)
    added = (e * _over(factor)).view(G * N, -1, C)
    into = rows.view(G * N, H * W, C)
    add = into.scatter_add if torch.is_grad_enabled() else into.scatter_add_
    return add(1, places.view(G * N, -1, C), added).view(rows.shape)


def _among_all(places: Tensor, entries: int) -> Tensor:
    """Entries of each image, ``[G, N, P]``, as entries of all images."""
    G, N, _ = places.shape
    if G * N > 1:
        places = places + torch.arange(0, G * N * entries, entries, device=places.device).view(G, N, 1)
    return places.flatten()


def _plus(rows: Tensor, e: Tensor, factor: Tensor) -> Tensor:
    """Add ``factor * e`` to rows: in place, unless autograd or an outer vmap needs them."""
    add = rows.addcmul if torch.is_grad_enabled() else rows.addcmul_
    return add(e, _over(factor))
