"""What ``mbv3dist verify`` does: read everything, trust nothing, name all that is wrong.

The tar is walked header by header, apart from the index that is under test.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.convert.writer import BLOCK, padded
from mbv3dist.data.index import (
    INDEX_VERSION,
    TARGET_EXTENSIONS,
    Shard,
    Split,
    format_key,
    open_split,
    require_splits,
)
from mbv3dist.data.reader import class_problem, parse_target

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int  # of the data, bytes from the start of the tar
    data: bytes


class _TarDamageError(ValueError):
    """Where walking a tar had to stop, and why."""


def verify_dataset(
    out: str | Path,
    splits: Sequence[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Check sizes, SHA-256, index, CRC, tar structure, targets and picture headers.

    Args:
        out: Folder of the data set.
        splits: Names of the splits to check; all by default.
        progress: Called with (shards checked, shards) after each shard.

    Returns:
        {ok: bool, samples: number of samples read, problems: [str]}; a problem names the shard
        and, where it is about a sample, key and source.

    Raises:
        ValueError: if there is no such split.
    """
    names = list(splits) if splits else require_splits(out)
    opened = [open_split(out, name) for name in names]
    num_shards, num_done = sum(len(split.shards) for split in opened), 0
    problems: list[str] = []
    num_samples = 0
    for split in opened:
        if (split.task, split.classes) != (opened[0].task, opened[0].classes):
            problems.append(
                f"{split.name}.json: task or classes differ from those of {opened[0].name}.json"
            )
        sources = _Sources(split, problems)
        num_boxes = 0
        for number in range(len(split.shards)):
            samples, boxes = _verify_shard(split, number, sources, problems)
            num_samples += samples
            num_boxes += boxes
            num_done += 1
            if progress is not None:
                progress(num_done, num_shards)
        if num_boxes != split.num_boxes:
            problems.append(
                f"{split.name}.json: says {split.num_boxes} boxes, the shards hold {num_boxes}"
            )
        listed = {shard.path.name for shard in split.shards}
        for path in sorted((split.root / split.name).glob("*.tar")):
            if path.name not in listed:
                problems.append(f"{split.name}/{path.name}: not listed in {split.name}.json")
    return {"ok": not problems, "samples": num_samples, "problems": problems}


class _Sources:
    """Where samples come from, for messages; a damaged sources file is one problem, not many."""

    def __init__(self, split: Split, problems: list[str]) -> None:
        self._split: Split | None = split
        try:
            for index in range(len(split)):
                split.source(index)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            self._split = None

    def describe(self, index: int) -> str:
        """Return the key and source of a sample."""
        source = self._split.source(index) if self._split else "source unknown"
        return f"sample {format_key(index)} ({source})"


def _verify_shard(
    split: Split, number: int, sources: _Sources, problems: list[str]
) -> tuple[int, int]:
    """Check one shard; return the samples and boxes that could be read in it."""
    shard = split.shards[number]
    first, position, num_boxes = int(split.starts[number]), 0, 0
    lines, checksums = [], []
    try:
        _check_file(shard, problems)
        for picture, target in _pairs(_walk_tar(shard.path)):
            if position == shard.num_samples:
                raise _TarDamageError(f"more samples than the {shard.num_samples} expected")
            index = first + position
            where = f"{shard.url}: {sources.describe(index)}"
            num_boxes += _check_sample(split, index, picture, target, where, problems)
            parts = []
            for member in (picture, target):
                extension = member.name.partition(".")[2]
                parts.append(f"{extension} {member.offset} {len(member.data)} {member.name}")
                checksums.append(zlib.crc32(member.data))
            lines.append(" ".join(parts))
            position += 1
    except OSError as error:
        problems.append(f"{shard.url}: {error.strerror or error}")
        return position, num_boxes
    except _TarDamageError as error:
        place = "the end"
        if position < shard.num_samples:
            place = sources.describe(first + position)
        problems.append(f"{shard.url}: at {place}: {error}")
        return position, num_boxes
    if position != shard.num_samples:
        problems.append(f"{shard.url}: {position} samples instead of {shard.num_samples}")
    expected = "\n".join([f"{INDEX_VERSION} {position}", *lines, ""]).encode("utf-8")
    _check_side_file(shard, ".idx", expected, problems)
    _check_side_file(shard, ".crc", np.array(checksums, dtype="<u4").tobytes(), problems)
    return position, num_boxes


