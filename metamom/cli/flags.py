"""Flags that several commands have: those of the options of a run, which declare them, and a few more."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, replace
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from metamom.common.choices import METRICS, NORMS, SERVERS, TIMEOUT
from metamom.common.flag_types import (
    counts,
    metric,
    module_callable,
    number,
    path,
    point_count,
    seed,
    step_count,
    task_count,
)
from metamom.common.options import Flag, declared
from metamom.experiments.families import FAMILIES, Family
from metamom.experiments.options import RecipeOptions, task_defaults
from metamom.training.options import Options


class Group(Protocol):
    """A parser, or a group of its flags."""

    def add_argument(self, *name_or_flags: str, **settings: Any) -> argparse.Action:
        """As argparse's."""


OWN = {  # of a run's commands, but not among its options
    "data_root": Flag(
        "task", "where the data is", "$METAMOM_DATA, else the user's data folder", type=path, metavar="DIR"
    ),
    "config": Flag(
        "run",
        "read flags from a YAML or JSON file, or a run's config.json; the command line overrides them",
        "none",
        type=path,
        metavar="FILE",
        before="seed",
    ),
}


def flag(group: Group, name: str, meaning: str, shows: object = None, **settings: Any) -> None:
    """Add a flag; its help ends with the default: ``shows``, or else the ``default`` itself."""
    default = settings.get("default") if shows is None else shows
    assert default is not None, name
    group.add_argument(name, help=f"{meaning} (default: {default})", **settings)


def switch(group: Group, name: str, meaning: str, **settings: Any) -> None:
    """Add a flag without a value, off by default."""
    flag(group, name, meaning, "off", action="store_true", **settings)


class Flagged(NamedTuple):
    """An option with a flag.

    Attributes:
        name: of the option.
        default: of the option; ``None`` or ``MISSING`` if the task decides it, unless the flag says otherwise.
        flag: as declared.
        filled: whether the parser fills in the default. A recipe fills in its own, and has to know what was given.
        own: whether only the task families that list it have it.
    """

    name: str
    default: Any
    flag: Flag
    filled: bool = False
    own: bool = False

    def value(self, task: str) -> Any:
        """The default of the flag."""
        default = self.default if self.flag.default is None else self.flag.default
        undecided = default is MISSING or (default is None and self.flag.shows is None)
        return task_defaults(task)[self.name] if undecided else default

    def belongs(self, task: str) -> bool:
        """Whether the task has the option."""
        if self.name == "data_root":  # a family with a root of its own has no data set to find
            return "root" not in FAMILIES[task].options
        return not self.own or self.name in FAMILIES[task].options

    def shown(self, task: str) -> object:
        """The default in the help; ``None`` if the task does not have the option."""
        if not self.belongs(task):
            return None
        shows = self.flag.shows
        if shows is None:
            value = self.value(task)
            return "off" if value is False else value
        return shows if isinstance(shows, str) else shows(task)

    def add(self, group: Group, shown: object, default: Any, task: str = "") -> None:
        """Add the flag to a group of the help."""
        settings = {name: getattr(self.flag, name) for name in ("type", "choices", "metavar")}
        settings = {name: value for name, value in settings.items() if value is not None}
        if self.flag.bare is not None:
            settings |= {"nargs": "?", "const": self.flag.bare}
        elif self.default is False or self.flag.switch:
            settings["action"] = "store_true"
        if self.flag.name is not None:
            settings["dest"] = self.name
        flag(group, self.spelled, self.meaning(task), shown, default=default, **settings)

    @property
    def spelled(self) -> str:
        """The flag."""
        return f"--{(self.flag.name or self.name).replace('_', '-')}"

    def meaning(self, task: str) -> str:
        """The help, without the default."""
        return self.flag.meaning if isinstance(self.flag.meaning, str) else self.flag.meaning(task)


def flagged() -> Mapping[str, Flagged]:
    """The options of a run that have flags, in the order of the help. A recipe's come before those of `train`."""
    return _flagged(RecipeOptions, Options)


@cache  # the command's parsers ask for them dozens of times
def _flagged(*kinds: type) -> Mapping[str, Flagged]:
    found: dict[str, Flagged] = {}
    for kind in kinds:
        for each in declared(kind):
            if each.option.flag is not None:
                found[each.name] = Flagged(
                    each.name, each.default, each.option.flag, filled=kind is Options, own=each.option.own
                )
    found |= {name: Flagged(name, None, own) for name, own in OWN.items()}
    names = list(found)
    for name, entry in found.items():
        if entry.flag.before is not None:
            names.remove(name)
            names.insert(names.index(entry.flag.before), name)
    return MappingProxyType({name: found[name] for name in names})


def add_options(group: argparse._ArgumentGroup, task: str, command: str) -> None:
    """Add the options that the command has for the task and that belong to the group of this title."""
    for each in flagged().values():
        if each.flag.group == group.title and command in each.flag.commands:
            shown = each.shown(task)
            if shown is not None:
                each.add(group, shown, each.value(task) if each.filled else None, task)


