"""``metamom bias``: measure the bias of a meta-gradient."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from metamom.cli.flags import given_flags, with_specs
from metamom.common.allocator import keep_freed_memory
from metamom.common.flag_types import counts, number, path, point_count, seed, step_count, task_count


def add(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    from metamom.maml.estimators import memoryless_estimators

    parser = kinds.add_parser("bias", help="measure a meta-gradient's bias", allow_abbrev=False, **with_specs())
    parser.set_defaults(run=run)
    parser.add_argument(
        "what",
        type=path,
        metavar="RUN|sinusoid|omniglot",
        help="a run directory, or tasks, with a learner as training starts with",
    )
    parser.add_argument(
        "--inner-batch",
        type=counts(point_count),
        metavar="M,M,...",
        help="inner batch sizes in shots (default: 1,2,5,10,20; of Omniglot, which has 20 drawings a class, 1,2,4)",
    )
    parser.add_argument(
        "--estimator",
        choices=memoryless_estimators(),
        metavar="NAME",
        help=f"{', '.join(memoryless_estimators())} (default: as in training, exact)",
    )
    parser.add_argument("--bias", metavar="SPEC", help="operator, see below (default: as in training, none)")
    parser.add_argument("--inner-lr", type=number, help="of a learner that is no RUN's (default: by task)")
    parser.add_argument("--inner-steps", type=step_count, help="of a learner that is no RUN's (default: 1)")
    parser.add_argument("--tasks", type=task_count, help="in all (default: 300; of Omniglot 60)")
    parser.add_argument("--seed", type=seed, help="of tasks, and of weights that are no RUN's (default: 0, or RUN's)")
    parser.add_argument(
        "--checkpoint", choices=("best", "newest"), default="best", help="which one (default: best by validation)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--data-root",
        type=path,
        metavar="DIR",
        help="where the data is (default: $METAMOM_DATA, else the user's data folder)",
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="where bias.md and figures/bias.png go (default: RUN, or a new folder in runs/)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else; write nothing without --out"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.experiments import bias_report
    from metamom.experiments.recipes import TASKS, Recipe
    from metamom.experiments.saved import load_run

    keep_freed_memory()
    what = arguments.what
    if what in TASKS:
        recipe = Recipe(task=what, **given_flags(arguments))
        learner = recipe.learner()
        title = f"{what}, weights as drawn"
    else:
        fixed = [name for name in ("inner_lr", "inner_steps") if getattr(arguments, name) is not None]
        if fixed:
            raise ValueError(
                f"--{fixed[0].replace('_', '-')} belongs to the learner that the run trained; give it with a task "
                f"({', '.join(TASKS)}) in place of a run."
            )
        saved = load_run(what, arguments.checkpoint, device=arguments.device or "cpu")
        asked = {
            name: value for name in ("estimator", "bias", "seed") if (value := getattr(arguments, name)) is not None
        }
        recipe = replace(saved.recipe, **asked)
        learner = saved.learner.like(estimator=recipe.estimator)
        title = f"{recipe.task}, after {saved.step} iterations"
    where = arguments.out
    if where is None and not arguments.json:
        where = f"runs/bias-{what}-{time.strftime('%Y%m%d-%H%M%S')}" if what in TASKS else what
    if where is not None and Path(where).exists() and not Path(where).is_dir():
        raise ValueError(f"{where} is a file; the report needs a directory (--out).")
    found = bias_report.measure_recipe(
        recipe, learner, inner_batches=arguments.inner_batch, tasks=arguments.tasks, root=arguments.data_root
    )
    report = None if where is None else bias_report.write(found, Path(where), title)
    if arguments.json:
        print(json.dumps(bias_report.as_json(found)))
        return 0
    print("\n".join([title, *bias_report.summary(found), "", bias_report.table(found), "", *bias_report.slopes(found)]))
    print(f"report: {report}")
    return 0
