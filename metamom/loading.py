"""Load a run: the learner with its trained weights, its settings and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from metamom.batch import TaskSampler
from metamom.common.kinds import named_type
from metamom.common.named_objects import created, named_callable
from metamom.evaluation import Evaluation
from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.learner import MAML
from metamom.training.directory import read_config, read_metrics
from metamom.weights import save_weights

if TYPE_CHECKING:
    from metamom.experiments.recipes import Recipe
    from metamom.tasks.preprocessing import Preprocessing

Checkpoint = Literal["best", "newest"]
OF_A_MACHINE = ("root", "splits", "location", "model_folder", "device")  # settings that a card leaves out
GivenModel = nn.Module | MAML | Callable[[], nn.Module] | str | None


@dataclass(frozen=True)
class LoadedRun:
    """A run read from disk. See `load`.

    Attributes:
        path: the run directory.
        learner: the learner with the weights of the checkpoint.
        step: the number of training steps before the checkpoint.
        settings: the settings in ``config.json``.
        recipe: the settings of a run of ``metamom train`` as a record; ``None`` for a run from Python.
        new_model: makes a new model of the same kind, with random weights; ``None`` if it is not known how.
    """

    path: Path
    learner: MAML
    step: int
    settings: Mapping[str, Any]
    recipe: Recipe | None = None
    new_model: Callable[[], nn.Module] | None = None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, one for each training step. A table: ``pandas.DataFrame(run.metrics)``.

        Raises:
            ValueError: for a damaged file.
        """
        return read_metrics(self.path)

    def sampler(self, split: str = "test", *, root: str | None = None, **changes: Any) -> TaskSampler:
        """The tasks of a split of the data that the run was trained on, with as many shots.

        Args:
            split: ``"train"``, ``"validation"``, ``"test"``, or another one that the task has.
            root: the folder of the data. For a run on images, any folder with this split will do, such as a copy or
                other images. By default it is the folder of training, and the splits that the run trained and validated
                on must not have changed.
            **changes: ``ways``, ``shots``, ``queries`` or ``seed``, if they should differ from training; of images,
                also ``splits``, the folder of their lists, and ``on_broken``: ``"raise"`` or ``"skip"``; of Omniglot,
                also ``within_alphabet``.

        Raises:
            ValueError: if the run's ``config.json`` does not say how to make its tasks, and for images that have
                changed.
        """
        from dataclasses import replace

        from metamom.experiments.python_tasks import known_sampler, task_family

        if self.recipe is not None:
            # tasks of `shots` support points, whatever the estimator trained on
            tasks = replace(self.recipe, **changes, estimator="exact", inner_batches="same").sampler(split, root=root)
            if root is None:
                self._check_unchanged(tasks, self.recipe.own().get("data_sha256") or {})
            return tasks
        trained_on = task_family(self.settings)
        if "shots" not in changes and self.learner.support_parts > 1 and isinstance(trained_on.get("shots"), int):
            changes["shots"] = trained_on["shots"] // self.learner.support_parts
        made = known_sampler(self.settings, split, root=root, **changes)
        if made is None:
            raise ValueError(
                f"the run in {self.path} was trained on tasks that its config.json cannot recreate "
                f"({trained_on.get('family', 'unknown')}): in Python, pass your sampler, metamom.evaluate(run.learner, "
                "sampler), with run = metamom.load(RUN)."
            )
        return made

    def _check_unchanged(self, tasks: Any, digests: Mapping[str, str]) -> None:
        """Refuse images that have changed since training, where the run's own folder is read.

        Raises:
            ValueError: with what to do.
        """
        family = getattr(tasks, "family", tasks)  # of fixed tasks
        split = str(getattr(family, "split", None))
        if split in digests and digests[split] != family.data_sha256:
            raise ValueError(
                f"the images of the split {split!r} in {family.root} have changed since the run in {self.path} was "
                "trained. Put them back; or, to use other images on purpose, name their folder with root=."
            )

    def images(self, paths: str | Path | Sequence[str | Path]) -> Tensor:
        """Image files as the run's network takes them: decoded, turned, cut, resized and normalised as in training.

        Only for runs on image files: of ``metamom train images``, or on `metamom.tasks.ImageFolder`.

        Args:
            paths: a file, a folder, of which all images are read in the order of their names, or a list of them.

        Returns:
            ``[N, C, H, H]`` float32, on the CPU.

        Raises:
            FileNotFoundError: for a path that does not exist.
            ValueError: for a file that cannot be decoded, a folder without images, and a run on other tasks.

        Example:
            >>> run = load("runs/photos")  # doctest: +SKIP
            >>> run.learner.fit(run.images("examples"), labels)(run.images("photo.jpg"))  # doctest: +SKIP
        """
        preprocessing = self._preprocessing()
        if preprocessing is None:
            raise ValueError(
                f"images reads files for runs on image files (`metamom train images`, or ImageFolder); the run in "
                f"{self.path} was trained on other tasks."
            )
        return preprocessing.read(paths)

    def _preprocessing(self) -> Preprocessing | None:
        from metamom.experiments.python_tasks import preprocessing_of

        return preprocessing_of(self.settings) if self.recipe is None else self.recipe.preprocessing()

    def save_weights(
        self, path: str | Path, *, evaluation: Evaluation | None = None, licence: str | None = None
    ) -> Path:
        """Write the model's weights as ``NAME.safetensors``, with the names of its ``state_dict``, and ``NAME.json``.

        The card, ``NAME.json``, holds the architecture, the training data, the settings, and how the run was started;
        of a run on image files, also how files become inputs (``"preprocessing"``).
        `metamom.load_weights` reads the weights into a model.

        Args:
            path: of the file.
            evaluation: from `metamom.evaluate`, for the card.
            licence: of the weights, for the card, such as ``"MIT"``.

        Returns:
            The path of the weights.
        """
        return save_weights(self.learner.model, path, self.card(evaluation=evaluation, licence=licence))

    def card(self, *, evaluation: Evaluation | None = None, licence: str | None = None) -> dict[str, Any]:
        """What `save_weights` writes next to the weights, as JSON values."""
        model, config = self.learner.model, read_config(self.path)
        settings = {name: value for name, value in self.settings.items() if name not in OF_A_MACHINE}
        data = settings.get("sampler") if self.recipe is None else self.recipe.data()
        measured = None if evaluation is None else evaluation._asdict()
        if measured is not None:
            measured["tasks"] = measured.pop("values").shape[1]
        preprocessing = self._preprocessing()
        return {
            "architecture": type(model).__name__,
            "model": str(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": data,
            **({} if preprocessing is None else {"preprocessing": preprocessing.as_json()}),
            "learner": self.learner.describe(),
            "settings": settings,
            "iterations": self.step,
            "validation": self._validation(),
            "evaluation": measured,
            "licence": licence,
            "command": config["environment"].get("command"),
            "versions": {name: config["environment"].get(name) for name in ("metamom", "torch", "python")},
        }

    def _validation(self) -> dict[str, Any] | None:
        """The last validation before the checkpoint."""
        for line in reversed(self.metrics):
            if line["step"] < self.step and "validation" in line:
                found = {"mean": line["validation"], "halfwidth": line.get("validation_halfwidth")}
                return found | {"iterations": line["step"] + 1}
        return None

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.path)!r}, step={self.step}, learner={self.learner!r})"


