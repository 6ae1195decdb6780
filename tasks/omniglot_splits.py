"""The splits of Omniglot: lists of characters, stored as data next to this file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from metamom.common.checks import is_word

STORED = ("train", "validation", "test")
PARTS = ("background", "evaluation")
SPLITS = (*STORED, *PARTS)


def split_characters(split: str) -> tuple[str, ...]:
    """The characters of a split, sorted, as ``part/Alphabet/characterNN`` with ``part`` one of the publishers' two.

    ``train`` (1,100), ``validation`` (100) and ``test`` (423) are stored lists and share no character;
    ``background`` (964) and ``evaluation`` (659) are the publishers' two sets, which share no alphabet.

    Raises:
        ValueError: for another name.
    """
    if not is_word(split, SPLITS):
        raise ValueError(f"Omniglot has the splits {', '.join(SPLITS)}; got {split!r}.")
    return _read(split)


@cache
def _read(split: str) -> tuple[str, ...]:
    if split in STORED:
        lines = (files("metamom.tasks") / "splits" / f"omniglot_{split}.txt").read_text("utf-8").splitlines()
        return tuple(line for line in lines if line and not line.startswith("#"))
    every = (name for stored in STORED for name in _read(stored))
    return tuple(sorted(name for name in every if name.startswith(f"{split}/")))
