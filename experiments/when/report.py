"""The report: the rule, where it fails, and the parts that have been run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metamom.experiments.when import map as quadratics
from metamom.experiments.when import mnist, sinusoids
from metamom.experiments.when.rule import WINS
from metamom.files import write_atomically


@dataclass(frozen=True)
class Configs:
    """Of each part."""

    map: quadratics.Config = field(default_factory=quadratics.Config)
    sinusoids: sinusoids.Config = field(default_factory=sinusoids.Config)
    mnist: mnist.Config = field(default_factory=mnist.Config)


TITLES = {"rule": "", "map": quadratics.TITLE, "sinusoids": sinusoids.TITLE, "mnist": mnist.TITLE}


def report(run_dir: Path, parts: Sequence[str], configs: Configs) -> Path:
    """Run some parts; ``report.md`` holds them and those that an earlier run has left in ``parts/``."""
    texts, figures = run_dir / "parts", run_dir / "figures"
    texts.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part == "map":
            found = quadratics.answer(figures, configs.map)
            write_atomically(texts / "rule.md", the_rule(found).encode())
            text = found.text
        elif part == "sinusoids":
            text = sinusoids.answer(figures, configs.sinusoids).text
        else:
            text = mnist.answer(figures, configs.mnist).text
        write_atomically(texts / f"{part}.md", text.encode())
    sections = ["# When does momentum beat SGD under biased gradients?"]
    for part, title in TITLES.items():
        if (texts / f"{part}.md").exists():
            sections += [f"## {title}"] * bool(title) + [(texts / f"{part}.md").read_text(encoding="utf-8")]
    write_atomically(run_dir / "report.md", ("\n\n".join(sections) + "\n").encode())
    return run_dir / "report.md"


def the_rule(found: quadratics.Answer) -> str:
    """In one sentence, and where it fails."""
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
        "as SGD's, and undoes the gain from B ≈ 0.3 on, whatever R and T. And it knows quadratics only: L, σ and so R "
        "and T of a network move as it trains."
    )
