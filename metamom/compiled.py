"""A meta-gradient as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree


class Compiled:
    """A function of tensors that takes derivatives inside, compiled whole, once for each shape of its arguments.

    `torch.compile` cannot differentiate twice through a graph of its own, so the function is first traced to the
    operators that its derivatives come down to (`make_fx`), and that derivative-free graph is compiled.

    Args:
        function: of nested containers of tensors and numbers; numbers are compiled in as they are. Tensors that are
            not among its arguments may change their values between calls, but not their shapes.
        settings: what else the function's course depends on; it is compiled anew for each value that this returns.
    """

    def __init__(self, function: Callable[..., Any], settings: Callable[[], Hashable]) -> None:
        self.function = function
        self.settings = settings
        self.graphs: dict[Any, tuple[Callable[..., Any], pytree.TreeSpec]] = {}

    def __call__(self, *args: Any) -> Any:
        """The function's value, compiled at the first call with these shapes, dtypes, devices and numbers."""
        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        key = (
            self.settings(),
            str(spec),
            *((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves),
        )
        if key not in self.graphs:
            self.graphs[key] = self._compile(leaves, spec, tensors)
        graph, out_spec = self.graphs[key]
        with torch.no_grad():
            return pytree.tree_unflatten(graph(*tensors), out_spec)

    def _compile(
        self, leaves: list[Any], spec: pytree.TreeSpec, tensors: list[Tensor]
    ) -> tuple[Callable[..., Any], pytree.TreeSpec]:
        out_spec: list[pytree.TreeSpec] = []

        def flat(*given: Tensor) -> list[Any]:
            rest = iter(given)
            args = pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
            outputs, tree = pytree.tree_flatten(self.function(*args))
            out_spec.append(tree)
            return outputs

        graph = make_fx(flat)(*tensors)
        return torch.compile(graph, fullgraph=True, dynamic=False), out_spec[0]
