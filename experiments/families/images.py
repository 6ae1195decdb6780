"""Images in folders of classes, classified with a network of metamom's or of the user's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metamom.experiments.families.family import (
    ACCURACY,
    BiasPlan,
    Classes,
    ComparisonPlan,
    Defaults,
    Family,
    TaskSettings,
    cross_entropy_loss,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from metamom.common.choices import OnBroken
    from metamom.maml.learner import MAML
    from metamom.tasks import FixedTasks, ImageFolder
    from metamom.tasks.family import TaskFamily
    from metamom.tasks.preprocessing import Preprocessing

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # means and deviations of the channels

FILTERS = {"conv4": 32, "conv4-64": 64}  # as in MAML on miniImageNet, and as in matching networks
NETWORKS = (*FILTERS, "resnet12")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # channel means and deviations, of images in [0, 1]
NAMES = {  # of what a network is created for, as models call it
    "ways": ("ways", "num_classes"),
    "channels": ("channels", "in_channels", "in_chans"),
    "image_size": ("image_size", "img_size"),
}
_SIZES = ", ".join(name for what in ("channels", "image_size") for name in NAMES[what])
TAKES = (
    f"metamom passes the number of classes as {' or '.join(NAMES['ways'])}, if the callable has such a parameter or "
    f"takes any keyword (**kwargs), and {_SIZES}, if it has them. Name a function that takes these, such as def "
    "model(ways): return Net(outputs=ways)."
)


def _tasks(
    wanted: TaskSettings,
    *,
    root: str | None,
    splits: str | None,
    image_size: int,
    channels: int,
    augment: tuple[str, ...] | None,
    standardize: str,
    rotations: str,
    on_broken: OnBroken,
    constants: Constants | None,
    **others: Any,
) -> TaskFamily:
    from metamom.tasks import ImageFolder
    from metamom.tasks.image_files import split_lists

    root = wanted.root or root
    if root is None:
        raise ValueError("images need the folder they are in: --root DIR, with DIR/train/CLASS/*.jpg.")
    assert wanted.ways is not None
    return ImageFolder(
        root,
        split=wanted.split,
        ways=wanted.ways,
        shots=wanted.shots,
        queries=wanted.queries,
        image_size=image_size,
        channels=channels,
        splits=None if splits is None else split_lists(splits),
        augment=augment if wanted.split == "train" else None,
        rotations="all" if rotations == "all" else rotations == "train",
        on_broken=on_broken,
        normalize=constants or {"data": "dataset", "imagenet": IMAGENET, "none": None}[standardize],
        seed=wanted.seed,
    )


def _check(*, image_size: int, channels: int, augment: tuple[str, ...] | None, **others: Any) -> None:
    from metamom.tasks.augment import augmentation
    from metamom.tasks.image_folder import check_pixels

    check_pixels(image_size, channels)
    augmentation(augment)


def _kept(tasks: ImageFolder, *others: ImageFolder) -> dict[str, Any]:
    return {
        "constants": None if tasks.constants is None else (tasks.constants.mean, tasks.constants.std),
        "data_sha256": {each.split: each.data_sha256 for each in (tasks, *others)},
    }


def _preprocessing(*, image_size: int, channels: int, constants: Constants | None, **others: Any) -> Preprocessing:
    from metamom.tasks.normalize import check_constants
    from metamom.tasks.preprocessing import Preprocessing

    return Preprocessing(image_size, channels, check_constants(constants, channels))


def _model(
    ways: int | None,
    generator: torch.Generator,
    *,
    model: str,
    image_size: int,
    channels: int,
    model_folder: str | None = None,
    **of_tasks: Any,
) -> nn.Module:
    assert ways is not None
    if model in FILTERS:
        from metamom.nets.models import Conv4

        return Conv4(ways, channels, FILTERS[model], image_size=image_size, pooling="max", generator=generator)
    if model == "resnet12":
        from metamom.nets.resnet import ResNet12

        return ResNet12(ways, channels, generator=generator)
    sizes = {"ways": ways, "channels": channels, "image_size": image_size}
    return own_network(model, sizes, generator, folder=model_folder)


def own_network(
    spelling: str, sizes: dict[str, int], generator: torch.Generator, *, folder: str | None = None
) -> nn.Module:
    """The network that ``PACKAGE.MODULE:CALLABLE`` returns. Its initial weights are drawn from the generator.

    Args:
        spelling: names a class or a function that returns an `nn.Module`.
        sizes: passed under the names that the callable has for them, see `NAMES`; the number of classes as
            ``num_classes`` if it takes any keyword (``**kwargs``) and does not name one for it.
        generator: the global one is seeded from it for the call, and restored.
        folder: where its module was imported from before, for the error if it is not found now.

    Raises:
        ValueError: if there is no such callable, if it takes other arguments or raises an error, or what it returns is
            not a module.
    """
    import torch
    from torch import nn

    from metamom.common.named_objects import created, named_callable

    what = "the model" if ":" in spelling else f"--model is {', '.join(NETWORKS)} or a callable, which"
    create = named_callable(spelling, what, folder=folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        network = created(spelling, create, _arguments(spelling, create, sizes), TAKES)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{spelling} must return a torch.nn.Module; got {type(network).__name__}. Name a class or a function that "
            "creates the network."
        )
    return network


def _arguments(spelling: str, create: Callable[..., Any], sizes: dict[str, int]) -> dict[str, int]:
    """The sizes under the names that the callable takes.

    Raises:
        ValueError: if it needs other arguments.
    """
    signature = inspect.signature(create)
    taken = signature.parameters
    arguments = {}
    for what, names in NAMES.items():
        if known := [name for name in names if name in taken]:
            arguments[known[0]] = sizes[what]
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
    if open_ended and not set(NAMES["ways"]) & set(arguments):
        arguments["num_classes"] = sizes["ways"]
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"the model {spelling}{signature} cannot be called: {error}. {TAKES}") from error
    return arguments


def check_outputs(learner: MAML, tasks: TaskFamily | FixedTasks, ways: int, spelling: str) -> None:
    """Compare the number of outputs of a user's network with the number of classes; warn if it is larger.

    Raises:
        ValueError: if it is smaller, or if the network cannot take the images.
    """
    import torch

    from metamom.common.numbers import counted
    from metamom.common.trees import lone

    like = next(learner.model.parameters())
    with torch.random.fork_rng(), torch.no_grad():
        batch = tasks.sample(0, 1).to(like.device, like.dtype)
        weights = learner.adapt(batch.support_x, batch.support_y, steps=0)
        support = {"support_x": batch.support_x} if learner.norm == "support" else {}
        scores = lone(learner.predict(weights, batch.support_x, **support))
    if scores is None or scores.dim() != 3 or scores.shape[-1] == ways:
        return
    found = f"the model {spelling} has {counted(scores.shape[-1], 'output')}, and tasks have {ways} classes (ways)"
    if scores.shape[-1] < ways:
        raise ValueError(f"{found}: it needs an output for each class. {TAKES}")
    warnings.warn(
        f"{found}: training works, but is slower and starts from a larger loss than with {ways} outputs. {TAKES}",
        stacklevel=2,
    )


FAMILY = Family(
    name="images",
    title="images",
    help="on your own images, in a folder for each class",
    defaults=Defaults(shots=1, queries=15, inner_lr=0.01, lr=0.03, meta_batch=4, ways=5),
    iterations=1000,
    metric=ACCURACY,
    comparison=ComparisonPlan(lrs=(0.01, 0.03, 0.1), target=0.5),
    tasks=_tasks,
    model=_model,
    loss=cross_entropy_loss,
    bias=BiasPlan((1, 2, 4), pool=16, queries=4, tasks=60, pairs=8, dtype="float32"),
    classes=Classes("classes", seen_in=("train",)),
    options={
        "root": None,
        "splits": None,
        "image_size": 84,
        "channels": 3,
        "augment": None,
        "standardize": "data",
        "rotations": "none",
        "on_broken": "raise",
        "constants": None,
        "data_sha256": None,
        "model": "conv4",
        "model_folder": None,
    },
    check=_check,
    kept=_kept,
    preprocessing=_preprocessing,
    train_examples=(
        "metamom train images --root photos --ways 5 --shots 1 --run-dir runs/photos",
        "metamom train images --root photos --model nets:Backbone --init weights.pt --adapt head",
    ),
    compare_examples=(
        "metamom compare images --root photos --seeds 3 --lrs 0.03,0.1 --run-dir runs/compare",
        "metamom compare images --root photos --model resnet12 --iterations 500",
    ),
)
