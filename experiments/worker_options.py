"""The options of a recipe that say when and how workers take part. Needs no torch, so that help is fast."""

# The annotations are objects and not text, since pydantic reads them for `Recipe`, in another module.

from dataclasses import dataclass

from metamom.common.flag_types import number, numbers, step_count
from metamom.common.options import Flag, option
from metamom.experiments.learner_options import LearnerOptions


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(LearnerOptions):
    """Absent workers, their weights, local steps, and the message to them. `Recipe.federation` is where they go."""

    participation: float | None = option(
        None,
        later=True,
        flag=Flag(
            "bias",
            "share of the workers that are present in each iteration, at least one, drawn from --seed; the server "
            "remembers the estimates of absent ones with ef21, clip21 and others",
            "1",
            type=number,
            metavar="SHARE",
            before="track_bias",
        ),
    )
    worker_weights: tuple[float, ...] | None = option(
        None,
        later=True,
        flag=Flag(
            "bias",
            "positive weights of the workers in the mean",
            "equal",
            type=numbers,
            metavar="W,W,...",
            before="track_bias",
        ),
    )
    local_steps: int | None = option(
        None,
        later=True,
        flag=Flag(
            "bias",
            "meta-steps that each worker takes on its own part of the tasks between two averages",
            "1",
            type=step_count,
            metavar="N",
            before="track_bias",
        ),
    )
    local_lr: float | None = option(
        None,
        later=True,
        flag=Flag("bias", "step size of local steps", "γ", type=number, before="track_bias"),
    )
    down_bias: str | None = option(
        None,
        later=True,
        flag=Flag(
            "bias",
            "operator on the server's message to the workers, see below",
            "none",
            metavar="SPEC",
            before="track_bias",
        ),
    )
