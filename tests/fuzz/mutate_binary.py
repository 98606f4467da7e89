"""Mutators of tar headers, `.idx` lines, `.npy` headers, safetensors headers and pickles."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from .mutate import NUMBERS, TEXTS, Mutator
from .mutate_markup import edit_tree

BLOCK = 512
# Field of a ustar header -> (start, end)
_FIELDS = {
    "name": (0, 100),
    "mode": (100, 108),
    "uid": (108, 116),
    "size": (124, 136),
    "mtime": (136, 148),
    "checksum": (148, 156),
    "type": (156, 157),
    "linkname": (157, 257),
    "magic": (257, 265),
    "devmajor": (329, 337),
    "prefix": (345, 500),
}
_NAMES = (
    *(b"../../evil.jpg", b"/tmp/evil.jpg", b"/etc/passwd", b"..", b".", b"", b"a/../b.jpg"),
    *(b"000000000.jpg", b"000000001.jpg", b"000000000.cls", b"000000000.json", b"x" * 100),
    *(b"\xff\xfe.jpg", b"\x1b[2J.jpg", b"a\nb.jpg", b"C:\\evil.jpg", b"000000000.jpg\0evil"),
)
_SIZES = (
    *(b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"00000000001 ", b"zzzzzzzzzzz\0"),
    *(b"\x80" + bytes(10) + b"\xff", b"\xff" * 12, b"\x80\x7f" + b"\xff" * 10, b" " * 12),
    *(b"00000001000\0", b"00000000777\0", b"1           ", b"0x000000010\0", bytes(12)),
)


def _sealed(header: bytes) -> bytes:
    """Return a tar header with a right checksum."""
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


def _headers(data: bytes) -> list[int]:
    """Return where the headers of a tar stand."""
    found, at = [], 0
    while at + BLOCK <= len(data) and any(data[at : at + BLOCK]):
        found.append(at)
        try:
            size = int(data[at + 124 : at + 135], 8)
        except ValueError:
            break
        at += BLOCK + -(-size // BLOCK) * BLOCK
    return found


def edit_header(rng: Random, data: bytes) -> bytes:
    """Change a field of a header, mostly with a right checksum."""
    places = _headers(data)
    if not places:
        return data
    at = rng.choice(places)
    header = bytearray(data[at : at + BLOCK])
    name = rng.choice(list(_FIELDS))
    start, end = _FIELDS[name]
    if name in ("name", "linkname", "prefix"):
        value = rng.choice(_NAMES)
    elif name == "type":
        value = rng.choice(
            (b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"\0")
        )
    elif name == "magic":
        value = rng.choice((b"ustar  \0", bytes(8), b"ustar\x0001", b"USTAR\x0000"))
    else:
        value = rng.choice(_SIZES)
    header[start:end] = value[: end - start].ljust(end - start, b"\0")
    changed = bytes(header)
    if name != "checksum" and rng.random() < 0.85:
        changed = _sealed(changed)
    return data[:at] + changed + data[at + BLOCK :]


def member(name: bytes, kind: bytes, body: bytes, link: bytes = b"") -> bytes:
    header = bytearray(BLOCK)
    header[:100] = name[:100].ljust(100, b"\0")
    header[100:148] = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(body) + b"%011o\0" % 0
    header[156:157] = kind
    header[157:257] = link[:100].ljust(100, b"\0")
    header[257:265] = b"ustar\x0000"
    return _sealed(bytes(header)) + body + bytes(-len(body) % BLOCK)


def insert_member(rng: Random, data: bytes) -> bytes:
    """Put in links, devices, folders, long names, pax records or files that lie elsewhere."""
    pax = b"%d path=../../evil.jpg\n"
    record = pax.replace(b"%d", str(len(pax)).encode())
    name = rng.choice(_NAMES)
    new = rng.choice(
        (
            member(name, b"0", b"evil"),
            member(name, b"2", b"", b"/etc/passwd"),
            member(name, b"1", b"", b"../../evil"),
            member(name, b"5", b""),
            member(name, b"3", b""),
            member(b"././@LongLink", b"L", b"../" * 300 + b"evil\0") + member(name, b"0", b"x"),
            member(b"PaxHeaders/x", b"x", record) + member(name, b"0", b"x"),
            member(b"PaxHeaders/x", b"x", b"30 size=99999999999999999999\n"),
            member(b"PaxHeaders/x", b"g", b"99999999 path=evil\n"),
            member(b"PaxHeaders/x", b"x", b"22 GNU.sparse.major=1\n"),
            bytes(BLOCK),
            bytes(2 * BLOCK),
        )
    )
    at = rng.choice([*_headers(data), len(data)])
    return data[:at] + new + data[at:]


def move_members(rng: Random, data: bytes) -> bytes:
    """Drop, double or reorder members, or join the tar with itself."""
    places = [*_headers(data), len(data)]
    members = [data[a:b] for a, b in itertools.pairwise(places)]
    kind = rng.randrange(4)
    if kind == 0 and members:
        members.pop(rng.randrange(len(members)))
    elif kind == 1 and members:
        members.insert(rng.randrange(len(members)), rng.choice(members))
    elif kind == 2:
        rng.shuffle(members)
    else:
        members *= 2
    return b"".join(members)


TAR: tuple[Mutator, ...] = (edit_header, edit_header, edit_header, insert_member, move_members)


def edit_field(rng: Random, data: bytes) -> bytes:
    """Change one word of an `.idx`."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    words = lines[at].split(b" ")
    field = rng.randrange(len(words))
    word = words[field]
    if word.isdigit() and rng.random() < 0.5:
        changed = int(word) + rng.choice((-1, 1, 511, 512, -512, 1024, 2**31, -(2**40)))
        words[field] = str(changed).encode()
    else:
        words[field] = rng.choice(NUMBERS + TEXTS).encode("utf-8", "surrogatepass")
    lines[at] = b" ".join(words)
    return b"\n".join(lines)


