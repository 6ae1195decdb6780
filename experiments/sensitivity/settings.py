"""The settings: a task family and a model each, with its grids, its length and its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from metamom.batch import Sampler
from metamom.maml.learner import MAML
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, Omniglot, Sinusoid
from metamom.tasks.images import labelled_images

FASHION_TRAINING_CLASSES = 6  # training classes of ten; the other four are for validation


@dataclass(frozen=True)
class Setting:
    """A task family and a model, and the grid to search over them.

    Attributes:
        title: for tables and figures.
        learner: makes a learner with weights drawn from a seed, compiled or not.
        tasks: makes the samplers for training and validation from a seed and the folder of the data.
        iterations: of every run.
        evaluate_every: iterations between validations.
        validation_tasks: tasks per validation, the same every time.
        target: validation error to reach; an error rate for classification.
        levels: the bias on each worker's gradient, as on the command line.
        methods: some of `metamom.experiments.sensitivity.methods.METHODS`.
        lr_scale: the factor on a method's grid of step sizes.
        lr_count: the number of step sizes of it, from the smallest.
        betas: weight of the new gradient; 1 is no momentum.
        seeds: 0, 1, ..., seeds - 1, for weights and tasks.
        meta_batch: tasks per iteration.
        workers: number of workers that share them.
        compiled: whether the learner is compiled.
    """

    title: str
    learner: Callable[[int, bool], MAML]
    tasks: Callable[[int, str | None], tuple[Sampler, Sampler]]
    iterations: int
    evaluate_every: int
    validation_tasks: int
    target: float
    levels: tuple[str, ...]
    methods: tuple[str, ...] = ("momentum", "adam", "rmsprop", "ef21-sgdm")
    lr_scale: float = 1.0
    lr_count: int = 4
    betas: tuple[float, ...] = (1.0, 0.3, 0.1)
    seeds: int = 1
    meta_batch: int = 16
    workers: int = 8
    compiled: bool = True


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _image_mlp(ways: int, seed: int) -> nn.Module:
    """Two hidden layers of 64 on the pixels, without normalisation, ``[N, 1, 28, 28] -> [N, ways]``."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, ways)
    )
    generator = _draws(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    return model


def _classifier(model: nn.Module, compiled: bool, **options: object) -> MAML:
    return MAML(model, F.cross_entropy, inner_lr=0.4, compile=compiled, **options)  # type: ignore[arg-type]


def _sinusoids(seed: int, root: str | None) -> tuple[Sampler, Sampler]:
    family = Sinusoid(shots=10, queries=10, seed=seed)
    return family, family.with_stream("validation")


def _omniglot(seed: int, root: str | None) -> tuple[Sampler, Sampler]:
    return Omniglot(root, ways=5, shots=1, queries=1, seed=seed), Omniglot(
        root, split="validation", ways=5, shots=1, queries=3, seed=seed
    )


def _fashion(seed: int, root: str | None) -> tuple[Sampler, Sampler]:
    images, labels = labelled_images("fashion", "train", root)
    seen = labels < FASHION_TRAINING_CLASSES
    samplers = [
        Episodes(images[which].unsqueeze(1), labels[which], ways=3, shots=1, queries=5, seed=seed)
        for which in (seen, ~seen)
    ]
    return samplers[0], samplers[1].with_stream("validation")


OMNIGLOT = Setting(
    title="Omniglot 5-way 1-shot, Conv4 of 32 channels",
    learner=lambda seed, compiled: _classifier(Conv4(5, hidden=32, generator=_draws(seed)), compiled),
    tasks=_omniglot,
    iterations=120,
    evaluate_every=15,
    validation_tasks=100,
    target=0.42,
    levels=("none", "topk:1%"),
    meta_batch=8,
)

SETTINGS = {
    "sinusoid": Setting(
        title="sinusoids, MLP 1-40-40-1",
        learner=lambda seed, compiled: MAML(
            SinusoidMLP(generator=_draws(seed)), F.mse_loss, inner_lr=0.01, compile=compiled
        ),
        tasks=_sinusoids,
        iterations=400,
        evaluate_every=25,
        validation_tasks=200,
        target=2.0,
        levels=("none", "topk:10%", "topk:1%"),
        methods=("momentum", "normalised", "adam", "rmsprop", "ef14", "ef21", "ef21-sgdm"),
        lr_scale=0.1,
        lr_count=5,
        seeds=2,
    ),
    "omniglot": OMNIGLOT,
    "anil": replace(
        OMNIGLOT,
        title="Omniglot 5-way 1-shot, ANIL on Conv4 of 32 channels",
        learner=lambda seed, compiled: _classifier(
            Conv4(5, hidden=32, generator=_draws(seed)), compiled, adapt=["head"]
        ),
        target=0.54,
    ),
    "fashion": replace(
        OMNIGLOT,
        title="Fashion-MNIST 3-way 1-shot on unseen classes, Conv4 of 32 channels",
        learner=lambda seed, compiled: _classifier(Conv4(3, hidden=32, generator=_draws(seed)), compiled),
        tasks=_fashion,
        target=0.22,
    ),
    "mlp": replace(
        OMNIGLOT,
        title="Omniglot 5-way 1-shot, MLP 784-64-64-5",
        learner=lambda seed, compiled: _classifier(_image_mlp(5, seed), compiled),
        iterations=240,
        target=0.6,
    ),
}
