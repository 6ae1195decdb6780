"""Write a page: one HTML file with everything in it, made by Bokeh."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from metamom.common.files import write_atomically
from metamom.experiments.report.contents import NO_SEED, Page, Section
from metamom.experiments.report.summary import POINTS

GENERATOR = "metamom report"  # marks a file as one that may be replaced
COMMANDS = 20  # of the runs, at most
ALL_POINTS = 9000  # of all curves, which keeps the file under 3 MB


def can_write_page() -> bool:
    """Whether Bokeh is installed."""
    return importlib.util.find_spec("bokeh") is not None


def write_page(path: str | Path, page: Page, *, reload_every: float | None = None) -> Path:
    """Write a page as one HTML file that needs no other file and no network.

    Args:
        path: of the file; its folder is created. A page that is there already is replaced.
        page: what it shows.
        reload_every: seconds, for a run under way: the open page reloads itself that often.

    Returns:
        The path.

    Raises:
        ValueError: if Bokeh is not installed, or if another file has that name.

    Example:
        >>> from metamom.experiments.families.family import ACCURACY
        >>> from metamom.experiments.report import Method, Page, Section, SeedRun, write_page
        >>> methods = (Method("momentum", (SeedRun(0, curve=((100, 0.71), (200, 0.84))),)),)
        >>> page = Page("My runs", (Section("Omniglot", ACCURACY, methods, target=0.8),))
        >>> write_page("runs/mine.html", page).name  # doctest: +SKIP
        'mine.html'
    """
    path = Path(path)
    if not can_write_page():
        raise ValueError("the page of a report needs Bokeh, which is not installed: pip install 'metamom[report]'.")
    check_own(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"the page needs a folder to be written to; {path.parent} is a file. Name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _html(page, reload_every).encode())
    return path


def check_own(path: Path) -> None:
    """Refuse to replace anything but a page of this command.

    Raises:
        ValueError: naming the file.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            if f'name="generator" content="{GENERATOR}"'.encode() in file.read(2000):
                return
    raise ValueError(f"{path} exists, and it is not a page of `{GENERATOR}`. Move it, or name another folder.")


def _html(page: Page, reload_every: float | None) -> str:
    from bokeh.document import Document
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from metamom.experiments.report.views import MOST, view

    lines = 2 * sum(min(len(section.methods), MOST) for section in page.sections)
    views = [view(section, max(20, min(POINTS, ALL_POINTS // max(1, lines)))) for section in page.sections]
    models: dict[str, Any] = {}
    for number, section in enumerate(views, 1):
        if section.switches is not None:
            models[f"s{number}-switches"] = section.switches
        for place, part in enumerate(section.parts, 1):
            part.id = f"s{number}-{place}"
            models[part.id] = part.model
    document = Document()
    with document.models.freeze():  # add_root would go through all models again for each of them, half of the time
        for model in models.values():
            document.add_root(model)
    script, divs = components(models) if models else ("", {})
    for number, section in enumerate(views, 1):
        section.switches = Markup(divs.get(f"s{number}-switches", ""))
        for part in section.parts:
            part.div = Markup(divs[part.id])
    template = resources.files("metamom.experiments.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    scripts = Resources(mode="inline", components=["bokeh", "bokeh-widgets", "bokeh-tables"]).render_js()
    html: str = environment.from_string(template).render(
        page=page,
        sections=views,
        generator=GENERATOR,
        reload_every=None if reload_every is None else f"{reload_every:g}",
        scripts=Markup(scripts),
        script=Markup(script),
        commands=_commands(page),
        facts=_facts(page),
    )
    return html


def command_line(environment: Mapping[str, Any]) -> str:
    """The command of a run as it was typed."""
    program, *arguments = environment.get("command") or [""]
    name = "metamom" if str(program).endswith(("__main__.py", "metamom")) else str(program)
    return shlex.join([name, *map(str, arguments)]) if name else ""


def _commands(page: Page) -> list[str]:
    commands = [line for line in dict.fromkeys(map(command_line, page.environments)) if line]
    more = len(commands) - COMMANDS
    return [*commands[:COMMANDS], f"and {more} more"] if more > 0 else commands


def _facts(page: Page) -> list[tuple[str, str]]:
    """What was asked for, versions, hardware and seeds, each with all the values that the runs have."""
    found = [
        (name, ", ".join(dict.fromkeys(value for each, value in page.facts if each == name)))
        for name in dict.fromkeys(name for name, _ in page.facts)
    ]
    names = {
        "metamom": "metamom", "torch": "PyTorch", "python": "Python", "numpy": "NumPy", "platform": "platform",
        "processor": "processor", "gpus": "GPUs", "threads": "threads",
    }  # fmt: skip
    for key, name in names.items():
        values = dict.fromkeys(_text(each[key]) for each in page.environments if key in each)
        if any(values):
            found.append((name, ", ".join(value for value in values if value)))
    found.append(("seeds", _seeds(page.sections)))
    return [(name, value) for name, value in found if value]


def _seeds(sections: tuple[Section, ...]) -> str:
    seeds = {str(run.seed) for section in sections for method in section.methods for run in method.runs}
    seeds.discard(NO_SEED)
    ordered = sorted(seeds, key=lambda seed: (0, int(seed), "") if seed.isdecimal() else (1, 0, seed))
    return ", ".join(ordered[:60]) + f" and {len(ordered) - 60} more" * (len(ordered) > 60)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