def edit_count(rng: Random, data: bytes) -> bytes:
    """Change the first line of an `.idx`, or its number of lines."""
    first, mark, rest = data.partition(b"\n")
    lines = rest.splitlines(keepends=True)
    number = rng.choice(NUMBERS).encode("utf-8", "surrogatepass")
    return rng.choice(
        (
            b"v1.2 " + number + mark + rest,
            rng.choice((b"v1.1", b"v1.3", b"V1.2", b"v1.2 ", b"")) + b" 7" + mark + rest,
            first + mark + rest * 2,
            first + mark + b"".join(lines[:-1]),
            first + mark + rest.replace(b" ", b"\t"),
            first + b"\r\n" + rest.replace(b"\n", b"\r\n"),
            first + mark + rest.rstrip(b"\n"),
            first + mark + b"".join(rng.sample(lines, len(lines))),
        )
    )


IDX: tuple[Mutator, ...] = (edit_field, edit_field, edit_count)

# NumPy's files: a magic, a version, the length of the header, the header as a Python literal.

_NPY_HEADERS: tuple[str, ...] = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (7,), }",
    "{'descr': '<i4', 'fortran_order': True, 'shape': (7,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (9223372036854775807,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (-7,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (7, 0), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': ('7',), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (7.0,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (True,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': 7, }",
    "{'descr': '<i8', 'fortran_order': False, 'shape': (7,), }",
    "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (7,), }",
    "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (7,), }",
    "{'descr': '<M8[q]', 'fortran_order': False, 'shape': (7,), }",
    "{'descr': 'x', 'fortran_order': False, 'shape': (7,), }",
    "{'descr': '', 'fortran_order': False, 'shape': (7,), }",
    "{'descr': (1, 2, 3), 'fortran_order': False, 'shape': (7,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (7L,), }",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (7,) ",
    "{'descr': '''<i4', 'fortran_order': False, 'shape': (7,), }",
    "__import__('os').system('touch EVIL')",
    "(" * 3000,
    "[" * 150 + "]" * 150,
    "{**{}}",
    "1" * 5000,
    "{1: 2}",
    "",
    "\n\t  {",
    "'\\ud800'",
)


def edit_npy(rng: Random, data: bytes) -> bytes:
    """Give an `.npy` another header."""
    start = data.find(b"\n") + 1
    header = rng.choice(_NPY_HEADERS).encode("latin-1")
    version = rng.choice((1, 1, 1, 2, 3, 4, 0))
    length = rng.choice((len(header), len(header), len(header), 0, 65535, 2**32 - 1))
    size = length.to_bytes(4, "little")[: 2 if version == 1 else 4]
    body = rng.choice((data[start:], b"", bytes(10_000)))
    return b"\x93NUMPY" + bytes((version, rng.choice((0, 0, 1)))) + size + header + body