def _check_file(shard: Shard, problems: list[str]) -> None:
    """Compare a tar's size and SHA-256 with the split's description."""
    digest, size = hashlib.sha256(), 0
    with open(shard.path, "rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            size += len(data)
    if size != shard.num_bytes:
        problems.append(f"{shard.url}: {size} bytes instead of {shard.num_bytes}")
    if digest.hexdigest() != shard.sha256:
        problems.append(f"{shard.url}: its SHA-256 is not the one that SPLIT.json names")


def _check_side_file(shard: Shard, suffix: str, expected: bytes, problems: list[str]) -> None:
    path = shard.path.with_suffix(suffix)
    url = shard.url.removesuffix(".tar") + suffix
    if not path.is_file():
        problems.append(f"{url}: missing")
    elif path.read_bytes() != expected:
        problems.append(f"{url}: does not fit to the tar")


def _walk_tar(path: Path) -> Iterator[_Member]:
    """Yield the members of a plain ustar tar.

    Raises:
        _TarDamageError: at the first header or member that is not as it should be.
    """
    with open(path, "rb") as file:
        position = 0
        while (header := file.read(BLOCK)) != bytes(BLOCK):
            if len(header) < BLOCK:
                raise _TarDamageError("the tar ends without its end mark")
            info = _parse_header(header, position)
            data = file.read(info.size)
            padding = file.read(padded(info.size) - info.size)
            if len(data) + len(padding) != padded(info.size):
                raise _TarDamageError(f"member {info.name!r} is cut off")
            if any(padding):
                raise _TarDamageError(f"the padding behind {info.name!r} is not zero")
            yield _Member(info.name, position + BLOCK, data)
            position += BLOCK + padded(info.size)
        rest = file.read()
        if len(rest) < BLOCK or any(rest):
            raise _TarDamageError("half of the end mark is missing, or more stands behind it")


def _parse_header(header: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _TarDamageError(f"damaged tar header at byte {position} ({error})") from error
    if info.type != tarfile.REGTYPE or header[257:265] != b"ustar\x0000":
        raise _TarDamageError(f"member {info.name!r} is no plain ustar file")
    if (info.mtime, info.uid, info.gid, info.mode) != (0, 0, 0, 0o644):
        raise _TarDamageError(f"member {info.name!r} has a time, an owner or another mode")
    return info


def _pairs(members: Iterator[_Member]) -> Iterator[tuple[_Member, _Member]]:
    for picture in members:
        target = next(members, None)
        if target is None:
            raise _TarDamageError(f"{picture.name!r} has no target behind it")
        yield picture, target


def _check_sample(
    split: Split, index: int, picture: _Member, target: _Member, where: str, problems: list[str]
) -> int:
    """Check names, picture header and target of a sample; return its number of boxes."""
    extension = TARGET_EXTENSIONS[split.task]
    for member, suffix in ((picture, "jpg"), (target, extension)):
        expected = f"{format_key(index)}.{suffix}"
        if member.name != expected:
            problems.append(f"{where}: member {member.name!r} where {expected!r} belongs")
    size = _picture_size(picture.data)
    if size is None:
        problems.append(f"{where}: its picture is no RGB JPEG")
    try:
        parsed = parse_target(target.data, split.task)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return 0
    reason = class_problem(parsed, len(split.classes))
    if reason:
        problems.append(f"{where}: {reason}")
    if split.task == "detection":
        if size is not None and size != (parsed.width, parsed.height):
            problems.append(
                f"{where}: its target says {parsed.width}x{parsed.height}, the picture is "
                f"{size[0]}x{size[1]}"
            )
        reason = _box_problem(target.data)
        if reason:
            problems.append(f"{where}: {reason}")
    return len(parsed.boxes)


def _picture_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of an RGB JPEG, or None."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as image:
            right = image.format in ("JPEG", "MPO") and image.mode == "RGB"
            return image.size if right else None
    except Exception:
        return None  # Pillow raises nearly anything on damaged bytes; all of it means the same


def _box_problem(data: bytes) -> str:
    value = json.loads(data)
    for box in value["boxes"]:
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= value["width"] and 0 <= y0 < y1 <= value["height"]):
            return f"box {box} has no area or reaches outside the picture"
    return ""
