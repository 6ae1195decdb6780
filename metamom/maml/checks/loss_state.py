"""The buffers of a loss module that a loop over the tasks must not pass on from task to task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from metamom.maml.running.swapping import slots

Result = TypeVar("Result")


class OwnState:
    """Gives each task the buffers as they were before the first one.

    A counter that every task advances alike ends up one call further, as when all tasks run at once.

    Args:
        module: the loss; use this under `metamom.maml.running.swapping.locked`.

    Example:
        >>> import torch
        >>> loss = nn.BCEWithLogitsLoss()
        >>> loss.register_buffer("calls", torch.tensor(0))
        >>> state = OwnState(loss)
        >>> [int(state.of_task(lambda: loss.calls.add_(1))) for task in range(3)]
        [1, 1, 1]
        >>> state.finish()
        >>> loss.calls
        tensor(1)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        found = slots(module)
        self.own = {name: found.tensors[name] for name, _ in module.named_buffers()}
        self.places = {name: found.places[name] for name in self.own}
        self.after: dict[str, Tensor] = {}

    def of_task(self, compute: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call a function with the buffers as they were, and remember their values after it.

        Raises:
            ValueError: naming the buffers that depend on the task.
        """
        for name, buffer in self.own.items():
            copy = buffer.clone()
            for registered, key in self.places[name]:
                registered[key] = copy
        try:
            found = compute(*args, **kwargs)
            now = {name: self._registered(name) for name in self.own}
        finally:
            self._restore()
        if self.after:
            differ = [name for name, buffer in now.items() if not _same(buffer, self.after[name])]
            if differ:
                raise ValueError(
                    f"loss_fn ({type(self.module).__name__}) changes {', '.join(differ)} by values that depend on the "
                    "task: tasks would pass them on to each other. Compute them from the current batch, or update them "
                    "outside the loss."
                )
        self.after = now
        return found

    def finish(self) -> None:
        """Set the module's buffers to their values after one task."""
        for name, value in self.after.items():
            if not _same(value, self.own[name]):
                self.own[name].data = value.detach().clone()

    def _registered(self, name: str) -> Tensor:
        registered, key = self.places[name][0]
        value = registered[key]
        return self.own[name] if value is None else value

    def _restore(self) -> None:
        for name, buffer in self.own.items():
            for registered, key in self.places[name]:
                registered[key] = buffer


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
