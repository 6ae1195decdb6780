"""Train as a recipe says: what ``metamom train`` and ``metamom reproduce`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metamom.distributed import World, as_world
from metamom.experiments.recipes import Recipe
from metamom.training import loop
from metamom.training.checkpoints import Checkpoints


def train_recipe(
    recipe: Recipe,
    options: Mapping[str, Any],
    *,
    root: str | None = None,
    track_bias: int | None = None,
    world: World | None = None,
) -> loop.TrainResult:
    """Train, or resume, a run of a recipe.

    Args:
        recipe: of the run; a ``cosine`` without a length is one over all iterations.
        options: the keywords of `metamom.train` that are not the recipe's: ``iterations``, ``run_dir``, ``resume``, ...
        root: where the data is; ``None`` for where it is by default.
        track_bias: iterations between measurements of the bias; ``None`` for none.
        world: the processes that train together.

    Returns:
        The result of `metamom.train`.

    Raises:
        ValueError: as `metamom.train` does, and for a run directory within the folder of the images.
    """
    options = dict(options)
    recipe = recipe.over(options["iterations"])
    goes_on = as_world(world).broadcast_object(lambda: _goes_on(options))
    learner = recipe.learner(initial=not goes_on)
    optimizer, operator = recipe.make_optimizer(learner), recipe.operator()
    run_dir = Path(options["run_dir"])
    if recipe.root is not None and run_dir.resolve().is_relative_to(Path(recipe.root).resolve()):
        raise ValueError(
            f"the run would be written into the folder of images {recipe.root}: name another folder with --run-dir."
        )
    if track_bias is not None:
        from metamom.experiments.bias_report import tracking

        options["track_bias"] = tracking(recipe, track_bias, root=root)
    sampler = recipe.sampler(root=root)
    validation = recipe.sampler("validation", root=root)
    recipe.check_outputs(learner, sampler)
    recipe = recipe.with_kept(sampler, validation)
    assert recipe.meta_batch is not None
    return loop.train(
        learner,
        optimizer,
        sampler,
        **options,
        meta_batch=recipe.meta_batch,
        workers=recipe.workers,
        bias=operator,
        aggregate=recipe.aggregate,
        attack=recipe.attack,
        **recipe.federation(),
        clip_grad=recipe.clip_grad,
        schedulers=recipe.schedulers(optimizer, operator),
        callbacks=recipe.callbacks(),
        validation=validation,
        settings=recipe.settings(),
        free=recipe.free(),
        world=world,
        label=f"train {recipe.task}",
    )


def _goes_on(options: Mapping[str, Any]) -> bool:
    """Whether a checkpoint will replace the initial weights, so that their file is not read again."""
    there = options.get("resume", False) and options["run_dir"] is not None
    return bool(there and Checkpoints(Path(options["run_dir"]) / "checkpoints").beyond_start())
