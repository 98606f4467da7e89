"""Post-process on a CPU: the best candidates of a picture, in order, until there are enough.

NMS goes through candidates from the best score down, and what it does with one depends on better
ones alone. So it can stop at the last detection that is wanted: of a quarter of a million scores
above the threshold in a picture (3234 anchors, 90 classes, a model that knows nothing yet) some two
thousand are looked at. One pass over the scores counts them per class and in a histogram of their
upper bits; from that follows a bound above which there are enough for a first try; they are
gathered, sorted and gone through; if that was too few, the next ones down to a lower bound are.

Per class only `topk_candidates` enter: along falling scores that is a count per class.

Shapes: B pictures, A anchors, C classes (without background), D = `max_detections`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

MOVED_APART = 1000  # up to this many candidates torchvision moves the classes apart
FIRST_TRY = 1024  # candidates at least, if there are as many
GROWTH = 4  # of the next try
SHIFT = 16  # a bin of the histogram holds scores that agree in the other bits
TOP = 0x3FFFFFFF  # bits of the largest float below 2: no score is above, infinity and NaN are
BINS = (TOP >> SHIFT) + 1

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    """Compile a function when it is first called, and keep the code if there is a place for it."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither beside this file nor in the user's cache can anything be written
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def choose(
    scores: Tensor,
    boxes: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the detections of a batch.

    Args:
        scores: float32 [B, A, C + 1], probabilities; column 0 is the background.
        boxes: float32 [B, A, 4], xyxy pixels, clipped.
        score_threshold: see `nms.postprocess`, like the others.
        nms_threshold: see there.
        topk_candidates: see there.
        max_detections: see there.

    Returns:
        The fields of `nms.Detections`.
    """
    batch = len(scores)
    found_boxes = torch.zeros(batch, max_detections, 4)
    found_scores = torch.zeros(batch, max_detections)
    found_labels = torch.full((batch, max_detections), -1, dtype=torch.int64)
    count = torch.zeros(batch, dtype=torch.int64)
    # Of floats from 0 up the bits are in the order of the values. Comparing them is comparing
    # integers, several at once, and NaN's are larger than those of any score.
    bits = scores.contiguous().view(torch.int32).numpy()
    threshold = np.float32(score_threshold)
    lowest = int(threshold.view(np.int32)) if threshold > 0 else int(threshold == 0) - 1
    for picture in range(batch):
        candidates = _Candidates(bits[picture], lowest, topk_candidates)
        count[picture] = _choose_one(
            candidates,
            boxes[picture].contiguous().numpy(),
            nms_threshold,
            (found_boxes[picture].numpy(), found_scores[picture].numpy().view(np.int32)),
            found_labels[picture].numpy(),
        )
    return found_boxes, found_scores, found_labels, count


class _Candidates:
    """The candidates of a picture, in order.

    A candidate is one int64: TOP less the score's bits, then class * A + anchor in 32 bits. Sorted,
    they are in the order that the docstring of `nms.py` defines.

    Attributes:
        number: how many there are.
        num_anchors: A.
        num_classes: C.
    """

    def __init__(self, bits: np.ndarray, lowest: int, most_per_class: int):
        """Count those of `bits`, int32 [A, C + 1], that are above `lowest`."""
        self.num_anchors, num_columns = bits.shape
        self.num_classes = num_columns - 1
        self._bits, self._lowest, self._most = bits, lowest, most_per_class
        self._histogram = np.zeros(BINS, np.int32)
        per_class = np.zeros(num_columns, np.int32)
        self._keys = np.empty(FIRST_TRY, np.int64)
        self._above = gather(bits, lowest, TOP, self._keys, self._histogram, per_class)
        self.number = int(np.minimum(per_class[1:], most_per_class).sum())

    def parts(self) -> Iterator[np.ndarray]:
        """Yield all candidates in sorted parts."""
        taken = np.zeros(self.num_classes, np.int32)
        left = self.number
        for keys in self._sorted_parts():
            length = limit(keys, self.num_anchors, self._most, taken)
            yield keys[:length]
            left -= length
            if not left:
                return

    def _sorted_parts(self) -> Iterator[np.ndarray]:
        """Yield all scores above the threshold in sorted parts."""
        if self._above <= len(self._keys):
            keys = self._keys[: self._above]
            keys.sort()
            yield keys
            return
        at_least = self._histogram[::-1].cumsum()  # scores in the uppermost 1, 2, ... bins
        upper, done, wanted = TOP, 0, FIRST_TRY
        unused = np.zeros(self.num_classes + 1, np.int32)
        while done < self._above:
            bins = int(np.searchsorted(at_least, min(done + wanted, self._above))) + 1
            lower = max(((BINS - bins) << SHIFT) - 1, self._lowest)
            keys = np.empty(int(at_least[bins - 1]) - done, np.int64)
            number = gather(self._bits, lower, upper, keys, self._histogram, unused)
            assert number == len(keys)
            keys.sort()
            yield keys
            done += number
            upper, wanted = lower, wanted * GROWTH


def _choose_one(
    candidates: _Candidates,
    boxes: np.ndarray,
    nms_threshold: float,
    found: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
) -> int:
    """Write the detections of one picture and return how many they are."""
    moved = np.empty((len(labels), 5), np.float32)
    links = np.full(len(labels) + candidates.num_classes, -1, np.int32)
    state = (candidates.num_anchors, boxes, nms_threshold)
    if candidates.number > MOVED_APART:
        count = 0
        for keys in candidates.parts():
            count = suppress(keys, *state, np.float32(0), count, moved, links, *found, labels)
            if count == len(labels):
                break
        return count
    if not candidates.number:
        return 0
    keys = np.concatenate(list(candidates.parts()))
    anchors = (keys & 0xFFFFFFFF) % candidates.num_anchors
    apart = np.float32(boxes[anchors].max() + np.float32(1))  # NaN if there is one
    return suppress(keys, *state, apart, 0, moved, links, *found, labels)


@_compiled
def gather(
    bits: np.ndarray,
    lower: int,
    upper: int,
    keys: np.ndarray,
    histogram: np.ndarray,
    per_class: np.ndarray,
) -> int:
    """Return how many scores are above `lower` and up to `upper`, and store the first as keys.

    Args:
        bits: int32 [A, C + 1], of scores; column 0 is left out.
        lower: int.
        upper: int.
        keys: int64 [any]; as many as there is room for.
        histogram: int32 [BINS], added to.
        per_class: int32 [C + 1], added to.
    """
    num_anchors, num_columns = bits.shape
    number = 0
    for anchor in range(num_anchors):
        row = bits[anchor]
        hits = 0
        for column in range(1, num_columns):
            hit = int((row[column] > lower) & (row[column] <= upper))
            hits += hit
            per_class[column] += hit
        if hits == 0:
            continue
        for column in range(1, num_columns):
            value = row[column]
            if value > lower and value <= upper:
                histogram[value >> SHIFT] += 1
                if number < len(keys):
                    better = np.int64(TOP - value) << 32
                    keys[number] = better + (column - 1) * num_anchors + anchor
                number += 1
    return number


@_compiled
def limit(keys: np.ndarray, num_anchors: int, most: int, taken: np.ndarray) -> int:
    """Move those keys to the front that are among the first `most` of their class.

    Args:
        keys: int64 [any], sorted; changed.
        num_anchors: A.
        most: per class.
        taken: int32 [C], how many of each class came before; changed.

    Returns:
        How many they are.
    """
    number = 0
    for key in keys:
        label = (key & 0xFFFFFFFF) // num_anchors
        if taken[label] < most:
            taken[label] += 1
            keys[number] = key
            number += 1
    return number


@_compiled
def suppress(
    keys: np.ndarray,
    num_anchors: int,
    boxes: np.ndarray,
    nms_threshold: float,
    apart: np.float32,
    count: int,
    moved: np.ndarray,
    links: np.ndarray,
    found_boxes: np.ndarray,
    found_scores: np.ndarray,
    found_labels: np.ndarray,
) -> int:
    """Go through sorted candidates and write those that are kept, until there are D.

    Overlaps are computed as torchvision's kernel for CPUs does: all in float32, compared with the
    threshold in float64.

    Args:
        keys: int64 [any].
        num_anchors: A.
        boxes: float32 [A, 4].
        nms_threshold: float.
        apart: float32, what a class is moved away from the one before it.
        count: detections so far.
        moved: float32 [D, 5], their boxes, moved apart, and areas; changed.
        links: int32 [D + C], the last detection of each class after D, and before each detection
            the one of the same class before it; changed.
        found_boxes: float32 [D, 4]; changed.
        found_scores: int32 [D], bits; changed.
        found_labels: int64 [D]; changed.

    Returns:
        Detections now.
    """
    wanted = len(found_labels)
    zero = np.float32(0)
    for key in keys:
        if count == wanted:
            break
        label = (key & 0xFFFFFFFF) // num_anchors
        anchor = (key & 0xFFFFFFFF) % num_anchors
        away = np.float32(label + 1) * apart
        x1, y1 = boxes[anchor, 0] + away, boxes[anchor, 1] + away
        x2, y2 = boxes[anchor, 2] + away, boxes[anchor, 3] + away
        area = (x2 - x1) * (y2 - y1)
        other = links[wanted + label]
        while other >= 0:
            width = min(moved[other, 2], x2) - max(moved[other, 0], x1)
            height = min(moved[other, 3], y2) - max(moved[other, 1], y1)
            if width > zero and height > zero:
                both = width * height
                if both / (moved[other, 4] + area - both) > nms_threshold:
                    break
            other = links[other]
        if other >= 0:
            continue
        moved[count, 0], moved[count, 1], moved[count, 2], moved[count, 3] = x1, y1, x2, y2
        moved[count, 4] = area
        links[count], links[wanted + label] = links[wanted + label], count
        for side in range(4):
            found_boxes[count, side] = boxes[anchor, side]
        found_scores[count] = TOP - (key >> 32)
        found_labels[count] = label
        count += 1
    return count
