"""Error messages for models that cannot run with per-task weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from types import FrameType, TracebackType

import torch
from torch import Tensor, nn

from metamom.common.code import code_of
from metamom.common.modules import named_buffers_of
from metamom.compile.tracing import is_tracing
from metamom.maml.under_vmap.draws import generator_states

REMEDY = (
    "MAML runs the model on all tasks at once (torch.func.vmap), each with its own weights. Write the forward "
    "without in-place operations on parameters, buffers or inputs, and use torch.where instead of if."
)
OF_LOSSES = (
    "The loss is computed for all tasks at once (torch.func.vmap). Write it without in-place operations and random "
    "draws, and use torch.where instead of if or a mask as an index."
)
OF_CHECKPOINTS = (
    "torch.utils.checkpoint runs a part of the model or of the loss again in the backward pass, which no longer has "
    "the tasks' weights. Remove checkpoint(); chunk_size= of the learner bounds the memory instead."
)
OF_CHANGES = (
    "Write the forward without in-place operations on parameters and buffers: tasks would pass the changes on to each "
    "other."
)
# Found in torch's messages about draws that it cannot make per task.
DRAWS = ("randomness error mode", "inplace randomness on an unbatched tensor")
OF_DRAWS = (
    "In the model's forward, draw with functions that return a new tensor, such as torch.randn_like or F.dropout."
)

NO_BACKEND = ". This could be because the operator doesn't exist for this backend"  # followed by a list of all backends

OF_VMAP = "vmap: "  # how those of vmap begin that are ValueErrors, such as of squeeze_()

# Found in torch's errors if an in-place write is the cause, in a loop over the tasks too.
INPLACE = ("in-place", "inplace", "refers to a single memory location")
# Found in torch's errors if batching over tasks, or an in-place write under it, is the cause.
SIGNS = (
    "vmap",
    "functorch",
    *INPLACE,
    "atching rule",
    "doesn't match the broadcast shape",
    "that doesn't have storage",  # .tolist() and .numpy()
    "BatchedTensorImpl",  # .untyped_storage(), copy.copy, pickle
    "unsupported for Sparse",
    "SparseTensorImpl",
    "does not require grad",  # torch.autograd.grad in the forward: batched tensors do not
)


class VmapError(ValueError):
    """Something runs for one task, but not on all tasks at once.

    Attributes:
        where: the module, or what else it is; empty if not known yet.
        gist: the reason in a few words.
    """

    def __init__(self, message: str, where: str = "", gist: str = "") -> None:
        super().__init__(message)
        self.where = where
        self.gist = gist or message.partition(":")[0]


@contextmanager
def explained(model: nn.Module, other: str | None = None, *, loop: bool = False) -> Iterator[None]:
    """Replace vmap's own errors by one that names the module of ``model`` that raised it, and the fix.

    Args:
        model: the model, to find the module's name.
        other: the name of what runs instead of the model, if something else does.
        loop: whether the tasks run one by one, without vmap.

    Raises:
        VmapError: in place of torch's errors about vmap or in-place changes; other errors pass unchanged.
        ValueError: in place of a RuntimeError that a loop would raise too, such as for a missing derivative.
    """
    try:
        yield
    except VmapError as error:
        error.where = error.where or _where(model, other, error)
        raise
    except (RuntimeError, ValueError) as error:
        text = str(error).partition(NO_BACKEND)[0]
        if isinstance(error, ValueError) and not text.startswith(OF_VMAP):
            raise
        said = f"{text.rstrip(' .')}."
        message = _of_any_run(model, text)
        if message is None and loop and any(sign in text for sign in INPLACE):
            message = f"{_where(model, other, error)} changes in place what its gradient needs: {said} {OF_CHANGES}"
        if message is None and not loop:
            message = _of_vmap(model, other, error, text, said)
        if message is None:
            raise
        if loop or (other is not None and any(sign in text for sign in DRAWS)):  # a loop would draw in task order
            raise ValueError(message) from error
        if message == OF_CHECKPOINTS:
            where = other or _where_checkpointed(model, error) or _where(model, other, error)
            raise VmapError(message, where, "torch.utils.checkpoint runs a part of it again") from error
        raise VmapError(message, _where(model, other, error), gist(text)) from error


@contextmanager
def loss_draws_refused(device: torch.device) -> Iterator[None]:
    """Refuse random draws of a loss in a loop, which would depend on the tasks before it.

    Raises:
        ValueError: with what to do instead.
    """
    before = generator_states(device)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, generator_states(device), strict=True)):
        raise ValueError(f"loss_fn draws at random, in the order of the tasks. {OF_DRAWS}")


def _of_any_run(model: nn.Module, text: str) -> str | None:
    """The message for errors that do not depend on how the tasks run."""
    if "'Sparse" in text:
        return (
            f"the model has sparse gradients{_sparse_modules(model)}, which PyTorch does not batch over tasks: "
            "set sparse=False."
        )
    if "derivative for" in text and "is not implemented" in text:
        return (
            f"the meta-gradient needs derivatives that PyTorch does not have: {text.rstrip('.')}. Use "
            'estimator="first-order", or write that part of the model with other operations.'
        )
    return None


def _of_vmap(model: nn.Module, other: str | None, error: Exception, text: str, said: str) -> str | None:
    """The message for errors of vmap; ``None`` for other errors."""
    signed = any(sign in text for sign in SIGNS)
    if (signed or type(error).__name__ == "CheckpointError") and _in_checkpoint(error.__traceback__):
        return OF_CHECKPOINTS
    if not signed:
        return None
    draws = any(sign in text for sign in DRAWS)
    if other is not None:
        return f"{other} cannot run on all tasks at once: {said} {OF_DRAWS if draws else OF_LOSSES}"
    where = _where(model, other, error)
    return f"the model cannot run under per-task weights, in {where}: {said} {OF_DRAWS if draws else REMEDY}"


def _where(model: nn.Module, other: str | None, error: Exception) -> str:
    """What raised an error: ``other``, or the innermost module that led to it."""
    if other is not None:
        return other
    return innermost_module(model, error.__traceback__) or _inplace_modules(model) or type(model).__name__


def _where_checkpointed(model: nn.Module, error: Exception) -> str | None:
    """The module that calls `torch.utils.checkpoint`, as far as code and names tell.

    The calls that led to an error in a backward pass are those of the part that runs again.
    """
    calling = [(name, each) for name, each in model.named_modules() if _names_checkpoint(each)]
    inside = [name for name, _, _ in modules_in(model, error.__traceback__)]
    around = [(name, each) for name, each in calling if any(_contains(name, other) for other in inside)]
    if around:
        return _described(*max(around, key=lambda found: len(found[0])))
    return ", ".join(_described(*each) for each in calling) or None


def _contains(name: str, other: str) -> bool:
    """Whether the module of a name is, or holds, that of another."""
    return not name or f"{other}.".startswith(f"{name}.")


def _names_checkpoint(module: nn.Module) -> bool:
    """Whether the code that a module reaches, without PyTorch's, has a name with "checkpoint" in it."""
    return any("checkpoint" in name for code in code_of(module) for name in code.co_names)


