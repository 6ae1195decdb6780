"""Trained networks that come with metamom: weights as safetensors in the wheel, each with a card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from metamom.common.did_you_mean import did_you_mean
from metamom.nets.models import Conv4
from metamom.weights import read_weights

FOLDER = Path(__file__).with_name("weights")
STEP_SIZES = "inner_lr."  # prefix of the names of learned inner step sizes in the files
NETWORKS: Mapping[str, Callable[..., nn.Module]] = {"Conv4": Conv4}


class Pretrained(NamedTuple):
    """A trained network and how to adapt it. See `pretrained`.

    Attributes:
        model: the network, with its trained weights.
        options: the keywords of `metamom.MAML` that it is adapted with: ``inner_lr``, a number or learned tensors by
            parameter, and ``inner_steps``.
        card: how it was trained, its accuracy, the licence of its data and the digest of its weights, as JSON values.
    """

    model: nn.Module
    options: dict[str, Any]
    card: dict[str, Any]


def pretrained(name: str) -> Pretrained:
    """Load a trained network that comes with metamom. Nothing is downloaded, and no code is read from the file.

    Args:
        name: such as ``"omniglot-5w1s"``, a `Conv4` for 5-way 1-shot tasks of characters, ``[1, 28, 28]`` in [0, 1],
            strokes 1 on 0. The error for an unknown name lists those that this version has.

    Returns:
        A `Pretrained`; each call makes a new network.

    Raises:
        ValueError: for an unknown name, and for files that do not fit their card.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import MAML
        >>> conv4, options, card = pretrained("omniglot-5w1s")  # doctest: +SKIP
        >>> model = MAML(conv4, F.cross_entropy, **options).fit(support_x, support_y)  # doctest: +SKIP
        >>> model(query_x).argmax(-1)  # doctest: +SKIP
    """
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    if name not in known:
        have = f"there are {', '.join(known)}" if known else "this version has none"
        raise ValueError(
            f"there are no pretrained weights {name!r:.60}; {have}{did_you_mean([str(name)], known) or '.'}"
        )
    card = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    file = FOLDER / f"{name}.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    if digest != card["sha256"]:
        what = "missing" if digest is None else "not those of their card"
        raise ValueError(f"the weights {file} are {what}: metamom's files were changed. Install it again.")
    model, options = NETWORKS[card["architecture"]](**card["arguments"]), dict(card["options"])
    found = read_weights(file)
    learned = {key: found.pop(key) for key in [*found] if key.startswith(STEP_SIZES)}
    if learned:
        options["inner_lr"] = {key.removeprefix(STEP_SIZES): alpha for key, alpha in learned.items()}
    model.load_state_dict(found)
    return Pretrained(model, options, card)
