"""Errors that a model or a loss catches itself.

Under `torch.func.vmap`, PyTorch raises errors that a loop does not know (of ``float(x)``, of a mask as an index), and
one task's error (a matrix without a Cholesky factor) is one of all tasks. So it does while a graph is traced. Code that
catches them would go on in another way than in a loop, without a word.
"""

from __future__ import annotations

from functools import lru_cache
from opcode import opmap
from types import CodeType

from metamom.common.code import code_of
from metamom.maml.vmap_errors import VmapError, gist

# before Python 3.11, and since; from 3.12 on the first is the compiler's own, with a number above those in code
_HANDLERS = {opmap[name] for name in ("SETUP_FINALLY", "PUSH_EXC_INFO") if opmap.get(name, 256) < 256}
_OF_WITH = opmap.get("WITH_EXCEPT_START", -1)


def refuse(what: str, error: Exception | None) -> None:
    """Refuse what a model or a loss has returned, if PyTorch raised an error in it.

    Args:
        what: "the model" or "the loss".
        error: the last error that a function of PyTorch raised in the call; ``None`` without one.

    Raises:
        VmapError: naming the error.
    """
    if error is None:
        return
    said = gist(str(error)) if str(error) else type(error).__name__
    raise VmapError(
        f"{what} catches an error of PyTorch, which may be that of another task, or of torch.func.vmap alone: all "
        f"tasks are computed at once. It was: {said}. Write {what} without try and suppress.",
        "loss_fn" if what == "the loss" else "",
        f"{what} catches an error of PyTorch: {said}",
    ) from error


def handles_errors(owner: object) -> bool:
    """Whether the code that an object reaches, without PyTorch's, has a ``try`` or `contextlib.suppress`."""
    return any(map(_has_handler, code_of(owner)))


@lru_cache(4096)
def _has_handler(code: CodeType) -> bool:
    if "suppress" in code.co_names:
        return True
    operations = code.co_code[::2]
    return any(
        operation in _HANDLERS and following != _OF_WITH
        for operation, following in zip(operations, [*operations[1:], -1], strict=True)
    )
