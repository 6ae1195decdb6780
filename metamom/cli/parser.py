"""The parser of the ``metamom`` command: argparse with one-line errors, suggestions and examples."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

from metamom.cli.spec_table import spec_table
from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import shown

WIDTH = 100  # columns of the help, at most


class Parser(argparse.ArgumentParser):
    """A parser that answers bad input with one line and exit status 2.

    Args:
        specs: whether the help shows the table of bias operators.
        examples: command lines that end the help.
        **settings: of `argparse.ArgumentParser`.
    """

    def __init__(self, *, specs: bool = False, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, formatter_class=_Formatter)
        self._specs, self._examples, self._words = specs, examples, list[str]()
        self.elsewhere: dict[str, str] = {}  # advice for flags that this command does not have, by flag

    def format_help(self) -> str:
        """The help; the table of operators is read only when it is shown."""
        parts = [spec_table()] if self._specs else []
        if self._examples:
            parts.append("\n  ".join(["examples:", *self._examples]))
        self.epilog = "\n\n".join(parts) or None
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and refuse what is left over: the parser of the command knows which flags come close."""
        self._words = list(args or ())
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(map(_short, rest))}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        if not message.startswith("argument ") and (unknown := self._unknown()):
            if not message.startswith("unrecognized"):  # what is missing may be what is misspelled
                message = f"unrecognized arguments: {' '.join(map(_short, unknown))}"
            advice = dict.fromkeys(self.elsewhere[flag] for flag in unknown if flag in self.elsewhere)
            others = [flag for flag in unknown if flag not in self.elsewhere]
            message += "".join(f"; {each}" for each in advice) + did_you_mean(others, self._option_string_actions)
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.exit(2, f"{self.prog}: error: {line}\n")

    def _unknown(self) -> list[str]:
        """The words that look like flags of this parser, but are not."""
        flags = []
        for word in self._words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # the rest is no flag, or belongs to a command
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                flags.append(name)
        return flags

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action,
                f"invalid choice: {shown(str(value))} (choose from {', '.join(choices)})"
                + did_you_mean([str(value)], choices),
            )


def _short(word: str) -> str:
    return word if len(word) <= 60 else shown(word)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """At most `WIDTH` columns."""

    def __init__(self, prog: str, **settings: Any) -> None:
        width = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, **{"max_help_position": 28, "width": width, **settings})
