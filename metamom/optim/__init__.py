"""The composite momentum method: the update rule, the optimizer, and a scheduler for beta."""

from metamom.common.choices import FirstStep
from metamom.optim.composite import CompositeMomentum
from metamom.optim.schedule import LambdaBeta
from metamom.optim.update import momentum_update, momentum_update_

__all__ = ["CompositeMomentum", "FirstStep", "LambdaBeta", "momentum_update", "momentum_update_"]
