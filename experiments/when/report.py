"""The report: the rule, where it fails, and the parts that have been run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metamom.experiments.shared.parts import assembled, keep_part
from metamom.experiments.when import map as quadratics
from metamom.experiments.when import mnist, sinusoids
from metamom.experiments.when.rule import WINS


@dataclass(frozen=True)
class WhenMomentumWins:
    """The configs of all parts."""

    map: quadratics.QuadraticMap = field(default_factory=quadratics.QuadraticMap)
    sinusoids: sinusoids.SinusoidSearch = field(default_factory=sinusoids.SinusoidSearch)
    mnist: mnist.CompressedMnist = field(default_factory=mnist.CompressedMnist)


TITLES = {"rule": "", "map": quadratics.TITLE, "sinusoids": sinusoids.TITLE, "mnist": mnist.TITLE}


def report(run_dir: Path, parts: Sequence[str], configs: WhenMomentumWins) -> Path:
    """Run some parts; ``report.md`` holds them and those that earlier runs left in ``parts/``."""
    figures = run_dir / "figures"
    for part in parts:
        if part == "map":
            found = quadratics.answer(figures, configs.map)
            keep_part(run_dir, "rule", the_rule(found))
            text = found.text
        elif part == "sinusoids":
            text = sinusoids.answer(figures, configs.sinusoids).text
        else:
            text = mnist.answer(figures, configs.mnist).text
        keep_part(run_dir, part, text)
    return assembled(run_dir, "When does momentum beat SGD under biased gradients?", TITLES)


def the_rule(found: quadratics.Answer) -> str:
    """The rule in one sentence, and where it fails."""
    rule = found.rule
    return (
        f"**The rule:** with γ and β searched for both, momentum needs at most 1/{WINS:g} of SGD's steps to E‖∇f‖² ≤ ε "
        f"when R = 2L(ε − b²)n / Σλσ² is above about {rule.room:.2g} and plain SGD at γ = 1/L would need more than "
        f"about {rule.length:.2g} steps even without noise: when SGD is held back by its limit of stability 2/L and "
        "not by noise; a constant bias is the same for both and enters only through ε − b², workers only through n.\n\n"
        f"**Where it fails:** on quadratics it is right for {found.accuracy:.0%} of those that it was not fitted on "
        f"({found.clear:.0%} where both numbers are a factor of two away from the thresholds). Where only R is too "
        f"small, momentum still gains {found.noisy:.2g} times in the median; where T < 8 there is nothing to gain "
        f"({found.short:.2g}), and now and then it takes two or three times as many steps. The rule is for a constant "
        "bias: one that turns the gradient, b = √B J∇f, lets momentum's steps be at most (1 + B)/(2√B) times as long "
        "as SGD's, and undid the gain from B ≈ 0.3 on where it was tried (κ = 100, no noise). And it knows quadratics "
        "only: L, σ and so R and T of a network move as it trains."
    )