def add_own_options(group: argparse._ArgumentGroup, families: Mapping[str, Family], *, but: str = "") -> None:
    """Add the options that belong to the group of this title and that only some of these families have, but for one."""
    for each in flagged().values():
        having = [name for name, family in families.items() if each.own and each.name in family.options]
        if having and each.flag.group == group.title and each.name != but:
            named = replace(each.flag, meaning=f"for {', '.join(having)}: {each.meaning(having[0])}")
            each._replace(flag=named).add(group, each.shown(having[0]), None, having[0])


def trained_with() -> dict[str, str]:
    """Advice for the flags of training that a command for runs does not have, by flag."""
    advice = "it belongs to training, and a run is used as it was trained"
    return {each.spelled: advice for each in flagged().values()} | {
        "--root": "the folder of images is --data-root DIR",
    }


def add_data_root(group: Group, name: str = "data_root") -> None:
    """Where the data is."""
    own = OWN["data_root"]
    Flagged(name, None, own).add(group, own.shows, None)


def add_splits(group: Group) -> None:
    """The lists of the classes of each split of images."""
    each = flagged()["splits"]
    each._replace(flag=replace(each.flag, meaning=f"for images: {each.meaning('images')}")).add(
        group, each.shown("images"), None
    )


def add_device(group: Group, default: str | None = None) -> None:
    """The device."""
    each = flagged()["device"]
    each.add(group, each.default, default)


def add_checkpoint(group: Group, *, default: str | None = "best") -> None:
    """Which of a run's checkpoints to load, the best one by default; ``default=None`` shows whether it was chosen."""
    flag(group, "--checkpoint", "best by validation, or newest", "best", choices=("best", "newest"), default=default)


def add_model(group: Group) -> None:
    """The model of a run that was made in Python."""
    flag(
        group,
        "--model",
        "class or function that makes the model of a RUN from Python; modules in the current directory are found",
        "none",
        type=module_callable,
        metavar="PACKAGE.MODULE:CALLABLE",
    )


def add_tasks(group: Group) -> None:
    """The tasks to evaluate runs on."""
    flag(group, "--tasks", "number of tasks", type=task_count, default=600)
    *splits, last = dict.fromkeys(split for family in FAMILIES.values() for split in family.splits)
    flag(group, "--split", f"{', '.join(splits)} or {last}", default="test")
    flag(group, "--ways", "classes a task", "as in training", type=task_count)
    flag(group, "--shots", "support points, a class or task", "as in training", type=point_count)
    flag(group, "--queries", "query points, a class or task", "as in training", type=point_count)
    flag(group, "--seed", "of the tasks", "as in training", type=seed)
    add_data_root(group)
    for name in ("splits", "on_broken"):
        each = flagged()[name]
        named = replace(each.flag, meaning=f"for images: {each.meaning('images')}")
        each._replace(flag=named).add(group, "as in training", None)
    flag(
        group,
        "--within-alphabet",
        "for omniglot: draw the characters of each task from one alphabet, or with --no-within-alphabet from all",
        "as in training",
        action=argparse.BooleanOptionalAction,
    )


def add_metric(group: Group) -> None:
    """What an evaluation measures."""
    names = ", ".join(METRICS)
    flag(
        group,
        "--metric",
        f"{names}, or PACKAGE.MODULE:CALLABLE, a function (predictions, targets) -> number of one task",
        "accuracy of classes, else the loss",
        type=metric,
        metavar="NAME",
    )


def add_steps(group: Group) -> None:
    """How long to adapt in an evaluation."""
    flag(
        group,
        "--steps",
        "numbers of adaptation steps",
        "0,1,5,10",
        type=counts(step_count),
        default=(0, 1, 5, 10),
        metavar="J,J,...",
    )


def add_adaptation(group: Group) -> None:
    """How the learners of runs adapt in an evaluation, where it is not as in training."""
    add_steps(group)
    flag(
        group,
        "--norm",
        "statistics that normalise queries: of the query set (batch), of the task's support set (support), or the "
        "model's running ones (frozen)",
        "as in training",
        choices=NORMS,
    )
    flag(group, "--inner-lr", "inner step size", "as in training", type=number)


def add_results(group: Group) -> None:
    """What an evaluation prints and writes."""
    switch(group, "--json", "print one JSON object and nothing else")
    switch(group, "--per-task", "with --json, also every task's value")
    flag(group, "--csv", "write every task's value into this file", "none", type=path, metavar="FILE")
    flag(
        group,
        "--record",
        "write the result with its command, settings, versions and hardware into this JSON file, for metamom report",
        "none",
        type=path,
        metavar="FILE",
    )


def add_processes(group: Group) -> None:
    """Flags of commands that torchrun may start on several processes."""
    flag(
        group,
        "--server",
        "under torchrun, who aggregates: every process (replicated), or process 0 for all (rank0)",
        choices=SERVERS,
        default=SERVERS[0],
    )
    flag(
        group,
        "--timeout",
        "under torchrun, seconds to wait for another process before it is an error",
        f"{TIMEOUT:g}",
        type=number,
        default=TIMEOUT,
        metavar="SECONDS",
    )


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of a recipe that were given; the recipe knows the defaults of the others."""
    known = [each.name for each in declared(RecipeOptions) if each.option.flag is not None]
    return {name: value for name in known if (value := getattr(arguments, name, None)) is not None}


def run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `metamom.train` that have flags."""
    return {each.name: getattr(arguments, each.name) for each in declared(Options) if each.option.flag is not None}
