"""The options of a recipe that say how the momentum follows the weights. Needs no torch, so that help is fast."""

# The annotations are objects and not text, since pydantic reads them for `Recipe`, in another module.

from dataclasses import dataclass

from metamom.common.choices import VARIANTS, Variant
from metamom.common.options import Flag, option
from metamom.experiments.learner_options import LearnerOptions

TRAIN = ("train",)


@dataclass(frozen=True, kw_only=True)
class MomentumOptions(LearnerOptions):
    """The variant of the momentum, and the schedule of the weight of the new gradient."""

    variant: Variant | None = option(
        None,
        later=True,
        flag=Flag(
            "optimizer",
            "how the momentum follows the weights: heavy-ball, not at all; igt, gradients at an extrapolated point; "
            "storm, differences of two gradients; hessian, Hessian-vector products. With --bias ef21-sgdm(ETA):A, the "
            "workers' momenta",
            "heavy-ball",
            choices=VARIANTS,
            commands=TRAIN,
            before="weight_decay",
        ),
    )
    beta_schedule: str | None = option(
        None,
        later=True,
        flag=Flag(
            "optimizer",
            "of β, or of the η of --bias ef21-sgdm(η):A: constant; power:P, β t^-P in iteration t = 1, 2, ...; power, "
            "with the P of the --variant",
            "constant",
            metavar="SPEC",
            commands=TRAIN,
            before="weight_decay",
        ),
    )
