"""Rewrite the many small matrix products of a traced graph into fewer, larger ones.

Tasks lead to batches of small products. If only their sum is needed, one large product does the same work and writes
less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)


def enlarge_products(graph: fx.GraphModule) -> None:
    """Apply all rewrites of this module, in the order that leaves the least work.

    Args:
        graph: traced by `make_fx`; changed in place. Results change only by rounding.
    """
    sum_products(graph)
    join_products(graph)


def sum_products(graph: fx.GraphModule) -> int:
    """Rewrite the sum of ``a_t @ b_t`` over a worker's tasks as one product, ``[a_1 ... a_m] @ [b_1; ...; b_m]``.

    A weight's gradient is such a sum over tasks. The rewrite never writes the tasks' own gradients.

    Returns:
        How many batches of products were rewritten.
    """
    nodes, summed = graph.graph, 0
    for total in _calls(nodes, aten.sum.dim_IntList):
        split = total.args[0]
        if total.args[1:] != ([1], True) or split.target not in VIEWS or len(split.users) > 1:
            continue
        each, (workers, tasks, *_) = split.args[0], _like(split).shape
        if tasks == 1 or _like(each).shape != (workers * tasks, *_like(split).shape[2:]):
            continue
        with nodes.inserting_before(total):
            found = _Sum(nodes, workers, tasks)
            if not found.holds_a_product(each) or not _like(total).is_contiguous():
                continue
            result = _call(nodes, aten.unsqueeze.default, found.of(each), 1)
            if _like(result).stride() != _like(total).stride():  # views of the total depend on its layout
                result = _call(nodes, aten.clone.default, result, memory_format=torch.contiguous_format)
            total.replace_all_uses_with(result)
        summed += found.products
    return _tidy(graph, summed)


class _Sum:
    """Moves the sum over each worker's tasks from a node to its inputs."""

    def __init__(self, nodes: fx.Graph, workers: int, tasks: int) -> None:
        self.nodes = nodes
        self.workers = workers
        self.tasks = tasks
        self.products = 0

    def of(self, node: Any) -> Any:
        """Sum a node over tasks, ``[workers * tasks, ...]`` to ``[workers, ...]``."""
        nodes = self.nodes
        if self._is_product(node):
            self.products += 1
            return self._product(node)
        inner = self._behind(node)
        if len(inner) == 2:
            return _call(nodes, aten.add.Tensor, *(self.of(term) for term in inner))
        if inner:
            rest = list(node.args[1:])
            if node.target in VIEWS:
                rest = [[self.workers, *_like(node).shape[1:]]]
            return _call(nodes, node.target, self.of(inner[0]), *rest)
        split = _call(nodes, aten.view.default, node, [self.workers, self.tasks, *_like(node).shape[1:]])
        return _call(nodes, aten.sum.dim_IntList, split, [1])

    def holds_a_product(self, node: Any) -> bool:
        """Whether a node is computed from a product that nothing else uses."""
        return self._is_product(node) or any(self.holds_a_product(term) for term in self._behind(node))

    def _is_product(self, node: Any) -> bool:
        """Whether it is a product that nothing else uses, with factors that stack a worker's tasks without a copy."""
        if node.target is not aten.bmm.default or len(node.users) > 1 or not _of_matrices(node):
            return False
        a, b = (_like(factor) for factor in node.args)
        return _can_view(a.mT, self._below(a.mT)) and _can_view(b, self._below(b))

    def _product(self, node: Any) -> Any:
        nodes, (a, b), (_, rows, columns) = self.nodes, node.args, _like(node).shape
        a = _call(nodes, aten.transpose.int, a, 1, 2)
        if self.workers > 1:
            a, b = (_call(nodes, aten.view.default, x, self._below(_like(x))) for x in (a, b))
            return _call(nodes, aten.bmm.default, _call(nodes, aten.transpose.int, a, 1, 2), b)
        a, b = (_call(nodes, aten.view.default, x, self._below(_like(x))[1:]) for x in (a, b))
        product = _call(nodes, aten.mm.default, _call(nodes, aten.transpose.int, a, 0, 1), b)
        return _call(nodes, aten.view.default, product, [1, rows, columns])

    def _below(self, x: Tensor) -> list[int]:
        """The shape with a worker's tasks stacked."""
        return [self.workers, self.tasks * x.shape[1], x.shape[2]]

    def _behind(self, node: Any) -> list[Any]:
        """The inputs that a node sums or rearranges within each task; empty if something else uses the node."""
        if len(node.users) > 1:
            return []
        if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            same = all(isinstance(x, fx.Node) and _like(x).shape == _like(node).shape for x in node.args)
            return list(node.args) if same else []
        within_tasks = (
            (node.target in VIEWS and _like(node.args[0]).shape[:1] == _like(node).shape[:1])
            or (node.target is aten.transpose.int and 0 not in (axis % _like(node).dim() for axis in node.args[1:]))
            or (node.target is aten.permute.default and node.args[1][0] == 0)
            or (node.target is aten.squeeze.dim and node.args[1] > 0)
        )
        return [node.args[0]] if within_tasks else []


