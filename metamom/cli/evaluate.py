"""``metamom evaluate``: evaluate a trained meta-learner on fresh tasks."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamom.cli.flags import (
    add_adaptation,
    add_checkpoint,
    add_device,
    add_metric,
    add_model,
    add_processes,
    add_results,
    add_tasks,
    flag,
    switch,
    trained_with,
)
from metamom.cli.parser import Parser
from metamom.common.flag_types import path, step_count, task_count
from metamom.common.numbers import counted, plural

if TYPE_CHECKING:
    from metamom.batch import Sampler
    from metamom.cli.results import Row
    from metamom.distributed import World
    from metamom.evaluation import Adaptable, Evaluation
    from metamom.loading import LoadedRun
    from metamom.task_metrics import Metric


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    leaf = kinds.add_parser(
        "evaluate",
        help="evaluate a trained meta-learner on fresh tasks",
        usage="%(prog)s RUN [options]",
        examples=("metamom evaluate runs/sine", "metamom evaluate runs/omni --split test --steps 0,1,5,10 --baselines"),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    leaf.elsewhere.update(trained_with())
    task = leaf.add_argument_group("task")
    add_tasks(task)
    learner = leaf.add_argument_group("learner")
    add_adaptation(learner)
    own = leaf.add_argument_group("run")
    own.add_argument("run_path", type=path, metavar="RUN", help="the run directory")
    add_checkpoint(own, default=None)
    flag(
        own,
        "--ensemble",
        "instead of one checkpoint, the mean of the predictions of the K best by validation among those kept",
        "none",
        type=task_count,
        metavar="K",
    )
    add_model(own)
    add_device(own, default="cpu")
    add_metric(own)
    switch(
        own,
        "--baselines",
        "also evaluate nearest centroid and linear probe (of classes, on the learner's features), fine-tuning of all "
        "weights, and training from scratch, on the same tasks",
    )
    flag(
        own,
        "--baseline-steps",
        "steps of Adam in fine-tuning and from scratch",
        type=step_count,
        default=20,
        metavar="J",
    )
    add_results(own)
    add_processes(leaf.add_argument_group("processes"))


def run(arguments: argparse.Namespace, world: World) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.cli.results import as_json, evaluated, table, write_csv, write_record
    from metamom.common.allocator import keep_freed_memory
    from metamom.ensemble import ensemble_of
    from metamom.evaluation import evaluate
    from metamom.loading import load
    from metamom.tasks import ImageFolder

    keep_freed_memory()
    check_results(arguments)
    if arguments.ensemble is not None and arguments.checkpoint is not None:
        raise ValueError(
            f"--ensemble {arguments.ensemble} takes the best checkpoints by validation; got --checkpoint "
            f"{arguments.checkpoint} too. Leave one of them out."
        )
    run = load(arguments.run_path, arguments.checkpoint or "best", arguments.model, device=arguments.device)
    asked = asked_of_tasks(arguments)
    check_run(run, arguments, asked)
    sampler = run.sampler(arguments.split, root=arguments.data_root, **asked)
    metric = chosen_metric(arguments)
    options = {"tasks": arguments.tasks, "stream": arguments.split, "world": world, "metric": metric}
    learner: Adaptable = run.learner
    members: list[int] = []
    if arguments.ensemble is not None:
        learner, members = ensemble_of(run, arguments.ensemble)
    result = evaluate(
        learner, sampler, steps=arguments.steps, norm=arguments.norm, inner_lr=arguments.inner_lr, **options
    )
    baselines = _baselines(run, sampler, result, arguments, options) if arguments.baselines else {}
    if not world.first:
        return 0
    if arguments.csv is not None:
        write_csv(arguments.csv, {"learner": result, **{name: row.result for name, row in baselines.items()}})
    if arguments.record is not None:
        answer = as_json(result, baselines, per_task=arguments.per_task, metric=True)
        what = evaluated({arguments.run_path: run}, result, tasks_in_words(run, asked), arguments, members)
        if isinstance(sampler, ImageFolder):
            what |= {"folder of the images": sampler.location()["root"], "SHA-256 of the images": sampler.data_sha256}
        write_record(arguments.record, answer, what)
    if arguments.json:
        answer = as_json(result, baselines, per_task=arguments.per_task, metric=metric is not None)
        if isinstance(sampler, ImageFolder):
            answer["data_sha256"] = sampler.data_sha256
        print(json.dumps(answer))
        return 0
    trained = (
        f"the mean of {plural(len(members), 'iteration')} {', '.join(map(str, members))}"
        if members
        else (f"trained for {run.step} {plural(run.step, 'iteration')}")
    )
    print(
        f"{tasks_in_words(run, asked)}, split {arguments.split}, {arguments.tasks} tasks, "
        f"{'; '.join([trained, *result.normalised, *_drawn_from(sampler)])}"
    )
    print("\n".join(table(result, baselines)))
    return 0


def _drawn_from(sampler: Sampler) -> list[str]:
    """What tasks are drawn from: the images of a folder, which may have become more or fewer since training; or the
    alphabets that have enough characters for a task each."""
    from metamom.tasks import ImageFolder, Omniglot

    if isinstance(sampler, Omniglot) and sampler.within_alphabet:
        return [f"each task within one of {counted(len(sampler.drawn_alphabets), 'alphabet')}"]
    return [sampler.contents] if isinstance(sampler, ImageFolder) else []


def check_results(arguments: argparse.Namespace) -> None:
    """Refuse, before the work, ``--per-task`` without ``--json`` and files that cannot be written."""
    for name in ("csv", "record"):
        file = getattr(arguments, name)
        if file is None:
            continue
        place = Path(file)
        if place.is_dir() or not place.name:
            raise ValueError(f"--{name} needs the name of a file; {file} is a folder.")
        above = next(each for each in place.absolute().parents if each.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise ValueError(f"--{name} cannot write {file}: {above} is not a folder that you can write to.")
    if arguments.per_task and not arguments.json:
        raise ValueError("--per-task is a part of --json: give both, or write every task's value with --csv FILE.")


def chosen_metric(arguments: argparse.Namespace) -> str | Metric | None:
    """The metric by name, or the user's function."""
    from metamom.common.named_objects import named_callable

    metric: str | None = arguments.metric
    return named_callable(metric, "the metric") if metric is not None and ":" in metric else metric


