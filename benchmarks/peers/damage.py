"""Damaged data: what is done to a system's files, and what the system then says.

Every system reads one whole epoch with one process. Each picture is decoded with Pillow, as a
training transform would. Sizes and places are the same in every format: the shard in the middle,
the sample in its middle. The reading happens in a child, because some cases end in a signal.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peers.protocol import Outcome, describe, run_children

# What is damaged before the start, then what changes while the epoch is read.
CASES = {
    "truncated": "a shard ends in the middle of a picture",
    "header": "the header that says where a picture lies is overwritten",
    "flipped": "one bit of a picture is flipped; it still decodes",
    "checksum": "a stored checksum is wrong",
    "no index": "an index file is missing",
    "other index": "two shards are taken for each other by their index",
    "truncated during": "a shard that is being read is cut to half in place",
    "overwritten during": "a shard that is being read is overwritten in place by another's bytes",
    "replaced during": "a shard that is being read is replaced by a file with another's bytes",
}


@dataclass(frozen=True)
class Target:
    """The shard and the sample that a case is about, and where that sample lies."""

    path: Path
    key: int
    position: int  # of the sample in its shard
    offset: int  # of its picture's first byte in the file
    files: tuple[str, ...]  # what a message may name: the shard, the other one, the index
    span: tuple[int, int]  # the offsets that a message may name


def read_damaged(
    adapter: Any,
    place: Path,
    variant: str,
    case: str,
    pictures: dict[int, bytes],
    *,
    limit_s: float,
) -> Outcome | None:
    """Damage the packed data at `place` and read it; None where a case does not exist."""
    shards = adapter.shards(place, variant)
    at = len(shards) // 2
    keys = keys_by_shard(shards, pictures)
    target = find_target(shards[at], keys[shards[at]], pictures)
    during = case.endswith(" during")
    # Another shard, and if there is one of another number of samples.
    other = sorted(shards, key=lambda path: len(keys[path]) == len(keys[target.path]))[0]
    if not during:
        changed = _damage_now(adapter, place, variant, case, target, other)
        if changed is None:
            return None
        target = changed
    call = partial(_read, adapter, place, variant, case if during else "", target, pictures)
    return run_children([(call, {})], scratch=place, limit_s=limit_s)[0]


def keys_by_shard(shards: list[Path], pictures: dict[int, bytes]) -> dict[Path, list[int]]:
    """Return which samples lie in which file; all formats keep the order of the keys."""
    keys = sorted(pictures)
    found: dict[Path, list[int]] = {}
    for path in shards:
        data, start = path.read_bytes(), len(keys) - sum(map(len, found.values()))
        at = len(keys) - start
        mine = []
        while at < len(keys) and pictures[keys[at]] in data:
            mine.append(keys[at])
            at += 1
        found[path] = mine
    if sum(map(len, found.values())) != len(keys):
        raise RuntimeError(f"{shards[0].parent}: not all samples were found in the packed shards")
    return found


def find_target(path: Path, keys: list[int], pictures: dict[int, bytes]) -> Target:
    """Return the sample in the middle of a shard."""
    position = len(keys) // 2
    key = keys[position]
    offset = path.read_bytes().index(pictures[key])
    # From the header before it to the picture's last byte.
    span = (max(offset - 512, 1), offset + len(pictures[key]))
    return Target(path, key, position, offset, (path.name,), span)


def _damage_now(
    adapter: Any, place: Path, variant: str, case: str, target: Target, other: Path
) -> Target | None:
    """Do what a case says and return what may be named; None if the format has no such thing."""
    if case == "truncated":
        size = target.path.stat().st_size
        os.truncate(target.path, target.offset + 100)
        return replace(target, span=(target.span[0], size))
    if case == "header":
        offset, size = adapter.header(target.position, target.offset)
        write_at(target.path, offset, b"\xff" * size)
        return target
    if case == "flipped":
        picture = target.path.read_bytes()[target.offset :]
        place_of_bit = flip_that_decodes(picture)
        value = picture[place_of_bit] ^ 1
        write_at(target.path, target.offset + place_of_bit, bytes([value]))
        return target
    name = adapter.break_index(place, variant, case, target, other)
    return replace(target, files=(target.path.name, other.name, name)) if name else None


def flip_that_decodes(picture: bytes) -> int:
    """Return a byte of the JPEG file at the head of `picture` whose lowest bit may be flipped.

    The picture then still decodes without an error, to other pixels.
    """
    end = picture.index(b"\xff\xd9") + 2
    whole = _pixels(picture[:end])
    for place in range(end * 3 // 4, end - 2):
        changed = bytearray(picture[:end])
        changed[place] ^= 1
        try:
            if changed[place] != 0xFF and picture[place] != 0xFF and _pixels(changed) != whole:
                return place
        except OSError:
            continue
    raise RuntimeError("no bit of the picture can be flipped unnoticed")


def _pixels(data: bytes | bytearray) -> bytes:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file in place."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def digest(data: bytes) -> str:
    """Return what stands for a picture's bytes in the reports."""
    return hashlib.sha256(data).hexdigest()[:12]


