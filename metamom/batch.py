"""A batch of tasks, and the interface of task samplers.

Legend: T tasks, S support points a task, Q query points a task, n workers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metamom.common.checks import AT_ONCE, check_whole
from metamom.common.kinds import named_type
from metamom.common.summaries import summary
from metamom.common.trees import Tree, count, mapped, named_leaves

if TYPE_CHECKING:
    from typing_extensions import Self


class _Shape:
    """Prints a tensor's shape and dtype."""

    def __init__(self, x: Tensor) -> None:
        self.text = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"

    def __repr__(self) -> str:
        return self.text


class TaskBatch(NamedTuple):
    """T tasks, each with a support set to adapt on and a query set to evaluate on.

    Inputs and targets are tensors, or trees of tensors: dicts, tuples and lists, nested in any way. Every tensor has
    the leading task axis. The model gets a tensor as ``model(x)``, a dict as ``model(**x)`` (such as a tokeniser's
    output), and a tuple or a list as ``model(*x)``; for a model that takes a dict as its only argument, wrap it:
    ``(x,)``. The loss gets ``loss_fn(output, targets)``, with a tree of targets as it is, or ``loss_fn(output)`` if the
    targets are ``None``.

    Classification sets are ordered shot by shot (labels 0..N-1, then 0..N-1 again), so that any half or part of a
    set is balanced.

    Attributes:
        support_x: inputs to adapt on, ``[T, S, ...]``.
        support_y: their targets, ``[T, S, ...]`` (class indices ``[T, S]``, or values ``[T, S, 1]``), or ``None``.
        query_x: inputs to evaluate on, ``[T, Q, ...]``.
        query_y: their targets, ``[T, Q, ...]``, or ``None``.
        task_ids: ``[T]`` int64, the id of each task in a fixed set of tasks; ``None`` if tasks are always new.
            It stays outside ``torch.func.vmap``.
        support_mask: ``[T, S]`` booleans, ``True`` for points that count, if tasks of different sizes were padded to
            one (`metamom.pad`); else ``None``.
        query_mask: the same of the query points, ``[T, Q]``.
    """

    support_x: Tree
    support_y: Tree
    query_x: Tree
    query_y: Tree
    task_ids: Tensor | None = None
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None

    def __repr__(self) -> str:
        shapes = {name: mapped(_Shape, field) for name, field in zip(self._fields, self, strict=True)}
        return f"TaskBatch({', '.join(f'{name}={shape}' for name, shape in shapes.items() if shape is not None)})"

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return count(self.support_x)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """Move the tensors to ``device``, and floating-point ones to ``dtype`` (class indices keep their dtype)."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        return TaskBatch(*(mapped(move, field) for field in self))

    def part(self, start: int, stop: int) -> TaskBatch:
        """Return the tasks ``start <= t < stop`` as views."""
        return TaskBatch(*(mapped(lambda x: x[start:stop], field) for field in self))

    def split(self, n: int) -> tuple[TaskBatch, ...]:
        """Split the tasks over n workers: worker i gets the i-th contiguous block of T/n tasks.

        Raises:
            TypeError: if n is not a whole number.
            ValueError: if n is below 1 or does not divide T.
        """
        size = len(block(self.num_tasks, 0, n))
        return tuple(self.part(start, start + size) for start in range(0, self.num_tasks, size))


def block(num_tasks: int, rank: int, world_size: int) -> range:
    """The task indices of ``rank`` out of ``world_size``: its contiguous block of a meta-batch.

    Workers and processes both get their tasks by this rule.

    Raises:
        TypeError: for numbers that are not whole.
        ValueError: if ``num_tasks`` is not a positive multiple of ``world_size``, or is more than ten million, or
            ``rank`` is out of range.
    """
    num_tasks = check_whole("the number of tasks", num_tasks, 1, AT_ONCE)
    world_size = check_whole("the number of workers (or processes)", world_size, 1)
    rank = check_whole("rank", rank, -math.inf)
    if num_tasks % world_size:
        raise ValueError(
            f"tasks are dealt in equal blocks, so the number of tasks must be a multiple of {world_size}; got "
            f"{num_tasks}. Use a meta-batch of {-(-num_tasks // world_size) * world_size} tasks or a number of "
            f"workers (or processes) that divides {num_tasks}."
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} (world_size={world_size}); got {rank}.")
    size = num_tasks // world_size
    return range(rank * size, (rank + 1) * size)


@runtime_checkable
class Sampler(Protocol):
    """Anything that returns tasks by step number.

    The result depends only on the sampler's own arguments, ``step`` and the global index of a task in the meta-batch.
    It does not depend on earlier calls or on the number of processes. In a single process, a sampler may leave out
    ``rank`` and ``world_size``. `TaskSampler` adds optional methods.
    """

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """Return ``rank``'s block of the meta-batch of ``num_tasks`` tasks for ``step``."""
        ...


