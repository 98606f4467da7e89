"""Whether a JPEG's bytes can be kept, found from its structure alone, without decoding it.

libjpeg fails on damaged headers and tables, on markers out of place and on a file that ends too
early; what is wrong within entropy-coded data it decodes to something, with no more than a warning.
So a baseline file whose headers, tables and scan are in order up to the end marker decodes, and
looking at that costs a fiftieth of decoding. Here are the files that are sure to (ITU-T T.81,
annex B); of all others, such as progressive ones, decoding has to tell.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from operator import mul

import numpy as np

from mbv3dist.convert.metadata import is_upright

END_MARKER = b"\xff\xd9"
# In entropy-coded data 0xFF is followed by 0x00 or is a restart marker.
_STRAY_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_NOTHING = np.zeros(0, np.uint8)
_SOF0, _SOF1, _DHT, _EOI, _SOS, _DQT, _DRI = 0xC0, 0xC1, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD
_COM = 0xFE
_APPS = range(0xE0, 0xF0)
# Marker -> how the content begins, and its least length.
_KNOWN = {0xE0: (b"JFIF\x00", 14), 0xE2: (b"ICC_PROFILE\x00", 14), 0xEE: (b"Adobe", 12)}
_METADATA = (0xE1, 0xED)
_SEGMENT = struct.Struct(">BBH")
_MAX_SIDE = 65_500  # pixels: libjpeg's limit
_MAX_PIXELS = 89_478_485  # Pillow's, above which it speaks of a bomb
_SAMPLING = (0x11, 0x21, 0x12, 0x22)  # of the luma, that of both chroma channels being 0x11
_NUM_TABLES = 4
_SHARES = tuple(1 << (16 - length) for length in range(1, 17))  # of all codes, one of a length
_SCAN_PARAMETERS = b"\x00\x3f\x00"  # all coefficients at once, as baseline files have it


@dataclass(frozen=True, slots=True)
class PlainHeader:
    """The header of a baseline JPEG of three channels, found in order.

    Attributes:
        size: (width, height).
        has_metadata: Whether there is EXIF, XMP or the like which may say that it is rotated.
        scan: Offset of the entropy-coded data, which must be looked at too (`scan_is_whole`).
        has_restarts: Whether restart markers may stand in there.
    """

    size: tuple[int, int]
    has_metadata: bool
    scan: int
    has_restarts: bool


def plain_header(data: bytes) -> PlainHeader | None:
    """Return the header of a plain JPEG, or None if decoding has to tell whether it is one.

    Args:
        data: The file, or as much of its beginning as holds the header.
    """
    if data[:2] != b"\xff\xd8":
        return None
    position, has_metadata, has_restarts = 2, False, False
    size: tuple[int, int] | None = None
    channels = b""
    quantisers: set[int] = set()
    huffman: set[int] = set()
    try:
        while True:
            start, marker, length = _SEGMENT.unpack_from(data, position)
            segment = data[position + 4 : position + 2 + length]
            position += 2 + length
            if start != 0xFF or len(segment) != length - 2:
                return None
            if marker == _SOS:
                break
            if marker == _DQT:
                quantisers |= _quantiser_numbers(segment)
            elif marker == _DHT:
                huffman |= _huffman_numbers(segment)
            elif marker in (_SOF0, _SOF1) and size is None:
                size, channels = _frame(segment)
            elif marker == _DRI and length == 4:
                has_restarts = segment != b"\x00\x00"
            elif marker in _APPS:
                has_metadata |= not _is_known(marker, segment)
            elif marker != _COM:
                return None
    except (struct.error, ValueError, IndexError):
        return None
    if size is None or max(size) > _MAX_SIDE or size[0] * size[1] > _MAX_PIXELS:
        return None
    if not _scan_fits(segment, channels, quantisers, huffman):
        return None
    return PlainHeader(size, has_metadata, position, has_restarts)


def scan_is_whole(data: bytes | memoryview, scan: int, *, has_restarts: bool) -> bool:
    """Return whether entropy-coded data goes on, without other markers, up to the end marker.

    Args:
        data: The whole file.
        scan: Offset of the entropy-coded data in it.
        has_restarts: Whether restart markers may stand in it.
    """
    if has_restarts:
        end = _STRAY_MARKER.search(data, scan)
        return end is not None and data[end.end() - 1] == _EOI
    # 0xFF followed by another byte than 0x00; far faster than searching for it, as NumPy has vector
    # code for these three steps over bytes.
    values = np.frombuffer(data, np.uint8, offset=scan) if scan < len(data) else _NOTHING
    if len(values) < 2:
        return False
    is_marker = (values[:-1] == 0xFF).view(np.uint8)
    np.minimum(is_marker, values[1:], out=is_marker)
    first = int(is_marker.view(np.bool_).argmax())
    return bool(is_marker[first]) and int(values[first + 1]) == _EOI


def _is_known(marker: int, segment: bytes) -> bool:
    """Return whether an application's segment surely says nothing about orientation, or upright.

    Raises:
        ValueError: if it is cut, which readers do not expect.
    """
    if marker in _METADATA:
        return is_upright(segment)
    if marker not in _KNOWN:
        return False
    head, least = _KNOWN[marker]
    if not segment.startswith(head):
        return False
    if len(segment) < least:
        raise ValueError
    return True


def _frame(segment: bytes) -> tuple[tuple[int, int], bytes]:
    """Return ((width, height), the channels' nine bytes) of a frame header.

    Raises:
        ValueError: if it is no usual one of three channels.
    """
    precision, height, width, count = struct.unpack(">BHHB", segment[:6])
    channels = segment[6:]
    if precision != 8 or not height or not width or count != 3 or len(channels) != 9:
        raise ValueError
    if channels[1] not in _SAMPLING or channels[4] != 0x11 or channels[7] != 0x11:
        raise ValueError
    if len({channels[0], channels[3], channels[6]}) != 3:
        raise ValueError
    return (width, height), channels


def _scan_fits(segment: bytes, channels: bytes, quantisers: set[int], huffman: set[int]) -> bool:
    """Return whether a scan header names the three channels and tables that are there."""
    if len(segment) != 10 or segment[0] != 3 or segment[7:] != _SCAN_PARAMETERS:
        return False
    for number in range(3):
        name, tables = segment[1 + 2 * number], segment[2 + 2 * number]
        if name != channels[3 * number] or channels[3 * number + 2] not in quantisers:
            return False
        if tables >> 4 not in huffman or (tables & 15) + 16 not in huffman:
            return False
    return True


@lru_cache(maxsize=256)  # most files have one of a few
def _quantiser_numbers(segment: bytes) -> frozenset[int]:
    """Return which quantisation tables a segment defines.

    Raises:
        ValueError: if it is damaged.
    """
    numbers, position = set(), 0
    while position < len(segment):
        precision, number = divmod(segment[position], 16)
        position += 1 + 64 * (precision + 1)
        if precision > 1 or number >= _NUM_TABLES or position > len(segment):
            raise ValueError
        numbers.add(number)
    return frozenset(numbers)


@lru_cache(maxsize=256)
def _huffman_numbers(segment: bytes) -> frozenset[int]:
    """Return which Huffman tables a segment defines: 0 to 3 of DC, 16 to 19 of AC coefficients.

    Raises:
        ValueError: if it is damaged, or its codes would not fit in their lengths.
    """
    numbers, position = set(), 0
    while position < len(segment):
        kind, number = divmod(segment[position], 16)
        counts = segment[position + 1 : position + 17]
        total = sum(counts)
        values = segment[position + 17 : position + 17 + total]
        position += 17 + total  # beyond the end also where counts are missing
        if kind > 1 or number >= _NUM_TABLES or total > 256 or position > len(segment):
            raise ValueError
        if kind == 0 and max(values, default=0) > 15:
            raise ValueError
        # Codes are given out from the shortest on, and that of all ones must stay free.
        if sum(map(mul, counts, _SHARES)) >= 1 << 16:
            raise ValueError
        numbers.add(16 * kind + number)
    return frozenset(numbers)
