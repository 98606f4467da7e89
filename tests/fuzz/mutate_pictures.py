"""Mutators of JPEG markers, PNG chunks and RIFF chunks, checksums and lengths kept right or not."""

from __future__ import annotations

import struct
import zlib
from random import Random

from .mutate import Mutator

SIZES = (0, 1, 2, 3, 7, 8, 16, 17, 255, 256, 4096, 9000, 13_000, 30_000, 65_500, 65_535)
_LARGE_SIZES = (*SIZES, 100_000, 2**20, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)
_SOF = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)

# JPEG: a list of (marker, payload); what follows SOS up to the next marker belongs to it.


def _segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Split a JPEG up to its first scan: segments, and the rest from SOS on."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            break
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((marker, data[at + 4 : at + 2 + length]))
        at += 2 + max(length, 2)
    return found, data[at:]


def _join(segments: list[tuple[int, bytes]], rest: bytes) -> bytes:
    head = b"".join(
        bytes((0xFF, marker)) + ((len(body) + 2) & 0xFFFF).to_bytes(2, "big") + body
        for marker, body in segments
    )
    return b"\xff\xd8" + head + rest


def edit_frame(rng: Random, data: bytes) -> bytes:
    """Change the frame header: size, precision, components, sampling, kind of coding."""
    segments, rest = _segments(data)
    for place, (marker, body) in enumerate(segments):
        if marker in _SOF and len(body) >= 6:
            frame = bytearray(body)
            kind = rng.randrange(6)
            if kind == 0:
                frame[1:5] = struct.pack(">HH", rng.choice(SIZES), rng.choice(SIZES))
            elif kind == 1:
                frame[0] = rng.choice((0, 1, 12, 16, 255))
            elif kind == 2:
                frame[5] = rng.choice((0, 1, 2, 3, 4, 5, 255))
            elif kind == 3:
                marker = rng.choice(_SOF)
            elif kind == 4:
                frame[rng.randrange(6, len(frame) + 1) - 1] = rng.choice((0, 0x11, 0x41, 0x44, 255))
            else:
                frame = frame[: rng.randrange(len(frame) + 1)]
            segments[place] = marker, bytes(frame)
    return _join(segments, rest)


def edit_segments(rng: Random, data: bytes) -> bytes:
    """Drop, double, reorder or damage one segment."""
    segments, rest = _segments(data)
    if not segments:
        return data
    at, kind = rng.randrange(len(segments)), rng.randrange(6)
    marker, body = segments[at]
    if kind == 0:
        del segments[at]
    elif kind == 1:
        segments.insert(rng.randrange(len(segments) + 1), segments[at])
    elif kind == 2:
        segments += [segments[at]] * 300
    elif kind == 3:
        rng.shuffle(segments)
    elif kind == 4:
        segments[at] = rng.randrange(0xC0, 0x100), body
    elif body:
        changed = bytearray(body)
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        segments[at] = marker, bytes(changed)
    return _join(segments, rest)


def _exif(rng: Random) -> bytes:
    """Return EXIF with an orientation and entries that lie."""
    order = rng.choice(("<", ">"))
    entries = [
        (0x0112, 3, 1, struct.pack(order + "HH", rng.choice((0, 1, 3, 5, 6, 8, 9, 65535)), 0)),
        (0x0112, 2, rng.choice((1, 2**31, 2**32 - 1)), struct.pack(order + "I", 8)),
        (0x8769, 4, 1, struct.pack(order + "I", rng.choice((8, 0, 26, 2**31)))),
        (
            0x0100,
            rng.choice((0, 1, 5, 12, 13, 99)),
            rng.choice((0, 1, 2**20, 2**32 - 1)),
            b"\0" * 4,
        ),
        (0x927C, 7, 2**24, struct.pack(order + "I", 4)),
        (0x0112, 4, 1, struct.pack(order + "I", rng.choice((6, 2**32 - 1)))),
        (0x0112, 5, 1, struct.pack(order + "I", 8)),
    ]
    chosen = rng.sample(entries, rng.randint(1, len(entries)))
    count = rng.choice((len(chosen), len(chosen), 0, 65535))
    body = struct.pack(order + "H", count)
    for tag, form, number, value in chosen:
        body += struct.pack(order + "HHI", tag, form, number) + value
    following = rng.choice((0, 8, 2**31))
    magic = rng.choice((42, 42, 42, 43, 0))
    start = b"II" if order == "<" else b"MM"
    head = start + struct.pack(order + "HI", magic, rng.choice((8, 8, 8, 0, 2**31)))
    return head + body + struct.pack(order + "I", following)


