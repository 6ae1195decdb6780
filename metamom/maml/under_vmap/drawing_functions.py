"""Functions that may draw at random, and a mode that separates only their operations by task.

`metamom.maml.under_vmap.draws.DrawsByTask` gives each task its own draws. It sees every operation of a model, most of
which draw nothing. `DrawingFunctions` sees the calls of functions instead, and turns that mode on for those that may
draw. The draws are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metamom.maml.under_vmap.batched import on_all_tasks
from metamom.maml.under_vmap.draws import DrawsByTask, generator_states, rewinder
from metamom.maml.under_vmap.filled_by_task import NEW, of_all_tasks, of_each_task

Result = TypeVar("Result")
# methods of descriptors read attributes
_BUILTIN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)


# Found in the error of a draw into a tensor that all tasks share, such as x.new_empty(5).normal_().
SHARED = "inplace randomness on an unbatched tensor"


class Places(NamedTuple):
    """Where a model draws.

    Attributes:
        elsewhere: whether outside of the functions that may draw.
        filled: whether in place, into new tensors that all tasks share under vmap, such as ``x.new_empty(5).normal_()``
            in a distribution's ``rsample``.
    """

    elsewhere: bool = False
    filled: bool = False


class DrawingFunctions(TorchFunctionMode):
    """Turns on a mode while functions that may draw are called.

    Args:
        draws: the mode.
        everywhere: whether it is on for all other operations too. Its ``elsewhere`` says afterwards whether one of
            them has drawn.
        filled: whether each task has new tensors of its own, to draw into.
    """

    def __init__(self, draws: DrawsByTask, *, everywhere: bool, filled: bool = False) -> None:
        super().__init__()
        self.draws, self.everywhere, self.filled = draws, everywhere, filled

    def __enter__(self) -> DrawingFunctions:
        if self.everywhere:
            self.draws.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self.everywhere:
            self.draws.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not may_draw(func):
            found = func(*args, **(kwargs or {}))
            return of_each_task(found, self.draws.tasks) if self.filled and func in NEW else found
        args = of_all_tasks(args, self.draws.tasks)
        before, self.draws.inside = self.draws.inside, True
        try:
            if self.everywhere or before:
                return func(*args, **(kwargs or {}))
            dropped = dropout(self.draws, *args, **(kwargs or {})) if func is F.dropout else None
            if dropped is not None:
                return dropped
            with self.draws:
                return func(*args, **(kwargs or {}))
        finally:
            self.draws.inside = before


def dropout(
    draws: DrawsByTask, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    """`torch.nn.functional.dropout`, with the operations of PyTorch, and without a mode that sees each of them.

    Returns:
        The output; ``None`` for a call that PyTorch must make.
    """
    if not training or inplace or not 0 < p < 1 or input.numel() == 0 or not input.is_floating_point():
        return None
    if draws.only is not None:
        return None if functorch.is_functorch_wrapped_tensor(input) else input * _noise(draws, input, p)
    usable = True

    def noise(value: Tensor) -> Tensor:
        nonlocal usable
        usable = value.shape[0] == draws.tasks
        return _noise(draws, value, p) if usable else value

    found = on_all_tasks(noise, input)
    return None if found is None or not usable else input * found


def _noise(draws: DrawsByTask, input: Tensor, p: float) -> Tensor:
    noise = torch.empty_like(input, memory_format=torch.contiguous_format)  # the order of draws is that of the memory
    draws.bernoulli_(noise, 1 - p)
    return noise.div_(1 - p)


def drawn_by_task(
    run: Callable[[DrawsByTask, Callable[[], DrawingFunctions]], Result],
    tasks: int,
    device: torch.device,
    *,
    known: Places | None,
) -> tuple[Result, Places]:
    """Run a model that draws at random, so that each task has its own draws.

    The model is run once more where ``known`` turns out to be wrong: looking at every operation if the generators have
    moved although no function that draws should have moved them; with new tensors for each task if it draws into them.

    Args:
        run: runs it, from the mode that draws and a function that makes the context in which to run the model.
        tasks: T, the number of tasks.
        device: where the model runs.
        known: where it has drawn before; ``None`` for the first time, to look at every operation.

    Returns:
        What ``run`` returns, and where the model draws, now and before.
    """
    elsewhere, filled = known or Places()
    everywhere = known is None or elsewhere
    while True:
        rewind = rewinder()
        draws = DrawsByTask(tasks)
        before = generator_states(device)
        context = partial(DrawingFunctions, draws, everywhere=everywhere, filled=filled)
        try:
            found = run(draws, context)
        except RuntimeError as error:
            if filled or SHARED not in str(error):
                raise
            filled = True
        else:
            if everywhere or _same(before, generator_states(device)):
                return found, Places(elsewhere or draws.elsewhere, filled)
            everywhere = elsewhere = True
        rewind()
        if device.type == "cuda":
            torch.cuda.set_rng_state(before[1], device)


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@cache
def may_draw(func: Callable[..., Any]) -> bool:
    """Whether a function of PyTorch may draw at random.

    It may if its operator is tagged so, or its Python code names one that is. Unknown kinds of functions may.

    Example:
        >>> may_draw(F.dropout), may_draw(torch.rand), may_draw(torch.Tensor.normal_), may_draw(F.gumbel_softmax)
        (True, True, True, True)
        >>> may_draw(F.relu), may_draw(F.linear), may_draw(torch.Tensor.add), may_draw(F.layer_norm)
        (False, False, False, False)
    """
    if isinstance(func, FunctionType) and func.__module__ == F.__name__:
        return any(map(_operator_draws, _named(func)))
    return _operator_draws(func.__name__) if isinstance(func, _BUILTIN) else True


def _named(func: FunctionType) -> set[str]:
    """All names in the code of a function of `torch.nn.functional`, and of those functions there that it names."""
    names: set[str] = set()
    todo = [func]
    while todo:
        new = set(todo.pop().__code__.co_names) - names
        names |= new
        inner = [getattr(F, name, None) for name in new]
        todo += [each for each in inner if isinstance(each, FunctionType) and each.__module__ == F.__name__]
    return names


@cache
def _operator_draws(name: str) -> bool:
    """Whether an operator of this name draws, or one that works in place."""
    operators = [getattr(torch.ops.aten, each, None) for each in {name, name.removesuffix("_"), name + "_"}]
    return any(
        torch.Tag.nondeterministic_seeded in getattr(operator, overload).tags
        for operator in operators
        if isinstance(operator, torch._ops.OpOverloadPacket)
        for overload in operator.overloads()  # type: ignore[no-untyped-call]
    )
