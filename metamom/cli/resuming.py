"""What a resumed run takes from its directory, and the command line that resumes an interrupted one."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from metamom.common.options import declared
from metamom.experiments.families import FAMILIES
from metamom.experiments.options import RecipeOptions


def kept_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a resumed run's data and network that need not be given again.

    These are the ones that only some families have. Others must be repeated, since their defaults are settings too.
    """
    if not arguments.resume or arguments.run_dir is None or not (Path(arguments.run_dir) / "config.json").is_file():
        return {}
    from metamom.training.directory import read_config

    settings = read_config(arguments.run_dir)["settings"]
    recorded = settings.get("base", settings)  # of a comparison
    if not isinstance(recorded, dict) or recorded.get("task") != arguments.task:
        return {}  # which is refused later
    own = [each.name for each in declared(RecipeOptions) if each.option.own and each.option.flag is not None]
    known = [name for name in own if name in FAMILIES[arguments.task].options]
    return {name: recorded[name] for name in known if recorded.get(name) is not None}


def continued(arguments: argparse.Namespace, run_dir: str) -> str:
    """The command line that continues an interrupted run or comparison."""
    words = ["metamom", *arguments.words]
    words += [] if arguments.run_dir else ["--run-dir", run_dir]
    return shlex.join([*words, *([] if arguments.resume else ["--resume"])])
