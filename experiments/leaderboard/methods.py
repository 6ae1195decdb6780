"""The methods. To add one, add a line to `METHODS`.

Legend of an operator's SPEC: ``{A}`` is the problem's operator (``none``, ``topk:1%`` or ``clip:1``), and ``{C}`` is
``clip:1+`` where messages must be clipped, else nothing. A method that has neither sends whole gradients everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["plain", "feedback", "unbiased", "robust"]


class Setup(NamedTuple):
    """A method on a problem, resolved. Two methods with equal setups are the same method there."""

    spec: str
    beta: float
    normalize: bool
    aggregate: str
    rule: str

    @property
    def slug(self) -> str:
        """A file name."""
        words = [self.spec, f"beta{self.beta:g}", *["normalised"] * self.normalize, self.aggregate, self.rule]
        return "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in word) for word in words)


@dataclass(frozen=True)
class Method:
    """A method as its paper has it.

    Attributes:
        name: in tables and figures.
        operator: SPEC of the workers' operator, with ``{A}`` and ``{C}`` as above.
        kind: the group it is listed with.
        beta: weight of the new gradient in the server's momentum.
        normalize: whether steps have length gamma.
        aggregate: the server's mean, see `metamom.server.robust.robust_mean`.
        rule: the server's step, a name in `metamom.experiments.leaderboard.rules.RULES`.
    """

    name: str
    operator: str
    kind: Kind
    beta: float = 1.0
    normalize: bool = False
    aggregate: str = "mean"
    rule: str = "momentum"

    def on(self, operator: str, clips: bool) -> Setup:
        """The method on a problem with this operator A; ``clips`` if messages must be clipped."""
        spec = self.operator.format(A=operator, C="clip:1+" if clips else "")
        return Setup(spec, self.beta, self.normalize, self.aggregate, self.rule)


METHODS: Sequence[Method] = (
    Method("SGD, whole gradients", "none", "plain"),
    Method("momentum, whole gradients", "none", "plain", beta=0.1),
    Method("normalised momentum, whole gradients", "none", "plain", beta=0.1, normalize=True),
    Method("IGT, whole gradients", "none", "plain", beta=0.1, rule="igt"),
    Method("STORM, two whole gradients a step", "none", "plain", beta=0.1, rule="storm"),
    Method("normalised momentum, power schedules", "none", "plain", normalize=True, rule="heavy-ball-powers"),
    Method("normalised IGT, power schedules", "none", "plain", normalize=True, rule="igt-powers"),
    Method("normalised STORM, power schedules", "none", "plain", normalize=True, rule="storm-powers"),
    Method("SGD", "{A}", "plain"),
    Method("momentum", "{A}", "plain", beta=0.1),
    Method("normalised momentum", "{A}", "plain", beta=0.1, normalize=True),
    Method("EF14", "ef14:{A}", "feedback"),
    Method("EF14 + momentum", "ef14:{A}", "feedback", beta=0.1),
    Method("EF21", "ef21:{A}", "feedback"),
    Method("EF21 + momentum", "ef21:{A}", "feedback", beta=0.1),
    Method("EF21 + normalised momentum", "ef21:{A}", "feedback", beta=0.1, normalize=True),
    Method("EF21-SGDM", "ef21-sgdm(0.1):{A}", "feedback"),
    Method("EF21-SGDM, normalised", "ef21-sgdm(0.1):{A}", "feedback", normalize=True),
    Method("EF21-SGD2M", "ef21-sgd2m(0.3):{A}", "feedback"),
    Method("Clip21", "clip21:1", "feedback"),
    Method("Clip21-SGD2M", "clip21-sgd2m:1:eta=0.1", "feedback"),
    Method("Rand-K + momentum", "{C}randk:1%:scaled", "unbiased", beta=0.1),
    Method("QSGD + momentum", "{C}qsgd:16", "unbiased", beta=0.1),
    Method("TernGrad + momentum", "{C}terngrad", "unbiased", beta=0.1),
    Method("natural compression + momentum", "{C}natural", "unbiased", beta=0.1),
    Method("8-bit blocks + momentum", "{C}block8:block=50", "unbiased", beta=0.1),
    Method("MLMC Top-K", "{C}mlmc:topk:1%", "unbiased"),
    Method("MLMC Top-K + momentum", "{C}mlmc:topk:1%", "unbiased", beta=0.1),
    Method("MLMC QSGD + momentum", "{C}mlmc:qsgd", "unbiased", beta=0.1),
    Method("DIANA, Rand-K", "diana(0.01):{C}randk:1%:scaled", "unbiased"),
    Method("DIANA, natural compression", "diana(0.8):{C}natural", "unbiased"),
    Method("DIANA, QSGD", "diana(0.7):{C}qsgd:16", "unbiased"),
    Method("DIANA, QSGD + momentum", "diana(0.7):{C}qsgd:16", "unbiased", beta=0.1),
    Method("MARINA, Rand-K", "marina(0.01):{C}randk:1%:scaled", "unbiased"),
    Method("DASHA, Rand-K", "dasha(0.005):{C}randk:1%:scaled", "unbiased"),
    Method("DASHA, Rand-K + momentum", "dasha(0.005,0.1):{C}randk:1%:scaled", "unbiased"),
    Method("median of whole gradients + momentum", "none", "robust", beta=0.1, aggregate="median"),
    Method("trimmed mean of whole gradients + momentum", "none", "robust", beta=0.1, aggregate="trimmed:0.2"),
    Method("geometric median of whole gradients + momentum", "none", "robust", beta=0.1, aggregate="geomedian"),
    Method("Krum of whole gradients + momentum", "none", "robust", beta=0.1, aggregate="krum:1"),
    Method("multi-Krum of whole gradients + momentum", "none", "robust", beta=0.1, aggregate="multi-krum:1:3"),
    Method("NNM, trimmed mean, whole gradients + momentum", "none", "robust", beta=0.1, aggregate="nnm:1>trimmed:0.2"),
    Method("NNM, trimmed mean of EF21-SGDM", "ef21-sgdm(0.1):{A}", "robust", aggregate="nnm:1>trimmed:0.2"),
    Method("trimmed mean of workers' momentum", "ef21-sgdm(0.1):none", "robust", aggregate="trimmed:0.2"),
    Method("trimmed mean of EF21-SGDM", "ef21-sgdm(0.1):{A}", "robust", aggregate="trimmed:0.2"),
    Method("median of EF21-SGDM", "ef21-sgdm(0.1):{A}", "robust", aggregate="median"),
)
