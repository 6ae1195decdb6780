"""The labels of a map-style data set, if possible without reading its items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from tqdm.auto import tqdm

from metamom.common.kinds import named_type
from metamom.rng import Ints

X_KEYS = ("image", "img", "pixel_values", "x", "input", "inputs", "features", "text")
Y_KEYS = ("label", "labels", "target", "targets", "y", "fine_label", "class")
ATTRIBUTES = ("targets", "labels", "_labels", "samples", "imgs")  # of torchvision's data sets
Label = int | str
Keys = tuple[str, str]


class Labels(NamedTuple):
    """The labels of N items.

    Attributes:
        of_items: ``[N]``, the class of each.
        classes: names of the classes; numbers as text if they have no names.
    """

    of_items: Ints
    classes: tuple[str, ...]


def find_labels(dataset: Any, given: Any, keys: Keys | None) -> Labels:
    """Find the label of each item.

    Args:
        dataset: with ``len(dataset)`` and ``dataset[i]``.
        given: labels ``[N]`` from the caller, or ``None``.
        keys: of input and label in items that are dicts.

    Raises:
        TypeError: for labels that are not whole numbers or text.
        ValueError: for another number of labels than items.
    """
    if given is not None:
        values = [_plain(label) for label in _listed(given)]
        if len(values) != len(dataset):
            raise ValueError(
                f"labels must have one entry for each of the {len(dataset):,} items of the data set; got "
                f"{len(values):,}."
            )
    else:
        found = _known(dataset, keys)
        values = found if found is not None and _agrees(dataset, found, keys) else _read(dataset, keys)
    if len({type(value) for value in values}) > 1:
        raise TypeError("labels must be all whole numbers or all text; got both.")
    classes, index = np.unique(np.array(values), return_inverse=True)
    names = _names(dataset, keys)
    if names is not None and classes.dtype.kind == "i" and classes.min() >= 0 and classes.max() < len(names):
        shown = [names[label] for label in classes]
    else:
        shown = [str(label) for label in classes]
    return Labels(index.astype(np.int64), tuple(shown))


def pair(item: Any, keys: Keys | None) -> tuple[Any, Any]:
    """The input and the label of an item ``(x, label)`` or ``{"image": x, "label": label}``.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(item, Mapping):
        x, y = keys or (_first(X_KEYS, item), _first(Y_KEYS, item))
        if x in item and y in item:
            return item[x], item[y]
        raise TypeError(
            f"items have the keys {', '.join(map(repr, item))}; say which hold the input and the label: "
            "keys=(..., ...)."
        )
    if isinstance(item, (tuple, list)) and len(item) >= 2:
        return item[0], item[1]
    raise TypeError(
        f"from_dataset needs items (x, label), or dicts such as {{'image': ..., 'label': ...}}; dataset[i] gave "
        f"{named_type(item)}."
    )


def _first(keys: Sequence[str], there: Any) -> str:
    return next((key for key in keys if key in there), "")


def _known(dataset: Any, keys: Keys | None) -> list[Label] | None:
    """Labels that the data set keeps, or ``None``."""
    if isinstance(dataset, Subset):
        inner = _known(dataset.dataset, keys)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_known(part, keys) for part in dataset.datasets]
        return None if None in parts else [label for part in parts if part is not None for label in part]
    values = _stored(dataset, keys)
    transform = getattr(dataset, "target_transform", None)
    try:
        listed = None if values is None else _listed(values)
        if listed is None or len(listed) != len(dataset):
            return None
        return [_plain(transform(value) if callable(transform) else value) for value in listed]
    except (TypeError, ValueError, LookupError):
        return None  # something else has that name; reading the items will tell


def _stored(dataset: Any, keys: Keys | None) -> Any:
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):  # Hugging Face
        key = keys[1] if keys else _first(Y_KEYS, features)
        # without a format or a transform, so that no image is decoded
        plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
        return plain[key] if key in features else None
    for name in ATTRIBUTES:
        values = getattr(dataset, name, None)
        if values is not None and not callable(values):
            pairs = name in ("samples", "imgs")
            return [value[1] for value in values] if pairs else values
    return None


def _agrees(dataset: Any, labels: Sequence[Label], keys: Keys | None) -> bool:
    """Whether the labels are those of the first item, the last, and one between."""
    return all(_plain(pair(dataset[i], keys)[1]) == labels[i] for i in {0, len(labels) // 2, len(labels) - 1})


def _read(dataset: Any, keys: Keys | None) -> list[Label]:
    items = tqdm(range(len(dataset)), desc="reading labels", unit="item", disable=None, leave=False)
    return [_plain(pair(dataset[i], keys)[1]) for i in items]


def _names(dataset: Any, keys: Keys | None) -> Sequence[str] | None:
    while isinstance(dataset, (Subset, ConcatDataset)):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    if getattr(dataset, "target_transform", None) is not None:
        return None  # its names are those of other numbers
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        names = getattr(features.get(keys[1] if keys else _first(Y_KEYS, features)), "names", None)
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return names
    return None


def _listed(values: Any) -> list[Any]:
    if isinstance(values, Tensor):
        return list(values.tolist())
    if isinstance(values, (str, bytes)):
        raise TypeError(f"labels must be a list with one entry for each item; got the text {values!r:.60}.")
    try:
        return list(values)
    except TypeError as error:
        raise TypeError(f"labels must be a list with one entry for each item; got {named_type(values)}.") from error


def _plain(label: Any) -> Label:
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    if isinstance(label, str):
        return str(label)
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        return int(label)
    shown = f"a tensor of shape {list(label.shape)}" if isinstance(label, (Tensor, np.ndarray)) else repr(label)
    raise TypeError(
        f"labels must be whole numbers or text, one class each; got {shown[:100]}. Pass labels=, one for each item."
    )
