"""Make the tasks of a run of ``metamom.train(run_dir=...)`` again, from its ``config.json``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from metamom import tasks
from metamom.batch import TaskSampler
from metamom.experiments.python_runs import as_dtype
from metamom.experiments.recipes import Recipe
from metamom.maml.estimators import support_parts
from metamom.tasks.augment import named_augmentation
from metamom.tasks.image_files import canonical, split_lists
from metamom.tasks.normalize import check_constants
from metamom.tasks.preprocessing import Preprocessing

# what an ImageFolder is made with, of what it is described by
IMAGE_ARGUMENTS = ("ways", "shots", "queries", "seed", "image_size", "channels", "rotations")


def task_family(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the run's family of tasks: of fixed tasks, that of the family they are from."""
    described = settings.get("sampler")
    if isinstance(described, dict) and described.get("family") == "FixedTasks":
        described = described.get("sampler")
    return described if isinstance(described, dict) else {}


def known_sampler(
    settings: Mapping[str, Any], split: str, *, root: str | None = None, **asked: Any
) -> TaskSampler | None:
    """The run's family of tasks, if it is metamom's own and needs no data but what can be found on disk.

    Args:
        settings: the run's.
        split: of the tasks, or a stream of the family's seed.
        root: of the data; by default where the run had it.
        **asked: arguments of the family to replace: ways, shots, queries, seed, within_alphabet.

    Raises:
        ValueError: for an argument that the family does not have, and as the family does.
    """
    described = task_family(settings)
    if described.get("family") == "ImageFolder":
        return _images(described, settings.get("location", {}), split, root=root, **asked)
    kinds = (tasks.Sinusoid, tasks.LinearRegression, tasks.Quadratic, tasks.Omniglot)
    kind: Any = next((kind for kind in kinds if kind.__name__ == described.get("family")), None)
    if kind is None:
        return None
    arguments = {name: _argument(name, value) for name, value in described.items() if name != "family"}
    on_disk = {"root": root} if kind is tasks.Omniglot else {}
    try:
        made: TaskSampler = kind(**arguments, **on_disk)
    except TypeError:  # large arrays, which settings hold by digest
        return None
    if made.describe() != described:
        return None
    _check_asked(kind.__name__, asked, [*arguments, *(["within_alphabet"] if on_disk else [])])
    if on_disk:
        return kind(**{**arguments, **asked, "split": split}, **on_disk)  # type: ignore[no-any-return]
    return kind(**{**arguments, **asked}).with_stream(split)  # type: ignore[no-any-return]


def _images(
    described: Mapping[str, Any], location: Mapping[str, Any], split: str, *, root: str | None, **asked: Any
) -> tasks.ImageFolder | None:
    """Images in a folder, normalised as in training; augmented in the training split alone.

    Returns:
        ``None`` if the training split is asked for, and was augmented by a function of the user's.
    """
    normalize = described["normalize"]
    arguments = {
        **{name: described[name] for name in IMAGE_ARGUMENTS},
        "splits": location.get("splits"),
        "on_broken": location.get("on_broken", "raise"),
        "normalize": None if normalize is None else (normalize["mean"], normalize["std"]),
    }
    if described["augment"] is not None and canonical(split) == described["split"]:
        arguments["augment"] = named_augmentation(described["augment"])
        if arguments["augment"] is None:
            return None
    _check_asked("ImageFolder", asked, (*IMAGE_ARGUMENTS, "splits", "on_broken"))
    if isinstance(asked.get("splits"), str):
        asked["splits"] = split_lists(asked["splits"])
    root = root or location.get("root")
    if root is None:  # of a version that did not record it
        raise ValueError("the run does not say where its images are: give the folder (--data-root DIR, or root=).")
    return tasks.ImageFolder(root, **{**arguments, **asked, "split": split})


def _check_asked(family: str, asked: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := asked.keys() - set(known):
        raise ValueError(f"tasks of {family} have no {', '.join(sorted(unknown))}.")


def preprocessing_of(settings: Mapping[str, Any]) -> Preprocessing | None:
    """How image files become inputs, of a run on `metamom.tasks.ImageFolder`; ``None`` for another run."""
    described = task_family(settings)
    if described.get("family") != "ImageFolder":
        return None
    given = described["normalize"]
    constants = None if given is None else check_constants((given["mean"], given["std"]), described["channels"])
    return Preprocessing(described["image_size"], described["channels"], constants)


def recipe_of_tasks(settings: Mapping[str, Any], *, root: str | None = None) -> Recipe | None:
    """A recipe with the tasks, estimator, workers and bias of a run, if the command can train on such tasks.

    Of images in a folder, `tasks_of` makes the tasks, since a run from Python may have splits as lists.

    Args:
        settings: the run's.
        root: of the data; by default where the run had it.
    """
    described, options = settings.get("sampler"), settings["learner"]
    if not isinstance(described, dict):
        return None
    fixed = described if described.get("family") == "FixedTasks" else {}
    within = described.get("sampler", described)
    images = within.get("family") == "ImageFolder"
    chosen = {
        "task": "images" if images else str(within.get("family")).lower(),
        **{name: within[name] for name in ("ways", "queries", "seed", "dtype", "within_alphabet") if name in within},
        **{name: options[name] for name in ("inner_steps", "inner_batches", "estimator") if name in options},
        **{
            name: settings[name]
            for name in ("workers", "meta_batch", "bias", "aggregate", "attack")
            if name in settings
        },
        **({"fixed_tasks": fixed["n"], "order": fixed["order"]} if fixed else {}),
        **({"on_broken": settings.get("location", {}).get("on_broken", "raise")} if images else {}),
    }
    try:
        parts = support_parts(chosen["estimator"], chosen["inner_steps"], chosen["inner_batches"])
        made = Recipe(**chosen, shots=within["shots"] // parts)
        return made if images or made.sampler(root=root).describe() == described else None
    except (ValueError, TypeError, LookupError, OSError):  # not tasks of the command
        return None


def tasks_of(settings: Mapping[str, Any], recipe: Recipe, root: str | None = None) -> TaskSampler:
    """The training tasks of a run from Python, in the sizes of a recipe.

    Raises:
        ValueError: for images that were augmented by a function of the user's, which the run cannot recreate.
    """
    described = task_family(settings)
    if described.get("family") != "ImageFolder":
        return recipe.sampler(root=root)
    sizes = {name: getattr(recipe, name) for name in ("shots", "queries", "seed", "on_broken")}
    made = _images(described, settings.get("location", {}), described["split"], root=root, **sizes)
    if made is None:
        raise ValueError(
            f"the run was trained on images augmented by {described['augment']:.80}, a function that its config.json "
            "cannot recreate: measure it in Python, metamom.diagnostics.measure(run.learner, sampler), with run = "
            "metamom.load(RUN)."
        )
    return made if recipe.fixed_tasks is None else tasks.FixedTasks(made, recipe.fixed_tasks, order=recipe.order)


def _argument(name: str, value: Any) -> Any:
    if name == "dtype":
        return as_dtype(value)
    return tuple(value) if isinstance(value, list) and name != "alphabets" else value
