"""The options of a recipe that only families of images have. Needs no torch, so that help is fast."""

# The annotations are objects and not text, since pydantic reads them for `Recipe`, in another module.

from dataclasses import dataclass

from metamom.common.choices import (
    ON_BROKEN,
    ROTATIONS,
    STANDARDIZED,
    OnBroken,
    Rotations,
    Standardize,
)
from metamom.common.flag_types import names, path, task_count
from metamom.common.options import Flag, option


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The options that only families of images have; ``None`` for others."""

    root: str | None = option(
        None,
        later=True,
        own=True,
        free=True,
        flag=Flag(
            "task",
            "the folder of images, which must be given: DIR/train/CLASS/*.jpg, with validation and test next to train, "
            "or DIR/CLASS/*.jpg with --splits",
            "none",
            type=path,
            metavar="DIR",
        ),
    )
    splits: str | None = option(
        None,
        later=True,
        own=True,
        free=True,
        flag=Flag(
            "task",
            "a folder with the classes of each split in train.csv, validation.csv and test.csv (filename,label), or in "
            ".txt files (a class a line)",
            "the folders in --root",
            type=path,
            metavar="DIR",
        ),
    )
    within_alphabet: bool | None = option(
        None,
        later=True,
        own=True,
        flag=Flag("task", "draw the characters of each task from one alphabet, which is harder", "off", switch=True),
    )
    image_size: int | None = option(
        None, later=True, own=True, flag=Flag("task", "pixels a side", type=task_count, metavar="N")
    )
    channels: int | None = option(
        None, later=True, own=True, flag=Flag("task", "3 for colour, 1 for grey", type=task_count, metavar="N")
    )
    augment: tuple[str, ...] | None = option(
        None,
        later=True,
        own=True,
        flag=Flag(
            "task",
            "random changes of training images: crop, flip, jitter",
            "none",
            type=names,
            metavar="NAMES",
        ),
    )
    standardize: Standardize | None = option(
        None,
        later=True,
        own=True,
        flag=Flag(
            "task",
            "shift and scale each channel to mean 0 and deviation 1, over the training split (data) or over ImageNet",
            choices=STANDARDIZED,
        ),
    )
    rotations: Rotations | None = option(
        None,
        later=True,
        own=True,
        flag=Flag(
            "task",
            "splits in which images rotated by 90, 180 and 270 degrees count as more classes",
            choices=ROTATIONS,
        ),
    )
    on_broken: OnBroken | None = option(
        None,
        later=True,
        own=True,
        flag=Flag("task", "raise an error for a file that cannot be decoded, or skip it", choices=ON_BROKEN),
    )
    model: str | None = option(
        None,
        later=True,
        own=True,
        flag=Flag(
            "learner",
            "the network: conv4, conv4-64 (filters), resnet12, or PACKAGE.MODULE:CALLABLE of your own, which gets the "
            "number of classes as ways or num_classes",
            metavar="NAME",
        ),
    )
    constants: tuple[tuple[float, ...], tuple[float, ...]] | None = option(None, later=True, own=True)
    model_folder: str | None = option(None, later=True, own=True, free=True)
    data_sha256: dict[str, str] | None = option(None, later=True, own=True)  # of the images of each split
