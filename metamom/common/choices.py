"""What options choose from, by name: shared by the library, which imports torch, and the help, which must not."""

from __future__ import annotations

from typing import Literal, get_args

FirstStep = Literal["zero", "gradient"]
"""The first value of v in `metamom.CompositeMomentum`."""
FIRST_STEPS: tuple[FirstStep, ...] = get_args(FirstStep)

Variant = Literal["heavy-ball", "igt", "storm", "hessian"]
"""The kinds of momentum of `metamom.CompositeMomentum`; `metamom.optim.variants` has their rules."""
VARIANTS: tuple[Variant, ...] = get_args(Variant)
FOLLOWING: tuple[Variant, ...] = ("igt", "storm", "hessian")  # those that need the weights of the last step

Order = Literal["replacement", "reshuffle"]  # of `metamom.tasks.FixedTasks`
ORDERS: tuple[Order, ...] = get_args(Order)

Server = Literal["replicated", "rank0"]
"""Where the server of `metamom.distributed` runs: on every process (all compute the same), or on process 0."""
SERVERS: tuple[Server, ...] = get_args(Server)
"""The kinds of `Server`."""
TIMEOUT = 600.0
"""How long processes of `metamom.distributed` wait for each other, in seconds; a first compiled step takes minutes."""

LearnedStepSizes = Literal["scalar", "tensor", "tensor-step", "entry"]
LEARNED_STEP_SIZES: tuple[LearnedStepSizes, ...] = get_args(LearnedStepSizes)
LearnInnerLR = bool | LearnedStepSizes  # of `metamom.MAML`

Learner = Literal["maml", "boil", "reptile", "protomaml"]  # `metamom.maml.learners.kinds.KINDS`
LEARNERS: tuple[Learner, ...] = get_args(Learner)

Norm = Literal["batch", "frozen", "support"]  # of `metamom.MAML`
NORMS: tuple[Norm, ...] = get_args(Norm)
Normalised = Norm | Literal["mixed"]  # what was used
STATISTICS_OF: dict[Normalised, str] = {  # in results
    "batch": "batch statistics",
    "frozen": "running statistics",
    "support": "statistics of each task's support set",
    "mixed": "running statistics in the layers in eval(), batch statistics in the others",
}

# of `metamom.evaluate`
METRICS = ("accuracy", "loss", "macro-f1", "rmse", "calibration-error")

ChunkSize = int | Literal["auto"] | None  # of `metamom.MAML`
CompileMode = bool | Literal["auto"]  # of `metamom.MAML`
Aggregate = str  # one of these: `metamom.server.robust_mean`
AGGREGATES = (
    "mean",
    "median",
    "trimmed:SHARE",
    "geomedian",
    "krum:F",
    "multi-krum:F[:M]",
    "centred-clip:RADIUS[:iterations=L]",
    "nnm:F>RULE",
    "bucketing:S[:seed=SEED]>RULE",
)
ATTACKS = (  # `metamom.server.attacks`
    "sign-flip:F",
    "ipm:F[:eps=EPS]",
    "alie:F[:z=Z]",
    "mimic:F[:worker=I]",
    "gaussian:F[:std=STD][:seed=SEED]",
)

Standardize = Literal["data", "imagenet", "none"]  # of images: which channel means and deviations to take away
STANDARDIZED: tuple[Standardize, ...] = get_args(Standardize)

OnBroken = Literal["raise", "skip"]  # of `metamom.tasks.ImageFolder`
ON_BROKEN: tuple[OnBroken, ...] = get_args(OnBroken)
Rotations = Literal["none", "train", "all"]  # the splits in which turned images are more classes
ROTATIONS: tuple[Rotations, ...] = get_args(Rotations)

DATA_SETS = ("omniglot", "mnist", "fashion")  # of `metamom.tasks.fetch`
