"""What is known about a picture: the bytes of a ``.cls`` or ``.json`` member, parsed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbv3dist.data.idx import TARGET_EXTENSIONS

_MAX_SIDE = 2**31  # pixels
_NO_BOXES, _NO_LABELS, _NO_FLAGS = (
    np.zeros((0, 4), np.float32),
    np.zeros(0, np.int64),
    np.zeros(0, np.bool_),
)


@dataclass(frozen=True)
class Target:
    """What is known about one picture.

    Attributes:
        label: Class number, or -1 for detection.
        boxes: float32 [M, 4], xyxy pixels of the stored picture, 0-based, half-open.
        labels: int64 [M], class numbers without background.
        difficult: bool [M].
        width: Pixels of the stored picture; 0 for classification (unknown before decoding).
        height: Likewise.
    """

    label: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    width: int
    height: int


def parse_target(data: bytes | memoryview, task: str, *, num_classes: int | None = None) -> Target:
    """Parse the bytes of a ``.cls`` or ``.json`` member.

    Args:
        data: The member's bytes.
        task: ``classification`` (a class number in ASCII) or ``detection`` (JSON).
        num_classes: Classes there are; class numbers outside are refused, because on a GPU they
            would end in a device assert. None: any number is taken.

    Raises:
        ValueError: with the reason, if the bytes are no such target.
    """
    assert task in TARGET_EXTENSIONS
    target = _parse_class(data) if task == "classification" else _parse_boxes(data)
    if num_classes is not None:
        reason = class_problem(target, num_classes)
        if reason:
            raise ValueError(reason)
    return target


def class_problem(target: Target, num_classes: int) -> str:
    """Return which class number of a target is outside 0 to num_classes - 1, or empty."""
    numbers = target.labels.tolist() if target.label < 0 else [target.label]
    if not numbers or (min(numbers) >= 0 and max(numbers) < num_classes):
        return ""
    wrong = next(number for number in numbers if not 0 <= number < num_classes)
    return f"class number {wrong} for {num_classes} classes"


def _parse_class(data: bytes | memoryview) -> Target:
    text = bytes(data)
    if not text.isdigit() or len(text) > 9:
        raise ValueError(f"its .cls member is {text[:20]!r}, not a class number")
    return Target(
        label=int(text),
        boxes=_NO_BOXES,
        labels=_NO_LABELS,
        difficult=_NO_FLAGS,
        width=0,
        height=0,
    )


def _parse_boxes(data: bytes | memoryview) -> Target:
    try:
        value: dict[str, Any] = json.loads(bytes(data))
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            boxes = np.array(value["boxes"], dtype=np.float32).reshape(-1, 4)
        labels = np.array(value["labels"], dtype=np.int64)
        difficult = np.array(value["difficult"], dtype=np.bool_)
        width, height = value["width"], value["height"]
        # NumPy would cut 1.9 to 1 and read texts as numbers.
        if not all(type(number) is int for number in (width, height, *value["labels"])):
            raise TypeError
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"its .json member is no target ({type(error).__name__})") from error
    if not (labels.shape == difficult.shape == (len(boxes),)) or len(value["boxes"]) != len(boxes):
        raise ValueError("its .json member has boxes, labels and difficult of different lengths")
    if not (0 < width < _MAX_SIDE and 0 < height < _MAX_SIDE) or not np.isfinite(boxes).all():
        raise ValueError("its .json member has an impossible size or box")
    if not (boxes[:, 2:] >= boxes[:, :2]).all():
        raise ValueError("its .json member has a box whose corners are in the wrong order")
    return Target(-1, boxes, labels, difficult, width, height)
