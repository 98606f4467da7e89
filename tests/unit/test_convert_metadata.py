"""What is told of a JPEG's metadata without Pillow is what Pillow would have said."""

import io
import random
import struct
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mbv3dist.convert.pictures import load_picture
from mbv3dist.convert.structure import plain_header

XMP = b"http://ns.adobe.com/xap/1.0/\x00"


def exif(order, entries, tail=b""):
    """EXIF of entries (tag, type, number, the four bytes of the value or offset)."""
    head = {">": b"MM\x00*", "<": b"II*\x00"}[order] + struct.pack(f"{order}LH", 8, len(entries))
    rows = [struct.pack(f"{order}HHL", *entry[:3]) + entry[3] for entry in entries]
    return b"Exif\x00\x00" + head + b"".join(rows) + bytes(4) + tail


def short(order, tag, value):
    return tag, 3, 1, struct.pack(f"{order}HH", value, 0)


def camera(order, orientation):
    """As a camera writes it: a make, a resolution, an orientation, a pointer to more."""
    offset = struct.pack(f"{order}L", 10 + 12 * 5 + 4)
    make = (0x010F, 2, 8, offset)
    resolution = (0x011A, 5, 1, struct.pack(f"{order}L", 10 + 12 * 5 + 12))
    further = (0x8769, 4, 1, struct.pack(f"{order}L", 10 + 12 * 5 + 20))
    rows = [make, resolution, short(order, 0x0112, orientation), short(order, 0x0128, 2), further]
    tail = b"Maker !\x00" + struct.pack(f"{order}LL", 72, 1) + struct.pack(f"{order}HL", 0, 0)
    return exif(order, rows, tail)


def resources(*blocks):
    packed = [
        b"8BIM" + struct.pack(">HBxL", code, 0, len(data)) + data + bytes(len(data) % 2)
        for code, data in blocks
    ]
    return b"Photoshop 3.0\x00" + b"".join(packed)


UPRIGHT = {
    "camera, big endian": (0xE1, camera(">", 1)),
    "camera, little endian": (0xE1, camera("<", 1)),
    "no orientation": (0xE1, exif("<", [short("<", 0x0128, 2)])),
    "XMP": (0xE1, XMP + b"<x:xmpmeta><tiff:Make>none</tiff:Make></x:xmpmeta>"),
    "Photoshop": (0xED, resources((0x03ED, bytes(16)), (0x0404, b"caption"))),
}
OTHERS = {
    "rotated": (0xE1, camera(">", 6)),
    "rotated, little endian": (0xE1, camera("<", 8)),
    "XMP, rotated": (0xE1, XMP + b'<x tiff:Orientation="6"/>'),
    "unknown": (0xE1, b"something else"),
    "cut": (0xE1, camera("<", 1)[:40]),
    "Photoshop, cut": (0xED, resources((0x0404, b"caption"))[:-4]),
    "Photoshop, short resolution": (0xED, resources((0x03ED, bytes(4)))),
    "several pictures": (0xE2, b"MPF\x00" + camera("<", 1)[6:]),
}


def plain_jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


PLAIN = plain_jpeg()


def with_segments(*segments):
    parts = [
        bytes((0xFF, kind)) + struct.pack(">H", len(data) + 2) + data for kind, data in segments
    ]
    return PLAIN[:2] + b"".join(parts) + PLAIN[2:]


@pytest.mark.parametrize("name", UPRIGHT)
def test_upright_ones_are_told(name):
    assert not plain_header(with_segments(UPRIGHT[name])).has_metadata


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_to_pillow(name):
    assert plain_header(with_segments(OTHERS[name])).has_metadata


def test_one_of_several_is_enough_for_pillow():
    both = with_segments(UPRIGHT["XMP"], OTHERS["rotated"])
    assert plain_header(both).has_metadata and load_picture(both).orientation == 6


@given(st.integers(0, 2**64))
def test_pillow_agrees(seed):
    rng = random.Random(seed)
    known = [*UPRIGHT.values(), *OTHERS.values()]
    for _ in range(30):
        segments = []
        for kind, content in rng.choices(known, k=rng.choice((1, 1, 2))):
            content = bytearray(content)
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                place = rng.randrange(len(content))
                content[place] = rng.choice((rng.randrange(256), 0, 1, 255, content[place] ^ 1))
            segments.append((kind, bytes(content)))
        data = with_segments(*segments)
        header = plain_header(data)
        if header is None or header.has_metadata:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = load_picture(data)
        assert picture.clean and picture.orientation == 1 and picture.kind == "jpeg"
