"""How far 5-way 1-shot Omniglot gets in a fixed number of iterations: composite momentum, plain SGD and Adam.

    python -m metamom.experiments.omniglot_accuracy [--iterations 15000] [--methods momentum,sgd,adam] [--run-dir DIR]

All start from the same weights, see the same tasks, 16 an iteration, and lower their step size along half a cosine.
An interrupted run continues where it stopped, and a finished one is only read. The report shows each method's test
accuracy on 1,000 tasks of characters never seen, the minutes its training took, and its curve.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from metamom.common import tables
from metamom.common.allocator import keep_freed_memory
from metamom.common.checks import MOST
from metamom.common.files import write_atomically
from metamom.common.flag_types import count, folder
from metamom.evaluation import Evaluation, evaluate
from metamom.experiments.recipes import Recipe
from metamom.experiments.shared.figures import learning_curves
from metamom.training.directory import environment, read_metrics
from metamom.training.loop import train

METHODS: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.5, "beta": 0.1},
    "sgd": {"lr": 0.5, "beta": 1.0},
    "adam": {"optimizer": "adam", "lr": 0.001},
}
LABELS = {
    "momentum": "momentum, β = 0.1, v₋₁ = 0, γ = 0.5",
    "sgd": "plain meta-SGD (β = 1), γ = 0.5",
    "adam": "Adam, γ = 0.001",
}
TEST_TASKS = 1000
TEST_STEPS = (0, 1, 3)
MARKS = (0.95, 0.97)


def run(method: str, iterations: int, folder: Path, root: str | None) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Train, resume, or read a finished run; return the newest weights' test accuracy and the metrics."""
    recipe = Recipe(task="omniglot", compile=True, schedule=f"cosine:{iterations}", **METHODS[method])
    learner = recipe.learner()
    optimizer = recipe.make_optimizer(learner)
    assert recipe.meta_batch is not None
    train(
        learner,
        optimizer,
        recipe.sampler(root=root),
        iterations=iterations,
        meta_batch=recipe.meta_batch,
        schedulers=recipe.schedulers(optimizer),
        validation=recipe.sampler("validation", root=root),
        evaluate_every=max(1, iterations // 30),
        evaluate_tasks=300,
        run_dir=folder / method,
        resume=True,
        settings=recipe.settings(),
        free=recipe.free(),
        label=method,
    )
    test = evaluate(learner, recipe.sampler("test", root=root), tasks=TEST_TASKS, steps=TEST_STEPS, stream="test")
    return test, read_metrics(folder / method)


def report(results: dict[str, tuple[Evaluation, list[dict[str, Any]]]], iterations: int) -> str:
    """A table in Markdown; ± is a 95 % interval over the test tasks."""
    env = environment()
    head = ["method", *(f"{steps} step{'s' if steps != 1 else ''}" for steps in TEST_STEPS), "minutes"]
    head += [f"iterations to {mark:.0%}" for mark in MARKS]
    lines = [
        f"5-way 1-shot Omniglot, {iterations:,} iterations of 16 tasks, one seed; accuracy on {TEST_TASKS:,} test",
        f"tasks, ± is the 95 % interval over them; the batch's own statistics; torch {env['torch']}, "
        f"{env['threads']} threads.",
        "",
        *tables.head(*head),
    ]
    for method, (test, metrics) in results.items():
        cells = [f"{mean:.1%} ± {100 * half:.1f}" for mean, half in zip(test.mean, test.halfwidth, strict=True)]
        cells.append(f"{metrics[-1]['seconds'] / 60:.0f}")
        for mark in MARKS:
            reached = [line["step"] + 1 for line in metrics if line.get("validation", 0.0) >= mark]
            cells.append(f"{reached[0]:,}" if reached else "never")
        lines.append(tables.row(LABELS[method], *cells))
    lines += ["", "![Validation error against iterations](figures/curves.png)", ""]
    return "\n".join(lines)


def main() -> None:
    """Run or resume, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.omniglot_accuracy",
        description="Train on Omniglot to high accuracy.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--iterations", type=count(MOST, 1), default=15000, help=("iterations of each method (default: 15000)")
    )
    parser.add_argument("--methods", default=",".join(METHODS), help=f"some of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--data-root", metavar="DIR", help="where the data is (default: as `metamom train` finds it)")
    parser.add_argument(
        "--run-dir",
        type=folder,
        default=Path("runs/omniglot-accuracy"),
        help=("where to write the runs and the report"),
    )
    arguments = parser.parse_args()
    methods = [name.strip() for name in arguments.methods.split(",")]
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods: unknown {', '.join(unknown)}; wanted some of {', '.join(METHODS)}.")
    if arguments.iterations < 1:
        parser.error(f"--iterations must be >= 1; got {arguments.iterations}.")
    keep_freed_memory()
    results = {name: run(name, arguments.iterations, arguments.run_dir, arguments.data_root) for name in methods}
    curves = {
        LABELS[name]: [[(line["step"] + 1, 1 - line["validation"]) for line in metrics if "validation" in line]]
        for name, (_, metrics) in results.items()
    }
    learning_curves(
        arguments.run_dir / "figures" / "curves.png",
        curves,
        ylabel="validation error after 1 step",
        title="Omniglot, 5-way 1-shot, step size on half a cosine",
        target=0.03,
        log=True,
    )
    text = report(results, arguments.iterations)
    write_atomically(arguments.run_dir / "report.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
