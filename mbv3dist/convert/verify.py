"""What ``mbv3dist verify`` does: read everything, trust nothing, name all that is wrong.

The tar is walked header by header, apart from the index that is under test. Nothing is unpacked,
and what a file claims to hold is never allocated before it is there.
"""

from __future__ import annotations

import hashlib
import json
import stat
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.convert.files import MAX_PICTURE_BYTES, UnusableFileError, read_bounded, show
from mbv3dist.convert.pixels import raw_size
from mbv3dist.convert.samples import sample_labels
from mbv3dist.convert.writer import BLOCK, padded
from mbv3dist.data.idx import INDEX_VERSION, PICTURE_EXTENSIONS, TARGET_EXTENSIONS
from mbv3dist.data.index import Shard, Split, open_split, require_splits
from mbv3dist.data.remote import is_url, redact
from mbv3dist.data.target import class_problem, parse_target

_READ_BYTES = 1 << 20
_MAX_TARGET_BYTES = 16 << 20
_BAD_TARGET = (TypeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int  # of the data, bytes from the start of the tar
    data: bytes


class _TarDamageError(ValueError):
    """Where walking a tar had to stop, and why."""


@dataclass
class _Found:
    """What the shards of a split were seen to hold.

    Attributes:
        num_samples: Samples read.
        num_boxes: Boxes in them.
        num_labels: For each sample, how many classes it has.
        labels: Those of the first sample, ascending, those of the second, ...
        complete: Whether every sample could be read.
    """

    num_samples: int = 0
    num_boxes: int = 0
    num_labels: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    complete: bool = True


def verify_dataset(
    out: str | Path,
    splits: Sequence[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Check sizes, SHA-256, index, CRC, tar structure, targets, labels and picture headers.

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
    if is_url(str(out)):
        raise ValueError(
            f"{redact(str(out))}: verify reads data sets on this machine; shards of a remote one "
            "are checked against SPLIT.json whenever they enter the cache"
        )
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
        found = _Found()
        for number in range(len(split.shards)):
            _verify_shard(split, number, sources, found, problems)
            num_done += 1
            if progress is not None:
                progress(num_done, num_shards)
        num_samples += found.num_samples
        if found.num_boxes != split.num_boxes:
            problems.append(
                f"{split.name}.json: says {split.num_boxes} boxes, the shards hold "
                f"{found.num_boxes}"
            )
        _check_labels(split, found, sources, problems)
        listed = {shard.url for shard in split.shards}
        for path in sorted((split.root / split.name).glob("*.tar")):
            if f"{split.name}/{path.name}" not in listed:
                problems.append(f"{split.name}/{show(path.name)}: not listed in {split.name}.json")
    return {"ok": not problems, "samples": num_samples, "problems": problems}


class _Sources:
    """Where samples come from, for messages; a damaged sources file is one problem, not many."""

    def __init__(self, split: Split, problems: list[str]) -> None:
        self._split = split
        self._usable = False
        path = split.root / f"{split.name}.sources.tsv"
        try:
            num_lines = _count_lines(path)
            if num_lines != len(split):
                problems.append(f"{path}: has {num_lines} lines for {len(split)} samples")
                return
            for index in range(len(split)):
                split.source(index)
            self._usable = True
        except (ValueError, OSError) as error:
            problems.append(str(error))

    def describe(self, index: int) -> str:
        """Return the key and source of a sample."""
        source = show(self._split.source(index)) if self._usable else "source unknown"
        return f"sample {self._split.key(index)} ({source})"


def _count_lines(path: Path) -> int:
    _check_regular(path)
    num_lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            num_lines += data.count(b"\n")
            last = data[-1:]
    if last != b"\n":
        raise ValueError(f"{path}: is cut off in its last line")
    return num_lines


def _check_regular(path: Path) -> None:
    """Raise OSError or ValueError unless reading this file would come to an end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: is a folder, a pipe, a device or the like, not a file")


def _check_labels(split: Split, found: _Found, sources: _Sources, problems: list[str]) -> None:
    """Compare ``SPLIT.labels.npy`` with the targets that were read."""
    try:
        path = split.root / f"{split.name}.labels.npy"
        _check_regular(path)
        if path.stat().st_size > 4 * len(split) + _READ_BYTES:
            raise ValueError(f"{path}: has far more bytes than {len(split)} labels take")
        labels = split.labels()
    except FileNotFoundError:
        problems.append(f"{split.name}.labels.npy: missing; convert again")
        return
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return
    if not found.complete or len(found.num_labels) != len(split):
        return  # a sample could not be read, which is said already
    if found.labels and not 0 <= min(found.labels) <= max(found.labels) < len(split.classes):
        return
    counts, flat = np.array(found.num_labels, np.int64), np.array(found.labels, np.int64)
    expected = sample_labels(counts, flat, len(split.classes))
    for index in np.flatnonzero(labels != expected):
        problems.append(
            f"{split.name}.labels.npy: says class {labels[index]} for "
            f"{sources.describe(int(index))}, which is of class {expected[index]}"
        )


def _verify_shard(
    split: Split, number: int, sources: _Sources, found: _Found, problems: list[str]
) -> None:
    """Check one shard; add what could be read in it to what was found."""
    shard = split.shards[number]
    first, position = int(split.starts[number]), 0
    lines, checksums = [], []
    try:
        _check_file(shard, problems)
        for picture, target in _pairs(_walk_tar(shard.path)):
            if position == shard.num_samples:
                raise _TarDamageError(f"more samples than the {shard.num_samples} expected")
            index = first + position
            where = f"{shard.url}: {sources.describe(index)}"
            _check_sample(split, index, picture, target, where, found, problems)
            parts = []
            for member in (picture, target):
                extension = member.name.partition(".")[2]
                parts.append(f"{extension} {member.offset} {len(member.data)} {member.name}")
                checksums.append(zlib.crc32(member.data))
            lines.append(" ".join(parts))
            position += 1
            found.num_samples += 1
    except OSError as error:
        problems.append(f"{shard.url}: {error.strerror or error}")
        found.complete = False
        return
    except _TarDamageError as error:
        place = "the end"
        if position < shard.num_samples:
            place = sources.describe(first + position)
        problems.append(f"{shard.url}: at {place}: {error}")
        found.complete = False
        return
    except ValueError as error:
        problems.append(str(error))
        found.complete = False
        return
    if position != shard.num_samples:
        problems.append(f"{shard.url}: {position} samples instead of {shard.num_samples}")
        found.complete = False
    expected = "\n".join([f"{INDEX_VERSION} {position}", *lines, ""])
    _check_side_file(shard, ".idx", expected.encode("utf-8", "surrogateescape"), problems)
    _check_side_file(shard, ".crc", np.array(checksums, dtype="<u4").tobytes(), problems)


def _check_file(shard: Shard, problems: list[str]) -> None:
    """Compare a tar's size and SHA-256 with the split's description.

    Raises:
        ValueError: if it is no file.
        _TarDamageError: if it is larger than it should be: the rest is not even read.
    """
    _check_regular(shard.path)
    size = shard.path.stat().st_size
    if size != shard.num_bytes:
        problems.append(f"{shard.url}: {size} bytes instead of {shard.num_bytes}")
        if size > shard.num_bytes:
            raise _TarDamageError("it is too long")
    digest = hashlib.sha256()
    with open(shard.path, "rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    if digest.hexdigest() != shard.sha256:
        problems.append(f"{shard.url}: its SHA-256 is not the one that SPLIT.json names")


def _check_side_file(shard: Shard, suffix: str, expected: bytes, problems: list[str]) -> None:
    path = shard.path.with_suffix(suffix)
    url = shard.url.removesuffix(".tar") + suffix
    try:
        whole = read_bounded(path, len(expected)) == expected
    except FileNotFoundError:
        problems.append(f"{url}: missing")
        return
    except UnusableFileError:
        whole = False
    except OSError as error:
        problems.append(f"{url}: {error.strerror or error}")
        return
    if not whole:
        problems.append(f"{url}: does not fit to the tar")


def _walk_tar(path: Path) -> Iterator[_Member]:
    """Yield the members of a plain ustar tar.

    Raises:
        _TarDamageError: at the first header or member that is not as it should be.
    """
    with open(path, "rb") as file:
        left = path.stat().st_size
        position = 0
        while (header := file.read(BLOCK)) != bytes(BLOCK):
            if len(header) < BLOCK:
                raise _TarDamageError("the tar ends without its end mark")
            info = _parse_header(header, position)
            left -= BLOCK + padded(info.size)
            if left < 0:
                raise _TarDamageError(f"member {show(info.name)!r} is cut off")
            if info.size > MAX_PICTURE_BYTES:
                raise _TarDamageError(f"member {show(info.name)!r} has {info.size} bytes")
            data = file.read(info.size)
            padding = file.read(padded(info.size) - info.size)
            if len(data) + len(padding) != padded(info.size):
                raise _TarDamageError(f"member {show(info.name)!r} is cut off")
            if any(padding):
                raise _TarDamageError(f"the padding behind {show(info.name)!r} is not zero")
            yield _Member(info.name, position + BLOCK, data)
            position += BLOCK + padded(info.size)
        rest = 0
        while data := file.read(_READ_BYTES):
            if any(data):
                raise _TarDamageError("more stands behind its end mark")
            rest += len(data)
        if rest < BLOCK:
            raise _TarDamageError("half of the end mark is missing")


def _parse_header(header: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _TarDamageError(f"damaged tar header at byte {position} ({error})") from error
    name = show(info.name)
    if info.type != tarfile.REGTYPE or header[257:265] != b"ustar\x0000" or info.size < 0:
        raise _TarDamageError(f"member {name!r} is no plain ustar file")
    if (info.mtime, info.uid, info.gid, info.mode) != (0, 0, 0, 0o644):
        raise _TarDamageError(f"member {name!r} has a time, an owner or another mode")
    return info


def _pairs(members: Iterator[_Member]) -> Iterator[tuple[_Member, _Member]]:
    for picture in members:
        target = next(members, None)
        if target is None:
            raise _TarDamageError(f"{show(picture.name)!r} has no target behind it")
        yield picture, target


def _check_sample(
    split: Split,
    index: int,
    picture: _Member,
    target: _Member,
    where: str,
    found: _Found,
    problems: list[str],
) -> None:
    """Check names, picture header and target of a sample; count its boxes and classes."""
    key, extension = split.key(index), TARGET_EXTENSIONS[split.task]
    picture_extension = PICTURE_EXTENSIONS[split.format]
    for member, suffix in ((picture, picture_extension), (target, extension)):
        expected = f"{key}.{suffix}"
        if member.name != expected:
            problems.append(f"{where}: member {show(member.name)!r} where {expected!r} belongs")
    size = raw_size(picture.data) if split.format == "raw" else _picture_size(picture.data)
    if size is None:
        what = "raw picture" if split.format == "raw" else "RGB JPEG"
        problems.append(f"{where}: its picture is no {what} that can be used")
    try:
        if len(target.data) > _MAX_TARGET_BYTES:
            raise ValueError(f"its target has {len(target.data)} bytes")
        parsed = parse_target(target.data, split.task)
        reason = class_problem(parsed, len(split.classes))
        labels = [parsed.label] if split.task == "classification" else parsed.labels.tolist()
        if split.task == "detection":
            reason = reason or _box_problem(target.data)
    except _BAD_TARGET as error:
        reason = show(str(error)) if isinstance(error, ValueError) else type(error).__name__
        problems.append(f"{where}: its target cannot be used: {reason}")
        found.complete = False
        return
    if reason:
        problems.append(f"{where}: {reason}")
    if split.task == "detection" and size is not None and size != (parsed.width, parsed.height):
        problems.append(
            f"{where}: its target says {parsed.width}x{parsed.height}, the picture is "
            f"{size[0]}x{size[1]}"
        )
    found.num_boxes += len(parsed.boxes)
    found.num_labels.append(len(set(labels)))
    found.labels += sorted(set(labels))


def _picture_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of an RGB JPEG, or None."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=("JPEG",)) as image:
                return image.size if image.mode == "RGB" else None
    except Exception:
        return None  # Pillow raises nearly anything on damaged bytes; all of it means the same


def _box_problem(data: bytes) -> str:
    value = json.loads(data)
    for box in value["boxes"]:
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= value["width"] and 0 <= y0 < y1 <= value["height"]):
            return f"box {box} has no area or reaches outside the picture"
    return ""
