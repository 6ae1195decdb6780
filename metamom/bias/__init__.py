"""Bias operators: what a worker does to its gradient before it sends it."""

from metamom.bias.base import BiasOperator, Identity
from metamom.bias.clip import Clip
from metamom.bias.spec import parse
from metamom.bias.topk import TopK

__all__ = ["BiasOperator", "Clip", "Identity", "TopK", "parse"]
