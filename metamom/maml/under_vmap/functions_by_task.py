"""Replacements for functions that `torch.func.vmap` or second derivatives get wrong; they agree with a loop over tasks.

Lookups, losses, attention, layouts and methods in place are in files of their own. Of those here, the gradient of the
source of `torch.select_scatter` is wrong. `torch.index_fill` uses one task's value for all tasks if only the values
differ between tasks. `torch.roll` of a single number rolls over the tasks. The derivative of `torch.prelu` fails if the
tasks share the input but not the slopes. `torch.as_strided` reads the memory of images, which have another layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dis import get_instructions
from functools import cache
from inspect import getattr_static
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metamom.common.modules import modules_of
from metamom.common.trees import Tree
from metamom.compile.tracing import is_tracing
from metamom.maml.under_vmap.attention_by_task import attention, multi_head_attention
from metamom.maml.under_vmap.attributes_by_task import (
    DATA,
    GRAD_FN,
    IS_LEAF,
    REQUIRES_GRAD,
    data,
    grad_fn,
    is_leaf,
    register_hook,
    requires_grad,
    retain_grad,
)
from metamom.maml.under_vmap.caught_errors import handles_errors, refuse
from metamom.maml.under_vmap.embeddings_by_task import embedding, embedding_bag, one_hot, table_lookup
from metamom.maml.under_vmap.in_place import IN_PLACE
from metamom.maml.under_vmap.layouts_by_task import DIMS, in_layout
from metamom.maml.under_vmap.losses_by_task import cross_entropy, gaussian_nll_loss, linear_cross_entropy
from metamom.maml.under_vmap.written_losses import WRITTEN
from metamom.maml.vmap_errors import VmapError
from metamom.nets.aliases import CURRENT, Aliases, is_permuted, writes
from metamom.nets.channels_last import on_any_layout
from metamom.nets.functions import FastFunctions
from metamom.nets.inside_vmap import differentiated


class FunctionsByTask(TorchFunctionMode):
    """Replaces calls of these functions inside a model.

    Args:
        fast: whether the model runs under vmap. Slow functions are then replaced too, see `metamom.nets.functions`; in
            a loop, only those with wrong or missing second derivatives are.
        waits: whether normalised activations are computed only if the model reads them, by PyTorch's functions: the
            model must have no other code (`metamom.maml.checks.hooks.is_of_pytorch`).

    Attributes:
        seen: whether a call has been replaced.
        raised: the last error in a call.
    """

    def __init__(self, *, fast: bool = True, waits: bool = False) -> None:
        super().__init__()
        self.seen = False
        self.raised: Exception | None = None
        self._fast = FastFunctions(waits) if fast else None

    def __enter__(self) -> FunctionsByTask:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._outer = CURRENT.set(None if self._fast is None else self._fast.aliases)
        self._outer_mode = _MODE.set(None if self._fast is None and not is_tracing() else self)
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode. What the model returns or keeps is computed now, if it was not before."""
        CURRENT.reset(self._outer)
        _MODE.reset(self._outer_mode)
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._fast is not None and self._fast.waits and error[0] is None:
            self._fast.followed.write_all()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        aliases = None if self._fast is None else self._fast.aliases
        try:
            if aliases is not None:
                _check_read(aliases, args, kwargs)
            found = self._called(func, args, kwargs)
        except Exception as error:
            self.raised = error
            raise
        if aliases is not None:
            aliases.note(func, args, kwargs)
        return found

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function or its replacement."""
        if self._fast is not None and self._fast.waits:
            self._fast.read(func, args, kwargs)
        if self._fast is not None and "memory_format" in kwargs:
            found = in_layout(func, args, kwargs)
            self.seen = self.seen or found is not NotImplemented
            if found is NotImplemented and kwargs["memory_format"] in DIMS:
                found = on_any_layout(func, args, kwargs)
            if found is not NotImplemented:
                return self._fast.aliases.in_layout(args[0] if args else None, found)
        fast = None if self._fast is None else self._fast.get(func)
        if self._fast is not None and fast is not None:
            found = fast(*args, **kwargs)
            self._fast.aliases.made(found, args if self._fast.keeps_layout(fast) else None)
            self.seen = self.seen or self._fast.seen
            return found
        other = by_task(func)
        if self._fast is None and (func in FINE_IN_A_LOOP or is_plain_embedding(func, args, kwargs)):
            return func(*args, **kwargs)
        self.seen = self.seen or other is not None
        if writes(func):
            found = self._checked(func, other or func, args, kwargs)
        elif other is not None:
            return other(*args, **kwargs)
        else:
            found = on_any_layout(func, args, kwargs)
        if self._fast is not None:
            self._fast.aliases.made(found, args)
        return found

    def _checked(
        self,
        func: Callable[..., Any],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run a function, or its replacement, that changes a tensor in place, but must not change the result of a ReLU.

        Raises:
            VmapError: if it does. PyTorch raises an error in the backward pass.
        """
        followed = None if self._fast is None else self._fast.followed
        before = [] if followed is None else [each for each in followed.rectified() if differentiated(each)]
        found = on_any_layout(run, args, kwargs)
        after = set() if followed is None else {*map(id, followed.rectified())}
        if any(id(each) not in after for each in before):
            raise VmapError(
                f"the model changes the result of a ReLU in place ({func.__name__}), and the derivative of the ReLU "
                "needs it. Compute a new tensor: z = z - 1 in place of z.sub_(1) or z -= 1.",
                gist="the result of a ReLU is changed in place",
            )
        return found


