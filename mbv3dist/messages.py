"""Values of unknown origin in messages: one line, printable, short.

What stands in a file that somebody else has written may hold line breaks, what a terminal obeys, or
megabytes; a message names it all the same.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

_LIMIT = 100  # characters of a value
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shown(value: Any) -> str:
    """Return what ``repr`` gives, cut in the middle if it is long, whatever the value's size."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, _LIMIT, _LIMIT, _LIMIT
    try:
        return short.repr(value)
    except ValueError:  # a number of thousands of digits
        return "a huge number"


def one_line(text: str, limit: int = 300) -> str:
    """Return a text on one line, without what a terminal obeys, cut at a length."""
    cut = " ".join(text[: 4 * limit].split())[:limit]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in cut)


def has_control(text: str) -> bool:
    """Return whether a name holds control characters, line breaks or half characters."""
    return _CONTROL.search(text) is not None
