"""Task families and data sets."""

from metamom.tasks.dataset import from_dataset
from metamom.tasks.episodes import Episodes
from metamom.tasks.fixed import FixedTasks
from metamom.tasks.image_check import check_images
from metamom.tasks.image_folder import ImageFolder
from metamom.tasks.linear import LinearRegression, half_squared_error
from metamom.tasks.omniglot import Omniglot
from metamom.tasks.omniglot_runs import OmniglotRuns
from metamom.tasks.per_worker import PerWorker
from metamom.tasks.prefetch import Prefetched
from metamom.tasks.quadratic import Quadratic, quadratic_loss
from metamom.tasks.sinusoid import Sinusoid

__all__ = [
    "Episodes",
    "FixedTasks",
    "ImageFolder",
    "LinearRegression",
    "Omniglot",
    "OmniglotRuns",
    "PerWorker",
    "Prefetched",
    "Quadratic",
    "Sinusoid",
    "check_images",
    "from_dataset",
    "half_squared_error",
    "quadratic_loss",
]