def _read(
    adapter: Any,
    place: Path,
    variant: str,
    change: str,
    target: Target,
    pictures: dict[int, bytes],
) -> dict[str, Any]:
    """Read one epoch and report what came; `change` is made on the way, if there is one.

    An epoch that ends without an error is followed by the first sample of the next one, because
    an error of a thread may show only there. What is logged as a warning or worse is reported.
    """
    report: dict[str, Any] = {"delivered": [], "error": None, "decoder": False, "epochs": 0}
    report |= {"files": list(target.files), "key": target.key, "position": target.position}
    report["span"] = list(target.span)
    report["log"] = []
    logging.getLogger().addHandler(_Log(report["log"]))
    try:
        for item in _changing(adapter, place, variant, change, pictures, report):
            if report["epochs"]:
                break
            if item is None:
                report["epochs"] = 1
                continue
            report["decoder"] = True
            _pixels(item[1])
            report["decoder"] = False
            report["delivered"].append([int(item[0]), digest(bytes(item[1]))])
    except Exception as error:
        report["error"] = describe(error)
    return report


class _Log(logging.Handler):
    """Keeps what is logged as a warning or worse, with the error it is about."""

    def __init__(self, lines: list[str]):
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._lines.append(f"{record.getMessage()} {describe(error)}".strip()[:500])


def _changing(
    adapter: Any,
    place: Path,
    variant: str,
    change: str,
    pictures: dict[int, bytes],
    report: dict[str, Any],
) -> Iterator[tuple[int, bytes] | None]:
    """Yield the adapter's samples; make the change when a shard has just been begun."""
    samples = adapter.read(place, variant)
    if not change:
        yield from samples
        return
    stored = adapter.shards(place, variant)
    keys = keys_by_shard(stored, pictures)
    home = {key: path for path in stored for key in keys[path]}
    came: Counter[Path] = Counter()
    for count, item in enumerate(samples, start=1):
        if item is None:
            if change:
                raise RuntimeError("the epoch ended before the change could be made")
            yield None
            continue
        path = home[item[0]]
        came[path] += 1
        # With most of the shard still to come, so that the change matters.
        if change and count >= len(pictures) // 3 and came[path] <= len(keys[path]) * 2 // 5:
            other = stored[-1] if path != stored[-1] else stored[0]
            report |= {"files": [path.name], "key": -1, "span": [1, path.stat().st_size]}
            _change(adapter.live(place, variant, path), change, other.read_bytes())
            change = ""
        yield item


def _change(path: Path, change: str, other: bytes) -> None:
    size = path.stat().st_size
    content = (other * (size // len(other) + 1))[:size]
    if change == "truncated during":
        os.truncate(path, size // 2)
    elif change == "overwritten during":
        write_at(path, 0, content)
    else:
        temporary = path.with_name(path.name + ".new")
        temporary.write_bytes(content)
        os.replace(temporary, path)
