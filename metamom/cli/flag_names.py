"""Errors of the library in the words of the command: flags instead of the arguments of Python."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

ALIASES = {"skip": "init_except", "root": "data_root"}  # arguments of the library that have another name as a flag
PHRASES: Mapping[str, tuple[tuple[str, str], ...]] = {  # by the flag that the command must have
    "splits": (
        (
            "splits={'train': [...], 'test': [...]}, or the path of a CSV file filename,label for each",
            "--splits DIR, with train.csv and test.csv of lines filename,label",
        ),
    ),
    "standardize": (
        ("normalize needs", "--standardize data needs"),
        ("leave normalize out, or pass a standard deviation of 1", "pass --standardize none"),
    ),
    "evaluate_every": (("pass validation= and evaluate_every= (--evaluate-every N)", "pass --evaluate-every N"),),
    "resume": (("(--resume, or resume=True)", "(--resume)"),),
    "image_size": (("a smaller image_size", "a smaller --image-size"),),
    "": (  # for every command; none has a flag for this limit
        (", or raise the limit if you trust the data: PIL.Image.MAX_IMAGE_PIXELS", ""),
    ),
}
QUOTES = r"""["']"""
NAME = r"(?<![^\s(])(?P<name>[a-z]+(?:_[a-z]+)*)"
LIST = r"""\[(?P<list>(?:"[^"]*"|'[^']*')(?:, (?:"[^"]*"|'[^']*'))*)\]"""
VALUE = rf"""(?:{LIST}|"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>-?\w+(?:\.\w+)*)(?![\w(\[]))"""
GIVEN = re.compile(rf"{NAME}=(?:{VALUE}|(?=[\s,.;)]))")
SUBJECT = re.compile(rf"^{NAME}(?= (?:must|knows|has|needs|is the)\b)")
# a name of one word may be the word itself, as in "workers are ..."
TWO_WORDS = re.compile(r"^(?P<name>[a-z]+(?:_[a-z]+)+)(?= (?:is|are|belongs|keeps|leaves|need)\b)")
# an argument of Python and, in parentheses, its flag, which are the same by now
TWICE = re.compile(r"(?P<flag>--[a-z-]+(?: [\w.:%-]+)?) \((?P=flag)\)")


def in_flags(message: str, arguments: argparse.Namespace) -> str:
    """An error's message with the command's flags for the arguments that it names.

    ``on_broken='skip'`` becomes ``--on-broken skip`` for a command that has this flag. Calls, such as
    ``metamom.load(RUN, model=learner)``, are left as they are.

    Args:
        message: of the library.
        arguments: the command's, with its parser as ``leaf``.
    """
    flags = {each.dest: max(each.option_strings, key=len) for each in arguments.leaf._actions if each.option_strings}
    for needed, pairs in PHRASES.items():
        for python, command in pairs if needed in ("", *flags) else ():
            message = message.replace(python, command)

    def flag(name: str) -> str | None:
        return flags.get(name) or flags.get(ALIASES.get(name, ""))

    def with_value(found: re.Match[str]) -> str:
        name = flag(found["name"])
        if name is None or found["bare"] in ("None", "False") or _in_a_call(message[: found.start()]):
            return found[0]
        if found["bare"] == "True":
            return name
        if found["list"] is not None:
            return f"{name} {re.sub(QUOTES, '', found['list']).replace(', ', ',')}"
        values = [found[kind] for kind in ("double", "single", "bare") if found[kind] is not None]
        return " ".join([name, *values])

    message = GIVEN.sub(with_value, message)
    for subject in (SUBJECT, TWO_WORDS):
        message = subject.sub(lambda found: flag(found["name"]) or found[0], message)
    return TWICE.sub(r"\g<flag>", message)


def _in_a_call(before: str) -> bool:
    """Whether the text ends within the parentheses of a call."""
    opened = []
    for at, letter in enumerate(before):
        if letter == "(":
            opened.append(at > 0 and (before[at - 1].isalnum() or before[at - 1] == "_"))
        elif letter == ")" and opened:
            opened.pop()
    return any(opened)