class TaskSampler(ABC):
    """The base class of metamom's samplers, and of custom samplers that offer more than `sample`.

    Streams, descriptions and workers are used only for subclasses. Any other sampler may use these names freely.

    Example:
        >>> class Ones(TaskSampler):
        ...     def __init__(self, stream="train"):
        ...         self.stream = stream
        ...     def sample(self, step, num_tasks, *, rank=0, world_size=1):
        ...         x = torch.ones(len(block(num_tasks, rank, world_size)), 2, 1)
        ...         return TaskBatch(x, x, x, x)
        ...     def with_stream(self, stream):
        ...         return Ones(stream)
        >>> of_stream(Ones(), "test").stream
        'test'
    """

    @abstractmethod
    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        """See `Sampler`."""

    @property
    def workers(self) -> int | None:
        """The number of workers that have their own family; ``None`` if any number of workers is fine."""
        return None

    def with_stream(self, stream: str) -> Self:
        """The same sampler with tasks or points of another stream (``"validation"``, ``"test"``), or itself if none."""
        return self

    def __repr__(self) -> str:
        return summary(type(self).__name__, vars(self))

    def describe(self) -> dict[str, Any]:
        """Identify this sampler by JSON values. They are part of a run's settings, which a resumed run must share."""
        return {"family": type(self).__name__}

    def task_identity(self) -> dict[str, Any]:
        """What decides which tasks a stream has, as JSON values: samplers that agree in it draw the same ones.

        They may give the points in another form, such as images of another size, normalised by other constants.
        """
        return self.describe()

    def location(self) -> dict[str, Any]:
        """Where the data is, as JSON values. A run records it, and a resumed run may find its data elsewhere."""
        return {}


def of_stream(sampler: Sampler, stream: str) -> Sampler:
    """The sampler for another stream; the sampler itself if it is not a `TaskSampler`."""
    return sampler.with_stream(stream) if isinstance(sampler, TaskSampler) else sampler


def described(sampler: Sampler) -> dict[str, Any]:
    """Identify a sampler by JSON values: only its type if it is not a `TaskSampler`."""
    return sampler.describe() if isinstance(sampler, TaskSampler) else {"family": type(sampler).__name__}


def located(sampler: Sampler) -> dict[str, Any]:
    """Where a sampler's data is; see `TaskSampler.location`."""
    return sampler.location() if isinstance(sampler, TaskSampler) else {}


def check_sampler(sampler: object, what: str = "a sampler") -> None:
    """Refuse anything that is not a sampler.

    Args:
        sampler: the value to check.
        what: what it should be, for the error.

    Raises:
        TypeError: for anything without a method ``sample``, for a class, and for a ``sample`` that takes the number of
            tasks before the step.
    """
    if isinstance(sampler, type):
        raise TypeError(f"{what} must have a method sample(step, num_tasks); got the class {sampler.__name__} itself.")
    if not isinstance(sampler, Sampler):
        raise TypeError(
            f"{what} must have a method sample(step, num_tasks), as metamom.tasks.Sinusoid() does; got "
            f"{named_type(sampler)}. For batches of your own, write a class with that method."
        )
    if not _binds(sampler, 0, 1):
        raise TypeError(
            f"{what} must have a method sample(step, num_tasks); {type(sampler).__name__}.sample takes "
            f"{signature(sampler.sample)}. Give it these two arguments, the step and the number of tasks."
        )
    if _is_swapped(sampler):
        raise TypeError(
            f"{what} is called as sample(step, num_tasks), in this order; {type(sampler).__name__}.sample takes "
            f"{signature(sampler.sample)}. Put the step first."
        )


