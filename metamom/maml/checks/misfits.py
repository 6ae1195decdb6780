"""Error messages for data that does not fit the model or the loss, in place of torch's own.

Shapes, dtypes and labels are checked only after a failure, since models and losses may accept data of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from opcode import opmap
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metamom.common.held import released
from metamom.common.kinds import named_type
from metamom.common.trees import Tree, leaves, shown
from metamom.maml.checks.batch_checks import IGNORED
from metamom.maml.checks.class_scores import class_axes
from metamom.maml.vmap_errors import SIGNS, gist, innermost_module, modules_in

P = ParamSpec("P")
R = TypeVar("R")

DEVICE_ASSERT = "device-side assert"
# Found in torch's messages about indices, but not in those of lists or arrays.
OF_TENSORS = ("out of bounds", "imension", "tensor", "index out of range in self")
OF_ARRAYS = "out of bounds for axis"
# Found in torch's messages about a row that a table does not have.
LOOKUPS = ("out of bounds", "index out of range", "tried to access index", "valid range", "num_embeddings")

ONE_POINT = "more than 1 value per channel"  # in what batch normalisation says


class MisfitError(ValueError):
    """An error of PyTorch about data that a model or a loss cannot take, or about vmap, whose errors are of many kinds.

    Attributes:
        where: the module, or what else raised it.
        gist: the reason in a few words.
    """

    def __init__(self, message: str, where: str, error: Exception) -> None:
        super().__init__(message)
        self.where = where
        self.gist = gist(str(error))


@contextmanager
def inputs_explained(model: nn.Module, x: Tree, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace torch's errors about inputs by one that names the layer, its input, and what to change.

    Args:
        model: the model, to find the module's name.
        x: inputs ``[T, N, ...]``, a tensor or a tree.
        weights: the weights that the model is called with.

    Raises:
        MisfitError: in place of torch's error. The model's own errors, and those of vmap, pass unchanged.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if not _by_torch(error):
            raise
        each = f"{shown(x)} for each task"
        raise MisfitError(
            f"the model cannot take inputs of shape {each}{_where(model, error.__traceback__)}: {_said(error)} "
            f"{_cure_of_inputs(x, weights, str(error))}",
            innermost_module(model, error.__traceback__) or type(model).__name__,
            error,
        ) from error


@contextmanager
def targets_explained(predictions: Any, targets: Tree) -> Iterator[None]:
    """Replace torch's errors in a loss function by one that says what is wrong with targets or predictions.

    Args:
        predictions: ``[T, N, ...]``, or whatever the model returned.
        targets: ``[T, N, ...]``, a tensor or a tree, or ``None``.

    Raises:
        TypeError: if the loss function needs targets and there are none; if the model does not return a single tensor
            and the loss function needs one.
        MisfitError: in place of torch's error. The loss function's own errors, and those of vmap, pass unchanged.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
        if targets is None and isinstance(error, TypeError) and "argument" in str(error):
            raise TypeError(
                f"the batch has no targets, so loss_fn is called with the predictions alone: {_said(error)} Give the "
                "batch support_y and query_y, or a loss that takes one argument."
            ) from error
        if not isinstance(predictions, Tensor) or not isinstance(targets, Tensor):
            if isinstance(error, (TypeError, AttributeError)) and not isinstance(predictions, Tensor):
                raise TypeError(f"{_not_one_tensor(predictions)} {_said(error)}") from error
            raise
        if not _by_torch(error) or isinstance(error, AttributeError):
            raise
        shapes = (
            f"predictions of shape {list(predictions.shape[1:])} of {predictions.dtype} and targets of shape "
            f"{list(targets.shape[1:])} of {targets.dtype} for each task"
        )
        why = _about_float_labels(predictions, targets, str(error))
        if why is None:
            why = f": {_said(error)} {_cure_of_targets(predictions, targets, str(error))}"
        raise MisfitError(f"loss_fn cannot take {shapes}{why}", "loss_fn", error) from error


