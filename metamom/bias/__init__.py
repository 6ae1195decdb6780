"""Bias operators, which a worker applies to its gradient before sending it."""

from metamom.bias.base import BiasOperator
from metamom.bias.block8 import Block8
from metamom.bias.clip import Clip, ClipValue
from metamom.bias.compose import Compose
from metamom.bias.constants import Constants
from metamom.bias.coordinates import NonFiniteError
from metamom.bias.differences import DASHA, DIANA
from metamom.bias.double_momentum import EF21SGD2M, Clip21SGD2M
from metamom.bias.feedback import EF14, EF21, EF21SGDM, Clip21, ErrorFeedback
from metamom.bias.function import Bias, Function, Identity, as_operator
from metamom.bias.layout import Layout
from metamom.bias.marina import MARINA
from metamom.bias.multilevel_qsgd import MLMCQSGD
from metamom.bias.multilevel_topk import MLMCTopK
from metamom.bias.natural import Natural
from metamom.bias.noise import GaussianNoise
from metamom.bias.normalize import Normalize, Sign
from metamom.bias.powersgd import PowerSGD
from metamom.bias.privacy import privacy_spent
from metamom.bias.random import QSGD, RandK
from metamom.bias.spec import parse
from metamom.bias.terngrad import TernGrad
from metamom.bias.topk import TopK

__all__ = [
    "DASHA",
    "DIANA",
    "EF14",
    "EF21",
    "EF21SGD2M",
    "EF21SGDM",
    "MARINA",
    "MLMCQSGD",
    "QSGD",
    "Bias",
    "BiasOperator",
    "Block8",
    "Clip",
    "Clip21",
    "Clip21SGD2M",
    "ClipValue",
    "Compose",
    "Constants",
    "ErrorFeedback",
    "Function",
    "GaussianNoise",
    "Identity",
    "Layout",
    "MLMCTopK",
    "Natural",
    "NonFiniteError",
    "Normalize",
    "PowerSGD",
    "RandK",
    "Sign",
    "TernGrad",
    "TopK",
    "as_operator",
    "parse",
    "privacy_spent",
]