_MODE: ContextVar[FunctionsByTask | None] = ContextVar("mode", default=None)
"""The mode of the model that runs under vmap in this thread, or is traced."""


def _check_read(aliases: Aliases, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check what is read, by a function or by the caller of the model.

    Raises:
        VmapError: for a tensor that lacks a change in place of what shares its memory in a loop.
    """
    if aliases.lacking(args, kwargs):
        raise VmapError(
            "the model changes reshaped images in place, or images that it has reshaped (flatten, view), or .data, and "
            "reads both. On all tasks at once, one is a copy of the other. Write it without in-place operations on "
            "them: z = z - 1 in place of z.sub_(1) or z -= 1.",
            gist="reshaped images are changed in place",
        )


def checked(run: Callable[[], Tree]) -> Tree:
    """Run a model and, inside of its `FunctionsByTask`, check what it returns.

    Raises:
        VmapError: if the result lacks a change in place, or the model has caught an error of PyTorch.
    """
    mode = _MODE.get()
    if mode is None:
        return run()
    mode.raised = None
    found = run()
    refuse("the model", mode.raised)
    aliases = CURRENT.get()
    if aliases is not None:
        _check_read(aliases, (found,), {})
    return found


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """`torch.select_scatter`."""
    if input.select(dim, index).shape != src.shape:
        return torch.select_scatter(input, src, dim, index)  # raises torch's own error
    index %= input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, index, index + 1)


def index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """`torch.index_fill`."""
    if not isinstance(value, Tensor) or value.dim() > 0:
        return torch.index_fill(input, dim, index, value)
    filled = torch.zeros_like(input, dtype=torch.bool).index_fill(dim, index, True)
    return torch.where(filled, value.to(input.dtype), input)


def roll(input: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """`torch.roll`."""
    return input.clone() if input.dim() == 0 and dims == () else torch.roll(input, shifts, dims)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.prelu`."""
    if weight.numel() != 1 and (input.dim() < 2 or input.shape[1] != weight.numel()):
        return torch.prelu(input, weight)  # raises torch's own error
    slopes = weight.reshape(-1, *[1] * (input.dim() - 2)) if input.dim() > 1 else weight.reshape(())
    return torch.where(input > 0, input, slopes * input)


def as_strided(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.as_strided`, which reads memory by its layout.

    Raises:
        VmapError: for images, which may lie in memory in another layout than in a loop.
    """
    if is_permuted(input):
        raise VmapError(
            "the forward calls as_strided on images, which are laid out in memory differently if all tasks are "
            "computed at once. Call .contiguous() first, or use unfold, view or indexing.",
            gist="its forward calls as_strided",
        )
    return torch.as_strided(input, *args, **kwargs)


def not_left_aligned(input: Tensor, mask: Tensor) -> bool:
    """``torch._nested_tensor_from_mask_left_aligned``, by which transformers choose kernels without derivatives."""
    return False


def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    """`torch.cond` as an ``if``, since its own graph does not run inside of vmap or of torch's modes.

    Raises:
        VmapError: under vmap, if the condition differs between tasks.
    """
    if isinstance(pred, Tensor) and torch._C._functorch.is_batchedtensor(pred):
        raise VmapError(
            "the forward calls torch.cond with a condition that differs between tasks, which is not possible under "
            "torch.func.vmap: all tasks are computed at once. Use torch.where.",
            gist="its forward calls torch.cond",
        )
    return (true_fn if pred else false_fn)(*operands)


def _under_all_names(name: str) -> list[Callable[..., Any]]:
    """All versions of a function that models may call: torch's, a tensor's, and the operator (in exported models)."""
    operator = getattr(torch.ops.aten, name)
    overloads = [getattr(operator, kind) for kind in operator.overloads() if not kind.endswith("out")]
    return [operator, *overloads, *(getattr(home, name) for home in (torch, torch.Tensor, F) if hasattr(home, name))]


_OTHERS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(_under_all_names("embedding"), table_lookup),
    **dict.fromkeys(_under_all_names("one_hot"), one_hot),
    **dict.fromkeys(_under_all_names("select_scatter"), select_scatter),
    **dict.fromkeys(_under_all_names("index_fill"), index_fill),
    **dict.fromkeys(_under_all_names("roll"), roll),
    **dict.fromkeys(_under_all_names("prelu"), prelu),
    **dict.fromkeys(_under_all_names("as_strided"), as_strided),
    **dict.fromkeys(_under_all_names("scaled_dot_product_attention"), attention),
    F.embedding: embedding,  # its arguments are in a different order than the operator's
    F.embedding_bag: embedding_bag,
    F.multi_head_attention_forward: multi_head_attention,
    F.gaussian_nll_loss: gaussian_nll_loss,
    F.cross_entropy: cross_entropy,
    **WRITTEN,
    REQUIRES_GRAD: requires_grad,
    GRAD_FN: grad_fn,
    IS_LEAF: is_leaf,
    DATA: data,
    torch.Tensor.register_hook: register_hook,
    torch.Tensor.retain_grad: retain_grad,
    torch.ops.higher_order.cond: cond,
    **IN_PLACE,
}
if hasattr(torch, "_nested_tensor_from_mask_left_aligned"):
    _OTHERS[torch._nested_tensor_from_mask_left_aligned] = not_left_aligned
if hasattr(F, "linear_cross_entropy"):
    _OTHERS[F.linear_cross_entropy] = linear_cross_entropy


def by_task(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The replacement of a function, if there is one."""
    return _OTHERS.get(func)


# what vmap alone gets wrong; a compiled graph never contains such a loop's hooks
FINE_IN_A_LOOP: frozenset[Callable[..., Any]] = frozenset(
    {
        REQUIRES_GRAD,
        GRAD_FN,
        IS_LEAF,
        DATA,
        F.cross_entropy,
        *WRITTEN,
        *IN_PLACE,
        *(
            function
            for name in ("one_hot", "index_fill", "roll", "prelu", "as_strided")
            for function in _under_all_names(name)
        ),
    }
)


def is_plain_embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is `torch.nn.functional.embedding` without options that change its gradients or its table."""
    if func is not F.embedding:
        return False
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return given.get("max_norm") is None and not given.get("scale_grad_by_freq") and not given.get("sparse")


def may_call_them(model: nn.Module, *, loop: bool = False) -> bool:
    """Whether the model has modules that call one of these functions, name one in their ``forward``, or catch errors.

    Args:
        model: the model.
        loop: whether it runs task by task, where fewer functions are replaced.
    """
    for module in modules_of(model):
        named = _named_by(type(module), loop)  # type: ignore[arg-type]  # a class hashes
        if _calls_one(module, loop) or named.functions or not named.own.issubset(module._modules.keys()):
            return True
        if not loop and handles_errors(module):
            return True
    return False


class _Named(NamedTuple):
    """Which names of these functions the code of a ``forward`` has.

    Attributes:
        functions: whether one may be the function.
        own: names that are always attributes of the module itself, such as its embedding.
    """

    functions: bool
    own: frozenset[str]


def _calls_one(module: nn.Module, loop: bool) -> bool:
    if loop and isinstance(module, nn.Embedding):
        return module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    if isinstance(module, (nn.Embedding, nn.PReLU)):
        return not loop
    return isinstance(module, (nn.EmbeddingBag, nn.MultiheadAttention))


@cache
def _named_by(kind: type[nn.Module], loop: bool) -> _Named:
    """The names of these functions in the code of a module's ``forward``, in any branch."""
    if loop and kind in (nn.Embedding, nn.PReLU):
        return _Named(False, frozenset())
    attributes = {REQUIRES_GRAD: "requires_grad", GRAD_FN: "grad_fn", IS_LEAF: "is_leaf", DATA: "data"}
    replaced = [function for function in _OTHERS if not (loop and function in FINE_IN_A_LOOP)]
    names = {attributes.get(function, function.__name__) for function in replaced}
    code = getattr(getattr_static(kind, "forward", None), "__code__", None)
    todo: list[CodeType] = [] if code is None else [code]
    own: set[str] = set()
    while todo:
        code = todo.pop()
        here = names.intersection(code.co_names)
        if not here <= _of_self(code):
            return _Named(True, frozenset())
        own |= here
        todo += [const for const in code.co_consts if isinstance(const, CodeType)]
    return _Named(False, frozenset(own))


def _of_self(code: CodeType) -> set[str]:
    """The names that a method's code reads as attributes of its first argument, and nowhere else."""
    found: set[str] = set()
    others: set[str] = set()
    before: Any = None
    for each in get_instructions(code):
        if each.argval in code.co_names:
            first = before is not None and before.opname.startswith("LOAD_FAST") and code.co_argcount > 0
            reads = first and before.argval == code.co_varnames[0] and each.opname in ("LOAD_ATTR", "LOAD_METHOD")
            (found if reads else others).add(each.argval)
        before = each
    return found - others
