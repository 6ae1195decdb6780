"""A training run as plain values: what the command line asks for, and what `config.json` keeps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from metamom.bias import BiasOperator, Identity, LambdaEta, parse
from metamom.common.checks import MOST, check_ways, check_whole
from metamom.common.named_objects import module_folder
from metamom.common.options import declared
from metamom.common.schema import as_record
from metamom.experiments.families import FAMILIES, Family
from metamom.experiments.families.family import TaskSettings
from metamom.experiments.families.images import check_outputs
from metamom.experiments.optimizers import (
    checked_weight_decay,
    default_lr,
    find_optimizer,
    groups_of,
    make_optimizer,
    parse_arguments,
)
from metamom.experiments.options import RecipeOptions, options_of_some_families, task_defaults
from metamom.experiments.recipe_checks import checked_federation, checked_momentum
from metamom.experiments.schedules import (
    make_beta_schedulers,
    make_schedulers,
    over,
)
from metamom.maml.estimators import ESTIMATORS, check_estimator, support_parts
from metamom.maml.implicit.proximal import as_proximal
from metamom.maml.inner_optimizer import as_inner_optimizer, check_inner_optimizer
from metamom.maml.learner import MAML
from metamom.maml.learners.kinds import check_kind_options, make_learner
from metamom.maml.normalisation.norm import check_norm
from metamom.optim import LambdaBeta
from metamom.server.down import as_down_bias
from metamom.server.participation import Participation
from metamom.server.robust import RobustMean
from metamom.tasks import FixedTasks
from metamom.tasks.checks import check_seed
from metamom.tasks.family import TaskFamily
from metamom.tasks.fixed import ORDERS
from metamom.tasks.preprocessing import Preprocessing
from metamom.training.early_stopping import EarlyStopping
from metamom.weights import load_weights

# of the weights; bfloat16 is for matrix products alone, and leaves the weights in float32
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
MOST_WAYS = 10_000  # a model has a row of weights for each; Omniglot has 6,492 classes, turned ones among them


@dataclass(frozen=True)
class Recipe(RecipeOptions):
    """Everything that decides how a run goes, but for its length; equal recipes give equal runs.

    ``None`` stands for the task's default and is replaced by it. Ranges are checked by what takes the values. Options
    that are ``free`` may differ when a run goes on; those that came ``later`` may be missing in a run of an earlier
    version.
    """

    def __post_init__(self) -> None:
        if self.task not in list(FAMILIES):
            raise ValueError(f"the task must be one of {', '.join(FAMILIES)}; got {self.task!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        self._check_family()
        for name in ("root", "splits"):  # a run may be evaluated from another folder
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.abspath(getattr(self, name)))
        find_optimizer(self.optimizer)
        filled = task_defaults(self.task)
        filled["lr"] = default_lr(self.optimizer, filled["lr"]) if self.lr is None else self.lr
        for each in fields(self):
            if getattr(self, each.name) is None and each.name in filled:
                object.__setattr__(self, each.name, filled[each.name])
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "seed" and isinstance(value, int) and value > MOST:
                raise ValueError(f"{each.name} must be at most {MOST:,}; got {value}.")
        if self.ways is not None:
            check_ways(self.ways)
        if (self.ways or 0) > MOST_WAYS:
            raise ValueError(
                f"ways must be at most {MOST_WAYS:,}, about as many classes as there are; got {self.ways}."
            )
        for name in ("adapt", "augment", "init_except", "worker_weights"):  # JSON has lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.family.check(**self.own())
        check_seed(self.seed)
        RobustMean(self.aggregate, self.attack)  # checks them
        self._become(checked_federation(self))
        self._check_fixed_tasks()
        self._check_learner()
        self._check_optimizer()
        self.operator()
        self.callbacks()

    def _become(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_family(self) -> None:
        """Refuse options that the family does not have."""
        if self.family.classes is None and self.ways is not None:
            raise ValueError(f"{self.family.title} have no classes, so no ways; got ways={self.ways}.")
        check_norm(self.norm)
        if self.family.classes is None and self.norm is not None:
            raise ValueError(
                f"the network for {self.family.title} has no normalisation, so no norm; got norm={self.norm!r}."
            )
        for name in options_of_some_families():
            if name not in self.family.options and getattr(self, name) is not None:
                raise ValueError(f"{self.family.title} have no option {name}; got {name}={getattr(self, name)!r}.")
        if self.init_except is not None and self.init is None:
            raise ValueError("init_except leaves out a part of the weights of init; got no init (--init FILE).")

    def _check_fixed_tasks(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}.")
        if self.order != "replacement" and self.fixed_tasks is None:
            raise ValueError(f"order={self.order!r} is of a fixed set of tasks: say how many, with fixed_tasks=N.")
        if self.order == "reshuffle" and (self.fixed_tasks or 0) % (self.meta_batch or 1):
            raise ValueError(
                f"a meta-batch must divide the {self.fixed_tasks} fixed tasks that come in turn; got {self.meta_batch}."
            )
        check_estimator(self.estimator, self.inner_batches)
        if self.proximal is not None:
            object.__setattr__(self, "proximal", as_proximal(self.proximal).spec)
        if ESTIMATORS[self.estimator].averages is not None and self.fixed_tasks is None:
            raise ValueError(
                f"estimator {self.estimator!r} remembers each task, so tasks must stay: say how many, with "
                "fixed_tasks=N."
            )

    def _check_learner(self) -> None:
        """Check the kind of learner; ``"maml"`` becomes ``None``, as in a run of an earlier version."""
        if self.learner_kind == "maml":
            object.__setattr__(self, "learner_kind", None)
        check_kind_options(
            self.learner_kind or "maml",
            head=self.head,
            estimator=self.estimator,
            adapt=self.adapt,
            learn_inner_lr=self.learn_inner_lr,
            inner_batches=self.inner_batches,
            multi_step=self.multi_step or 0,
            first_order_until=self.first_order_until or 0,
            step_norms=bool(self.step_norms),
            positive_inner_lr=bool(self.positive_inner_lr),
        )
        if self.positive_inner_lr and self.learn_inner_lr is False:
            raise ValueError(
                "positive_inner_lr keeps learned inner step sizes positive: choose which to learn, with "
                'learn_inner_lr="tensor" (--learn-inner-lr tensor), or leave it out.'
            )
        inside = as_inner_optimizer(self.inner_optimizer)
        check_inner_optimizer(self.estimator, inside)
        object.__setattr__(self, "inner_optimizer", None if inside.plain else inside.spec)
        if self.learner_kind == "protomaml" and self.family.classes is None:
            raise ValueError(f"{self.family.title} have no classes, so no prototypes; got learner_kind='protomaml'.")

    def federation(self) -> dict[str, Any]:
        """The keywords of `metamom.train` for absent workers, weights, local steps and the message to the workers."""
        given: dict[str, Any] = {"worker_weights": self.worker_weights, "local_lr": self.local_lr}
        if self.participation is not None:
            given["participation"] = Participation(self.participation, seed=self.seed)
        return given | {"local_steps": self.local_steps or 1, "down_bias": as_down_bias(self.down_bias)}

    def _check_optimizer(self) -> None:
        """Check the options of the optimizer and the schedule; those at their defaults become ``None``.

        So a run of an earlier version, which had none of them, is the same run.
        """
        parse_arguments(self.optimizer, self.optimizer_args)
        object.__setattr__(self, "weight_decay", checked_weight_decay(self.optimizer, self.weight_decay))
        self._become(checked_momentum(self))
        if self.warmup is not None:
            object.__setattr__(self, "warmup", check_whole("warmup", self.warmup, 0) or None)

    @property
    def family(self) -> Family:
        """The record of the task family."""
        return FAMILIES[self.task]

    def data(self) -> dict[str, Any]:
        """The task, and the options of its family but for where the data is, as JSON values."""
        own = {
            name: value for name, value in self.own().items() if name not in ("root", "splits", "model", "model_folder")
        }
        return {"task": self.task, "ways": self.ways, "shots": self.shots, "queries": self.queries, **own}

    def own(self) -> dict[str, Any]:
        """The values of the options that only some families have, of those that this one has."""
        return {name: getattr(self, name) for name in self.family.options}

    def preprocessing(self) -> Preprocessing | None:
        """How image files become inputs; ``None`` for tasks that are not made of image files."""
        make = self.family.preprocessing
        return None if make is None else make(**self.own())

    def with_kept(self, *samplers: TaskFamily | FixedTasks) -> Recipe:
        """The recipe with what a run keeps: of its tasks, such as the images' mean and deviation; and the folder of the
        user's module that has created the model.

        Args:
            *samplers: its training tasks, then those of other splits.
        """
        families = (s.family if isinstance(s, FixedTasks) else s for s in samplers)
        kept = dict(self.family.kept(*families))
        if self.model is not None and ":" in self.model:
            kept["model_folder"] = module_folder(self.model)
        return replace(self, **kept)

    def settings(self) -> dict[str, Any]:
        """The recipe as JSON values, without the options that only other families have."""
        others = set(options_of_some_families()) - set(self.family.options)
        return {name: value for name, value in asdict(self).items() if name not in others}

    @classmethod
    def free(cls) -> tuple[str, ...]:
        """Names of the settings that say only where and how a run is computed: these may differ when it goes on."""
        return tuple(each.name for each in declared(cls) if each.option.free)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], run: str = "the run") -> Recipe:
        """The recipe that `settings` describes; what an earlier version had no setting for is as it was then.

        Args:
            settings: JSON values.
            run: they are of, for the error.

        Raises:
            ValueError: if it is not the settings of a recipe of this version or an earlier one, naming what is odd.
        """
        odd = sorted(set(settings) - {each.name for each in fields(cls)}) or sorted({"task"} - set(settings))
        if odd:
            raise ValueError(
                f"{run} is not a run of `metamom train` of this version: its settings differ in {', '.join(odd)}. "
                "Use the version that wrote it (config.json names it)."
            )
        missing = [each.name for each in declared(cls) if not each.option.later and each.name not in settings]
        if missing:
            raise ValueError(
                f"the settings of {run} lack {', '.join(missing)}, which every version of `metamom train` writes: its "
                "config.json was changed. Put back what is missing, as the command in its history has it."
            )
        if settings["task"] not in list(FAMILIES):
            *others, last = map(repr, FAMILIES)
            raise ValueError(
                f"the settings of {run}: task should be {', '.join(others)} or {last}; got {settings['task']!r:.80}."
            )
        return as_record(cls, dict(settings), f"the settings of {run}")

    def operator(self) -> BiasOperator | None:
        """The bias operator, ``None`` for none."""
        operator = parse(self.bias)
        return None if isinstance(operator, Identity) else operator

    def sampler(self, split: str = "train", *, root: str | None = None) -> TaskFamily | FixedTasks:
        """The tasks of a split.

        ``shots`` is the size of one inner batch: the support sets of split ``"train"`` have as many of them as the
        estimator takes, those of other splits one. Training tasks are fixed ones if so chosen.
        """
        assert self.shots is not None
        shots = self.shots
        if split == "train":
            shots *= support_parts(self.estimator, self.inner_steps, self.inner_batches)
        assert self.queries is not None
        tasks = self.family.tasks(
            TaskSettings(split, self.ways, shots, self.queries, self.seed, DTYPES[self.dtype], root), **self.own()
        )
        if split == "train" and self.fixed_tasks is not None:
            return FixedTasks(tasks, self.fixed_tasks, order=self.order)
        return tasks

    def learner(self, model: nn.Module | None = None, *, initial: bool = True) -> MAML:
        """A learner with initial weights, or around a given model.

        Args:
            model: with weights of its own; by default the family's, with weights drawn from the seed.
            initial: whether to read the initial weights from the file of ``init``, if there is one.
        """
        if model is None:
            model = self.family.model(self.ways, torch.Generator().manual_seed(self.seed), **self.own())
            if initial and self.init is not None:
                load_weights(model, self.init, skip=self.init_except or ())
        assert self.inner_lr is not None
        return make_learner(
            self.learner_kind or "maml",
            model.to(device=find_device(self.device), dtype=DTYPES[self.dtype]),
            self.family.loss(),
            inner_lr=self.inner_lr,
            inner_steps=self.inner_steps,
            estimator=self.estimator,
            inner_batches=self.inner_batches,
            tracking=self.tracking,
            proximal=self.proximal,
            learn_inner_lr=self.learn_inner_lr,
            adapt=self.adapt,
            chunk_size=self.chunk_size,
            compile=self.compile,
            autocast=torch.bfloat16 if self.dtype == "bfloat16" else None,
            norm=self.norm,
            multi_step=self.multi_step or 0,
            first_order_until=self.first_order_until or 0,
            step_norms=bool(self.step_norms),
            inner_optimizer=self.inner_optimizer,
            positive_inner_lr=bool(self.positive_inner_lr),
            head=self.head,
        )

    def check_outputs(self, learner: MAML, tasks: TaskFamily | FixedTasks) -> None:
        """Compare the outputs of a network of the user's with the classes of the tasks; warn if there are more.

        Raises:
            ValueError: if there are fewer.
        """
        if self.model is not None and ":" in self.model and self.ways is not None:
            check_outputs(learner, tasks, self.ways, self.model)

    def make_optimizer(self, learner: MAML) -> Optimizer:
        """The optimizer over everything the learner learns.

        Raises:
            ValueError: for an option out of range.
        """
        if not 0 < (self.lr or 0) < math.inf:
            raise ValueError(f"lr is the step size and must be > 0 and finite; got {self.lr}.")
        arguments = {"lr": self.lr, **parse_arguments(self.optimizer, self.optimizer_args)}
        if self.weight_decay is not None:
            arguments["weight_decay"] = self.weight_decay
        if self.optimizer == "momentum":
            arguments |= {"beta": self.beta, "first_step": self.first_step, "normalize": self.normalize}
            arguments |= {} if self.variant is None else {"variant": self.variant}
        return make_optimizer(self.optimizer, groups_of(learner, self.inner_lr_lr), arguments)

    def callbacks(self) -> list[EarlyStopping]:
        """The callbacks of `metamom.train`: early stopping, if ``patience`` is set.

        Raises:
            ValueError: for a patience out of range.
        """
        return [] if self.patience is None else [EarlyStopping(self.patience)]

    def over(self, iterations: int) -> Recipe:
        """This recipe for a run of so many iterations: a ``cosine`` gets its length, which then stays.

        Raises:
            ValueError: if the warm-up takes all of them.
        """
        return replace(self, schedule=over(self.schedule, self.warmup, iterations))

    def schedulers(
        self, optimizer: Optimizer, operator: BiasOperator | None = None
    ) -> list[LambdaLR | LinearLR | ReduceLROnPlateau | LambdaBeta | LambdaEta]:
        """What moves the step size, the warm-up and the schedule, and what moves β, or the η of the operator's workers.

        Raises:
            ValueError: for a ``cosine`` without a length, see `over`.
        """
        moved = make_schedulers(self.schedule, self.warmup, optimizer)
        return [*moved, *make_beta_schedulers(self.beta_schedule, optimizer, operator)]


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: for a name that means none, or a GPU where there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; wanted cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here; use cpu.")
    return device
