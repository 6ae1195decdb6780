"""The options of a recipe, each with its default, flag and place in the record. Needs no torch, so that help is fast.

To add one, add a field to `RecipeOptions`, or to `ImageOptions` if only images have it; `LearnerOptions` says which
kind of learner, `AttackOptions` which workers attack, `WorkerOptions` when and how workers take part, and
`MomentumOptions` which momentum.
`metamom.experiments.recipes.Recipe` is where it takes effect.
"""

# The annotations are objects and not text, since pydantic reads them for `Recipe`, in another module.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metamom.common.choices import (
    AGGREGATES,
    FIRST_STEPS,
    LEARNED_STEP_SIZES,
    NORMS,
    ORDERS,
    Aggregate,
    ChunkSize,
    CompileMode,
    FirstStep,
    LearnInnerLR,
    Norm,
    Order,
)
from metamom.common.flag_types import (
    auto,
    count_or_auto,
    long_count,
    names,
    number,
    path,
    point_count,
    seed,
    step_count,
    task_count,
)
from metamom.common.options import Flag, declared, option
from metamom.experiments.attack_options import AttackOptions
from metamom.experiments.defaults import DTYPE_NAMES, PLATEAU, STEP_SIZES, WEIGHT_DECAYS
from metamom.experiments.families import FAMILIES
from metamom.experiments.momentum_options import TRAIN, MomentumOptions
from metamom.experiments.worker_options import WorkerOptions
from metamom.maml.estimators import (
    ESTIMATORS,
    INNER_BATCHES,
    Estimator,
    InnerBatches,
    memoryless_estimators,
    proximal_estimators,
    support_parts,
    tracked_estimators,
)


def task_defaults(task: str) -> dict[str, Any]:
    """The defaults of the options that have none of their own. ``None`` stands for an option that the task lacks."""
    family = FAMILIES[task]
    return {**family.defaults._asdict(), **family.options, "iterations": family.iterations}


def _points(text: str) -> Callable[[str], str]:
    """A text with the unit that a task counts its points by."""
    return lambda task: text.format(FAMILIES[task].unit)


def _estimators(task: str) -> str:
    alone = [name for name in memoryless_estimators() if support_parts(name, 1) == 1]
    halved = [name for name in memoryless_estimators() if name not in alone]
    return (
        f"of the meta-gradient. On support sets of --shots: {', '.join(alone)}. On support sets of twice the --shots, "
        f"in two halves: {', '.join(halved)}. With --fixed-tasks, with a moving average for each task: "
        f"{', '.join(tracked_estimators())}"
    )


def _lr(task: str) -> str:
    sizes = sorted({*STEP_SIZES.values()})
    others = [", ".join(name for name in STEP_SIZES if STEP_SIZES[name] == size) for size in sizes]
    return "; ".join(
        [f"{task_defaults(task)['lr']}", *(f"{size} with {names}" for size, names in zip(sizes, others, strict=True))]
    )


def _tracking(task: str) -> str:
    *others, last = tracked_estimators()
    return f"weight of a new inner step in the moving averages of {', '.join(others)} and {last}, 0 < B <= 1"


def _proximal(task: str) -> str:
    return (
        f"strength λ of the proximal problem that estimators {' and '.join(proximal_estimators())} adapt by, and the "
        "solver's options, such as 2,tolerance=1e-4,iterations=50"
    )


