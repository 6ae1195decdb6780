"""Find the head of a model: the part that computes its output from features that inner steps do not change.

The head is the smallest module that holds all adapted parameters and whose output is the output of the model. Whether a
module is one is decided by watching a run of the model. It must be called once, with one tensor, and nothing else in
the model may read the adapted parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metamom.common.modules import modules_of
from metamom.maml.checks.carried_over import generators_outside_torch
from metamom.maml.normalisation.norm_modes import AnyNorm
from metamom.maml.running.swapping import is_training, slots
from metamom.maml.task_weights import Params

SIMPLE = (bool, int, float, str)


class Kind(NamedTuple):
    """A kind of run, for which a module is the head or not.

    Attributes:
        training: the mode.
        norm: what normalisations use.
        adapted: names of the adapted parameters.
        shapes: of the sets of one task, with their dtypes.
    """

    training: bool
    norm: AnyNorm | None
    adapted: tuple[str, ...]
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]


class Heads:
    """Remembers the head of a model for each kind of run.

    A decision holds until a number, string or flag in a module changes. If a run changes one, there is no head: it
    would change less often.
    """

    def __init__(self) -> None:
        self._decided: dict[Kind, tuple[Hashable, str | None]] = {}
        self._unsteady = False
        self._apart: dict[tuple[str, ...], bool] = {}

    def may_have_one(self, model: nn.Module, adapted: tuple[str, ...]) -> bool:
        """Whether a part of the model holds all adapted parameters."""
        if adapted not in self._apart:
            self._apart[adapted] = bool(_around(model, adapted))
        return self._apart[adapted]

    def has_none(self, kind: Kind, options: Hashable) -> bool:
        """Whether the model is known to have no head."""
        return self._unsteady or self._decided.get(kind) == (options, None)

    def found_elsewhere(self, kind: Kind, options: Hashable) -> bool:
        """Whether the model is known to have a head on sets of some shapes."""
        return any(
            path is not None and before == options and other[:3] == kind[:3]
            for other, (before, path) in self._decided.items()
        )

    def watch(self, model: nn.Module, kind: Kind, options: Hashable) -> Watch | None:
        """What to call in place of ``model`` to record the features; ``None`` if it has no head.

        Args:
            model: the model.
            kind: of run.
            options: from `options_of`.
        """
        adapted = kind.adapted
        before, path = self._decided.get(kind, (None, None))
        if before == options:
            return None if path is None else Watch(model, {path: model.get_submodule(path)}, adapted, closely=False)
        found = _around(model, adapted)
        if not found:
            self._decided[kind] = options, None
            return None
        return Watch(model, found, adapted, closely=True)

    def decide(self, kind: Kind, options: Hashable, after: Hashable, left: Iterable[str]) -> str | None:
        """The name of the head after a run; ``None`` if there is none.

        Args:
            kind: as for `watch`.
            options: as for `watch`.
            after: the same after the run.
            left: the modules that may be the head, smallest first.
        """
        self._unsteady = self._unsteady or after != options
        path = None if self._unsteady else next(iter(left), None)
        self._decided[kind] = options, path
        return path


@dataclass
class _Calls:
    """The calls of a module during a run of the model."""

    module: nn.Module
    inputs: list[Tensor]
    running: bool = False
    output: Tensor | None = None
    writes: int = 0  # to that output
    fits: bool = True


class Watch:
    """Calls a model, and records the inputs of the modules that may be its head.

    Args:
        model: the model.
        heads: those modules by name, smallest first.
        adapted: names of the adapted parameters.
        closely: whether to check everything. Otherwise only the calls are checked.
    """

    def __init__(
        self, model: nn.Module, heads: Mapping[str, nn.Module], adapted: Iterable[str], *, closely: bool
    ) -> None:
        self.model = model
        self.closely = closely
        places = slots(model).places
        self._places = [place for name in adapted for place in places.get(name, [])]
        self._calls = {path: _Calls(module, []) for path, module in heads.items()}

    def __call__(self, x: Tensor) -> Any:
        """The model's output. Its inputs to the heads are kept until `features` takes them."""
        outside = generators_outside_torch() if self.closely else {}
        counts = {path: len(calls.inputs) for path, calls in self._calls.items()}
        try:
            with _Reads(self._note) if self.closely else nullcontext(), self._recorded(_settings(x)):
                out = self.model(x)
        except BaseException:
            self.features()  # those of a run that failed are not used
            raise
        drawn = self.closely and generators_outside_torch() != outside
        for path, calls in self._calls.items():
            once = len(calls.inputs) == counts[path] + 1
            changed = self.closely and isinstance(out, Tensor) and _writes(out) != calls.writes
            calls.fits = calls.fits and once and out is calls.output and not drawn and not changed
            calls.output = None
        return out

    def features(self) -> dict[str, list[Tensor]]:
        """The inputs of each module that may still be the head, in the order of the calls."""
        found = {path: calls.inputs for path, calls in self._calls.items() if calls.fits}
        for calls in self._calls.values():
            calls.inputs = []
        return found

    @contextmanager
    def _recorded(self, around: Hashable) -> Iterator[None]:
        """Replace the modules' forwards by ones that record their calls."""
        had = {path: calls.module.__dict__.get("forward") for path, calls in self._calls.items()}
        try:
            for calls in self._calls.values():
                calls.module.__dict__["forward"] = self._recording(calls, calls.module.forward, around)
            yield
        finally:
            for path, calls in self._calls.items():
                calls.running = False
                if had[path] is None:
                    calls.module.__dict__.pop("forward", None)
                else:
                    calls.module.__dict__["forward"] = had[path]

    def _recording(self, calls: _Calls, forward: Callable[..., Any], around: Hashable) -> Callable[..., Any]:
        def recording(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or type(args[0]) is not Tensor or calls.running:
                calls.fits = False
                return forward(*args, **kwargs)
            (features,) = args
            calls.inputs.append(features)
            calls.fits = calls.fits and _settings(features) == around
            before = _writes(features) if self.closely else 0
            calls.running = True
            try:
                out = forward(features)
            finally:
                calls.running = False
            if self.closely and _writes(features) != before:
                calls.fits = False
            if isinstance(out, Tensor):
                calls.output, calls.writes = out, _writes(out) if self.closely else 0
            return out

        return recording

    def _note(self, ids: set[int]) -> None:
        """Note which tensors a function reads: of the adapted ones, and of the heads' outputs."""
        reads_adapted = any(id(registered[key]) in ids for registered, key in self._places)
        for calls in self._calls.values():
            if not calls.running and (reads_adapted or (calls.output is not None and id(calls.output) in ids)):
                calls.fits = False


class _Reads(TorchFunctionMode):
    """Reports the ids of tensors that are arguments of PyTorch's functions."""

    def __init__(self, note: Callable[[set[int]], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._note({id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return func(*args, **(kwargs or {}))


def options_of(model: nn.Module) -> Hashable | None:
    """The numbers, strings and flags in a model's modules; ``None`` if hooks or scripted code rule out a head.

    A forward hook would run less often.
    """
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return None
    found: list[Hashable] = []
    for module in modules_of(model):
        if isinstance(module, torch.jit.ScriptModule) or module._forward_hooks or module._forward_pre_hooks:
            return None
        values = module.__dict__
        found += [id(module), id(type(module)), is_training(module), id(values.get("forward"))]
        found += [value for value in values.values() if type(value) in SIMPLE]
    return tuple(found)


def versions_of(model: nn.Module, sets: Sequence[Tensor]) -> Hashable:
    """Which tensors a model and its inputs consist of, and how often each was written to."""
    registered = [t for m in modules_of(model) for held in (m._parameters, m._buffers) for t in held.values()]
    return tuple((id(t), _version(t)) for t in (*registered, *sets) if t is not None)


def depends(outputs: Iterable[Tensor], weights: Params) -> bool:
    """Whether the graph of some output contains one of the weights."""
    targets = {get_gradient_edge(w).node for w in weights.values() if w.requires_grad}
    todo: list[Node] = [get_gradient_edge(out).node for out in outputs if out.requires_grad]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node in targets:
            return True
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        todo += new
    return False


def _around(model: nn.Module, adapted: Iterable[str]) -> dict[str, nn.Module]:
    """The modules in the model that hold all adapted parameters, smallest first; not the model itself."""
    registered = {id(tensor) for name, tensor in slots(model).tensors.items() if name in set(adapted)}
    holders = [
        path.split(".") if path else []
        for path, module in model.named_modules(remove_duplicate=False)
        if any(id(tensor) in registered for tensor in (*module._parameters.values(), *module._buffers.values()))
    ]
    common: list[str] = []
    for parts in zip(*holders, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    paths = [".".join(common[:length]) for length in range(len(common), 0, -1)]
    return {path: model.get_submodule(path) for path in paths}


def _settings(x: Tensor) -> Hashable:
    """PyTorch's settings that change what a module computes."""
    kind = x.device.type
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
    )


def _writes(tensor: Tensor) -> int:
    """How often a tensor, which may be inside vmap, was written to."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return _version(tensor)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
