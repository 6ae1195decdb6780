"""The parameter server: aggregates the workers' gradients into one."""

from metamom.server.down import DownBias, down_update
from metamom.server.participation import Participation, present_workers

__all__ = ["DownBias", "Participation", "down_update", "present_workers"]
