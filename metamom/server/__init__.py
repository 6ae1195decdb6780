"""The parameter server: aggregates the workers' gradients into one, by a mean or a robust mean."""

from metamom.server.attacks import parse_attack
from metamom.server.robust import RobustMean, robust_mean

__all__ = ["RobustMean", "parse_attack", "robust_mean"]