def load(
    path: str | Path,
    checkpoint: Checkpoint = "best",
    model: GivenModel = None,
    *,
    loss_fn: LossFn | None = None,
    device: torch.device | str | None = None,
) -> LoadedRun:
    """Load a run of ``metamom train`` or of ``metamom.train(run_dir=...)``.

    Nothing in the run directory changes, and no code from it is run. But a run of ``metamom train --model
    PACKAGE.MODULE:CALLABLE`` names the function that makes its model, which is imported from what is installed or from
    the current folder, and called: pass ``model`` for a run that you do not trust.

    Args:
        path: the run directory.
        checkpoint: ``"best"`` by validation where there was one, else the newest; or ``"newest"``.
        model: needed for a run from Python whose model is not one of `metamom.nets`: the module, or a function or class
            that makes it, or its name ``"PACKAGE.MODULE:CALLABLE"``; or the whole learner. The weights are loaded into
            it.
        loss_fn: the loss, needed for a run from Python whose loss is not one of PyTorch's.
        device: the device of the learner; by default the CPU, or where a given model is.

    Returns:
        A `LoadedRun`.

    Raises:
        ValueError: if there is no run, if it cannot be made without ``model`` or ``loss_fn``, or if the model does not
            fit the run's weights: the error lists the names and shapes that differ.
        metamom.training.checkpoints.CheckpointError: if it has no usable checkpoint.

    Example:
        >>> run = load("runs/sine")  # doctest: +SKIP
        >>> run.learner.fit(support_x, support_y)(query_x)  # doctest: +SKIP
        >>> pandas.DataFrame(run.metrics).plot("step", "loss")  # doctest: +SKIP
    """
    from metamom.experiments.python_runs import is_python_run, of_adapted
    from metamom.experiments.recipes import find_device
    from metamom.experiments.saved import learner_state, load_learner, read_state, recipe_of

    if checkpoint not in ("best", "newest"):
        raise ValueError(f'checkpoint must be "best" or "newest"; got {checkpoint!r:.40}.')
    given = _given(model)
    settings = read_config(path)["settings"]
    # a run with settings of its own says nothing about its learner, so only a whole learner helps
    from_python = "task" not in settings and (Path(path) / "checkpoints").is_dir()
    if from_python and not is_python_run(settings) and not isinstance(given, MAML):
        raise ValueError(
            f"the settings of the run in {path} were chosen by its caller, train(settings=...), and do not say how its "
            "learner was made: pass the whole learner, metamom.load(RUN, model=learner)."
        )
    recipe = None if from_python else recipe_of(settings, path, str(device or "cpu"))
    state, step = read_state(path, checkpoint)
    where = f"the checkpoint in {path}"
    weights = learner_state(state, where)
    if isinstance(given, MAML):
        learner = given
    elif recipe is not None:
        learner = recipe.learner(given, initial=False)
    else:
        weights = of_adapted(settings, weights)
        learner = _from_python(path, settings, weights, given, loss_fn)
    if device is not None or (given is None and recipe is None):
        learner.to(find_device(str(device or "cpu")))
    load_learner(learner, weights, where, given=given is not None)
    made_by = _maker(model, recipe, settings, weights)
    return LoadedRun(Path(path), learner, step, settings, recipe, made_by)