def insert_segment(rng: Random, data: bytes) -> bytes:
    """Put in EXIF, MPF, XMP, a colour profile, Adobe's transform, a restart interval or junk."""
    segments, rest = _segments(data)
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='%d'/>" % rng.choice((0, 6, 8, 99))
    new = rng.choice(
        (
            (0xE1, b"Exif\0\0" + _exif(rng)),
            (0xE1, b"Exif\0\0" + _exif(rng)),
            (0xE1, xmp),
            (0xE1, b"Exif\0\0"),
            (0xE2, b"MPF\0" + _exif(rng)),
            (0xE2, b"MPF\0" + rng.randbytes(60)),
            (0xE2, b"ICC_PROFILE\0" + bytes((rng.choice((0, 1, 2)), rng.choice((0, 1, 255))))),
            (0xED, b"Photoshop 3.0\0" + b"8BIM" + rng.randbytes(30)),
            (0xEE, b"Adobe\0" + bytes(5) + bytes((rng.choice((0, 1, 2, 255)),))),
            (0xDD, struct.pack(">H", rng.choice((0, 1, 7, 65535)))),
            (0xDC, struct.pack(">H", rng.choice(SIZES))),
            (0xDB, rng.randbytes(rng.choice((0, 1, 65, 130)))),
            (0xC4, bytes((rng.choice((0, 0x10, 0x13, 0x44)),)) + rng.randbytes(40)),
            (0xFE, rng.randbytes(5)),
            (0xE0, b"JFIF\0" + rng.randbytes(9)),
        )
    )
    segments.insert(rng.randrange(len(segments) + 1), new)
    return _join(segments, rest)


