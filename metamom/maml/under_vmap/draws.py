"""Random draws of a model that depend on the task's number alone, not on its neighbours, under `torch.func.vmap` too.

Under ``vmap(randomness="different")`` all tasks draw from one generator, so a task's draws depend on which tasks are
computed with it. Here each random operation runs task by task. Its generator is seeded from one number a step, the
task's number in the batch, and the number of the operation, so chunks and processes do not change the draws.

In a loop over the tasks, a task's random operations draw the same numbers as under vmap.

A compiled meta-gradient contains its random operations and draws as ``vmap`` does.

A mode that sees every operation takes longer than a small network. Once the functions that draw are known to be the
only source of a model's draws (`metamom.maml.under_vmap.drawing_functions`), the mode is on only while one of them
runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_STEP: ContextVar[Step | None] = ContextVar("step", default=None)


class Step:
    """The random draws of one step, shared by all of its chunks.

    The first random operation takes the seed from torch's CPU generator. So a model that does not draw leaves that
    generator unchanged, and a model that draws advances it by one number a step.

    Attributes:
        first: number of the first task of the current chunk.
        count: number of tasks in the current chunk.
        calls: number of model calls so far in the current chunk.
    """

    def __init__(self) -> None:
        self._seed: int | None = None
        self.first = 0
        self.count = 0
        self.calls = 0

    def seed(self) -> int:
        """The step's seed."""
        if self._seed is None:
            self._seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
        return self._seed

    @contextmanager
    def tasks(self, first: int, count: int) -> Iterator[None]:
        """Select the current chunk: ``count`` tasks, starting with number ``first``."""
        self.first, self.count, self.calls = first, count, 0
        token = _STEP.set(self)
        try:
            yield
        finally:
            _STEP.reset(token)


def rewinder() -> Callable[[], None]:
    """A function that takes back the draws since this call, so that a model can be called again with the same ones."""
    step, state = _STEP.get(), torch.get_rng_state()
    seed, calls = (None, 0) if step is None else (step._seed, step.calls)

    def rewind() -> None:
        torch.set_rng_state(state)
        if step is not None:
            step._seed, step.calls = seed, calls

    return rewind


