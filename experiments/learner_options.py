"""The options of a recipe that say which kind of learner it trains. Needs no torch, so that help is fast."""

# The annotations are objects and not text, since pydantic reads them for `Recipe`, in another module.

from dataclasses import dataclass

from metamom.common.choices import LEARNERS, Learner
from metamom.common.flag_types import long_count, number
from metamom.common.options import Flag, option
from metamom.experiments.families import FAMILIES
from metamom.experiments.image_options import ImageOptions


def _learners(task: str) -> str:
    text = (
        "how tasks are learned: maml; boil, which does not adapt the head; reptile, which moves the weights towards "
        "adapted ones, and needs several --inner-steps"
    )
    without_classes = FAMILIES[task].classes is None
    return text if without_classes else f"{text}; protomaml, whose head starts at the prototypes of a task's classes"


@dataclass(frozen=True, kw_only=True)
class LearnerOptions(ImageOptions):
    """The kind of learner, and the parts of MAML++. `metamom.experiments.recipes.Recipe` has a method ``learner``."""

    learner_kind: Learner | None = option(  # None for maml, as in runs of earlier versions
        None,
        later=True,
        flag=Flag("learner", _learners, "maml", choices=LEARNERS, name="learner", before="inner_lr"),
    )
    head: str | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "with --learner boil or protomaml, the module that is the head",
            "the last layer",
            metavar="NAME",
            before="inner_lr",
        ),
    )
    multi_step: int | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "iterations over which the query losses after each inner step give way to the last one (MAML++)",
            "0",
            type=long_count,
            metavar="N",
            before="adapt",
        ),
    )
    first_order_until: int | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "first iterations without second derivatives",
            "0",
            type=long_count,
            metavar="N",
            before="adapt",
        ),
    )
    step_norms: bool | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "learn scale and offset of batch normalisation for each inner step",
            "off",
            bare=True,
            before="adapt",
        ),
    )
    positive_inner_lr: bool | None = option(
        None,
        later=True,
        flag=Flag(
            "learner",
            "learn the logarithms of the inner step sizes, so that none becomes negative",
            "off",
            bare=True,
            before="adapt",
        ),
    )
    inner_lr_lr: float | None = option(
        None,
        later=True,
        flag=Flag(
            "optimizer",
            "step size γ of learned inner step sizes, which --schedule scales too; they stay positive only if it is "
            "small compared with --inner-lr",
            "that of --lr",
            type=number,
            metavar="LR",
            commands=("train",),
            before="beta",
        ),
    )
    inner_optimizer: str | None = option(  # None for plain steps, as in runs of earlier versions
        None,
        later=True,
        flag=Flag(
            "learner",
            "what inner steps follow: sgd, plain steps; momentum:M or nesterov:M; or adam, with options as in "
            "adam:beta1=0.9,beta2=0.999,eps=1e-8,eps_root=0",
            "sgd",
            metavar="SPEC",
            before="inner_steps",
        ),
    )
