"""Runs written to disk without training, and pages of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metamom.experiments.recipes import Recipe
from metamom.training.directory import environment

STEPS = (0, 1, 5)
Results = dict[tuple[float, float], list[tuple[float, ...] | None]]


def write_run(
    path: Path,
    recipe: Recipe,
    values: dict[int, float],
    *,
    iterations: int | None = None,
    test: tuple[float, ...] | None = None,
    diverged: int | None = None,
    total: int | None = None,
) -> Path:
    """A run of ``metamom train`` with these validations, by the iterations before each.

    Args:
        path: of the run.
        recipe: its settings.
        values: validations.
        iterations: done; those of the last validation unless given.
        test: of a comparison's run that has ended.
        diverged: where it did.
        total: iterations that were asked for.
    """
    done = iterations or max(values)
    path.mkdir(parents=True)
    config = {"settings": asdict(recipe), "length": {"iterations": total or done}, "environment": environment()}
    (path / "config.json").write_text(json.dumps({**config, "history": []}))
    lines = []
    for step in range(done):
        line: dict[str, Any] = {"step": step, "loss": 2.0 / (1 + step), "wire_bytes": 100, "sent_bytes": 0}
        if step + 1 in values:
            line |= {"validation": values[step + 1], "validation_halfwidth": 0.1}
        lines.append(json.dumps(line) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))
    if test is not None or diverged is not None:
        half = None if test is None else [0.05] * len(test)
        (path / "outcome.json").write_text(json.dumps({"diverged": diverged, "test": test, "halfwidth": half}))
    return path


def write_comparison(path: Path, results: Results, **changes: Any) -> Path:
    """A comparison on sinusoids: by β and γ, each seed's test results after `STEPS`; ``None`` of one that diverged.

    The last validation of a run is its last test result plus 0.5, and the one before it 2.
    """
    base = Recipe("sinusoid")
    betas, lrs = (list(dict.fromkeys(key[place] for key in results)) for place in (0, 1))
    seeds = len(next(iter(results.values())))
    settings = {
        "base": asdict(base), "betas": betas, "first_steps": ["zero"], "lrs": lrs, "seeds": seeds, "iterations": 40,
        "evaluate_every": 20, "validation_tasks": 4, "test_tasks": 4, "steps": STEPS, "target": 1.0,
    }  # fmt: skip
    path.mkdir()
    config = {"settings": {**settings, **changes}, "environment": environment()}
    (path / "config.json").write_text(json.dumps(config))
    for (beta, lr), tests in results.items():
        for seed, test in enumerate(tests):
            recipe = Recipe("sinusoid", beta=beta, lr=lr, seed=seed)
            values = {20: 2.0} if test is None else {20: 2.0, 40: test[-1] + 0.5}
            write_run(
                path / "runs" / f"beta{beta:g}-zero_lr{lr:g}_seed{seed}", recipe, values,
                test=test, diverged=25 if test is None else None, total=40,
            )  # fmt: skip
    return path


THREE_SEEDS: Results = {
    (1.0, 0.01): [(3.0, 1.0, 0.9), (3.1, 1.1, 0.8), (2.9, 1.2, 0.7)],
    (1.0, 0.03): [(3.0, 0.9, 0.6), (3.1, 1.0, 0.5), (2.9, 1.1, 0.7)],
    (0.1, 0.01): [(3.0, 0.9, 0.5), (3.1, 1.0, 0.3), (2.9, 0.8, 0.4)],
    (0.1, 0.03): [(3.0, 0.7, 0.2), None, (2.9, 0.6, 0.1)],
}
