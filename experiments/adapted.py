"""Adapt a trained learner to the images in a folder, and classify others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.common.choices import Norm, Normalised
from metamom.common.numbers import counted
from metamom.experiments.python_tasks import preprocessing_of, task_family
from metamom.experiments.recipes import Recipe
from metamom.maml.learner import MAML
from metamom.maml.normalisation.norm import for_single_points, name_of, resolved
from metamom.maml.normalisation.norm_modes import ByLayer
from metamom.tasks.image_files import find_tree
from metamom.tasks.preprocessing import Preprocessing, image_paths
from metamom.weights import save_weights

AT_ONCE = 256  # images classified together


class Reader(NamedTuple):
    """How a run reads image files.

    Attributes:
        ways: the number of classes that its model tells apart.
        preprocessing: from image files to the model's inputs.
    """

    ways: int
    preprocessing: Preprocessing


def reader_of(recipe: Recipe | None, settings: Mapping[str, Any]) -> Reader:
    """How a run of ``metamom train images``, or one from Python on an `ImageFolder`, reads image files.

    Args:
        recipe: the run's; ``None`` for a run from Python.
        settings: the run's.

    Raises:
        ValueError: for a run on other tasks.
    """
    if recipe is not None:
        preprocessing, ways, on = recipe.preprocessing(), recipe.ways, recipe.family.title
    else:
        described = task_family(settings)
        preprocessing, ways = preprocessing_of(settings), described.get("ways")
        on = described.get("family", "unknown tasks")
    if preprocessing is None:
        raise ValueError(
            "adapt takes runs on image files, of `metamom train images` or of metamom.train on an ImageFolder; got one "
            f"on {on}. In Python, learner.fit adapts to any task."
        )
    assert ways is not None
    return Reader(ways, preprocessing)


class Prediction(NamedTuple):
    """What an image is taken for.

    Attributes:
        file: its path, as given or below the folder given.
        name: of the class.
        probability: of this class, by the softmax of the scores.
        probabilities: of all classes.
    """

    file: str
    name: str
    probability: float
    probabilities: tuple[float, ...]

    def as_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """The prediction as JSON values."""
        each = dict(zip(classes, self.probabilities, strict=True))
        return {"file": self.file, "class": self.name, "probability": self.probability, "probabilities": each}


@dataclass(frozen=True)
class Adapted:
    """A model adapted to a folder of classes.

    Attributes:
        model: scores images ``[N, C, H, H]``; the first ``len(classes)`` scores are the classes'.
        classes: their names, sorted.
        images: the number of support images.
        steps: inner steps taken.
        norm: the statistics that normalise, if there are any: see `metamom.MAML`.
        reader: of the run.
    """

    model: nn.Module
    classes: tuple[str, ...]
    images: int
    steps: int
    norm: Normalised
    reader: Reader

    def predict(self, paths: Sequence[str | Path]) -> list[Prediction]:
        """Classify image files, and those in folders, in the order of their names.

        Raises:
            ValueError: for a path that does not exist, a folder without images, or a file that cannot be decoded.
        """
        files = image_paths(paths) if paths else []
        found = []
        for start in range(0, len(files), AT_ONCE):
            part = files[start : start + AT_ONCE]
            probabilities = self._probabilities(self.reader.preprocessing.read_files(part)).tolist()
            for file, row in zip(part, probabilities, strict=True):
                best = max(range(len(row)), key=row.__getitem__)
                found.append(Prediction(str(file), self.classes[best], row[best], tuple(row)))
        return found

    @torch.inference_mode()
    def _probabilities(self, images: Tensor) -> Tensor:
        like = next(self.model.parameters())
        scores = self.model(images.to(like))
        return torch.softmax(scores[:, : len(self.classes)].double(), -1).cpu()


def adapt_to_folder(
    reader: Reader, learner: MAML, support: str | Path, *, steps: int | None = None, norm: Norm | None = None
) -> Adapted:
    """Adapt a run's learner to ``SUPPORT/CLASS/*``.

    Args:
        reader: of the run, see `reader_of`.
        learner: the run's.
        support: a folder with a few images of each class.
        steps: inner steps; as in training by default.
        norm: see `metamom.MAML`. By default ``"frozen"`` if the run was trained so, else ``"support"``, by which the
            prediction for an image does not depend on the others.

    Raises:
        ValueError: for a folder without classes or with more than the model tells apart.
    """
    folder = Path(support)
    if not folder.is_dir():
        raise ValueError(f"--support must be a folder with a folder of images for each class; got {folder}.")
    listing = find_tree(folder)
    classes = listing.classes
    empty = [name for i, name in enumerate(classes) if not (listing.labels == i).any()]
    if len(classes) < 2 or empty:
        found = f"it has {counted(len(classes), 'folder')} of classes"
        what = f"the class {empty[0]!r} has no images" if empty else found
        raise ValueError(f"--support needs DIR/CLASS/*.jpg, two classes or more; in {folder}, {what}.")
    paths = [file.path.split("/") for file in listing.files]
    for name in classes:
        inside = sorted({parts[1] for parts in paths if parts[0] == name and len(parts) > 2})
        if len(inside) > 1:
            raise ValueError(
                f"--support needs DIR/CLASS/*.jpg; {folder / name} has folders of images: {', '.join(inside[:3])}, ... "
                f"If these are the classes, name the folder they are in: --support {folder / name}."
            )
    if len(classes) > reader.ways:
        raise ValueError(
            f"the run's model tells {reader.ways} classes apart; {folder} has {len(classes)}. Remove some, or train "
            f"with --ways {len(classes)}."
        )
    uses = for_single_points(resolved(learner.model, learner.norm)) if norm is None else norm
    x = reader.preprocessing.read_files([listing.root / file.path for file in listing.files])
    labels, given = torch.from_numpy(listing.labels), None if isinstance(uses, ByLayer) else uses
    model = learner.fit(x, labels, steps=steps, norm=given)
    taken = learner.inner_steps if steps is None else steps
    return Adapted(model, classes, len(x), taken, name_of(uses), reader)


def save(adapted: Adapted, file: str | Path, card: Mapping[str, Any]) -> Path:
    """Write the adapted weights as safetensors, and next to them the run's card with the classes."""
    details = {"classes": list(adapted.classes), "inner_steps": adapted.steps, "norm": adapted.norm}
    return save_weights(adapted.model, file, {"adapted_to": details, **card, "model": str(adapted.model)})
