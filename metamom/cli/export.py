"""``metamom export``: the weights of a trained meta-learner as one file, for other programs."""

from __future__ import annotations

import argparse

from metamom.cli.flags import add_checkpoint, add_data_root, add_model, flag
from metamom.cli.parser import Parser
from metamom.common.flag_types import path, task_count


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    leaf = kinds.add_parser(
        "export",
        help="write a run's weights as safetensors, with a card",
        usage="%(prog)s RUN FILE.safetensors [options]",
        examples=(
            "metamom export runs/photos photos.safetensors",
            "metamom export runs/photos photos.safetensors --licence CC-BY-4.0",
        ),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    own = leaf.add_argument_group("run")
    own.add_argument("run_path", type=path, metavar="RUN", help="the run directory")
    own.add_argument("file", type=path, metavar="FILE", help="NAME.safetensors; NAME.json says what they are")
    add_checkpoint(own)
    add_model(own)
    flag(own, "--tasks", "test tasks to evaluate on, for the card", "only the last validation", type=task_count)
    add_data_root(own)
    flag(own, "--licence", "of the weights, for the card", "not stated", metavar="TEXT")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from pathlib import Path

    from metamom.evaluation import evaluate
    from metamom.loading import load

    trained = load(arguments.run_path, arguments.checkpoint, arguments.model)
    evaluation = None
    if arguments.tasks:
        tasks = trained.sampler("test", root=arguments.data_root)
        evaluation = evaluate(trained.learner, tasks, tasks=arguments.tasks, steps=(trained.learner.inner_steps,))
    written = trained.save_weights(arguments.file, evaluation=evaluation, licence=arguments.licence)
    print(f"weights: {written}")
    print(f"card: {Path(written).with_suffix('.json')}")
    return 0
