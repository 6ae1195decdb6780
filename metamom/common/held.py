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
from torch.distributions import Distribution, Transform
from torch.utils import _pytree as pytree

from metamom.common.trees import Tree

SHAPE = "_batch_shape"  # of a distribution
CACHES: dict[str, Any] = {"_inv": None, "_cached_x_y": (None, None)}  # of a transform

PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)


@dataclass(frozen=True)  # PyTorch takes all named tuples alike
class Constant:
    """A value that is no tensor, in a tree without leaves."""

    value: Any


@dataclass(frozen=True)
class Fields:
    """The fields of a dataclass or a namespace, the items of a dict of another class, or a distribution's attributes.

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


def check_distributions(out: Any) -> None:
    """Refuse distributions of several tasks with parameters that are not those of their points.

    They cannot be one distribution: a covariance that all points share, for example, would have to be expanded first.

    Raises:
        TypeError: naming the class.
    """
    for leaf in () if isinstance(out, Tensor) else pytree.tree_leaves(out):
        parts = _parts(leaf)
        shapes = [each.batch_shape for each in parts if isinstance(each, Distribution)]
        for part in parts:
            own = [each for each in vars(part).values() if isinstance(each, Tensor)]
            shape = part.batch_shape if isinstance(part, Distribution) else shapes[0]
            if any(each.shape[: len(shape)] != shape for each in own):
                raise TypeError(
                    f"the tasks' outputs, {type(leaf).__name__} with parameters that several points share, cannot be "
                    "one distribution. Use MAML.losses or metamom.evaluate, which call loss_fn on each task's, or give "
                    "each point its own parameters (expand them) in the model."
                )


def _parts(value: Any) -> list[Distribution | Transform]:
    """A distribution and what it is made of."""
    if isinstance(value, (list, tuple)):
        return [part for each in value for part in _parts(each)]
    if not isinstance(value, (Distribution, Transform)):
        return []
    return [value, *(part for each in vars(value).values() for part in _parts(each))]


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
    if isinstance(leaf, (Distribution, Transform)):
        return _held_distribution(leaf)
    if is_dataclass(leaf) and not isinstance(leaf, type):
        given = {each.name: getattr(leaf, each.name) for each in fields(leaf) if each.init}
        return Fields(type(leaf), {name: held(each) for name, each in given.items()})
    return leaf


def _held_distribution(value: Distribution | Transform) -> Fields:
    """Its attributes. The shape of a batch is that of a tensor without entries of its own, which may be stacked."""
    items = {name: held(each) for name, each in vars(value).items() if name not in (SHAPE, *CACHES)}
    if isinstance(value, Distribution):
        items[SHAPE] = torch.zeros(()).expand(value.batch_shape)  # last, since the first gives the device
    return Fields(type(value), items)


def _released_distribution(kind: type, items: dict[str, Any]) -> Any:
    made: Any = object.__new__(kind)
    if SHAPE in items:
        items[SHAPE] = items[SHAPE].shape
    made.__dict__.update({**(CACHES if issubclass(kind, Transform) else {}), **items})
    return made


def _released(node: Any) -> Any:
    if isinstance(node, Constant):
        return node.value
    if not isinstance(node, Fields):
        return node
    items, kind = {name: released(each) for name, each in node.items.items()}, node.kind
    if issubclass(kind, Distribution) or issubclass(kind, Transform):
        return _released_distribution(kind, items)
    by_name: Any = kind
    return by_name(**items) if is_dataclass(kind) or kind is SimpleNamespace else by_name(items)
