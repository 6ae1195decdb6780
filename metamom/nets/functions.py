"""Replacements for functions of `torch.nn.functional` that are slow with separate weights for each task.

They are called under `torch.func.vmap` in place of PyTorch's, on a CPU. Convolutions and normalisations become the
operators of `metamom.nets.convolution` and `metamom.nets.normalisation`. A ReLU or max-pooling of normalised
activations becomes part of the normalisation. Other poolings are in `metamom.nets.channels_last`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.nets import cells
from metamom.nets.aliases import RESHAPING, Aliases
from metamom.nets.channels_last import ChannelsLastFunctions, as_group, pair
from metamom.nets.channels_last import on_any_layout as on_any_layout
from metamom.nets.convolution import convolve
from metamom.nets.followed import Followed
from metamom.nets.inside_vmap import differentiated, suitable
from metamom.nets.kernels.convolutions import Geometry
from metamom.nets.linear import bilinear, linear
from metamom.nets.normalisation import Pooling, normalise
from metamom.nets.rows import weight_norm


class FastFunctions(ChannelsLastFunctions):
    """The replacements during one call of a model.

    Args:
        waits: whether normalised activations are computed when something reads them. All calls of PyTorch's functions
            must then pass through `read` first, and `Followed.write_all` must follow.

    Attributes:
        seen: whether a call has been replaced.
        waits: as given.
        followed: the tensors that replacements have made.
        aliases: the images that the model has reshaped.
    """

    def __init__(self, waits: bool = False) -> None:
        super().__init__()
        self.waits = waits
        self.followed = Followed()
        self.aliases = Aliases()
        self._table: dict[Callable[..., Any], Callable[..., Any]] = {
            F.conv2d: self.conv2d,
            F.linear: self.linear,
            F.bilinear: self.bilinear,
            F.batch_norm: self.batch_norm,
            F.instance_norm: self.instance_norm,
            F.group_norm: self.group_norm,
            F.relu: self.relu,
            torch.relu: self.relu,
            torch.Tensor.relu: self.relu,
            F.leaky_relu: self.leaky_relu,
            F.max_pool2d: self.max_pool2d,
            torch.max_pool2d: self.max_pool2d,
            F.avg_pool2d: self.avg_pool2d,
            F.adaptive_avg_pool2d: self.adaptive_avg_pool2d,
            torch.mean: self.mean,
            torch.Tensor.mean: self.mean,
            torch.cat: self.cat,
            torch.lstm_cell: self.lstm_cell,
            torch._weight_norm: self.weight_norm,
            **{cell: self._cell(cell, composed) for cell, composed in cells.replacements(self.linear).items()},
        }

    def get(self, func: Callable[..., Any]) -> Callable[..., Any] | None:
        """The replacement of a function, if there is one."""
        return partial(self.aliases.reshaped, func) if func in RESHAPING else self._table.get(func)

    def keeps_layout(self, replacement: Callable[..., Any]) -> bool:
        """Whether a replacement returns what it gets in the layout that it has, as PyTorch's function does."""
        return replacement in (self.relu, self.leaky_relu)

    def read(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Write the activations that this call of a function of PyTorch reads, if they have waited.

        A ReLU or pooling of them does not read them; its replacement writes them where it leaves the call to PyTorch.
        """
        if self._table.get(func) not in (self.relu, self.max_pool2d):
            self.followed.read(args, kwargs)

    def _cell(self, original: Callable[..., Tensor], composed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A recurrent cell; PyTorch's own where the composed one may round differently, or PyTorch raises an error."""

        @wraps(composed)
        def called(
            input: Tensor,
            hx: Tensor,
            w_ih: Tensor,
            w_hh: Tensor,
            b_ih: Tensor | None = None,
            b_hh: Tensor | None = None,
        ) -> Tensor:
            if not cells.fits(input, hx, w_ih, w_hh, b_ih, b_hh):
                return original(input, hx, w_ih, w_hh, b_ih, b_hh)
            self.seen = True
            return composed(input, hx, w_ih, w_hh, b_ih, b_hh)

        return called

    def conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """`torch.nn.functional.conv2d`."""
        geometry = _geometry(input, weight, bias, stride, padding, dilation, groups)
        if geometry is None:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        self.seen = True
        if _frozen(input, weight, bias):
            return F.conv2d(input.contiguous(), weight, bias, stride, padding, dilation, groups)
        own_bias = None if bias is None else bias.unsqueeze(0)
        return self.followed.images(
            convolve(self.followed.group(input).contiguous(), weight.unsqueeze(0), own_bias, geometry)
        )

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`torch.nn.functional.linear`."""
        found = linear(input, weight, bias)
        if found is None:
            return _linear_of_one(input, weight, bias)
        self.seen = True
        return found

    def bilinear(self, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`torch.nn.functional.bilinear`."""
        if not suitable(input1, input2, weight):
            return F.bilinear(input1, input2, weight, bias)
        self.seen = True
        return bilinear(input1, input2, weight, bias)

    def weight_norm(self, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        """`torch._weight_norm`, of `torch.nn.utils.parametrizations.weight_norm`."""
        found = weight_norm(v, g, dim) if suitable(v, g) else None
        if found is None:
            return torch._weight_norm(v, g, dim)
        self.seen = True
        return found

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.batch_norm`."""
        own = weight is not None and bias is not None and suitable(input, weight, bias)
        statistics = training and running_mean is None and running_var is None  # of this batch
        if not (own and statistics and input.dim() == 4 and input.numel() > input.shape[1]):
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        assert weight is not None
        assert bias is not None
        self.seen = True
        gain, shift = weight.unsqueeze(0), bias.unsqueeze(0)
        return self.followed.keep(normalise(self.followed.group(input), gain, shift, eps, waits=self.waits))

    def instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.instance_norm`."""
        own = use_input_stats and running_mean is None and running_var is None  # of each image
        found = self._of_images(input, weight, bias, eps, 0) if own else None
        if found is None:
            return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        return found

    def group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.group_norm`."""
        found = self._of_images(input, weight, bias, eps, num_groups)
        return F.group_norm(input, num_groups, weight, bias, eps) if found is None else found

    def _of_images(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sets: int
    ) -> Tensor | None:
        """Images normalised by statistics of their own; ``None`` if PyTorch must do it (or raise its error)."""
        if (weight is None) != (bias is None) or input.dim() != 4 or not suitable(input, *_present(weight, bias)):
            return None
        N, C, H, W = input.shape
        if N == 0 or sets < 0 or (sets and C % sets) or C // (sets or C) * H * W < 2:
            return None
        if any(x.shape != (C,) for x in _present(weight, bias)):
            return None
        self.seen = True
        gain = input.new_ones(C) if weight is None else weight
        shift = input.new_zeros(C) if bias is None else bias
        images = input.permute(0, 2, 3, 1).unsqueeze(1)  # each one is a group
        return self.followed.keep(normalise(images, gain.expand(N, C), shift.expand(N, C), eps, sets))

    def relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        """`torch.nn.functional.relu`."""
        if inplace:
            self.followed.write(input)
        found = self._activate(input, 0.0, inplace)
        if found is None:
            self.followed.write(input)
            return F.relu(input, inplace)
        return found

    def leaky_relu(self, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
        """`torch.nn.functional.leaky_relu`."""
        found = self._activate(input, negative_slope, inplace)
        return F.leaky_relu(input, negative_slope, inplace) if found is None else found

    def max_pool2d(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        """`torch.nn.functional.max_pool2d`."""
        made = None if return_indices else self.followed.normalised(input)
        if made is None:
            self.followed.write(input)
            return super().max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        steps = kernel_size if stride is None or stride == [] else stride
        windows = [n for each in (kernel_size, steps, padding, dilation) for n in pair(each)]
        return self.followed.images(made.pooled(Pooling(windows, ceil_mode)))

    def lstm_cell(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`torch.lstm_cell`, the hidden state and the cell's."""
        h, c = hx
        if c.shape != h.shape or c.dtype != h.dtype or not cells.fits(input, h, w_ih, w_hh, b_ih, b_hh):
            return torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
        self.seen = True
        return cells.lstm_cell(self.linear, input, h, c, w_ih, w_hh, b_ih, b_hh)

    def _activate(self, input: Tensor, slope: float, inplace: bool) -> Tensor | None:
        made = self.followed.normalised(input)
        if made is None or made.slope != 1 or not 0 <= slope < 1:
            return None
        if inplace:  # PyTorch's own, but a pooling of it is still part of the normalisation
            out = F.leaky_relu(input, slope, inplace=True) if slope else F.relu(input, inplace=True)
            self.followed.hold(out, made._replace(value=as_group(out.detach()).view_as(made.value), slope=slope))
            return out
        return self.followed.keep(made.activated(slope))


def _linear_of_one(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's linear layer; without vmap, by the products that vmap makes of it, so that the bits are the same."""
    if torch._C._are_functorch_transforms_active() or input.dim() != 2 or weight.dim() != 2:
        return F.linear(input, weight, bias)
    if not suitable(input, weight) or input.shape[1] != weight.shape[1] or (bias is not None and bias.dim() != 1):
        return F.linear(input, weight, bias)  # or PyTorch's error
    product = torch.bmm(input.unsqueeze(0), weight.unsqueeze(0).mT).squeeze(0)
    return product if bias is None else product + bias


def _frozen(input: Tensor, *weights: Tensor | None) -> bool:
    """Whether tasks share these weights, and nothing is differentiated: PyTorch's own function takes all of them."""
    shared = not any(torch._C._functorch.is_functorch_wrapped_tensor(w) for w in weights if w is not None)
    return shared and not differentiated(input, *weights)


def _geometry(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Geometry | None:
    """How the kernel moves, or ``None`` if PyTorch must do it (or raise its error)."""
    given = (input, weight) if bias is None else (input, weight, bias)
    if input.dim() != 4 or weight.dim() != 4 or not suitable(*given) or input.numel() == 0:
        return None
    if input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    steps, dilations, kernel = pair(stride), pair(dilation), weight.shape[2:]
    if padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if padding != "same" or any(span % 2 for span in spans) or steps != (1, 1):
            return None
        padding = tuple(span // 2 for span in spans)
    geometry = Geometry(steps, pair(padding), dilations, groups)
    valid = min(*steps, *dilations) >= 1 and min(geometry.padding) >= 0
    return geometry if valid and min(geometry.size(input.shape[2:], kernel)) >= 1 else None


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]
