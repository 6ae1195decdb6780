"""Run a model with a choice of statistics for its normalisations, by replacing their functions.

This covers PyTorch's layers, metamom's `BatchNormReLU`, and models that call `torch.nn.functional.batch_norm` or
`instance_norm` themselves. Running statistics are never written. Instance normalisation uses running statistics if they
are frozen, else those of each instance.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import repeat
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from metamom.common.choices import Norm
from metamom.common.modules import modules_of, named_modules_of
from metamom.maml.running.swapping import trains_elsewhere
from metamom.nets.inside_vmap import differentiated
from metamom.nets.layers import batch_norm_relu
from metamom.nets.statistics import hidden, normalises_itself, uncounted, uses_running_statistics


class ByLayer(NamedTuple):
    """A choice for each layer, in place of one for all of them.

    Attributes:
        frozen: the names of the layers that normalise by running statistics.
        others: what the other layers use, ``"batch"`` or ``"support"``.
    """

    frozen: frozenset[str]
    others: Norm = "batch"


AnyNorm = Norm | ByLayer


class Statistics(NamedTuple):
    """The mean and variance of each channel, ``[C]``."""

    mean: Tensor
    variance: Tensor


def normalised(
    x: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, eps: float, axis: int
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` along one axis of ``x``; the others are ``[C]``."""
    shape = [1] * x.dim()
    shape[axis] = -1
    wide, mean, variance = _wide(x), *(_wide(each) for each in statistics)
    scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
    centred = wide - mean.view(shape)  # first, since the mean may be large in units of the deviation
    out = centred * scale.view(shape) if bias is None else torch.addcmul(bias.view(shape), centred, scale.view(shape))
    return out.to(x.dtype)


