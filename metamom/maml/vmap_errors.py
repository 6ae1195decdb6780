"""Error messages for models that cannot run with per-task weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from types import FrameType, TracebackType

from torch import Tensor, nn

REMEDY = (
    "MAML runs the model on all tasks at once (torch.func.vmap), each with weights of its own. Write the forward "
    "without in-place operations on parameters, buffers or inputs, and choose with torch.where instead of if."
)
OF_LOSSES = (
    "The loss is taken of all tasks at once (torch.func.vmap). Write it without in-place operations and draws, and "
    "choose with torch.where instead of if or a mask as an index."
)
# Found in torch's messages about draws that it cannot make per task.
DRAWS = ("randomness error mode", "inplace randomness on an unbatched tensor")
OF_DRAWS = "Draw in the model's forward by functions that return a new tensor, such as torch.randn_like or F.dropout."

NO_BACKEND = ". This could be because the operator doesn't exist for this backend"  # followed by a list of all backends

# Found in torch's errors if batching over tasks, or an in-place write under it, is the cause.
SIGNS = (
    "vmap",
    "functorch",
    "in-place",
    "inplace",
    "atching rule",
    "doesn't match the broadcast shape",
    "refers to a single memory location",
)


@contextmanager
def explained(model: nn.Module, other: str | None = None) -> Iterator[None]:
    """Replace vmap's own errors by one that names the module of ``model`` that raised it, and the fix.

    Args:
        model: the model, to find the module's name.
        other: the name of what runs instead of the model, if something else does.

    Raises:
        ValueError: in place of a RuntimeError about vmap or in-place changes; other errors pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).partition(NO_BACKEND)[0]
        if any(sign in text for sign in SIGNS) and _in_checkpoint(error.__traceback__):
            raise ValueError(
                "torch.utils.checkpoint runs a part of the model or of the loss again in the backward pass, where the "
                "weights are not the tasks' any more. Remove checkpoint(); chunk_size= of the learner bounds the "
                "memory instead."
            ) from error
        if "'Sparse" in text:
            raise ValueError(
                f"the model has sparse gradients{_sparse_modules(model)}, which PyTorch does not batch over tasks: "
                "set sparse=False."
            ) from error
        if "derivative for" in text and "is not implemented" in text:
            raise ValueError(
                f"the meta-gradient needs derivatives that PyTorch does not have: {text.rstrip('.')}. Use "
                'estimator="first-order", or write that part of the model in other operations.'
            ) from error
        if not any(sign in text for sign in SIGNS):
            raise
        said = f"{text.rstrip(' .')}."
        draws = any(sign in text for sign in DRAWS)
        if other is not None:
            remedy = OF_DRAWS if draws else OF_LOSSES
            raise ValueError(f"{other} cannot run on all tasks at once: {said} {remedy}") from error
        where = _innermost_module(model, error.__traceback__) or _inplace_modules(model) or type(model).__name__
        remedy = OF_DRAWS if draws else REMEDY
        raise ValueError(f"the model cannot run under per-task weights, in {where}: {said} {remedy}") from error


@contextmanager
def unchanged(what: Mapping[str, Tensor], model: nn.Module) -> Iterator[None]:
    """Check that the model does not write to these tensors.

    Raises:
        ValueError: naming a tensor that was changed in place.
    """
    before = {name: _version(tensor) for name, tensor in what.items()}
    yield
    changed = [name for name, tensor in what.items() if _version(tensor) != before[name]]
    if changed:
        raise ValueError(f"{type(model).__name__} changed in place: {', '.join(changed)}. {REMEDY}")


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


def _innermost_module(model: nn.Module, trace: TracebackType | None) -> str | None:
    found = None
    for name, module, _ in modules_in(model, trace):
        found = f"module {name!r} ({type(module).__name__})" if name else f"{type(module).__name__} itself"
    return found


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