class DrawsRefused(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses random operations, in the words of `torch.func.vmap` with ``randomness="error"``.

    Raises:
        RuntimeError: at the first one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise drawn()
        return func(*args, **(kwargs or {}))


def drawn() -> RuntimeError:
    """The error of a call that has drawn at random although it must not."""
    return RuntimeError("called a random operation while in randomness error mode")


def generator_states(device: torch.device) -> list[Tensor]:
    """The states of torch's generators for the CPU and this device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


class DrawsByTask(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the random operations of one model call task by task.

    Args:
        tasks: T, the size of vmap's axis: the tasks of the current chunk, or c adjacent copies of each.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        step = _STEP.get()
        if step is None:
            step = Step()
            step.count = tasks
        self.step = step
        self.tasks = tasks
        self.start = step.first * (tasks // step.count)
        self.call = step.calls
        self.operations = 0  # that run on all tasks at once
        self.singles = 0  # that run on one task each, in task order
        self.seeded: dict[int, tuple[torch.Generator, Tensor]] = {}  # seeded in this call, with states before a draw
        self.only: int | None = None  # the task that runs, in a loop
        self.inside = False  # a function that draws is running
        self.elsewhere = False  # an operation has drawn outside of such functions
        step.calls += 1
        step.seed()
        self.untouched = torch.default_generator.get_state()

    def each(
        self, one_task: Callable[..., Any], mode: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> Callable[..., Any]:
        """Wrap a function that is called for each task in turn, without vmap. It draws as it would under vmap.

        Args:
            one_task: the function.
            mode: makes the context of a call; ``None`` for this mode, which sees every operation.
        """
        tasks = iter(range(self.tasks))

        def drawing(*args: Any) -> Any:
            self.only, self.operations, self.seeded = next(tasks), 0, {}
            self.untouched = torch.default_generator.get_state()
            with self if mode is None else mode():
                return one_task(*args)

        return drawing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.elsewhere = self.elsewhere or not self.inside
        return self.call_operator(func, args, kwargs)

    def call_operator(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call an operator that draws, task by task.

        Args:
            func: the overload.
            args: its arguments, outside of vmap: with all tasks in the first dimension, or of one in a loop.
            kwargs: its keyword arguments.
        """
        generator = self._generator(kwargs.get("generator"))
        if self.only is not None:
            self.operations += 1
            return self._draw(func, args, kwargs, self.only, str(self.operations - 1), generator)
        if not any(self._has_tasks(value) for value in (*args, *kwargs.values())):
            task = self.singles % self.tasks
            self.singles += 1
            if task == 0:
                self.operations += 1  # counted once, as in a loop
            return self._draw(func, args, kwargs, task, str(self.operations - 1), generator)
        number = self.operations
        self.operations += 1
        results = []
        for task in range(self.tasks):
            own = [self._of(value, task) for value in args]
            own_kwargs = {key: self._of(value, task) for key, value in kwargs.items()}
            results.append(self._draw(func, own, own_kwargs, task, str(number), generator))
        if func._schema.is_mutable:  # each task has written to its own part
            return args[0]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    def bernoulli_(self, out: Tensor, p: float) -> None:
        """Fill a tensor as `call_operator` does with ``aten.bernoulli_.float``, with less overhead.

        Args:
            out: of all tasks ``[T, ...]``, outside of vmap, or of one in a loop; contiguous.
            p: the probability of 1.
        """
        generator = self._generator(None)
        if generator is not None or (self.only is None and len(out) != self.tasks):
            self.call_operator(torch.ops.aten.bernoulli_.float, (out, p), {})
            return
        number = str(self.operations)
        self.operations += 1
        own = torch.Generator(out.device)
        for task, part in enumerate(out.unbind()) if self.only is None else [(self.only, out)]:
            part.bernoulli_(p, generator=own.manual_seed(self._seed(task, number)))

    def _seed(self, task: int, what: str) -> int:
        """The seed of one task's draws in an operation."""
        key = f"{self.step.seed()} {self.start + task} {self.call} {what}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1

    def _has_tasks(self, value: Any) -> bool:
        """Whether an argument is a tensor, or a size, with all tasks in its first dimension."""
        if isinstance(value, Tensor):
            return value.dim() > 0 and value.shape[0] > 0 and value.shape[0] % self.tasks == 0
        return isinstance(value, (list, tuple)) and len(value) > 0 and value[0] > 0 and value[0] % self.tasks == 0

    def _of(self, value: Any, task: int) -> Any:
        """One task's part of an argument."""
        if not self._has_tasks(value):
            return value
        if isinstance(value, Tensor):
            size = value.shape[0] // self.tasks
            return value.narrow(0, task * size, size)
        return [value[0] // self.tasks, *value[1:]]

    def _generator(self, given: torch.Generator | None) -> torch.Generator | None:
        """The generator that the model has seeded in this call, so that every task draws the same from it.

        ``None`` means torch's own generator, not seeded in this call.

        Raises:
            ValueError: for another generator that was not seeded in this call, since in a loop each task would
                continue where the previous one stopped.
        """
        if given is None:
            if torch.equal(torch.default_generator.get_state(), self.untouched):
                return None
            return torch.default_generator  # seeded, or its state set, during the forward
        if id(given) not in self.seeded:
            fresh = torch.Generator(given.device).manual_seed(given.initial_seed())
            if not torch.equal(fresh.get_state(), given.get_state()):
                raise ValueError(
                    "the model draws from a torch.Generator that keeps its state from call to call, so a task's "
                    "draws would depend on earlier tasks. Seed it in the forward (generator.manual_seed(...)), or "
                    "draw without generator=: metamom then gives each task its own draws."
                )
        return given

    def _draw(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], task: int, what: str, generator: torch.Generator | None
    ) -> Any:
        if generator is not None:  # it goes through the same states for each task
            if self.only is not None:
                self.seeded[id(generator)] = generator, self.untouched
                return func(*args, **kwargs)
            if task == 0:
                self.seeded[id(generator)] = generator, generator.get_state()
            generator.set_state(self.seeded[id(generator)][1])
            return func(*args, **kwargs)
        seed = self._seed(task, what)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not all(tensor.is_contiguous() for tensor in tensors):  # the order of draws must not depend on the layout
            return self._on_any_layout(func, args, kwargs, task, what)
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        overload = _with_generator(func)
        if overload is not None:
            return overload(*args, **kwargs, generator=torch.Generator(device).manual_seed(seed))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or 0].manual_seed(seed)
            else:
                torch.default_generator.manual_seed(seed)
            return func(*args, **kwargs)

    def _on_any_layout(self, func: Any, args: Any, kwargs: Mapping[str, Any], task: int, what: str) -> Any:
        """`_draw` on contiguous copies."""
        own = [value.contiguous() if isinstance(value, Tensor) else value for value in args]
        own_kwargs = {key: value.contiguous() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        found = self._draw(func, own, own_kwargs, task, what, None)
        if not func._schema.is_mutable:
            return found
        for written, copy in zip((*args, *kwargs.values()), (*own, *own_kwargs.values()), strict=True):
            if written is not copy:
                written.copy_(copy)
        return args[0]


@cache
def _with_generator(func: Any) -> Any:
    """The operation or its overload that takes a generator; ``None`` if there is none."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    names = [argument.name for argument in func._schema.arguments]
    for overload in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, overload)
        if [argument.name for argument in other._schema.arguments if argument.name != "generator"] == names and len(
            other._schema.arguments
        ) == len(names) + 1:
            return other
    return None