NPY: tuple[Mutator, ...] = (edit_npy,)


def edit_safetensors(rng: Random, data: bytes) -> bytes:
    """Change the header of a safetensors file: its length, names, types, shapes, offsets."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        size = rng.choice((0, 1, length - 1, length + 1, 10**8, 2**40, 2**63, 2**64 - 1))
        return size.to_bytes(8, "little") + header + body
    if kind == 1:
        header = edit_tree(rng, header)
    elif kind == 2:
        header = _edit_tensor(rng, header)
    elif kind == 3:
        body = body[: rng.randrange(len(body) + 1)]
    else:
        body = body + bytes(rng.choice((1, 8, 4096)))
    return len(header).to_bytes(8, "little") + header + body


def _edit_tensor(rng: Random, header: bytes) -> bytes:
    try:
        tree: dict[str, Any] = json.loads(header)
        names = [name for name in tree if name != "__metadata__"]
        facts: dict[str, Any] = tree[rng.choice(names)]
        facts.update(
            rng.choice(
                (
                    {"dtype": rng.choice(("F64", "F8_E4M3", "BOOL", "C64", "F4", "X", "U16", ""))},
                    {"shape": rng.choice(([2**40], [2**32, 2**32], [-1], [], [0], [1] * 300))},
                    {"data_offsets": rng.choice(([0, 0], [8, 0], [0, 2**62], [-1, 4], [0]))},
                )
            )
        )
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
        return header
    return json.dumps(tree).encode()


SAFETENSORS: tuple[Mutator, ...] = (edit_safetensors,)


class Payload:
    """Unpickled without care, this makes a file or takes all memory."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def payloads() -> list[bytes]:
    """Return pickles that do something when they are loaded."""
    import os

    made = [
        Payload(os.system, "touch EVIL"),
        Payload(open, "EVIL", "w"),
        Payload(eval, "open('EVIL', 'w')"),
        Payload(os.mkdir, "EVIL"),
        Payload(bytearray, 1 << 36),
        Payload(bytes, 1 << 36),
        {"model": Payload(os.system, "touch EVIL")},
        {"optimizer": {"state": Payload(exec, "open('EVIL', 'w')")}},
    ]
    return [pickle.dumps(value, protocol=2) for value in made]


def edit_pth(rng: Random, data: bytes) -> bytes:
    """Change the pickle or the records inside torch's zip, or put a payload in."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(name, archive.read(name)) for name in archive.namelist()]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, struct.error):
        return data
    kind, buffer = rng.randrange(5), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, body in records:
            if name.endswith("data.pkl"):
                body = _edit_pickle(rng, body, kind)
            elif kind == 3 and rng.random() < 0.5:
                body = body[: rng.randrange(len(body) + 1)]
            elif kind == 4 and rng.random() < 0.3:
                continue
            archive.writestr(name, body)
    return buffer.getvalue()


def _edit_pickle(rng: Random, body: bytes, kind: int) -> bytes:
    if kind == 0:
        return rng.choice(payloads())
    if kind == 1:  # operation codes and their arguments
        changed = bytearray(body)
        for _ in range(rng.choice((1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.choice(b"()0.2NRPQbcdehjlpqrstu}]a\x80\x85X")
        return bytes(changed)
    if kind == 2:  # names of what is called, sizes of storages
        old, new = rng.choice(
            (
                (b"torch._utils", b"os\n#"),
                (b"_rebuild_tensor_v2", b"system"),
                (b"FloatStorage", b"UntypedStorage"),
                (b"OrderedDict", b"Counter"),
                (b"K\x02", b"J\xff\xff\xff\x7f"),
                (b"storage", b"module"),
            )
        )
        return body.replace(old, new)
    return body


def plain_pickle(rng: Random, data: bytes) -> bytes:
    """A payload without torch's zip, in torch's older format, or as a tar."""
    payload = rng.choice(payloads())
    if rng.random() < 0.4:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
        head = pickle.dumps(1001, protocol=2) + pickle.dumps({"little_endian": True}, protocol=2)
        return magic + head + payload
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("storages", "tensors", "pickle", "../EVIL"):
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))
        return buffer.getvalue()
    return payload


PTH: tuple[Mutator, ...] = (edit_pth, edit_pth, edit_pth, plain_pickle)
