"""Operators and robust means of many runs at once. Each has a slow twin in the library, which the tests compare."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates
from metamom.bias.draws import Draws
from metamom.bias.feedback_base import ErrorFeedback
from metamom.bias.multilevel import geometric
from metamom.bias.multilevel_qsgd import MLMCQSGD
from metamom.bias.multilevel_topk import MLMCTopK
from metamom.bias.spec import parse
from metamom.server.robust import robust_mean

MEDIAN_STEPS, MEDIAN_TOLERANCE = 300, 1e-9


def operator_for(spec: str, generator: torch.Generator) -> BiasOperator:
    """The operator of a SPEC, which draws from this generator: one call for all rows instead of one counter a row."""
    operator = parse(spec)
    for each in _parts(operator):
        if isinstance(each, Draws):
            each.generator = generator
        if type(each) is MLMCTopK:
            each.__class__ = ManyTopK
        elif type(each) is MLMCQSGD:
            each.__class__ = ManyQSGD
    return operator


def _parts(operator: BiasOperator) -> Iterator[BiasOperator]:
    yield operator
    if isinstance(operator, ErrorFeedback):
        yield from _parts(operator.operator)
    for each in getattr(operator, "operators", ()):
        yield from _parts(each)


class ManyTopK(MLMCTopK):
    """`MLMCTopK` of all rows in a few calls; a level's norm is summed in another order than one row's."""

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        n, d = rows.shape
        k = self.kept(d)
        magnitude, order = rows.abs().sort(dim=1, descending=True, stable=True)
        wide = magnitude / magnitude[:, :1].clamp_min(torch.finfo(rows.dtype).tiny)
        padded = torch.nn.functional.pad(wide, (0, -d % k))
        norms = torch.linalg.vector_norm(padded.view(n, -1, k), dim=2)
        level, chance = _levels(norms, self.geometric, self._uniform(at, rows, 1)[:, 0])
        places = level.unsqueeze(1) * k + torch.arange(k)
        kept = order.gather(1, places.clamp_max(d - 1))
        values = torch.where(places < d, rows.gather(1, kept) / chance.unsqueeze(1).to(rows.dtype), 0)
        return torch.zeros_like(rows).scatter_add_(1, kept, values)


class ManyQSGD(MLMCQSGD):
    """`MLMCQSGD` of all rows in a few calls."""

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        uniform, bits = self._uniform(at, rows, 1 + rows.shape[1]), self.bits
        wide = rows.double()
        scale = wide.abs().amax(1, keepdim=True)
        exact = wide.abs() / torch.where(scale > 0, scale, 1) * 2**bits
        below = exact.floor().clamp_max(2**bits - 1)
        whole, places = below.to(torch.int64), torch.arange(bits - 1, -1, -1)
        digits = [(whole >> int(place)) & 1 for place in places] + [(uniform[:, 1:] < exact - below).to(torch.int64)]
        levels = torch.stack(digits, 1).double()
        units = torch.tensor([2.0**-level for level in [*range(1, bits + 1), bits]], dtype=torch.float64)
        norms = units * levels.square().sum(2).sqrt()
        level, chance = _levels(norms, self.geometric, uniform[:, 0])
        chosen = levels[torch.arange(len(rows)), level]
        value = scale * (units[level] / chance).unsqueeze(1)
        return (value * chosen * wide.sign()).to(rows.dtype)


def _levels(norms: Tensor, ratio: float | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The level ``[n]`` of each row that its uniform number chooses, and its probability ``[n]``."""
    if ratio is None:
        total = norms.sum(1, keepdim=True)
        chances = torch.where(total > 0, norms / total.clamp_min(torch.finfo(norms.dtype).tiny), 1 / norms.shape[1])
    else:
        chances = geometric(ratio, norms.shape[1]).to(norms).expand_as(norms)
    cumulated = chances.cumsum(1)
    level = (cumulated <= uniform.to(norms).unsqueeze(1) * cumulated[:, -1:]).sum(1)
    last = torch.where(chances > 0, torch.arange(norms.shape[1]), 0).amax(1)
    level = torch.minimum(level, last)
    return level, chances[torch.arange(len(norms)), level]


def means(vectors: Tensor, how: str) -> Tensor:
    """`robust_mean` of each run's vectors, ``[..., n, d] -> [..., d]``."""
    if how == "mean":
        return vectors.mean(-2)
    n = vectors.shape[-2]
    if how == "median" or how.startswith("trimmed:"):
        share = float(how.partition(":")[2] or 0.0)
        cut = (n - 1) // 2 if how == "median" else int(share * n * (1 + 1e-12))
        return vectors.sort(dim=-2).values[..., cut : n - cut, :].mean(-2)
    rows = vectors.reshape(-1, n, vectors.shape[-1])
    if how == "geomedian":
        return geometric_medians(rows).view(*vectors.shape[:-2], -1)
    return torch.stack([robust_mean(each, how) for each in rows]).view(*vectors.shape[:-2], -1)


def geometric_medians(x: Tensor) -> Tensor:
    """The geometric median of each of R sets, ``[R, n, d] -> [R, d]``: Weiszfeld's steps with Vardi and Zhang's."""
    y = means(x, "median")
    tiny = torch.finfo(x.dtype).tiny
    near = (MEDIAN_TOLERANCE * torch.linalg.vector_norm(x - y.unsqueeze(1), dim=2).median(1).values).unsqueeze(1)
    for _ in range(MEDIAN_STEPS):
        away = x - y.unsqueeze(1)
        distance = torch.linalg.vector_norm(away, dim=2)
        here = distance <= near
        weights = torch.where(here, 0, 1 / distance.clamp_min(tiny))
        pull = (weights.unsqueeze(2) * away).sum(1)
        strength = torch.linalg.vector_norm(pull, dim=1).clamp_min(tiny)
        held = (1 - here.sum(1) / strength).clamp_min(0).unsqueeze(1)
        step = held * pull / weights.sum(1, keepdim=True).clamp_min(tiny)
        y = y + step
        if bool((torch.linalg.vector_norm(step, dim=1, keepdim=True) <= near).all()):
            break
    return y