@dataclass(frozen=True)
class RecipeOptions(AttackOptions, WorkerOptions, MomentumOptions):
    """The options that decide how a run goes, but for its length.

    ``None`` stands for the task's default, unless the help says otherwise.
    """

    task: str
    init: str | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "start from the weights in a file: safetensors, or a state dict saved by torch.save",
            "weights drawn from --seed",
            type=path,
            metavar="FILE",
        ),
    )
    init_except: tuple[str, ...] | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "with --init, modules that keep the weights drawn from --seed, such as head",
            "none",
            type=names,
            metavar="NAMES",
        ),
    )
    ways: int | None = option(None, flag=Flag("task", "classes a task", type=task_count))
    shots: int | None = option(
        None, flag=Flag("task", _points("support points {}, in each inner batch"), type=point_count)
    )
    queries: int | None = option(None, flag=Flag("task", _points("query points {}"), type=point_count))
    inner_lr: float | None = option(None, flag=Flag("learner", "inner step size", type=number))
    inner_steps: int = option(1, flag=Flag("learner", "inner steps in training", type=step_count))
    estimator: Estimator = option("exact", flag=Flag("learner", _estimators, choices=ESTIMATORS, metavar="NAME"))
    inner_batches: InnerBatches = option(
        "same",
        later=True,
        flag=Flag(
            "learner",
            "same or fresh support points for each inner step in training; fresh takes --shots for each",
            choices=INNER_BATCHES,
        ),
    )
    tracking: float | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            _tracking,
            "0.2",
            type=number,
            metavar="B",
            before="inner_batches",
        ),
    )
    proximal: float | str | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            _proximal,
            "2",
            metavar="SPEC",
            before="learn_inner_lr",
        ),
    )
    learn_inner_lr: LearnInnerLR = option(
        False,
        flag=Flag(
            "learner",
            "learn the inner step sizes: one for each entry (Meta-SGD) if no value follows",
            choices=LEARNED_STEP_SIZES,
            bare="entry",
        ),
    )
    adapt: tuple[str, ...] | None = option(
        None,
        flag=Flag(
            "learner", "parameters or modules that adapt, such as head for ANIL", "all", type=names, metavar="NAMES"
        ),
    )
    norm: Norm | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "statistics that normalise queries: batch, of the query set; support, of the task's support set; frozen, "
            "the model's running ones, which Conv4 does not have",
            lambda task: None if task_defaults(task)["ways"] is None else "batch",
            choices=NORMS,
        ),
    )
    chunk_size: ChunkSize = option(
        "auto",
        free=True,
        flag=Flag(
            "learner",
            "tasks computed at a time, or auto: as many as fit into 256 MiB",
            "auto",
            type=count_or_auto,
            metavar="N",
        ),
    )
    compile: CompileMode = option(
        False,
        free=True,
        flag=Flag(
            "learner",
            "compile the meta-gradient; with auto, only in runs long enough to gain time",
            type=auto("--compile"),
            metavar="auto",
            bare=True,
        ),
    )
    optimizer: str = option(
        "momentum",
        flag=Flag(
            "optimizer",
            "outer optimizer: momentum, or one of torch.optim by name, such as sgd, adam or adamw",
            type=str.lower,
            metavar="NAME",
            commands=TRAIN,
        ),
    )
    optimizer_args: str | None = option(
        None,
        later=True,
        flag=Flag(
            "optimizer",
            "further options of the optimizer by name, such as betas=0.9,0.99,eps=1e-6",
            "its own",
            metavar="NAME=VALUE,...",
            commands=TRAIN,
        ),
    )
    lr: float | None = option(None, flag=Flag("optimizer", "step size γ", _lr, type=number, commands=TRAIN))
    beta: float = option(
        0.1,
        flag=Flag("optimizer", "weight of the new gradient, 0 < β <= 1; 1 is plain SGD", type=number, commands=TRAIN),
    )
    first_step: FirstStep = option(
        "zero",
        flag=Flag("optimizer", "start from v_{-1} = 0 or v_0 = g_0", choices=FIRST_STEPS, commands=TRAIN),
    )
    normalize: bool = option(
        False,
        later=True,
        flag=Flag("optimizer", "move by γ v/‖v‖, so that every step has length γ", commands=TRAIN),
    )
    weight_decay: float | None = option(
        None,
        later=True,
        flag=Flag(
            "optimizer",
            "weight decay, as the optimizer defines it; momentum adds the weights times it to the gradient",
            lambda task: "; ".join(["0", *(f"{value} with {name}" for name, value in WEIGHT_DECAYS.items())]),
            type=number,
        ),
    )
    clip_grad: float | None = option(
        None,
        later=True,
        flag=Flag(
            "optimizer",
            "scale the aggregated gradient down to a norm of at most MAXNORM before the step",
            "off",
            type=number,
            metavar="MAXNORM",
        ),
    )
    schedule: str = option(
        "constant",
        later=True,
        flag=Flag(
            "optimizer",
            "of γ: constant; cosine:N, from γ to 0 in N iterations; cosine, in all of them; power:P, γ t^-P in "
            "iteration t; power, with the P of the --variant; plateau:FACTOR,PATIENCE, "
            f"times FACTOR ({PLATEAU[0]}) after more than PATIENCE ({PLATEAU[1]}) validations without improvement",
            metavar="SPEC",
        ),
    )
    warmup: int | None = option(
        None,
        later=True,
        flag=Flag(
            "optimizer",
            "raise γ linearly in the first N iterations, before the schedule",
            "0",
            type=long_count,
            metavar="N",
        ),
    )
    meta_batch: int | None = option(None, flag=Flag("task", "tasks an iteration", type=task_count))
    workers: int = option(1, flag=Flag("bias", "workers that share the tasks", type=task_count))
    bias: str = option("none", flag=Flag("bias", "operator on each worker's gradient, see below", metavar="SPEC"))
    aggregate: Aggregate = option(
        "mean",
        flag=Flag(
            "bias",
            f"how the server aggregates the workers' gradients: {', '.join(AGGREGATES)}",
            metavar="SPEC",
        ),
    )
    fixed_tasks: int | None = option(
        None,
        later=True,
        flag=Flag(
            "task",
            "train on the same N tasks",
            "new tasks in each iteration",
            type=task_count,
            metavar="N",
        ),
    )
    order: Order = option(
        "replacement",
        later=True,
        flag=Flag(
            "task",
            "with --fixed-tasks: sample tasks independently, or reshuffle every epoch",
            choices=ORDERS,
        ),
    )
    seed: int = option(
        0,
        flag=Flag("run", "of the initial weights and of the tasks", type=seed, commands=TRAIN, before="evaluate_every"),
    )
    patience: int | None = option(
        None,
        later=True,
        free=True,
        flag=Flag(
            "run",
            "stop after N validations in a row without improvement",
            "off",
            type=long_count,
            metavar="N",
            commands=TRAIN,
            before="checkpoint_every",
        ),
    )
    dtype: str = option(
        "float32",
        flag=Flag("learner", "bfloat16 is for matrix products only, summed in float32", choices=DTYPE_NAMES),
    )
    device: str = option("cpu", free=True, flag=Flag("run", "cpu or cuda", before="run_dir"))


def options_of_some_families() -> list[str]:
    """The names of the options that only families have which list them."""
    return [each.name for each in declared(RecipeOptions) if each.option.own]