def asked_of_tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of tasks that were given."""
    names = ("ways", "shots", "queries", "seed", "splits", "on_broken", "within_alphabet")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _baselines(
    run: LoadedRun, sampler: Sampler, result: Evaluation, arguments: argparse.Namespace, options: dict[str, Any]
) -> dict[str, Row]:
    """The baselines on the same tasks."""
    from metamom.baselines import standard_baselines
    from metamom.baselines.tuning import FineTuning
    from metamom.cli.results import Row
    from metamom.common.log_lines import LogLines
    from metamom.common.trees import lone
    from metamom.evaluation import evaluate, paired_difference

    labels = lone(sampler.sample(0, 1).support_y)
    classes = labels is not None and not labels.is_floating_point() and labels.dim() == 2
    found: dict[str, Row] = {}
    baselines = standard_baselines(run.learner, classes=classes, make=run.new_model)
    world: World = options["world"]
    lines = (
        None if sys.stderr.isatty() or not world.first else LogLines("evaluate", len(baselines), "baselines", since=0)
    )
    for name, baseline in baselines.items():
        if lines is not None:
            lines.stepped(len(found), {"now": name})
        steps = arguments.baseline_steps if isinstance(baseline, FineTuning) else 0
        of_baseline = evaluate(baseline, sampler, steps=(steps,), **options)
        found[name] = Row(of_baseline, paired_difference(of_baseline, result.at(max(result.steps))))
    return found


def check_run(run: LoadedRun, arguments: argparse.Namespace, asked: dict[str, Any]) -> None:
    """Refuse tasks and statistics that the learner cannot have, and warn of classes that it has seen."""
    recipe = run.recipe
    if recipe is None:
        _check_split(run, arguments)
        return
    if recipe.ways is not None and asked.get("ways", recipe.ways) != recipe.ways:
        raise ValueError(
            f"the learner in {run.path} distinguishes {recipe.ways} classes; got "
            f"--ways {asked['ways']}. Train one with that many --ways."
        )
    if arguments.norm is not None:
        recipe = replace(recipe, norm=arguments.norm)  # which checks it
    classes = recipe.family.classes
    if classes is not None and arguments.split in classes.seen_in:
        unseen = " or ".join(split for split in recipe.family.splits if split not in classes.seen_in)
        warnings.warn(
            f"the learner was trained on split train, and {arguments.split} shares {classes.noun} with it: this is no "
            f"accuracy on new {classes.noun}. Use {unseen}.",
            stacklevel=1,
        )


def _check_split(run: LoadedRun, arguments: argparse.Namespace) -> None:
    """Warn if a run from Python is evaluated on the classes that it was trained on."""
    from metamom.experiments.python_tasks import task_family

    described = task_family(run.settings)
    if described.get("split") == arguments.split and "ways" in described:
        warnings.warn(
            f"the learner was trained on split {arguments.split}: this is no accuracy on new classes. Use another "
            "split, such as test.",
            stacklevel=1,
        )


def tasks_in_words(run: LoadedRun, asked: dict[str, Any]) -> str:
    """The tasks of an evaluation in a few words: ``omniglot 5-way 1-shot``."""
    if run.recipe is not None:
        name, trained = run.recipe.task, run.recipe.settings()
    else:
        from metamom.experiments.python_tasks import task_family

        trained = task_family(run.settings)
        name = str(trained["family"])
    ways, shots = (asked.get(each, trained.get(each)) for each in ("ways", "shots"))
    return f"{name} {ways}-way {shots}-shot" if ways else f"{name} {shots}-shot"
