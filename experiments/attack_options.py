"""The option of a recipe that says which workers attack. Needs no torch, so that help is fast."""

# The annotations are objects and not text, since pydantic reads them for `Recipe`, in another module.

from dataclasses import dataclass

from metamom.common.choices import ATTACKS
from metamom.common.options import Flag, option
from metamom.experiments.learner_options import LearnerOptions


@dataclass(frozen=True, kw_only=True)
class AttackOptions(LearnerOptions):
    """What faulty workers send, to test robust means: `metamom.server.attacks`."""

    attack: str | None = option(
        None,
        later=True,
        flag=Flag(
            "bias",
            f"what the last F workers send instead of their gradients, to test --aggregate: {', '.join(ATTACKS)}",
            "none",
            metavar="SPEC",
            before="fixed_tasks",
        ),
    )