def in_one_pass(
    x: Tensor, statistics: Statistics, weight: Tensor | None, bias: Tensor | None, eps: float, axis: int
) -> Tensor:
    """The same as `normalised`, in one pass over ``x`` if nothing is differentiated."""
    if differentiated(x, weight, bias, *statistics):
        return normalised(x, statistics, weight, bias, eps, axis)
    shape = [1] * x.dim()
    shape[axis] = -1
    mean, variance = (_wide(each) for each in statistics)
    scale = torch.rsqrt(variance + eps) if weight is None else torch.rsqrt(variance + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale  # as PyTorch does
    return torch.addcmul(shift.view(shape), _wide(x), scale.view(shape)).to(x.dtype)


class Normalisation(TorchFunctionMode):
    """Replaces the functions that normalise. Here, each set is normalised by its own statistics.

    Attributes:
        by_channel: the function for batch normalisation by statistics that are not the input's own.
        replaced: how often such a function was called.
    """

    by_channel = staticmethod(normalised)
    replaced = 0

    def __init__(self) -> None:
        super().__init__()
        self._table: dict[Callable[..., Any], Callable[..., Any]] = {
            F.batch_norm: self.batch_norm,
            F.instance_norm: self.instance_norm,
            batch_norm_relu: self.batch_norm_relu,
            **dict.fromkeys(_operators("batch_norm"), self._operator(self.batch_norm)),
            **dict.fromkeys(_operators("instance_norm"), self._operator(self.instance_norm)),
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        replacement = self._table.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        self.replaced += 1
        return replacement(*args, **(kwargs or {}))

    def call(self, model: Callable[[Tensor], Any], sets: Sequence[Tensor]) -> Any:
        """Call the model on the last of the sets. If there are two, the first is the support set."""
        return model(sets[-1])

    def of_batch(self, input: Tensor, running: Statistics | None, axis: int) -> Statistics | None:
        """The statistics to normalise ``input`` by, along a channel axis; ``None`` for its own."""
        return None

    def of_instance(self, running: Statistics | None) -> Statistics | None:
        """The same for instance normalisation; ``None`` for those of each instance."""
        return None

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
        found = self.of_batch(input, _given(running_mean, running_var), 1)
        if found is None:
            return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        return self.by_channel(input, found, weight, bias, eps, 1)

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
        found = self.of_instance(_given(running_mean, running_var))
        if found is None:
            return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)
        return normalised(input, found, weight, bias, eps, 1)

    def batch_norm_relu(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """`metamom.nets.layers.batch_norm_relu`."""
        found = self.of_batch(x, None, -1)
        return (
            batch_norm_relu(x, weight, bias, eps)
            if found is None
            else normalised(x, found, weight, bias, eps, -1).relu()
        )

    def _operator(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``torch.batch_norm`` or ``torch.instance_norm``, which exported models call, from its replacement."""

        def operator(
            input: Tensor,
            weight: Tensor | None,
            bias: Tensor | None,
            running_mean: Tensor | None,
            running_var: Tensor | None,
            own: bool,
            momentum: float,
            eps: float,
            cudnn_enabled: bool,
        ) -> Tensor:
            return function(input, running_mean, running_var, weight, bias, own, momentum, eps)

        return operator


class Frozen(Normalisation):
    """Normalises by running statistics, in training mode too."""

    by_channel = staticmethod(in_one_pass)

    def of_batch(self, input: Tensor, running: Statistics | None, axis: int) -> Statistics | None:
        """The running statistics.

        Raises:
            ValueError: if there are none.
        """
        if running is None:
            raise ValueError(
                'norm="frozen" normalises by running statistics, and the model calls batch_norm without them. Use '
                'norm="batch" or norm="support".'
            )
        return running

    def of_instance(self, running: Statistics | None) -> Statistics | None:
        """The running statistics, if there are any."""
        return running


class OfSupport(Normalisation):
    """Normalises queries by the statistics of the support set, from a pass of that set just before.

    Statistics are recorded in the order of the calls. That pass has the same weights, and predictions depend on the
    weights through it too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[Statistics] | None = None
        self._left: Iterator[Statistics] | None = None

    def call(self, model: Callable[[Tensor], Any], sets: Sequence[Tensor]) -> Any:
        """Call the model on the support set, then on the queries. A single set has its own statistics.

        Raises:
            ValueError: if the second call does not normalise as often as the first.
        """
        if len(sets) == 1:
            return model(sets[0])
        recorded: list[Statistics] = []
        self._recorded = recorded
        try:
            model(sets[0])
            self._recorded, self._left = None, iter(recorded)
            out = model(sets[1])
            if next(self._left, None) is not None:
                raise _different_calls()
        finally:
            self._recorded = self._left = None
        return out

    def of_batch(self, input: Tensor, running: Statistics | None, axis: int) -> Statistics | None:
        """The statistics of the same call on the support set. In that call itself, they are recorded."""
        if self._left is not None:
            found = next(self._left, None)
            if found is None:
                raise _different_calls()
            return found
        if self._recorded is not None:
            self._recorded.append(statistics_of(input, axis))
        return None


class AsTold(OfSupport):
    """Normalises by running statistics where a call of the function says so, and elsewhere as `OfSupport`.

    A forward that passes its module's mode on says what it does in training, if evaluations have changed that mode.

    Layers that are not to use their running statistics must not pass them on, see `metamom.nets.statistics.hidden`.
    """

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
        running = None if training or _trains_elsewhere() else _given(running_mean, running_var)
        if running is not None:
            return in_one_pass(input, running, weight, bias, eps, 1)
        return super().batch_norm(input, None, None, weight, bias, True, momentum, eps)

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
        running = None if use_input_stats or _trains_elsewhere() else _given(running_mean, running_var)
        if running is not None:
            return normalised(input, running, weight, bias, eps, 1)
        return super().instance_norm(input, None, None, weight, bias, True, momentum, eps)


MODES: dict[Norm, type[Normalisation]] = {"batch": Normalisation, "frozen": Frozen, "support": OfSupport}


@contextmanager
def normalising(
    model: nn.Module, norm: AnyNorm | None
) -> Iterator[Callable[[Callable[[Tensor], Any], Sequence[Tensor]], Any]]:
    """Yield a function that calls ``model`` on sets (see `Normalisation.call`) with a choice of statistics.

    Its layers do not count their calls meanwhile. Use this under `metamom.maml.running.swapping.locked`.
    """
    if norm is None:
        yield lambda model, sets: model(sets[-1])
        return
    if isinstance(norm, ByLayer):
        named = named_modules_of(model)
        modules = [*named.values()]
        kind: type[Normalisation] = AsTold
        uses: Iterable[Norm] = ["frozen" if name in norm.frozen else norm.others for name in named]
        of_input = [module for name, module in named.items() if name not in norm.frozen]
    else:
        modules, kind, uses, of_input = modules_of(model), MODES[norm], repeat(norm), []
    with uncounted(modules), hidden(of_input), kind() as mode, _acting(mode, zip(modules, uses, strict=False)):
        yield mode.call


@contextmanager
def _acting(mode: Normalisation, uses: Iterable[tuple[nn.Module, Norm]]) -> Iterator[None]:
    """Refuse layers with a forward of their own that do not do what they should, when they are called.

    Raises:
        ValueError: for a layer that does not call a function that ``mode`` replaces, unless it uses what it should in
            the mode that it is in.
    """
    before: list[int] = []
    own = {id(each): (each, norm) for each, norm in uses if normalises_itself(type(each))}  # type: ignore[arg-type]

    def begin(module: nn.Module, inputs: Any) -> None:
        before.append(mode.replaced)

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        does = "batch" if module.training or not uses_running_statistics(module) else "frozen"
        _, norm = own[id(module)]
        if before.pop() == mode.replaced and norm != does:
            raise ValueError(
                f"norm={norm!r} replaces the functions that normalise, and {type(module).__name__} normalises by a "
                f"forward of its own, here as {does!r}. Let its forward call torch.nn.functional.batch_norm."
            )

    with ExitStack() as hooks:
        for module, _ in own.values():
            for hook in (module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)):
                hooks.callback(hook.remove)
        yield


def statistics_of(x: Tensor, axis: int) -> Statistics:
    """The statistics of a set along a channel axis, as normalisation takes them."""
    axes = [i for i in range(x.dim()) if i != axis % x.dim()]
    variance, mean = torch.var_mean(_wide(x), axes, correction=0)
    return Statistics(mean, variance)


def _trains_elsewhere() -> bool:
    """Whether the code that calls a function reads the mode of a module that is otherwise in training.

    That code is a module's forward, or what it calls: a function may be given the mode or the module.
    """
    frame: FrameType | None = sys._getframe(1)
    reads, modules = False, []
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, _NormBase):
            return False
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("torch", "metamom"):
            reads = reads or "training" in frame.f_code.co_names
            modules += [each for each in frame.f_locals.values() if isinstance(each, nn.Module)]
            if isinstance(module, nn.Module):
                return reads and any(map(trains_elsewhere, modules))
        frame = frame.f_back
    return False


def _given(mean: Tensor | None, variance: Tensor | None) -> Statistics | None:
    return None if mean is None or variance is None else Statistics(mean, variance)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # 16 bits are too few for statistics


def _operators(name: str) -> list[Callable[..., Any]]:
    operator = getattr(torch.ops.aten, name)
    return [getattr(torch, name), operator, operator.default]


def _different_calls() -> ValueError:
    return ValueError(
        'norm="support" normalises each call on the queries by that of the support set, and the model normalises more '
        "often on one of them than on the other. Write its forward so that it does not depend on the number of points."
    )
