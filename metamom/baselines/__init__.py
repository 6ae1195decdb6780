"""Baselines of few-shot learning, for `metamom.evaluate`: what any meta-learner should be compared with.

`NearestCentroid` and `LinearProbe` classify the features of a network, `FineTuning` trains all weights of a network on
each task, and `FromScratch` does so from random weights.
"""

from metamom.baselines.features import Penultimate
from metamom.baselines.per_task import PerTask
from metamom.baselines.probes import LinearProbe, NearestCentroid
from metamom.baselines.standard import standard_baselines
from metamom.baselines.tuning import FineTuning, FromScratch

__all__ = [
    "FineTuning",
    "FromScratch",
    "LinearProbe",
    "NearestCentroid",
    "Penultimate",
    "PerTask",
    "standard_baselines",
]
