"""The kinds of learners by name, as runs and flags spell them."""

from __future__ import annotations

from metamom.maml.boil import BOIL
from metamom.maml.learner import MAML
from metamom.maml.protomaml import ProtoMAML
from metamom.maml.reptile import Reptile

KINDS: dict[str, type[MAML]] = {each.kind: each for each in (MAML, BOIL, Reptile, ProtoMAML)}
