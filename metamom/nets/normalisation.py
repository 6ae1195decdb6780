"""Normalisation with separate statistics for each group, and the activation and pooling that follow it.

Legend: G groups, N images of each, C channels. A group is a task in batch normalisation, and an image in instance and
group normalisation.

Images are channels-last, ``[G, N, H, W, C]``. A ReLU or max-pooling that follows becomes part of the normalisation in
the derivatives: cotangents are masked and summed after the pooling, where they are small, and each derivative passes
over the large activations once or twice. Third derivatives use plain autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.nets import kernels
from metamom.nets.grouped import Grouped, not_a_view
from metamom.nets.kernels import normalisations
from metamom.nets.kernels.normalisations import Chosen


class Pooling(NamedTuple):
    """The windows of a maximum, as in `torch.nn.functional.max_pool2d`: kernel, stride, padding and dilation."""

    windows: list[int]
    ceil_mode: bool


class Normalised(NamedTuple):
    """Normalised activations, and what their derivatives need.

    Attributes:
        y: the activations before, ``[G, N, H, W, C]``.
        gain: ``[G, C]``.
        shift: ``[G, C]``.
        mean: of each group and channel, ``[G, C]``.
        rstd: ``1 / sqrt(variance + eps)``, ``[G, C]``.
        eps: added to the variance.
        slope: of the activation function below 0; 1 if there is none so far.
        value: the result so far, ``[G, N, H, W, C]``.
        sets: the number of sets of channels that share statistics; 0 if none do.
        waits: whether the value is still to be written.
    """

    y: Tensor
    gain: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    eps: float
    slope: float
    value: Tensor
    sets: int = 0
    waits: bool = False

    def activated(self, slope: float) -> Normalised:
        """Apply ``z if z > 0 else slope * z``. The result waits if this does."""
        before = self.y if self.waits else self.value.detach()  # which is not read if it waits
        value, _ = _Then.run(*self._inputs(), before, slope, None, self.eps, self.sets, self.waits)
        return self._replace(value=value, slope=slope)

    def pooled(self, pooling: Pooling) -> Tensor:
        """The maximum over windows, ``[G, N, H', W', C]``."""
        value: Tensor
        if kernels.are_native(self.y):
            options = self.slope, pooling, self.eps, self.sets, False
            value = _Then.run(*self._inputs(), self.value.detach(), *options)[0]
        else:
            value = _Pooled.run(*self._inputs(), self.slope, pooling, self.eps, self.sets)[0]
        return value

    def written(self) -> Normalised:
        """The same, with the value in its memory if that has waited so far."""
        if self.waits:
            with torch.no_grad():
                _Write.run(*self._inputs(), self.value.detach(), self.slope)
        return self._replace(waits=False)

    def _inputs(self) -> tuple[Tensor, ...]:
        return self.y, self.gain, self.shift, self.mean, self.rstd


def normalise(y: Tensor, gain: Tensor, shift: Tensor, eps: float, sets: int = 0, *, waits: bool = False) -> Normalised:
    """Normalise ``[G, N, H, W, C]`` by the statistics of each group and channel. ``gain``, ``shift``: ``[G, C]``.

    With ``sets``, the channels are that many sets of neighbours, each with common statistics. A value that ``waits`` is
    empty memory until `Normalised.written`: a pooling does not need it.
    """
    waits = waits and not kernels.are_native(y)
    value, mean, rstd = _Norm.run(y, gain, shift, eps, sets, waits)
    return Normalised(y, gain, shift, mean, rstd, eps, 1.0, value, sets, waits)


class _Norm(Grouped):
    """``(z, mean, rstd)``; mean and rstd are for the derivatives of z alone."""

    @staticmethod
    def forward(
        y: Tensor, gain: Tensor, shift: Tensor, eps: float, sets: int, waits: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if waits:
            y = y.contiguous()
            return y.new_empty(y.shape), *normalisations.statistics(y, eps, sets)
        given = y.contiguous(), gain, shift, eps
        value, mean, rstd = normalisations.norm(*given, sets) if sets else kernels.norm(*given)
        return not_a_view(value), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, gain, _, ctx.eps, ctx.sets, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(y, gain, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        found = _NormBackward.run(dz, *ctx.saved_tensors, None, None, None, 1.0, ctx.eps, ctx.sets)
        return *found, None, None, None


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
        sets: int,
        waits: bool,
    ) -> tuple[Tensor, Tensor]:
        y = y.contiguous()
        if waits:
            return y.new_empty(y.shape), y.new_empty(y.shape[0], 0)
        # compiled operators compute `before` again: a graph in which nothing else needs it never writes it
        given = y, gain, shift, mean, rstd, y if kernels.are_native(y) else before.contiguous(), slope
        if pooling is not None:
            return kernels.pool(*given, *pooling)
        return kernels.activate(*given), y.new_empty(y.shape[0], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, gain, _, mean, rstd, before, ctx.slope, ctx.pooling, ctx.eps, ctx.sets, _ = inputs
        z, places = output
        ctx.mark_non_differentiable(places)
        ctx.set_materialize_grads(False)  # zeros for `places` would be as large as they are
        # as PyTorch's functions do: the result of a ReLU must not change in place, that of a leaky one may
        signs = before if ctx.slope > 0 and ctx.pooling is None else z
        if ctx.pooling is not None and ctx.slope != 1:
            signs = z.clone()  # that of a pooling may too
        ctx.save_for_backward(y, gain, mean, rstd, signs, places)

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dz is None:
            return (None,) * 11
        *tensors, places = ctx.saved_tensors
        places = None if ctx.pooling is None else places
        found = _NormBackward.run(dz, *tensors, places, None, ctx.slope, ctx.eps, ctx.sets)
        return *found, *(None,) * 8


class _Pooled(Grouped):
    """``(z, there, places)``: the activation function and the pooling of normalised activations, from those before."""

    @staticmethod
    def forward(
        y: Tensor,
        gain: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        slope: float,
        pooling: Pooling,
        eps: float,
        sets: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, there, places = normalisations.maximum(y.contiguous(), gain, shift, mean, rstd, slope, *pooling)
        return not_a_view(z), there, places

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.slope, _, ctx.eps, ctx.sets = inputs
        _, there, places = output
        ctx.mark_non_differentiable(there, places)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, places, there)  # not z, which a model may change in place

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dz is None:
            return (None,) * 9
        y, gain, shift, mean, rstd, places, there = ctx.saved_tensors
        with torch.no_grad():
            signs = None if ctx.slope == 1 else normalisations.affine(there, gain, shift, mean, rstd)
        found = _NormBackward.run(dz, y, gain, mean, rstd, signs, places, there, ctx.slope, ctx.eps, ctx.sets)
        return *found, *(None,) * 6


class _Write(Grouped):
    """Write normalised and activated values into the memory of a tensor that has waited for them."""

    @staticmethod
    def forward(
        y: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, value: Tensor, slope: float
    ) -> Tensor:
        normalisations.write(y.contiguous(), gain, shift, mean, rstd, slope, value.data)
        return value.new_empty(len(value), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass


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
        there: Tensor | None,
        slope: float,
        eps: float,
        sets: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (dz.contiguous(), y.contiguous(), gain, mean, rstd, z)
        if there is not None and places is not None:
            return normalisations.norm_backward(*given, Chosen(places, there), slope, sets)
        if sets:
            return normalisations.norm_backward(*given, places, slope, sets)
        return kernels.norm_backward(*given, places, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.slope, ctx.eps, ctx.sets = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor | None, ...]:
        dz, y, gain, mean, rstd, z, places, there = ctx.saved_tensors
        given = (v.contiguous(), a, s, dz.contiguous(), y.contiguous(), gain)
        if torch.is_grad_enabled():  # for a third derivative, recompute everything from y with plain autograd
            mean, rstd = normalisations.moments(given[4].flatten(1, 3), ctx.eps, ctx.sets)
        if there is not None:
            chosen = Chosen(places, None if torch.is_grad_enabled() else there)
            found = normalisations.norm_double_backward(*given, mean, rstd, z, chosen, ctx.slope, ctx.sets)
        elif torch.is_grad_enabled() or ctx.sets:
            found = normalisations.norm_double_backward(*given, mean, rstd, z, places, ctx.slope, ctx.sets)
        else:
            found = kernels.norm_double_backward(*given, mean, rstd, z, places, ctx.slope)
        return *found, *(None,) * 8
