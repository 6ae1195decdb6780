"""The type of a value, as an error names it."""

from __future__ import annotations

SPELLED_OUT = set("FHLMNRSX")  # letters that are said with a vowel first: an LSTM, an SGD


def named_type(value: object) -> str:
    """The value's type with its article: ``an int``, ``a list``, ``an LSTM``; a class is ``the class Net itself``."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    return with_article(type(value).__name__)


def with_article(name: str) -> str:
    """``a NAME`` or ``an NAME``, by how the name is said. Acronyms without a vowel are spelled out."""
    acronym = name[: next((i for i, letter in enumerate(name) if not letter.isupper()), len(name))]
    spelled = len(acronym) > 1 and acronym[0] in SPELLED_OUT and not set(acronym) & set("AEIOU")
    return f"an {name}" if name[:1].lower() in "aeio" or spelled else f"a {name}"
