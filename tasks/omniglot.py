"""Omniglot: few-shot classification of handwritten characters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metamom.common.checks import check_flag
from metamom.rng import DrawCoordinates, Ints, Purpose, choose, uniforms
from metamom.tasks.cache import Arrays, cached
from metamom.tasks.checks import check_count
from metamom.tasks.episodes import Episodes
from metamom.tasks.locate import DataError, DataNotFoundError, PathLike, locate
from metamom.tasks.omniglot_archive import files_below, read_characters
from metamom.tasks.omniglot_splits import PARTS, split_characters

MAX_IMAGE_SIZE = 512  # pixels; with rotations the 964 background characters then take 20 GB
CACHE_FORMAT = 1  # increase it when decoding changes


class Omniglot(Episodes):
    """Tasks "tell these `ways` characters apart", from 20 drawings each of 1,623 characters of 50 alphabets.

    Images are ``[1, H, H]`` float32 in [0, 1], bright strokes on dark. The data is verified and decoded once, then
    read from a cache (``$METAMOM_CACHE``, else the per-user cache folder).

    Args:
        root: folder with ``omniglot/images_background.zip`` and ``omniglot/images_evaluation.zip`` (or the folders
            they unpack to); else ``$METAMOM_DATA``, else the per-user data folder.
        split: ``"train"`` (1,100 characters), ``"validation"`` (100) and ``"test"`` (423), or the publishers'
            ``"background"`` (964) and ``"evaluation"`` (659). Each split draws from the stream of its name.
            The first three have no character in common, but alphabets; the last two have no alphabet in common.
        ways: classes of a task.
        shots: support drawings per class.
        queries: query drawings per class; shots + queries <= 20.
        image_size: H, pixels a side, up to 512; 105 keeps the drawings as published.
        rotations: ``True``: in training (``"train"``, ``"background"``) characters rotated by 90°, 180° and 270°
            count as new classes. ``"all"``: in every split. ``False``: in none.
        seed: 0 <= seed < 2^64.
        download: fetch the data if it is missing.
        alphabets: use only these alphabets of the split, e.g. ``["Greek"]``.
        within_alphabet: draw the characters of each task from one alphabet, which is harder. The alphabet is drawn
            first, all with the same probability; those with fewer characters than ``ways`` in the split are left out
            (of ``"test"``, 40 of the 50 have five, and none has 20; of ``"background"``, 26 of 30 have 20, and of
            ``"evaluation"`` all 20). Where characters are rotated, all those of a task are, by the same angle: an
            alphabet rotated by 90°, 180° or 270° counts as another one.

    Attributes:
        characters: the split's characters; class c, before rotation, is ``characters[c]``.
        num_classes: number of classes, including rotated ones.
        drawn_alphabets: names of the alphabets that tasks are drawn from.

    Returns (from `sample`):
        ``support_x: [T, ways · shots, 1, H, H]``, ``query_x: [T, ways · queries, 1, H, H]``; labels int64.

    Raises:
        FileNotFoundError: if the data is missing.
        ValueError: for damaged data, an unknown split or alphabet, or more ways, shots or queries than there are, in
            any single alphabet with ``within_alphabet=True``.

    Example:
        >>> batch = Omniglot(split="test", ways=5, shots=1).sample(0, 8)  # doctest: +SKIP
        >>> batch.support_x.shape  # doctest: +SKIP
        torch.Size([8, 5, 1, 28, 28])

    Reference:
        Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction" (2015);
        the rotations are those of Santoro et al., "Meta-learning with memory-augmented neural networks" (2016).
    """

    def __init__(
        self,
        root: PathLike | None = None,
        *,
        split: str = "train",
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        image_size: int = 28,
        rotations: bool | Literal["all"] = True,
        seed: int = 0,
        download: bool = False,
        alphabets: Sequence[str] | None = None,
        within_alphabet: bool = False,
    ) -> None:
        if not isinstance(rotations, int | str) or rotations not in (True, False, "all"):
            raise ValueError(f"rotations must be True, False or 'all'; got {rotations!r}.")
        self.split, self.image_size = split, check_count("image_size", image_size)
        if self.image_size > MAX_IMAGE_SIZE:
            raise ValueError(
                f"image_size must be <= {MAX_IMAGE_SIZE}; got {image_size}. The drawings have 105 pixels a side, and "
                f"all of them are kept in memory: enlarge batches instead."
            )
        if alphabets is not None and (isinstance(alphabets, str) or not isinstance(alphabets, Iterable)):
            raise ValueError(f"alphabets must be a list of names, e.g. ['Greek'], or None for all; got {alphabets!r}.")
        self.alphabets = None if alphabets is None else list(alphabets)
        self.characters = _of_alphabets(split, self.alphabets)
        self.within_alphabet = check_flag("within_alphabet", within_alphabet)
        self._rotations_argument = rotations
        images = images_of(self.characters, root, self.image_size, download)
        super().__init__(
            images.flatten(0, 1).unsqueeze(1),
            torch.arange(len(images)).repeat_interleave(images.shape[1]),
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            rotations=rotations == "all" or (bool(rotations) and split in ("train", "background")),
        )
        self.stream = split
        self._alphabets = Alphabets.of(self.characters, self.ways if self.within_alphabet else 1)
        self.drawn_alphabets = self._alphabets.names
        if not self.drawn_alphabets:
            raise ValueError(
                f"a task within an alphabet needs one with ways={self.ways} characters; those of the split {split!r} "
                f"have at most {max(Alphabets.of(self.characters, 1).sizes)}. Use fewer ways, or split='background' "
                "or 'evaluation', which have whole alphabets."
            )

    def _classes(self, tasks: DrawCoordinates) -> Ints:
        """See `EpisodicFamily._classes`."""
        if not self.within_alphabet:
            return super()._classes(tasks)
        chosen = uniforms(self.seed, tasks, Purpose.TASK, 1 + self.ways)
        rotations = self.num_classes // len(self.characters)
        drawn = (chosen[:, 0] * (rotations * len(self.drawn_alphabets))).astype(np.int64)
        turns, alphabet = np.divmod(drawn, len(self.drawn_alphabets))
        characters = choose(chosen[:, 1:], self._alphabets.sizes[alphabet])
        first: Ints = self._alphabets.starts[alphabet] + turns * len(self.characters)
        return np.add(first[:, None], characters, dtype=np.int64)

    @staticmethod
    def has_alphabets(split: str, ways: int) -> bool:
        """Whether a split has an alphabet with so many characters, which ``within_alphabet=True`` needs."""
        return bool(Alphabets.of(split_characters(split), ways).names)

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`. The location of the data is left out."""
        return {
            "family": "Omniglot",
            "split": self.split,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "image_size": self.image_size,
            "rotations": self._rotations_argument,
            "seed": self.seed,
            "alphabets": self.alphabets,
            **({"within_alphabet": True} if self.within_alphabet else {}),
        }

    def task_identity(self) -> dict[str, Any]:
        """See `TaskSampler.task_identity`. Rotations count in the splits that have them."""
        return super().task_identity() | {"rotations": self.rotations}


