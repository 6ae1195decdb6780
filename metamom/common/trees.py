"""Trees of tensors: a tensor, or dicts, tuples and lists of trees, for models with several inputs or outputs.

A whole tree may also be ``None``, for labels that a loss does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metamom.common.kinds import named_type

# Tensor | Mapping[str, Tree] | Sequence[Tree] | None. It is Any, so that nobody has to cast batch.support_x.
Tree: TypeAlias = Any


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in a fixed order; none for ``None``."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) is tuple and len(tree) == 1:  # quickly, for targets
        return leaves(tree[0])
    return [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]


def named_leaves(name: str, tree: Tree) -> dict[str, Any]:
    """The leaves of a tree called ``name``, each with its place.

    Example:
        >>> list(named_leaves("x", {"ids": torch.ones(2), "more": (torch.ones(1),)}))
        ["x['ids']", "x['more'][0]"]
    """
    if isinstance(tree, Tensor):
        return {name: tree}
    return {name + pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def mapped(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply a function to every tensor of a tree."""
    if tree is None or isinstance(tree, Tensor):
        return None if tree is None else function(tree)
    return pytree.tree_map_only(Tensor, function, tree)


def joined(function: Callable[[list[Tensor]], Tensor], trees: list[Tree]) -> Tree:
    """Apply a function, such as `torch.cat`, to the tensors at each place of several trees of one form."""
    first, form = pytree.tree_flatten(trees[0])
    rows = [first, *(pytree.tree_flatten(tree)[0] for tree in trees[1:])]
    merged = [None if each[0] is None else function(list(each)) for each in zip(*rows, strict=True)]
    return pytree.tree_unflatten(merged, form)


def lone(tree: Tree) -> Tensor | None:
    """The tensor of a tree that has exactly one."""
    found = leaves(tree)
    return found[0] if len(found) == 1 and isinstance(found[0], Tensor) else None


def count(tree: Tree) -> int:
    """The length of the first axis, which all tensors of the tree share."""
    return leaves(tree)[0].shape[0]


def points(tree: Tree) -> int:
    """N of a tree ``[T, N, ...]``: the length of the second axis of the first tensor that has one."""
    return next((x.shape[1] for x in leaves(tree) if x.dim() > 1), 1)


def device_of(tree: Tree) -> torch.device:
    """The device of the first tensor."""
    return leaves(tree)[0].device


def shown(tree: Tree) -> str:
    """Shape and dtype of each tensor without the task axis, for errors.

    Example:
        >>> shown(torch.zeros(8, 5, 2)), shown({"ids": torch.zeros(8, 5, 7).long()})
        ('[5, 2] of torch.float32', "{'ids': [5, 7] of torch.int64}")
    """
    if isinstance(tree, Tensor):
        return f"{list(tree.shape[1:])} of {tree.dtype}"
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{key!r}: {shown(each)}' for key, each in tree.items())}}}"
    if isinstance(tree, (tuple, list)):
        return f"({', '.join(shown(each) for each in tree)})"
    return "None" if tree is None else named_type(tree)


def flattened(fields: tuple[Tree, ...]) -> tuple[pytree.TreeSpec, list[Tensor]]:
    """The tensors of several trees, and their form, from which `restored` makes them again."""
    if all(field is None or isinstance(field, Tensor) for field in fields):
        return _form_of(*(field is None for field in fields)), [field for field in fields if field is not None]
    found, form = pytree.tree_flatten(tuple(() if field is None else field for field in fields))
    return form, found


@cache
def _form_of(*absent: bool) -> pytree.TreeSpec:
    """The form of tensors, some of which are ``None``."""
    return pytree.tree_flatten(tuple(() if each else 0 for each in absent))[1]


def restored(form: pytree.TreeSpec, found: tuple[Tensor, ...]) -> tuple[Tree, ...]:
    """The trees that `flattened` took apart."""
    fields: tuple[Tree, ...] = pytree.tree_unflatten(list(found), form)
    return tuple(None if isinstance(field, tuple) and not field else field for field in fields)
