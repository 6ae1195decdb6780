"""Detect state that a model carries from one call to the next, and that tasks would leak to each other."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metamom.common.user_code import users_level


@contextmanager
def refused(model: nn.Module, trainable: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuse a model call that reads tensors in buffers or attributes and replaces them by new ones.

    Args:
        model: the model.
        trainable: the weights in it that require gradients, by name. The call must not switch these off: flags of
            weights that an inner step has moved cannot be set, and vmap ignores them.

    Raises:
        ValueError: naming the tensors.
    """
    places = [
        (f"{prefix}.{key}" if prefix else key, held, key, tensor)
        for prefix, module in model.named_modules()
        for held in (module._buffers, module.__dict__)
        for key, tensor in list(held.items())
        if isinstance(tensor, Tensor)
    ]
    with _Reads({id(w): name for name, w in trainable.items()}) as reads:
        yield
    carried = sorted(
        name for name, held, key, tensor in places if held.get(key) is not tensor and id(tensor) in reads.seen
    )
    if carried:
        raise ValueError(
            f"the model's forward reads and replaces {', '.join(carried)}, as a running statistic or a counter does: "
            "tasks would pass it on to each other, and every meta-gradient would start from the same value. Compute "
            "it from the current batch, or update it outside the forward."
        )


@contextmanager
def warn_of_draws(*, loop: bool = False) -> Iterator[None]:
    """Warn if the model draws from Python's or NumPy's generator, which does not know about tasks.

    Args:
        loop: whether the tasks run one by one, without `torch.func.vmap`.
    """
    before = generators_outside_torch()
    yield
    moved = [name for name, state in generators_outside_torch().items() if state != before[name]]
    if moved:
        how = (
            "whose draws depend on the tasks before it"
            if loop
            else "once for all tasks that are computed together, where a loop would draw for each task"
        )
        warnings.warn(
            f"the model draws from {' and '.join(moved)} generator, {how}. Draw with torch instead: "
            "torch.where(torch.rand(()) < 0.5, a, b).",
            stacklevel=users_level(),
        )


class _Reads(TorchFunctionMode):
    """Records the ids of tensors that are arguments of PyTorch's functions.

    Raises:
        ValueError: in the function that no longer lets one of the ``trainable`` tensors, by id, require gradients.
    """

    def __init__(self, trainable: Mapping[int, str]) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.trainable = trainable

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            self.seen.update(map(id, value) if isinstance(value, (list, tuple)) else [id(value)])
        if _switches_off(func, args, kwargs) and id(args[0]) in self.trainable:
            raise ValueError(
                f"the model's forward sets requires_grad of {self.trainable[id(args[0])]}, which the tasks' own "
                "weights do not have. Freeze parameters before, outside the forward; or, to cut the graph in one "
                "place, use weight.detach()."
            )
        return func(*args, **kwargs)


def _switches_off(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is ``tensor.requires_grad = False`` or ``tensor.requires_grad_(False)``."""
    sets = getattr(func, "__self__", None) is Tensor.requires_grad and func.__name__ == "__set__"
    if not sets and func is not Tensor.requires_grad_:
        return False
    return not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True))


def generators_outside_torch() -> dict[str, object]:
    """The states of Python's and NumPy's generators."""
    numpy: Any = np.random.get_state()  # noqa: NPY002  # the model may use it
    return {"Python's": random.getstate(), "NumPy's": (numpy[1].tobytes(), numpy[2])}