def edit_scan(rng: Random, data: bytes) -> bytes:
    """Change the coded pixels or the scan header; cut, repeat, or fill them with markers."""
    segments, rest = _segments(data)
    if len(rest) < 12:
        return data
    at = rng.randrange(2, len(rest))
    new = rng.choice(
        (
            rest[:at],
            rest[:at] + b"\xff\xd9" + rest[at:],
            rest[:at] + b"\xff" + bytes((0xD0 + rng.randrange(8),)) + rest[at:],
            rest[:at] + rest[:at] + rest[at:],
            rest[:at] + bytes(rng.choice((10, 1000))) + rest[at:],
            rest[:4] + bytes((rng.choice((0, 1, 3, 4, 255)),)) + rest[5:],
            rest * 50,
            rest + data,
            rest[: len(rest) // 2] + rng.randbytes(200),
        )
    )
    return _join(segments, new)


JPEG: tuple[Mutator, ...] = (edit_frame, edit_frame, edit_segments, insert_segment, edit_scan)

# PNG


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _join_chunks(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def edit_ihdr(rng: Random, data: bytes) -> bytes:
    """Change size, depth, colour type, filter or interlacing, with a right checksum."""
    chunks = _chunks(data)
    for place, (name, body) in enumerate(chunks):
        if name == b"IHDR" and len(body) == 13:
            header = list(struct.unpack(">IIBBBBB", body))
            for field in rng.sample(range(7), rng.choice((1, 1, 2))):
                header[field] = (
                    rng.choice(_LARGE_SIZES)
                    if field < 2
                    else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
                )
            chunks[place] = name, struct.pack(">IIBBBBB", *header)
    return _join_chunks(chunks)


def edit_chunks(rng: Random, data: bytes) -> bytes:
    """Drop, double, reorder or damage a chunk."""
    chunks = _chunks(data)
    if not chunks:
        return data
    at, kind = rng.randrange(len(chunks)), rng.randrange(5)
    name, body = chunks[at]
    if kind == 0:
        del chunks[at]
    elif kind == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
    elif kind == 2:
        rng.shuffle(chunks)
    elif kind == 3:
        chunks[at] = name, body[: rng.randrange(len(body) + 1)]
    else:
        changed = bytearray(body or b"\0")
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        chunks[at] = name, bytes(changed)
    return _join_chunks(chunks)


def insert_chunk(rng: Random, data: bytes) -> bytes:
    """Put in text and profile bombs, animation, palettes, transparency, EXIF, unknown chunks."""
    chunks = _chunks(data)
    bomb = zlib.compress(bytes(rng.choice((1000, 30_000_000))))
    new = rng.choice(
        (
            (b"zTXt", b"a\0\0" + bomb),
            (b"iTXt", b"a\0\1\0\0\0" + bomb),
            (b"iCCP", b"a\0\0" + bomb),
            (b"tEXt", b"XML:com.adobe.xmp\0<x tiff:Orientation='6'/>"),
            (b"tEXt", b"Raw profile type exif\0\nexif\n  8\n" + rng.randbytes(16).hex().encode()),
            (b"eXIf", _exif(rng)),
            (b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 256)))),
            (b"PLTE", rng.randbytes(rng.choice((0, 3, 4, 768, 771)))),
            (b"acTL", struct.pack(">II", rng.choice((0, 1, 2, 2**31)), 0)),
            (
                b"fcTL",
                struct.pack(
                    ">IIIIIHHBB", 0, *[rng.choice(_LARGE_SIZES) for _ in range(4)], 1, 1, 0, 0
                ),
            ),
            (b"fdAT", rng.randbytes(20)),
            (b"IDAT", zlib.compress(bytes(rng.choice((10, 30_000_000))))),
            (b"gAMA", struct.pack(">I", 0)),
            (b"pHYs", rng.randbytes(rng.choice((0, 8, 9)))),
            (b"CRIT", b""),
            (b"IEND", b""),
        )
    )
    chunks.insert(rng.randrange(len(chunks) + 1), new)
    return _join_chunks(chunks)


def cut_idat(rng: Random, data: bytes) -> bytes:
    """Cut or spoil the compressed pixels, with right checksums."""
    chunks = _chunks(data)
    for place, (name, body) in enumerate(chunks):
        if name == b"IDAT":
            at = rng.randrange(len(body) + 1)
            new = rng.choice((body[:at], body[:at] + rng.randbytes(9) + body[at:], b""))
            chunks[place] = name, new
    return _join_chunks(chunks)


PNG: tuple[Mutator, ...] = (edit_ihdr, edit_ihdr, edit_chunks, insert_chunk, cut_idat)

# WebP: RIFF chunks


def _riff(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        found.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return found


def edit_riff(rng: Random, data: bytes) -> bytes:
    """Drop, double, reorder, resize or put in RIFF chunks."""
    chunks = _riff(data)
    if not chunks:
        return data
    at, kind = rng.randrange(len(chunks)), rng.randrange(6)
    name, body = chunks[at]
    side = struct.pack("<I", rng.choice(_LARGE_SIZES))[:3]
    if kind == 0:
        del chunks[at]
    elif kind == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
    elif kind == 2:
        chunks[at] = name, body[: rng.randrange(len(body) + 1)]
    elif kind == 3:
        flags = bytes((rng.choice((0, 2, 8, 16, 32, 62, 255)), 0, 0, 0))
        chunks.insert(0, (b"VP8X", flags + side + rng.choice((side, b"\0\0\0"))))
    elif kind == 4:
        chunks.append((b"EXIF", _exif(rng)))
    else:
        changed = bytearray(body)
        if changed:
            changed[rng.randrange(min(len(changed), 12))] = rng.randrange(256)
        chunks[at] = name, bytes(changed)
    parts = []
    for name, body in chunks:
        length = len(body) if rng.random() < 0.95 else rng.choice(_LARGE_SIZES)
        parts.append(name + struct.pack("<I", length) + body + b"\0" * (len(body) % 2))
    joined = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(joined)) + joined


WEBP: tuple[Mutator, ...] = (edit_riff, edit_riff)
