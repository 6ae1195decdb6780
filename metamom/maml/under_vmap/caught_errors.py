"""Errors that a model or a loss catches itself.

Under `torch.func.vmap`, PyTorch raises errors that a loop over the tasks does not raise (for ``float(x)``, or a mask as
an index), and an error in one task (a matrix without a Cholesky factor) is raised for all. Tracing a graph raises such
errors too. Code that catches them would silently take another branch than it takes in a loop.
"""

from __future__ import annotations

from functools import lru_cache
from opcode import opmap
from types import CodeType

from metamom.common.code import code_of
from metamom.maml.vmap_errors import VmapError, gist

# The first until Python 3.10, the second since 3.11. Since 3.12 the first has a number above 255 and is never in code.
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
        f"tasks are computed at once. It was: {said}. Write {what} without try and contextlib.suppress.",
        "loss_fn" if what == "the loss" else "",
        f"{what} catches an error of PyTorch: {said}",
    ) from error


def handles_errors(owner: object) -> bool:
    """Whether the code that an object reaches, apart from PyTorch's, has a ``try`` or uses `contextlib.suppress`."""
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
