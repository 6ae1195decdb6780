"""Suggest a known word for one that is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(words: Iterable[str], known: Iterable[str]) -> str:
    """``; did you mean A?``, or nothing if no known word comes close to one of ``words``."""
    names = {each.lstrip("-"): each for each in known if len(each) > 2}
    close = []
    for word in words:
        name = word.lstrip("-").replace("_", "-")[:60]
        longer = [each for each in names if len(name) > 1 and each.startswith(name)]
        close += [names[each] for each in difflib.get_close_matches(name, names, n=1) or longer[:1]]
    return f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""
