"""What models return besides tensors, held by a tree of tensors: ``None``, numbers, and the fields of dataclasses.

A model of Hugging Face's kind returns a dataclass, or a dict, of logits, a loss that is ``None``, and more. Inside,
such outputs are trees in which only tensors are leaves, so that vmap and stacking take them.
"""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metamom.common.trees import Tree

PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)


@dataclass(frozen=True)  # PyTorch takes all named tuples alike
class Constant:
    """A value that is no tensor, in a tree without leaves."""

    value: Any


@dataclass(frozen=True)
class Fields:
    """The fields of a dataclass or a namespace, or the items of a dict of another class.

    Attributes:
        kind: the class.
        items: trees by name.
    """

    kind: type
    items: dict[str, Tree]


pytree.register_pytree_node(
    Constant,
    lambda node: ([], node.value),
    lambda _, value: Constant(value),
    flatten_with_keys_fn=lambda node: ([], node.value),
)
pytree.register_pytree_node(
    Fields,
    lambda node: (list(node.items.values()), (node.kind, tuple(node.items))),
    lambda found, form: Fields(form[0], dict(zip(form[1], found, strict=True))),
    flatten_with_keys_fn=lambda node: (
        [(pytree.MappingKey(name), each) for name, each in node.items.items()],
        (node.kind, tuple(node.items)),
    ),
)


def held(out: Any) -> Tree:
    """A model's output as a tree with tensors as its only leaves, as far as it can be.

    Example:
        >>> out = held({"logits": torch.ones(2), "loss": None, "scale": 2.0})
        >>> pytree.tree_leaves(out)
        [tensor([1., 1.])]
        >>> released(out)
        {'logits': tensor([1., 1.]), 'loss': None, 'scale': 2.0}
    """
    return out if isinstance(out, Tensor) else pytree.tree_map(_held, out, is_leaf=_is_held)


def released(tree: Tree) -> Any:
    """Undo `held`, so that a loss and a user get what the model returns."""
    return tree if isinstance(tree, Tensor) else pytree.tree_map(_released, tree, is_leaf=_is_held)


def numbers_as_tensors(tree: Tree) -> Tree:
    """A held tree with tensors in place of its numbers, which may then differ between tasks."""

    def tensor(node: Any) -> Any:
        if not isinstance(node, Constant) or not isinstance(node.value, (bool, int, float)):
            return Fields(node.kind, numbers_as_tensors(node.items)) if isinstance(node, Fields) else node
        return torch.tensor(node.value, dtype=torch.float64 if isinstance(node.value, float) else None)

    return pytree.tree_map(tensor, tree, is_leaf=_is_held)


def _is_held(value: Any) -> bool:
    return isinstance(value, (Constant, Fields, torch.Size))  # a size would become a tuple


def _held(leaf: Any) -> Any:
    if isinstance(leaf, (Tensor, Constant, Fields)):
        return leaf
    if isinstance(leaf, PLAIN):
        return Constant(leaf)
    if isinstance(leaf, (dict, UserDict)):  # of a class that PyTorch does not know; a dataclass may be one too
        return Fields(type(leaf), {name: held(each) for name, each in leaf.items()})
    if type(leaf) is SimpleNamespace:
        return Fields(SimpleNamespace, {name: held(each) for name, each in vars(leaf).items()})
    if is_dataclass(leaf) and not isinstance(leaf, type):
        given = {each.name: getattr(leaf, each.name) for each in fields(leaf) if each.init}
        return Fields(type(leaf), {name: held(each) for name, each in given.items()})
    return leaf


def _released(node: Any) -> Any:
    if isinstance(node, Constant):
        return node.value
    if not isinstance(node, Fields):
        return node
    items = {name: released(each) for name, each in node.items.items()}
    return node.kind(**items) if is_dataclass(node.kind) or node.kind is SimpleNamespace else node.kind(items)
