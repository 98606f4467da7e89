"""What stands in the members of samples, for many at once, compiled by Numba, without the GIL.

The way that reader.py and target.py go for one sample, for those that are as `convert` writes them:
tar headers with the right name and size, targets in the exact form of our own JSON. What is not is
only told apart here, and read again by those files, which say what is wrong, or accept it.
"""

from __future__ import annotations

import numpy as np

from mbv3dist.data.compiled import compiled
from mbv3dist.data.picture_header import memory

_BLOCK = 512
_NAME, _SIZE, _SIZE_DIGITS = 0, 124, 11  # places in a tar header
_KEY_DIGITS = 9
_MAX_DIGITS, _MAX_FRACTION = 15, 22  # of numbers that a double division reads exactly
_WIDTH, _HEIGHT, _BOXES, _LABELS, _DIFFICULT, _END = (
    np.frombuffer(text, np.uint8)
    for text in (b'{"width":', b',"height":', b',"boxes":[', b'],"labels":[', b'],"difficult":[',
                 b"]}")
)  # fmt: skip
_POWERS = np.array([10.0**n for n in range(_MAX_FRACTION + 1)])


@compiled
def check_headers(
    addresses: np.ndarray,
    sizes: np.ndarray,
    keys: np.ndarray,
    extensions: np.ndarray,
    good: np.ndarray,
) -> int:
    """Compare tar headers with what the index says.

    Args:
        addresses: int64 [n, 2], of the members' first bytes, behind their headers.
        sizes: int64 [n, 2], the members' sizes.
        keys: int64 [n].
        extensions: uint8 [n, 2, 8], zeros behind.
        good: bool [n], written.

    Returns:
        How many are not good.
    """
    bad = 0
    for n in range(len(keys)):
        good[n] = True
        for member in range(2):
            header = memory(addresses[n, member] - _BLOCK, _BLOCK)
            if not (
                _has_name(header, keys[n], extensions[n, member])
                and _has_size(header, sizes[n, member])
            ):
                good[n] = False
        bad += not good[n]
    return bad


@compiled
def _has_name(header: np.ndarray, key: int, extension: np.ndarray) -> bool:
    digits = _KEY_DIGITS
    while key >= 10**digits:
        digits += 1
    for place in range(digits - 1, -1, -1):
        if header[place] != 0x30 + key % 10:
            return False
        key //= 10
    if header[digits] != 0x2E:
        return False
    for place in range(len(extension)):
        if header[digits + 1 + place] != extension[place]:
            return False
        if extension[place] == 0:
            return True
    return False


@compiled
def _has_size(header: np.ndarray, size: int) -> bool:
    for place in range(_SIZE_DIGITS - 1, -1, -1):
        if header[_SIZE + place] != 0x30 + size % 8:
            return False
        size //= 8
    return size == 0


@compiled
def parse_classes(
    addresses: np.ndarray, sizes: np.ndarray, num_classes: int, labels: np.ndarray
) -> int:
    """Read class numbers, int64 [n]; -1 where `parse_target` shall look: returns how many."""
    odd = 0
    for n in range(len(addresses)):
        text = memory(addresses[n], sizes[n])
        value = 0
        for digit in text:
            if digit < 0x30 or digit > 0x39 or len(text) > 9:
                value = num_classes
                break
            value = 10 * value + np.int64(digit) - 0x30
        if len(text) == 0 or value >= num_classes:
            value = -1
            odd += 1
        labels[n] = value
    return odd


@compiled
def parse_boxes(
    addresses: np.ndarray,
    lengths: np.ndarray,
    num_classes: int,
    starts: np.ndarray,
    sizes: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    difficult: np.ndarray,
    odd: np.ndarray,
) -> int:
    """Read the JSON of detection targets, after each other.

    Args:
        addresses: int64 [n], of the JSON's first bytes.
        lengths: int64 [n], bytes.
        num_classes: Classes there are.
        starts: int64 [n + 1], written: where each sample's boxes start.
        sizes: int32 [n, 2], written: width and height that the target states.
        boxes: float32 [T, 4], written; T is lengths.sum() / 8 at least, more than there can be.
        labels: int64 [T], written.
        difficult: bool [T], written.
        odd: bool [n], written: what `target.parse_target` shall look at; it has no boxes here.

    Returns:
        How many are odd.
    """
    num_odd = 0
    starts[0] = 0
    for n in range(len(addresses)):
        first = starts[n]
        text = memory(addresses[n], lengths[n])
        count = _parse(
            text, num_classes, sizes[n], boxes[first:], labels[first:], difficult[first:]
        )
        odd[n] = count < 0
        num_odd += count < 0
        starts[n + 1] = first + max(count, 0)
    return num_odd