def _maker(
    model: GivenModel, recipe: Recipe | None, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Callable[[], nn.Module] | None:
    """How to make a new model of the run's kind, drawing from torch's generator."""
    from metamom.experiments.python_runs import known_model

    if isinstance(model, nn.Module):
        return None
    if model is not None:
        return named_callable(model) if isinstance(model, str) else model
    if recipe is not None:
        return lambda: recipe.family.model(recipe.ways, torch.default_generator, **recipe.own())
    return lambda: cast(nn.Module, known_model(settings, weights))  # the learner has one


def _given(model: GivenModel) -> nn.Module | None:
    """The module or learner that was given.

    Raises:
        TypeError: for anything else.
    """
    if model is None or isinstance(model, nn.Module):
        return model
    make = named_callable(model) if isinstance(model, str) else model
    if not callable(make):
        raise TypeError(f"model must be a module, or a function or class that makes it; got {named_type(model)}.")
    made: object = created(model, make) if isinstance(model, str) else make()
    if not isinstance(made, nn.Module):
        raise TypeError(f"the call for the model must return a torch.nn.Module; it returned {named_type(made)}.")
    return made


def _from_python(
    path: str | Path,
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    model: nn.Module | None,
    loss_fn: LossFn | None,
) -> MAML:
    """The learner of a run of `metamom.train`."""
    from metamom.experiments.python_runs import as_dtype, known_loss, known_model, learner_of, model_weights
    from metamom.experiments.saved import check_fit

    what = settings["model"].partition("(")[0]
    made = known_model(settings, weights) if model is None else model
    if made is None:
        raise ValueError(
            f"the run in {path} was made in Python with a model that metamom cannot make ({what:.60}): pass it, as "
            'metamom.load(RUN, model=Net()), or by name, "PACKAGE.MODULE:CALLABLE" (--model on the command line).'
        )
    loss = known_loss(settings) if loss_fn is None else loss_fn
    if loss is None:
        named = settings.get("loss")
        name = named.get("name") if isinstance(named, dict) else "unknown"
        raise ValueError(
            f"the run in {path} was made in Python with a loss that metamom cannot make ({name!s:.60}): pass it, as "
            "metamom.load(RUN, loss_fn=...), or pass the whole learner as model=."
        )
    check_fit(made.state_dict(), model_weights(weights), f"the checkpoint in {path}")
    made.to(as_dtype(settings.get("dtype", "float32")))
    try:
        return learner_of(settings, weights, made, loss)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the settings of the run in {path} do not describe a learner of this version ({type(error).__name__}: "
            f"{error}): pass the whole learner, metamom.load(RUN, model=learner)."
        ) from error
