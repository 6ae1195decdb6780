"""Bias operators: what a worker does to its gradient before it sends it."""

from metamom.bias.base import Bias, BiasOperator, Function, Identity, as_operator
from metamom.bias.clip import Clip
from metamom.bias.spec import parse
from metamom.bias.topk import TopK

__all__ = ["Bias", "BiasOperator", "Clip", "Function", "Identity", "TopK", "as_operator", "parse"]
