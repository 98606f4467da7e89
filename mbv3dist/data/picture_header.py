"""What a picture's header says, for many files at once, compiled by Numba, without the GIL.

Only what decides who decodes it: its size, and whether it is plain: a JPEG of three 8-bit YCbCr
components, upright and whole to its end mark, or raw pixels as `convert --format raw` writes them.
All else goes to decode.Picture, which knows every case, or says what is wrong with it.
(ITU-T T.81 annex B; EXIF 2.32 section 4.6 for orientation; NumPy's NEP 1 for raw pixels.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from mbv3dist.data.compiled import compiled

_SOF = 0xC0  # and C1, C2: Huffman-coded frames of 8 or 12 bits, C2 progressive
_SOI, _EOI, _SOS, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE1, 0xEE
_EXIF = np.frombuffer(b"Exif\0\0", np.uint8)
_XMP = np.frombuffer(b"http://ns.adobe.com/xap/1.0/\0", np.uint8)
_ADOBE = np.frombuffer(b"Adobe", np.uint8)
_ORIENTATION = np.frombuffer(b"Orientation", np.uint8)
_RAW = np.frombuffer(b"\x93NUMPY\x01\x00", np.uint8)
_RAW_HEADER = np.frombuffer(b"{'descr': '|u1', 'fortran_order': False, 'shape': (", np.uint8)
_COMMA = np.frombuffer(b", ", np.uint8)
_RAW_END = np.frombuffer(b", 3), }", np.uint8)
_ORIENTATION_TAG, _SHORT = 0x0112, 3


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """Return an address as a pointer to bytes."""
    signature = types.CPointer(types.uint8)(types.int64)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return signature, generate


@compiled
def memory(address: int, num_bytes: int) -> np.ndarray:
    """Return bytes in memory as an array, uint8 [num_bytes]; for compiled code only."""
    array: np.ndarray = carray(_pointer(address), (num_bytes,))
    return array


@compiled
def scan_headers(
    addresses: np.ndarray,
    lengths: np.ndarray,
    sizes: np.ndarray,
    plain: np.ndarray,
    raw_starts: np.ndarray,
    max_pixels: int,
) -> int:
    """Read the headers of n files in memory.

    Args:
        addresses: int64 [n], of their first bytes.
        lengths: int64 [n], their bytes.
        sizes: int32 [n, 2], written: width and height in pixels where plain or raw.
        plain: bool [n], written: whether it is a plain JPEG.
        raw_starts: int64 [n], written: where raw pixels begin, 0 where there are none.
        max_pixels: A picture of more is neither.

    Returns:
        How many are neither.
    """
    others = 0
    for n in range(len(addresses)):
        data = memory(addresses[n], lengths[n])
        width, height = plain_size(data)
        start = 0
        if width == 0:
            width, height, start = _scan_raw(data)
        if width == 0 or width * height > max_pixels:
            width, height, start = 0, 0, 0
            others += 1
        plain[n], raw_starts[n] = width > 0 and start == 0, start
        sizes[n, 0], sizes[n, 1] = width, height
    return others


@compiled
def plain_size(data: np.ndarray) -> tuple[int, int]:
    """Return width and height of a plain JPEG, else zeros."""
    none = (0, 0)
    end = len(data)
    if end < 4 or data[0] != 0xFF or data[1] != _SOI:
        return none
    if data[end - 2] != 0xFF or data[end - 1] != _EOI:
        return none
    width, height = 0, 0
    place = 2
    while place + 4 <= end:
        if data[place] != 0xFF:
            return none
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        length = np.int64(data[place + 2]) << 8 | np.int64(data[place + 3])
        start, stop = place + 4, place + 2 + length
        if length < 2 or stop > end or marker == _EOI or 0xD0 <= marker <= _SOI or marker <= 1:
            return none
        if marker == _SOS:
            return width, height
        if _SOF <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            # Components 1, 2, 3 are YCbCr by convention; others may be stored as RGB.
            if marker > 0xC2 or length < 17 or data[start] != 8 or data[start + 5] != 3:
                return none
            if data[start + 6] != 1 or data[start + 9] != 2 or data[start + 12] != 3:
                return none
            height = np.int64(data[start + 1]) << 8 | np.int64(data[start + 2])
            width = np.int64(data[start + 3]) << 8 | np.int64(data[start + 4])
            if width == 0 or height == 0:
                return none
        elif marker == _APP14 and _starts(data[start:stop], _ADOBE):
            if length < 14 or data[start + 11] != 1:
                return none
        elif marker == _APP1 and _starts(data[start:stop], _EXIF):
            if not _is_upright(data[start + 6 : stop]):
                return none
        elif (
            marker == _APP1
            and _starts(data[start:stop], _XMP)
            and _contains(data[start:stop], _ORIENTATION)
        ):
            return none
        place = stop
    return none


@compiled
def _starts(data: np.ndarray, name: np.ndarray) -> bool:
    if len(data) < len(name):
        return False
    same = 0
    while same < len(name) and data[same] == name[same]:
        same += 1
    return same == len(name)


@compiled
def _contains(data: np.ndarray, name: np.ndarray) -> bool:
    for place in range(len(data) - len(name) + 1):
        if data[place] == name[0] and _starts(data[place:], name):
            return True
    return False


@compiled
def _number(data: np.ndarray, place: int, count: int, big: bool) -> int:
    value = 0
    for offset in range(count):
        value = value << 8 | np.int64(data[place + (offset if big else count - 1 - offset)])
    return value


@compiled
def _is_upright(tiff: np.ndarray) -> bool:
    """Whether EXIF's first directory says that rows and columns are as stored, beyond doubt."""
    if len(tiff) < 14:
        return False
    big = tiff[0] == 0x4D and tiff[1] == 0x4D
    if not big and not (tiff[0] == 0x49 and tiff[1] == 0x49):
        return False
    if _number(tiff, 2, 2, big) != 42:
        return False
    start = _number(tiff, 4, 4, big)
    if start + 2 > len(tiff):
        return False
    count = _number(tiff, start, 2, big)
    if start + 2 + 12 * count > len(tiff):
        return False
    for entry in range(count):
        place = start + 2 + 12 * entry
        if _number(tiff, place, 2, big) == _ORIENTATION_TAG:
            is_short = _number(tiff, place + 2, 2, big) == _SHORT
            is_one = _number(tiff, place + 4, 4, big) == 1
            return bool(is_short and is_one and _number(tiff, place + 8, 2, big) == 1)
    return True


@compiled
def _scan_raw(data: np.ndarray) -> tuple[int, int, int]:
    """Return width, height and where pixels begin of a raw picture, else zeros."""
    none = (0, 0, 0)
    if len(data) < 10 or not _starts(data, _RAW):
        return none
    start = 10 + _number(data, 8, 2, False)
    place = 10 + len(_RAW_HEADER)
    if start > len(data) or place > start or not _starts(data[10:start], _RAW_HEADER):
        return none
    height, place = _digits(data, place, start)
    if not _starts(data[place:start], _COMMA):
        return none
    width, place = _digits(data, place + len(_COMMA), start)
    if not _starts(data[place:start], _RAW_END):
        return none
    for rest in range(place + len(_RAW_END), start - 1):
        if data[rest] != 0x20:
            return none
    if height == 0 or width == 0 or len(data) - start != 3 * width * height:
        return none
    return width, height, start


@compiled
def _digits(data: np.ndarray, place: int, end: int) -> tuple[int, int]:
    """Return a number of up to six digits, and where it ends."""
    value = 0
    first = place
    while place < end and place < first + 6 and 0x30 <= data[place] <= 0x39:
        value = 10 * value + np.int64(data[place]) - 0x30
        place += 1
    return value, place
