"""Pages of the command line, from its parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from metamom.cli.app import parser
from metamom.cli.parser import Parser

INDEX = """# The command line

`metamom COMMAND --help` shows the same in a terminal. Flags can also be in a file: `--config FILE`.

| command | what it does |
|---|---|
{commands}

## Exit status

| status | meaning |
|---|---|
| 0 | done |
| 1 | training diverged |
| 2 | bad input; one line on standard error says what is wrong |
| 3 | another process of the same run is gone or hangs |
| 130, 143 | interrupted by Ctrl-C or SIGTERM; the run is saved, and `--resume` continues it |

## SPEC, a bias operator

```text
{specs}
```
"""


def leaves(root: argparse.ArgumentParser, words: tuple[str, ...] = (), text: str = "") -> Iterator[tuple]:
    """The commands that do something: their words, parser and help."""
    nested = [action for action in root._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield words, root, text
    for action in nested:
        helps = {choice.dest: choice.help for choice in action._choices_actions}
        for name, child in action.choices.items():
            yield from leaves(child, (*words, name), ", ".join(filter(None, (text, helps.get(name)))))


def write_pages(folder: Path) -> list[str]:
    """An index, and a page for each command; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{'-'.join(words)}.md": (words, leaf, text) for words, leaf, text in leaves(parser())}
    for name, (words, leaf, text) in pages.items():
        (folder / name).write_text(page(words, leaf, text), encoding="utf-8")
    rows = [f"| [`metamom {' '.join(words)}`]({name}) | {text} |" for name, (words, _, text) in pages.items()]
    (folder / "index.md").write_text(INDEX.format(commands="\n".join(rows), specs=specs()), encoding="utf-8")
    return ["index.md", *pages]


def specs() -> str:
    """The table of operators, as in the help."""
    from metamom.cli.spec_table import spec_table

    return spec_table()


def page(words: tuple[str, ...], leaf: Parser, text: str) -> str:
    """One command: usage, examples, and a list of flags for each group."""
    usage = re.sub(r"\s*\n\s*", "\n", leaf.format_usage().removeprefix("usage: ").strip())
    lines = [f"# metamom {' '.join(words)}", "", f"{text[:1].upper()}{text[1:]}.", "", "```text", usage, "```", ""]
    if leaf._examples:
        lines += ["## Examples", "", "```bash", *leaf._examples, "```", ""]
    for group in leaf._action_groups:
        actions = [a for a in group._group_actions if a.help is not argparse.SUPPRESS and a.dest != "help"]
        if not actions:
            continue
        lines += [f"## {(group.title or '').capitalize()}", ""]
        for action in actions:
            lines += definition(leaf, action)
    if leaf._specs:
        lines += ["[SPEC](index.md#spec-a-bias-operator) is a bias operator.", ""]
    return "\n".join(lines)


def definition(leaf: Parser, action: argparse.Action) -> list[str]:
    """A flag, what it does, and its default."""
    formatter = leaf._get_formatter()
    shown = formatter._format_action_invocation(action)
    text = formatter._expand_help(action) if action.help else ""
    found = re.fullmatch(r"(.*?)\s*\(default: (.*)\)", text, re.DOTALL)
    described = [prose(found[1] if found else text)]
    if found:
        described.append(f"*Default: {prose(found[2])}*")
    return [f"`{shown}`", f":   {'<br>'.join(described)}", ""]


def prose(text: str) -> str:
    """Help as Markdown: flags, files and variables as code, and nothing else as markup."""
    escaped = re.sub(r"([\\`*_<>\[\]|{}])", r"\\\1", text)
    return re.sub(r"(?<![\w\\-])(--[a-z][\w-]*|\$[A-Z\\_]+)", lambda m: f"`{m[1]}`".replace("\\", ""), escaped)