def join_products(graph: fx.GraphModule) -> int:
    """Rewrite ``a @ b + c @ d`` as one product ``[a c] @ [b; d]`` if the result is large compared to the factors.

    With a small inner dimension, two products spend most time writing their results, which the sum then reads again.

    Returns:
        How many pairs were joined.
    """
    nodes, joined = graph.graph, 0
    for total in _calls(nodes, aten.add.Tensor):
        if len(total.args) != 2 or total.kwargs:
            continue
        left, right = (_product_behind(term) for term in total.args)
        if left is None or right is None or left is right:
            continue
        (a, b), (c, d) = left.args, right.args
        same_shape = _like(left).shape == _like(right).shape
        same_shape = same_shape and all(_like(term).shape == _like(total).shape for term in total.args)
        (_, rows, columns), inner = _like(left).shape, _like(a).shape[2] + _like(c).shape[2]
        if not same_shape or rows * columns < inner * (rows + columns):
            continue
        with nodes.inserting_before(total):
            wide = _call(nodes, aten.cat.default, [a, c], 2)
            if _transposed(b) and _transposed(d):  # join them in their memory order
                joint = _call(nodes, aten.cat.default, [b.args[0], d.args[0]], 2)
                tall = _call(nodes, aten.transpose.int, joint, 1, 2)
            else:
                tall = _call(nodes, aten.cat.default, [b, d], 1)
            product = _call(nodes, aten.bmm.default, wide, tall)
            total.replace_all_uses_with(_call(nodes, aten.view.default, product, list(_like(total).shape)))
        joined += 1
    return _tidy(graph, joined)


def _calls(nodes: fx.Graph, target: Callable[..., Any]) -> list[Any]:
    return list(nodes.find_nodes(op="call_function", target=target))


def _call(nodes: fx.Graph, target: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Add a node with the layout of its result."""
    node = nodes.call_function(target, args, options)
    node.meta["like"] = target(*pytree.tree_map_only(fx.Node, _like, args), **options)
    return node


def _like(node: Any) -> Tensor:
    """A tensor with a node's shape, strides and dtype, but without values."""
    if "like" not in node.meta:
        val = node.meta["val"]
        node.meta["like"] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
    like: Tensor = node.meta["like"]
    return like


def _can_view(x: Tensor, size: Sequence[int]) -> bool:
    try:
        x.view(size)
    except RuntimeError:
        return False
    return True


def _of_matrices(product: Any) -> bool:
    """Whether both factors are matrices. Compilers turn products with a vector into sums or elementwise products."""
    return 1 not in (*_like(product).shape[1:], _like(product.args[0]).shape[2])


def _product_behind(node: Any) -> Any:
    """The batched product behind a node that views it, if nothing else uses it."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is aten.bmm.default:
            return node
        if node.target not in VIEWS:
            return None
        node = node.args[0]
    return None


def _transposed(node: Any) -> bool:
    """Whether a node is the transpose of the matrices behind it."""
    return node.target is aten.transpose.int and node.args[1:] in ((1, 2), (2, 1), (-1, -2), (-2, -1))


def _tidy(graph: fx.GraphModule, changes: int) -> int:
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return changes
