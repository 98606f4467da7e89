"""Whether a JPEG's metadata says that it is upright, beyond doubt and without Pillow.

Nearly every photograph of a camera has EXIF, XMP or Photoshop's resources, and Pillow takes a
quarter of a millisecond to read them, half of what copying the file takes. Here is what can be told
from whole and simple ones (Exif 2.3, section 4.6; TIFF 6.0, section 2): all else is left to Pillow,
also what it would stumble over.
"""

from __future__ import annotations

import struct

_EXIF, _XMP = b"Exif\x00\x00", b"http://ns.adobe.com/xap/1.0/\x00"
_PHOTOSHOP, _RESOURCE = b"Photoshop 3.0\x00", b"8BIM"
_RESOLUTION_INFO, _RESOLUTION_BYTES = 0x03ED, 14
_FORMATS = {b"II*\x00": "<", b"MM\x00*": ">"}
_ORIENTATION, _X_RESOLUTION = 0x0112, 0x011A
_SHORT, _RATIONAL = 3, 5
# Bytes of a value of each type, from 1 (BYTE) to 12 (DOUBLE).
_TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)


def is_upright(segment: bytes) -> bool:
    """Return whether the content of an APP1 or APP13 segment surely says nothing else."""
    if segment.startswith(_EXIF):
        return _exif_is_upright(segment[len(_EXIF) :])
    if segment.startswith(_XMP):
        return b"Orientation" not in segment
    return segment.startswith(_PHOTOSHOP) and _resources_are_whole(segment)


def _exif_is_upright(tiff: bytes) -> bool:
    """Return whether EXIF's first directory lies there whole, and says upright or nothing."""
    order = _FORMATS.get(tiff[:4])
    if order is None or len(tiff) < 14:
        return False
    (start,) = struct.unpack_from(f"{order}L", tiff, 4)
    if start + 2 > len(tiff):
        return False
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    entries = tiff[start + 2 : start + 2 + 12 * count]
    if len(entries) != 12 * count:
        return False
    for tag, kind, number, value in struct.iter_unpack(f"{order}HHLL", entries):
        if not 1 <= kind < len(_TYPE_BYTES):
            return False
        size = number * _TYPE_BYTES[kind]
        if size > 4 and value + size > len(tiff):
            return False
        if tag == _ORIENTATION:
            # The value stands at the beginning of its four bytes.
            upright = 1 if order == "<" else 1 << 16
            if (kind, number) != (_SHORT, 1) or value & (0xFFFF * upright) != upright:
                return False
        elif tag == _X_RESOLUTION and (kind, number) != (_RATIONAL, 1):
            return False
    return True


def _resources_are_whole(segment: bytes) -> bool:
    """Return whether Photoshop's resources end where they say."""
    position = len(_PHOTOSHOP)
    try:
        while segment.startswith(_RESOURCE, position):
            (code,) = struct.unpack_from(">H", segment, position + 4)
            position += 7 + segment[position + 6]  # behind its name
            position += position & 1
            (size,) = struct.unpack_from(">L", segment, position)
            if code == _RESOLUTION_INFO and size < _RESOLUTION_BYTES:
                return False
            position += 4 + size
            if position > len(segment):
                return False
            position += position & 1
    except (struct.error, IndexError):
        return False
    return True