def asserts_explained(function: Callable[P, R]) -> Callable[P, R]:
    """Replace a GPU's assertion, which may surface long after its cause, by an error that lists likely causes.

    Raises:
        ValueError: in place of torch's error.
    """

    @wraps(function)
    def explained(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if DEVICE_ASSERT not in str(error):
                raise
            raise ValueError(
                "an index was out of range on the GPU, and this process can no longer use the GPU. Labels must be in "
                "0..C-1 for a model with C outputs, and indices of an embedding must be in its range. Run this batch "
                f"on the CPU to see which are not. ({str(error).splitlines()[0]})"
            ) from error

    return explained


def check_output(model: nn.Module, out: object) -> None:
    """Refuse model outputs of an unsupported type, after `metamom.common.held.held`.

    Raises:
        TypeError: unless it is a tensor, or a structure of tensors that the loss function can unpack.
    """
    if isinstance(out, Tensor):
        return
    leaves = pytree.tree_leaves(out)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        out = released(out)
        others = sorted({_kind(leaf) for leaf in leaves if not isinstance(leaf, Tensor) and leaf is not out})
        holding = f" that holds {', '.join(others)}" if others else "" if leaves else " without a tensor"
        raise TypeError(
            f"{type(model).__name__} must return a tensor of predictions [N, ...]; got {_kind(out)}{holding}. A tuple, "
            "a list, a dict, a named tuple or a dataclass of tensors works too, with None, numbers and strings among "
            "them, and so do classes that torch.utils._pytree.register_pytree_node knows."
        )


def check_loss(value: object) -> None:
    """Refuse loss values of an unsupported type.

    Raises:
        TypeError: unless it is a tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss_fn must return a differentiable 0-d tensor; got {_kind(value)}. Return the loss itself, without "
            "float() or .item()."
        )


def _by_torch(error: Exception) -> bool:
    """Whether the error was raised by torch, not by the code of a model or loss function."""
    text = str(error)
    if any(sign in text for sign in (*SIGNS, DEVICE_ASSERT, "alloc")):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        if trace.tb_next.tb_frame.f_code is torch._assert.__code__:  # called in place of an assert
            return str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"
        trace = trace.tb_next
    assert trace is not None
    if str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "torch":
        return True
    # an error from torch's C++ code shows the line that calls it, which is not a `raise`
    raised = trace.tb_frame.f_code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]
    of_tensors = type(error) is IndexError and any(sign in text for sign in OF_TENSORS) and OF_ARRAYS not in text
    return not raised and (type(error) is RuntimeError or of_tensors)


def _where(model: nn.Module, trace: TracebackType | None) -> str:
    """The innermost module in which an error was raised (its repr), and its input."""
    found = ""
    for name, module, frame in modules_in(model, trace):
        if frame.f_code.co_name != "forward":
            continue
        shown = type(module).__name__ if list(module.children()) else " ".join(repr(module).split())
        argument = frame.f_locals.get(next(iter(frame.f_code.co_varnames[1:2]), ""))
        came = f", which got {list(argument.shape)}" if isinstance(argument, Tensor) else ""
        found = f", in module {name!r}, {shown}{came}" if name else f", in {shown}{came}"
    return found


def _cure_of_inputs(x: Tree, weights: Mapping[str, Tensor], said: str) -> str:
    """What to do about inputs; of a tree, about the first tensor that is on another device or of another dtype."""
    if ONE_POINT in said:
        return (
            "A set of one point has no variance: give each set more points, or normalise otherwise, by running "
            'statistics (norm="frozen") or GroupNorm.'
        )
    if not isinstance(x, Tensor):
        if "argument" in said:
            return (
                "A dict of inputs is passed as model(**x), a tuple or a list as model(*x): give the names and the "
                "number of arguments that the forward takes. To pass a dict as one argument, wrap it: (x,)."
            )
        of_weights = {w.device for w in weights.values()}
        x = next((leaf for leaf in leaves(x) if leaf.device not in of_weights), None)
        if x is None:
            return "Give every tensor the shape [T, N, ...], where the model takes [N, ...], or change the module."
    if any(sign in said for sign in LOOKUPS):
        return "Indices into a table of n rows, such as an embedding, must be in 0..n-1."
    devices = sorted({str(w.device) for w in weights.values()})
    kinds = {w.dtype for w in weights.values() if w.is_floating_point() or w.is_complex()}
    if str(x.device) not in devices:
        return f"The inputs are on {x.device}, the weights on {', '.join(devices)}: use batch.to({devices[0]!r})."
    if len(kinds) == 1 and x.dtype not in kinds:
        dtype = kinds.pop()
        if dtype.is_complex or x.is_complex():
            return f"The weights are {dtype}: convert the inputs, x.to({dtype}), or the model, model.to({x.dtype})."
        if x.is_floating_point():
            return f"The weights are {dtype}: use batch.to(dtype={dtype}), or convert the model."
        scale = " and to the scale of training, such as x / 255" if x.dtype is torch.uint8 else ""
        return f"The weights are {dtype}: convert the inputs, x.to({dtype}){scale}."
    return "Give support_x and query_x the shape [T, N, ...], where that module takes [N, ...], or change the module."


def _about_float_labels(predictions: Tensor, targets: Tensor, said: str) -> str | None:
    """What to do about class labels that are not integers; ``None`` for other targets."""
    if not targets.is_floating_point() or targets.device != predictions.device or predictions.dim() < 3:
        return None
    column = predictions.dim() == targets.dim() and targets.shape[-1] == 1 and "multi-target" in said
    classes = predictions.shape[2]
    if classes < 2 or not (column or ("gather" in said and predictions.dim() == targets.dim() + 1)):
        return None
    cure = "y.squeeze(-1).long()" if column else "y.long()"
    return f". If targets are class indices, make them integers: {cure}, in 0..ways-1 (here 0..{classes - 1})."


def _cure_of_targets(predictions: Tensor, targets: Tensor, said: str) -> str:
    if predictions.device != targets.device:
        return f"Targets are on {targets.device}, predictions on {predictions.device}: move the batch, batch.to(...)."
    if predictions.is_complex() or targets.is_complex():
        return (
            "Torch's losses take real numbers. Give them p.abs() or torch.view_as_real(p), or write out the loss: (p "
            "- y).abs().square().mean()."
        )
    if targets.is_floating_point():
        if predictions.shape == targets.shape and predictions.dtype == targets.dtype:
            return "Both have the same shape and dtype: check what else the loss takes, such as its weight."
        return "Give both the same shape and dtype."
    axes = class_axes(predictions.shape[1:], targets.shape[1:])
    if axes:
        return _cure_of_labels(targets, predictions.shape[1 + axes[0]], said)
    if predictions.dim() == targets.dim() and targets.shape[-1] == 1 and predictions.shape[-1] > 1:
        return "If targets are class indices, drop their last axis: y.squeeze(-1)."
    return "Class indices have the shape of the predictions without the class axis: [T, N] for scores [T, N, C]."


def _cure_of_labels(targets: Tensor, classes: int, said: str) -> str:
    if "weight" in said:
        return f"The loss's weight must hold {classes} numbers, one for each of the model's outputs (ways)."
    labels = targets[targets != IGNORED].long()
    if bool(((labels < 0) | (labels >= classes)).any()):
        lowest, highest = int(labels.min()), int(labels.max())
        return (
            f"The model has {classes} outputs (ways), so labels must be in 0..{classes - 1}; got "
            f"{lowest}..{highest}. Number the classes of each task from 0, or give the model more outputs."
        )
    if targets.dtype == torch.int64:
        return "The labels match the predictions: check what else the loss takes, or does with them."
    return "Make class labels 64-bit integers: y.long()."


def _not_one_tensor(predictions: object) -> str:
    return (
        f"the model returns {_kind(predictions)}, where one tensor of predictions [N, ...] is wanted. Wrap it in a "
        "module that returns that tensor alone, such as out[0] or out['logits']."
    )


def _said(error: Exception) -> str:
    return f"{str(error).rstrip('.')}."


def _kind(value: object) -> str:
    return "None" if value is None else named_type(value)