def check_points(name: str, x: object, *, absent: bool = False) -> None:
    """Refuse anything that is not points ``[T, N, ...]``: a tensor, or a tree of tensors with one T.

    Args:
        name: of the field, for the error.
        x: the points. A tensor of a tree may also hold one thing for each task, ``[T, ...]``.
        absent: whether ``None`` is fine.

    Raises:
        TypeError: for anything but dense tensors.
        ValueError: for a tensor without an axis of points, or tensors of different tasks.
    """
    if absent and x is None:
        return
    if isinstance(x, Tensor):
        _check_dense(name, x)
        if x.dim() < 2:
            raise ValueError(
                f"{name} must have shape [T, N, ...], N points of each of T tasks; got {list(x.shape)}. "
                "One task is T = 1: x.unsqueeze(0)."
            )
        return
    found = named_leaves(name, x)
    if not isinstance(x, (Mapping, tuple, list)) or not any(isinstance(leaf, Tensor) for leaf in found.values()):
        advice_for = {
            "ndarray": " Convert it: torch.from_numpy(...), or torch.as_tensor(...).",
            "list": " Convert it: torch.as_tensor(...).",
        }
        advice = advice_for.get(type(x).__name__, " Convert it: dict(x)." if isinstance(x, Mapping) and x else "")
        raise TypeError(f"{name} must be a tensor [T, N, ...], N points of each of T tasks; got {kind_of(x)}.{advice}")
    for place, leaf in found.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{place} must be a tensor [T, ...]; got {kind_of(leaf)}. Leave out what the model does not need, and "
                "convert the rest: torch.as_tensor(...)."
            )
        _check_dense(place, leaf)
    shapes = {place: list(leaf.shape) for place, leaf in found.items()}
    if len({shape[0] if shape else -1 for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{place} {shape}" for place, shape in shapes.items())
        raise ValueError(
            f"all tensors of {name} must hold the same tasks, [T, ...]; got {listed}. If these are "
            "tasks of different sizes, make one batch of them: metamom.pad(tasks)."
        )


def _check_dense(name: str, x: Tensor) -> None:
    """Refuse sparse and nested tensors.

    Raises:
        TypeError: with what to do.
    """
    if x.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor [T, N, ...]; got one with layout {x.layout}. Convert it: x.to_dense()."
        )


def check_ids(name: str, ids: object) -> None:
    """Refuse anything that is not a tensor of task ids ``[T]``.

    Raises:
        TypeError: for anything but a tensor of whole numbers or ``None``.
    """
    if ids is not None and not (isinstance(ids, Tensor) and ids.dim() == 1 and not ids.is_floating_point()):
        raise TypeError(f"{name} must be a tensor [T] of whole numbers, or None; got {kind_of(ids)}.")


def kind_of(thing: object) -> str:
    """Describe an object in a few words, for errors."""
    if isinstance(thing, Tensor):
        return f"a tensor {list(thing.shape)} of {thing.dtype}"
    if isinstance(thing, (tuple, list, dict)):
        return f"{named_type(thing)} of {len(thing)} items"
    return "None" if thing is None else named_type(thing)


def takes_blocks(sampler: Sampler) -> bool:
    """Whether a sampler accepts ``rank`` and ``world_size``, and so can return a part of a meta-batch."""
    return _binds(sampler, 0, 1, rank=0, world_size=1)


def _binds(sampler: Sampler, *arguments: int, **named: int) -> bool:
    """Whether its method ``sample`` can be called with these arguments."""
    try:
        signature(sampler.sample).bind(*arguments, **named)
    except TypeError:
        return False
    except ValueError:  # not written in Python, so it has no signature
        return True
    return True


def _is_swapped(sampler: Sampler) -> bool:
    """Whether the names of ``sample``'s first two parameters are in the opposite order."""
    try:
        first, second, *_ = [*signature(sampler.sample).parameters, "", ""]
    except ValueError:
        return False
    return first == "num_tasks" or second == "step"


def drawn(
    sampler: Sampler, step: int, num_tasks: int, rank: int = 0, world_size: int = 1, *, or_all: bool = False
) -> TaskBatch:
    """Sample ``rank``'s block of the meta-batch of ``num_tasks`` tasks for ``step``, from any sampler.

    Args:
        sampler: the sampler to call.
        step: >= 0.
        num_tasks: size of the whole meta-batch.
        rank: number of the part, 0 <= rank < world_size.
        world_size: number of parts.
        or_all: also accept the whole meta-batch, from a sampler that accepts ``rank`` and ``world_size`` but ignores
            them.

    Raises:
        TypeError: if the sampler cannot return a part when one is needed, or does not return a `TaskBatch` of tensors.
        ValueError: if it returns a different number of tasks than the part has, or tensors without an axis of points.
    """
    if takes_blocks(sampler):
        batch = sampler.sample(step, num_tasks, rank=rank, world_size=world_size)
    elif world_size == 1:
        batch = sampler.sample(step, num_tasks)
    else:
        raise TypeError(
            f"{type(sampler).__name__}.sample takes no rank and world_size, so its tasks cannot be dealt to "
            f"{world_size} processes or workers: write sample(self, step, num_tasks, *, rank=0, world_size=1) and "
            "return the tasks of metamom.batch.block(num_tasks, rank, world_size)."
        )
    if not isinstance(batch, TaskBatch):
        raise TypeError(
            f"{type(sampler).__name__}.sample must return a metamom.TaskBatch(support_x, support_y, query_x, "
            f"query_y); got {named_type(batch)}."
        )
    for name, field in zip(batch._fields[:4], batch[:4], strict=True):
        check_points(f"{name} of {type(sampler).__name__}.sample", field, absent=name.endswith("_y"))
    check_ids(f"task_ids of {type(sampler).__name__}.sample", batch.task_ids)
    if batch.num_tasks * world_size != num_tasks and not (or_all and batch.num_tasks == num_tasks):
        raise ValueError(
            f"{type(sampler).__name__}.sample returned {batch.num_tasks} tasks for part {rank} of {world_size} of a "
            f"meta-batch of {num_tasks}; wanted {num_tasks // world_size}, those of metamom.batch.block(num_tasks, "
            "rank, world_size)."
        )
    return batch
