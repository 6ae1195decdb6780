"""The parameter server: aggregates the workers' gradients into one, by a mean or a robust mean."""

from metamom.server.attacks import parse_attack
from metamom.server.down import DownBias, down_update
from metamom.server.participation import Participation, present_workers
from metamom.server.robust import RobustMean, robust_mean

__all__ = ["DownBias", "Participation", "RobustMean", "down_update", "parse_attack", "present_workers", "robust_mean"]
