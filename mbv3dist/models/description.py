"""Checks of a `model.json` that somebody else has written: types, ranges, how large the model is.

What passes can be relied on by everything that reads a description, and is no larger in memory
than its file lets expect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mbv3dist.messages import has_control, shown

_MAX_LIST = 100  # numbers in a list, such as the scales of anchors
_MAX_NUMBER = 1_000_000_000  # of anything in a description
_MAX_CHANNELS = 2500  # that feed the last layers of the largest architecture at width 1, all maps
_MAX_WEIGHTS = 6_000_000  # of the rest of it


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: with the reason, if it is none.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def check_fields(kind: type, values: Mapping[str, Any], *, source: str) -> None:
    """Check that values are of the types that a dataclass gives its fields.

    Args:
        kind: The dataclass.
        values: By the names of its fields; some may be missing.
        source: Where they come from, for messages.

    Raises:
        ValueError: naming the field.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(
                f"{source}: {name} is {shown(value)}, not {_words(hints[name])}; copy the file "
                "again"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, tuple) or not all(_fits(item, arguments[0]) for item in value):
            return False
        if arguments[-1] is Ellipsis:
            return arguments[0] is str or len(value) <= _MAX_LIST
        return len(arguments) == len(value)
    if origin is dict:
        return isinstance(value, dict)
    if arguments:  # a union with None
        return any(_fits(value, choice) for choice in arguments)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= _MAX_NUMBER  # false for nan
    if hint is int:
        return type(value) is int and 0 <= value <= _MAX_NUMBER
    if hint is str:
        return isinstance(value, str) and not has_control(value)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} times "
        return f"a list of {count}{_words(arguments[0])}"
    names = {
        float: "a finite number",
        int: "a whole number",
        str: "a text without control characters",
    }
    return names.get(hint, "true or false" if hint is bool else "an object")


def check_size(
    weights: Path, *, width: float, num_classes: int, input_size: int, anchors_per_cell: int
) -> None:
    """Refuse a description of a model that is far larger than its weights, before it is built.

    Args:
        weights: File of the weights, beside the description.
        width: Channel multiplier.
        num_classes: Without background.
        input_size: Side of the canvas in pixels.
        anchors_per_cell: 0 for classifiers.

    Raises:
        ValueError: naming both sizes.
    """
    per_cell = max(anchors_per_cell, 1)
    last = _MAX_CHANNELS * max(width, 1.0) * per_cell * (num_classes + 5)
    anchors = 4 * 1.4 * math.ceil(input_size / 16) ** 2 * anchors_per_cell
    expected = int(4 * (_MAX_WEIGHTS * max(width, 1.0) ** 2 + last + anchors))
    found = weights.stat().st_size
    if expected > max(2**30, 16 * found):
        raise ValueError(
            f"{weights}: has {found >> 20} MiB and the description beside it is of a model of up "
            f"to {expected >> 20} MiB; they do not belong together: copy both again"
        )
