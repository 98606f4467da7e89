"""Mutators of bytes and of text, and the choice of a mutator by the kind of file.

A mutator takes a `random.Random` and valid bytes and returns others, so that an input can be made
again from its seed. The ones that know a format are in `mutate_markup.py` (XML, JSON, YAML),
`mutate_pictures.py` and `mutate_binary.py` (tar, idx, npy, safetensors, pickles).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random

Mutator = Callable[[Random, bytes], bytes]

MAX_BYTES = 4 << 20  # of an input: bombs are to be small files that want to become large
_BYTES = (0x00, 0x01, 0x0A, 0x20, 0x22, 0x2E, 0x2F, 0x30, 0x3C, 0x7F, 0x80, 0xC0, 0xFE, 0xFF)
_WORDS = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 100_000)
_LARGE = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (
    *("0", "-0", "-1", "1", "2", "7", "255", "65536", "100000", "2147483647", "-2147483649"),
    *("4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *("1e5", "1e308", "-1e308", "1e309", "1e-320", "1e999999999", "nan", "inf", "-inf", "NaN"),
    *("Infinity", "0x10", "0o17", "0b1", "1_000", "1,5", "1.5.2", "+3", " 4 ", "", "-", "."),
    *("\u0663", "\uff11\uff12", "\u00b2", "\u2028", "1\x00", "\x1b[31m1", "1" * 400, "9" * 5000),
)
TEXTS = (
    *("", " ", "\n", "\r\n", "\t", "\x00", "\x7f", "\x1b[2J", "\x9b31m", "\u202e", "\u2028"),
    *("\ufeff", "\ud800", "\U0001f600", "e\u0301", "../../evil", "/etc/passwd", "..", ".", "~"),
    *("C:\\evil", "a" * 300, "b" * 5000, "{}", "%s%n", "${HOME}", "$(touch EVIL)", "`touch EVIL`"),
    *("; touch EVIL", "pipe:touch EVIL", "file:///etc/passwd", "__import__('os')", "None", "true"),
)
_NUMBER = re.compile(rb"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_ENCODINGS = ("utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp037", "utf-7")


def one_of(rng: Random, mutators: Sequence[Mutator], data: bytes) -> bytes:
    """Apply one to three mutators, one after the other, and bound the size."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # One that knows a format need not cope with what another has made of the file.
        with suppress(ValueError, IndexError, OverflowError, RecursionError, struct.error):
            data = rng.choice(mutators)(rng, data)[:MAX_BYTES]
    return data


def flip_bits(rng: Random, data: bytes) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(rng: Random, data: bytes) -> bytes:
    """Set one to four bytes to values that often mean something."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice(_BYTES)
    return bytes(changed)


def set_word(rng: Random, data: bytes) -> bytes:
    """Replace 2, 4 or 8 bytes by a number at a limit, in either byte order."""
    size = rng.choice((2, 4, 4, 8))
    if len(data) < size:
        return data
    at = rng.randrange(len(data) - size + 1)
    value = rng.choice(_WORDS + _LARGE) % (1 << 8 * size)
    word = value.to_bytes(size, rng.choice(("big", "little")))
    return data[:at] + word + data[at + size :]


def truncate(rng: Random, data: bytes) -> bytes:
    """Cut the end off."""
    return data[: rng.randrange(len(data) + 1)]


def _span(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 16, 64, 512, 4096)))


def delete_span(rng: Random, data: bytes) -> bytes:
    """Take some bytes out."""
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def repeat_span(rng: Random, data: bytes) -> bytes:
    """Repeat some bytes, sometimes very often."""
    start, end = _span(rng, data)
    count = rng.choice((2, 3, 10, 100, 3000))
    return data[:start] + data[start:end] * count + data[end:]


def insert_bytes(rng: Random, data: bytes) -> bytes:
    """Put some bytes in: random ones, zeros, or copies from elsewhere."""
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 2, 4, 16, 512, 3000))
    start, _ = _span(rng, data)
    new = rng.choice((bytes(size), rng.randbytes(size), data[start : start + size]))
    return data[:at] + new + data[at:]


def swap_spans(rng: Random, data: bytes) -> bytes:
    """Exchange two stretches."""
    if not data:
        return data
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def empty(rng: Random, data: bytes) -> bytes:
    """Return nothing, zeros, blanks or noise."""
    size = rng.choice((1, 16, 512, 10240))
    return rng.choice((b"", bytes(size), b" " * size, b"\n", rng.randbytes(size), b"\xef\xbb\xbf"))


def replace_number(rng: Random, data: bytes) -> bytes:
    """Replace one number written in ASCII."""
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    match = rng.choice(found)
    new = rng.choice(NUMBERS).encode("utf-8", "surrogatepass")
    return data[: match.start()] + new + data[match.end() :]


def recode(rng: Random, data: bytes) -> bytes:
    """Write a text in another encoding."""
    return data.decode("utf-8", "replace").encode(rng.choice(_ENCODINGS), "replace")


def edit_lines(rng: Random, data: bytes) -> bytes:
    """Drop, double, swap, join or change lines."""
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines[at] += lines[other]
        lines[other] = b""
    elif kind == 4:
        lines[at] += b"\r"
    else:
        words = lines[at].split(b" ")
        text = rng.choice(TEXTS + NUMBERS).encode("utf-8", "surrogatepass")
        words[rng.randrange(len(words))] = text
        lines[at] = b" ".join(words)
    return b"\n".join(lines)


BYTES: tuple[Mutator, ...] = (
    *(flip_bits, set_bytes, set_word, truncate, delete_span, repeat_span, insert_bytes),
    *(swap_spans, empty),
)
LINES: tuple[Mutator, ...] = (
    *BYTES,
    replace_number,
    replace_number,
    edit_lines,
    edit_lines,
    recode,
)


def splice(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Join the head of one file and the tail of another of its kind."""
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def mutate(rng: Random, kind: str, seeds: Sequence[bytes]) -> bytes:
    """Return a mutated file.

    Args:
        rng: Decides everything.
        kind: ``xml``, ``json``, ``yaml``, ``jpeg``, ``png``, ``webp``, ``picture`` (other formats),
            ``tar``, ``idx``, ``npy``, ``safetensors``, ``pth``, ``lines`` or ``bytes``.
        seeds: Valid files of that kind.
    """
    from . import mutate_binary, mutate_markup, mutate_pictures

    own: dict[str, tuple[Mutator, ...]] = {
        "xml": mutate_markup.XML,
        "json": mutate_markup.JSON,
        "yaml": mutate_markup.YAML,
        "jpeg": mutate_pictures.JPEG,
        "png": mutate_pictures.PNG,
        "webp": mutate_pictures.WEBP,
        "picture": (),
        "tar": mutate_binary.TAR,
        "idx": mutate_binary.IDX,
        "npy": mutate_binary.NPY,
        "safetensors": mutate_binary.SAFETENSORS,
        "pth": mutate_binary.PTH,
        "lines": (),
        "bytes": (),
    }
    data = rng.choice(seeds)
    if rng.random() < 0.02:
        return data  # so that a target that refuses everything is noticed
    if rng.random() < 0.06:
        return splice(rng, data, seeds)[:MAX_BYTES]
    general = LINES if kind in ("xml", "json", "yaml", "idx", "lines") else BYTES
    if own[kind] and rng.random() < 0.6:
        data = one_of(rng, own[kind], data)
        return data if rng.random() < 0.8 else one_of(rng, general, data)
    return one_of(rng, general, data)