def gist(text: str) -> str:
    """The first sentence of torch's message, without the advice that may follow."""
    first = text.strip().splitlines()[0].split(". ")[0].rstrip(".")
    return first if len(first) <= 120 else f"{first[:117]}..."


@contextmanager
def unchanged(
    what: Mapping[str, Tensor], model: nn.Module, *, loop: bool = False, closely: Collection[str] = ()
) -> Iterator[None]:
    """Check that the model does not write to these tensors.

    Args:
        what: the tensors by name.
        model: the model, for the message.
        loop: whether the tasks run one by one, without vmap.
        closely: the names of those with values to compare, since writes to ``tensor.data`` are not counted.

    Raises:
        VmapError: naming a tensor that was changed in place; a plain ValueError in a loop over the tasks.
    """
    before = {name: _version(tensor) for name, tensor in what.items()}
    values = {name: (what[name].data_ptr(), what[name].detach().clone()) for name in closely if _is_plain(what[name])}
    yield
    changed = [
        name
        for name, tensor in what.items()
        if _version(tensor) != before[name] or (name in values and _has_moved(tensor, *values[name]))
    ]
    if changed:
        message = f"{type(model).__name__} changed in place: {', '.join(changed)}."
        if not named_buffers_of(model).keys().isdisjoint(changed):
            message += ' If these are running statistics that F.batch_norm writes to, pass norm="batch".'
        if loop:
            raise ValueError(f"{message} {OF_CHANGES}")
        raise VmapError(f"{message} {REMEDY}", type(model).__name__, "it changes tensors in place")


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Undo writes to these tensors at the end: they are the caller's, and a loop over the tasks may follow.

    While a graph is compiled, nothing is undone.
    """
    once = {} if is_tracing() else {id(tensor): tensor for tensor in tensors if _is_plain(tensor)}
    before = [(tensor, _version(tensor), tensor.detach().clone()) for tensor in once.values()]
    try:
        yield
    finally:
        for tensor, version, value in before:
            if _version(tensor) != version:
                with torch.no_grad():
                    tensor.copy_(value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a memory of its own with a number for each entry."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not wrapped


def _has_moved(tensor: Tensor, place: int, value: Tensor) -> bool:
    """Whether a tensor has another memory than ``place``, or another value."""
    if tensor.data_ptr() != place or tensor.shape != value.shape:
        return True
    same = (tensor == value) | ((tensor != tensor) & (value != value))
    return not bool(same.all())


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to (its version); tensors made in inference mode do not have one."""
    return 0 if tensor.is_inference() else tensor._version


def modules_in(model: nn.Module, trace: TracebackType | None) -> Iterator[tuple[str, nn.Module, FrameType]]:
    """Yield the calls of ``model``'s modules that led to an error, innermost last: name, module and frame."""
    names = {id(module): name for name, module in model.named_modules()}
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            yield names[id(module)], module, trace.tb_frame
        trace = trace.tb_next


def innermost_module(model: nn.Module, trace: TracebackType | None) -> str | None:
    """The innermost module whose call led to an error: its name and class."""
    found = None
    for name, module, _ in modules_in(model, trace):
        found = _described(name, module)
    return found


def _described(name: str, module: nn.Module) -> str:
    return f"module {name!r} ({type(module).__name__})" if name else f"{type(module).__name__} itself"


def _in_checkpoint(trace: TracebackType | None) -> bool:
    """Whether an error was raised inside `torch.utils.checkpoint`."""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        trace = trace.tb_next
    return False


def _sparse_modules(model: nn.Module) -> str:
    names = [
        f"{name!r} ({type(m).__name__})" for name, m in model.named_modules() if getattr(m, "sparse", False) is True
    ]
    return f" in {', '.join(names)}" if names else ""


def _inplace_modules(model: nn.Module) -> str | None:
    names = [f"{name!r} ({type(m).__name__})" for name, m in model.named_modules() if _is_inplace(m)]
    return f"one of the in-place modules {', '.join(names)}" if names else None


def _is_inplace(module: nn.Module) -> bool:
    """Whether it is one of torch's modules with ``inplace=True``. Other modules may use the name for anything."""
    torchs = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    return any("inplace" in signature(kind).parameters for kind in torchs) and getattr(module, "inplace", False) is True
