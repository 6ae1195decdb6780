"""metamom: meta-learners trained by composite momentum under biased gradients.

``metamom.nets``, ``metamom.tasks`` and the other sub-packages are imported when they are first named.
"""

from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from metamom.server.accumulator import BiasedAccumulator
from metamom.batch import Sampler, TaskBatch, TaskSampler
from metamom.bias import (
    EF14,
    EF21,
    EF21SGDM,
    QSGD,
    Clip,
    Clip21,
    ClipValue,
    Compose,
    Identity,
    Normalize,
    RandK,
    Sign,
    TopK,
)
from metamom.evaluation import Evaluation, evaluate
from metamom.maml.learner import MAML
from metamom.optim import CompositeMomentum, LambdaBeta, momentum_update
from metamom.training.progress import DivergedError
from metamom.training.loop import TrainResult, train

if TYPE_CHECKING:
    from metamom import bias as bias
    from metamom import diagnostics as diagnostics
    from metamom import distributed as distributed
    from metamom import experiments as experiments
    from metamom import interop as interop
    from metamom import nets as nets
    from metamom import tasks as tasks
    from metamom import theory as theory

    __version__: str

__all__ = [
    "EF14",
    "EF21",
    "EF21SGDM",
    "MAML",
    "QSGD",
    "BiasedAccumulator",
    "Clip",
    "Clip21",
    "ClipValue",
    "Compose",
    "CompositeMomentum",
    "DivergedError",
    "Evaluation",
    "Identity",
    "LambdaBeta",
    "Normalize",
    "RandK",
    "Sampler",
    "Sign",
    "TaskBatch",
    "TaskSampler",
    "TopK",
    "TrainResult",
    "evaluate",
    "momentum_update",
    "train",
]

_MODULES = {found.name for found in iter_modules(__path__) if not found.name.startswith("_")}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"metamom.{name}")
    if name == "__version__":
        try:
            return metadata.version("metamom")
        except metadata.PackageNotFoundError:  # a checkout on the path that nothing has installed
            return "unknown"
    raise AttributeError(f"module 'metamom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