@compiled
def _parse(
    text: np.ndarray,
    num_classes: int,
    size: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    difficult: np.ndarray,
) -> int:
    """Return the number of boxes of one target, or -1: not in our form, or not right."""
    place = _skip(text, 0, _WIDTH)
    width, place = _whole(text, place)
    place = _skip(text, place, _HEIGHT)
    height, place = _whole(text, place)
    place = _skip(text, place, _BOXES)
    if place < 0 or not (0 < width < 2**31 and 0 < height < 2**31):
        return -1
    size[0], size[1] = width, height
    count = 0
    while place >= 0 and place < len(text) and text[place] == 0x5B:  # [
        for corner in range(4):
            value, place = _number(text, place + 1)
            if place < 0 or place >= len(text) or text[place] != (0x5D if corner == 3 else 0x2C):
                return -1
            boxes[count, corner] = np.float32(value)
        box = boxes[count]
        if not (box[2] >= box[0] and box[3] >= box[1]):
            return -1
        count += 1
        place += 1
        if place < len(text) and text[place] == 0x2C:
            place += 1
            if place >= len(text) or text[place] != 0x5B:
                return -1
    place = _skip(text, place, _LABELS)
    for number in range(count):
        value, place = _item(text, place, number)
        if place < 0 or value >= num_classes:
            return -1
        labels[number] = value
    place = _skip(text, place, _DIFFICULT)
    for number in range(count):
        value, place = _item(text, place, number)
        if place < 0 or value > 1:
            return -1
        difficult[number] = value == 1
    place = _skip(text, place, _END)
    return count if place == len(text) else -1


@compiled
def _skip(text: np.ndarray, place: int, expected: np.ndarray) -> int:
    """Return the place behind an expected text, or -1."""
    if place < 0 or place + len(expected) > len(text):
        return -1
    for offset in range(len(expected)):
        if text[place + offset] != expected[offset]:
            return -1
    return place + len(expected)


@compiled
def _item(text: np.ndarray, place: int, number: int) -> tuple[int, int]:
    """Return an integer of a list, and the place behind it or -1; a comma before all but one."""
    if number > 0:
        if place < 0 or place >= len(text) or text[place] != 0x2C:
            return 0, -1
        place += 1
    return _whole(text, place)


@compiled
def _whole(text: np.ndarray, place: int) -> tuple[int, int]:
    """Return an integer without sign, and the place behind it or -1."""
    if place < 0:
        return 0, -1
    value, first = 0, place
    while place < len(text) and 0x30 <= text[place] <= 0x39:
        value = 10 * value + np.int64(text[place]) - 0x30
        place += 1
    digits = place - first
    if digits == 0 or digits > _MAX_DIGITS or (digits > 1 and text[first] == 0x30):
        return 0, -1
    return int(value), place


@compiled
def _number(text: np.ndarray, place: int) -> tuple[float, int]:
    """Return a decimal number, as Python reads it to the last bit, and the place behind or -1."""
    negative = place < len(text) and text[place] == 0x2D
    if negative:
        place += 1
    first = place
    mantissa, place = _whole(text, place)
    if place < 0:
        return 0.0, -1
    fraction = 0
    if place < len(text) and text[place] == 0x2E:
        start = place + 1
        place = start
        while place < len(text) and 0x30 <= text[place] <= 0x39:
            if place - first > _MAX_DIGITS:
                return 0.0, -1
            mantissa = 10 * mantissa + np.int64(text[place]) - 0x30
            place += 1
        fraction = place - start
        if fraction == 0 or fraction > _MAX_FRACTION:
            return 0.0, -1
    # Both are exact doubles, so that their quotient is rounded once, as in reading the text.
    value = np.float64(mantissa) / _POWERS[fraction]
    return (-value if negative else value), place