class Alphabets(NamedTuple):
    """The alphabets of some characters. Those of alphabet a are ``starts[a], ..., starts[a] + sizes[a] - 1``.

    Attributes:
        names: A of them, sorted by the publishers' part and name.
        starts: ``[A]``.
        sizes: ``[A]``.
    """

    names: tuple[str, ...]
    starts: Ints
    sizes: Ints

    @classmethod
    def of(cls, characters: Sequence[str], least: int) -> Alphabets:
        """The alphabets with at least so many of these characters, sorted as `split_characters` sorts them."""
        names = [name.rpartition("/")[0] for name in characters]
        found, starts, sizes = np.unique(names, return_index=True, return_counts=True)
        kept = sizes >= least
        every = tuple(str(name).partition("/")[2] for name in found[kept])
        return cls(every, starts[kept].astype(np.int64), sizes[kept].astype(np.int64))


def _of_alphabets(split: str, alphabets: Sequence[str] | None) -> tuple[str, ...]:
    characters = split_characters(split)
    if alphabets is None:
        return characters
    if not alphabets or not all(isinstance(name, str) for name in alphabets):
        raise ValueError(f"alphabets must be a list of names, e.g. ['Greek'], or None for all; got {alphabets!r}.")
    present = {name.split("/")[1] for name in characters}
    if unknown := set(alphabets) - present:
        raise ValueError(
            f"the split {split!r} has no alphabet {', '.join(map(repr, sorted(unknown)))}. It has: "
            f"{', '.join(sorted(present))}."
        )
    return tuple(name for name in characters if name.split("/")[1] in alphabets)


def images_of(characters: Sequence[str], root: PathLike | None, image_size: int, download: bool) -> Tensor:
    """The drawings of these characters, ``[C, 20, H, H]`` uint8."""
    chosen = []
    for part in PARTS:
        wanted = [name.removeprefix(f"{part}/") for name in characters if name.startswith(f"{part}/")]
        if not wanted:
            continue
        source = _located(part, root, download)
        arrays = _decoded(source, part, image_size)
        rows = {name: row for row, name in enumerate(arrays["names"].tolist())}
        if strangers := [name for name in wanted if name not in rows]:
            raise DataError(f"{source} lacks the character {strangers[0]}. Download the published data again.")
        chosen.append(torch.from_numpy(arrays["images"][[rows[name] for name in wanted]]))
    return torch.cat(chosen)  # in the order of `characters`, which is sorted and so grouped by part


def _located(part: str, root: PathLike | None, download: bool) -> Path:
    try:
        return locate("omniglot", f"images_{part}", root)
    except DataNotFoundError:
        if not download:
            raise
        from metamom.tasks.fetch import fetch  # imported here, so that reading does not load a download library

        fetch("omniglot", root)
        return locate("omniglot", f"images_{part}", root)


def _decoded(source: Path, part: str, image_size: int) -> Arrays:
    def decode() -> Arrays:
        names, images = read_characters(source, part, image_size)
        return {"names": np.array(names), "images": images}

    key = {"format": CACHE_FORMAT, "image_size": image_size, **_fingerprint(source)}
    return cached(f"omniglot-{part}-{image_size}px", key, decode)


def _fingerprint(source: Path) -> dict[str, Any]:
    """A fingerprint that changes with the data: path, size and time of an archive, or of each file in a folder."""
    files = [("", source.stat())] if source.is_file() else files_below(source)
    digest = hashlib.sha256()
    for path, file in files:
        digest.update(f"{path}\0{file.st_size} {file.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return {"path": str(source.resolve()), "files": digest.hexdigest()}
