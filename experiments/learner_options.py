"""The options of a recipe that say which kind of learner it trains. Needs no torch, so that help is fast."""

# The annotations are objects and not text, since pydantic reads them for `Recipe`, in another module.

from dataclasses import dataclass

from metamom.common.choices import LEARNERS, Learner
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
    """The kind of learner; a method of `metamom.experiments.recipes.Recipe` is called ``learner``."""

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
