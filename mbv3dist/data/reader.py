"""Bytes of samples out of local shards, through mmap and the ``.idx`` beside each tar.

Nothing is copied: ``read`` hands out views into the mapped file. A shard is opened when it is
first needed; the number held open is bounded, the one longest unused goes first.
"""

from __future__ import annotations

import json
import mmap
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mbv3dist.data.index import (
    TARGET_EXTENSIONS,
    DamagedShardError,
    ShardIndex,
    Split,
    format_key,
    read_idx,
)

__all__ = ["DamagedShardError", "Reader", "Target", "parse_target"]

# A map holds a file descriptor; half of the usual limit of 1024 leaves room for everything else.
MAX_OPEN_SHARDS = 512
_BLOCK = 512


@dataclass(frozen=True)
class Target:
    """What is known about one picture.

    Attributes:
        label: Class number, or -1 for detection.
        boxes: float32 [M, 4], xyxy pixels of the stored picture, 0-based, half-open.
        labels: int64 [M], class numbers without background.
        difficult: bool [M].
        width: Pixels of the stored picture; 0 for classification (unknown before decoding).
        height: Likewise.
    """

    label: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    width: int
    height: int


@dataclass(frozen=True)
class _OpenShard:
    """A mapped tar with its index and, if reads are verified, its checksums (uint32 [2N])."""

    view: memoryview
    index: ShardIndex
    checksums: np.ndarray | None


class Reader:
    """Reads samples of a split by pack index; safe to share between threads.

    Args:
        split: An open split, its shards on a local disk.
        verify: ``open`` checks sizes and index when a shard is opened and each member's tar
            header when it is read; ``always`` also checks each member's CRC-32.
        max_open_shards: Number of shards held open.

    Raises:
        ValueError: if ``verify`` is neither.
    """

    def __init__(
        self, split: Split, *, verify: str = "open", max_open_shards: int = MAX_OPEN_SHARDS
    ) -> None:
        if verify not in ("open", "always"):
            raise ValueError(f"data.verify is {verify!r}; use 'open' or 'always'")
        assert max_open_shards >= 1
        self.split = split
        self.verify = verify
        self._max_open = max_open_shards
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, index: int) -> tuple[memoryview, memoryview]:
        """Return a sample's picture bytes and target bytes, valid as long as they are held.

        Args:
            index: Pack index of the sample.

        Raises:
            DamagedShardError: if the shard or the sample is damaged.
            ValueError: if there is no such sample.
        """
        number, position = self.split.locate(index)
        shard = self._shard(number)
        table = shard.index
        picture = self._member(
            shard, index, 2 * position, table.image_offset[position], table.image_size[position]
        )
        target = self._member(
            shard,
            index,
            2 * position + 1,
            table.target_offset[position],
            table.target_size[position],
        )
        return picture, target

    def target(self, index: int) -> Target:
        """Return a sample's parsed target; errors as in ``read``."""
        try:
            data = self.read(index)[1]
            target = parse_target(data, self.split.task, num_classes=len(self.split.classes))
        except DamagedShardError:
            raise
        except ValueError as error:
            self.split.locate(index)  # a wrong index is the caller's error, not damage
            raise self.damage(index, str(error)) from error
        return target

    def damage(self, index: int, reason: str) -> DamagedShardError:
        """Return the error that names a sample's shard, key and source, and the reason."""
        split = self.split
        shard = split.shards[split.locate(index)[0]]
        try:
            source = split.source(index)
        except ValueError:
            source = "source unknown"
        return DamagedShardError(
            f"{shard.url}: sample {split.key(index)} ({source}): {reason}; run `mbv3dist verify` "
            "on the data set, then copy that shard again or convert again with --overwrite"
        )

    def close(self) -> None:
        """Let go of all shards; views already handed out stay valid."""
        with self._lock:
            # A map with views in use must not be closed by force: the last view frees it.
            self._open.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            shard = self._open.get(number)
            if shard is not None:
                self._open.move_to_end(number)
                return shard
            shard = _open_shard(self.split, number, checksums=self.verify == "always")
            self._open[number] = shard
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return shard

    def _member(
        self, shard: _OpenShard, index: int, number: int, offset: int, size: int
    ) -> memoryview:
        """Return the bytes of a shard's member (2 per sample) after a look at its tar header."""
        view = shard.view
        extension = shard.index.target_ext if number % 2 else shard.index.image_ext
        name = f"{format_key(index)}.{extension}".encode("ascii")
        start = offset - _BLOCK
        if (
            view[start : start + len(name) + 1] != name + b"\0"
            or view[start + 124 : start + 135] != b"%011o" % size
        ):
            raise self.damage(index, _header_problem(bytes(view[start:offset]), name, int(size)))
        data = view[offset : offset + size]
        if shard.checksums is not None and zlib.crc32(data) != int(shard.checksums[number]):
            raise self.damage(index, f"checksum of its .{extension} member is wrong")
        return data


def _header_problem(header: bytes, name: bytes, size: int) -> str:
    """Return why a tar header is not that of the named member."""
    expected = name.decode("ascii")
    found = header[:100].rstrip(b"\0")
    if found != name:
        shown = found[:40].decode("ascii", "backslashreplace")
        return f"index and tar disagree: {expected} expected, {shown!r} found"
    try:
        stored = int(header[124:135], 8)
    except ValueError:
        return f"the tar header of {expected} is damaged"
    return f"index and tar disagree: {expected} has {stored} bytes in the tar, {size} in the index"


def _open_shard(split: Split, number: int, *, checksums: bool) -> _OpenShard:
    shard = split.shards[number]

    def damaged(reason: str) -> DamagedShardError:
        first, last = int(split.starts[number]), int(split.starts[number + 1]) - 1
        return DamagedShardError(
            f"{shard.path}: {reason} (samples {format_key(first)} to {format_key(last)} of split "
            f"{split.name!r}); copy that shard again or convert again with --overwrite"
        )

    try:
        with open(shard.path, "rb") as file:
            size = file.seek(0, 2)
            if size != shard.num_bytes:
                raise damaged(f"it has {size} bytes, {split.name}.json says {shard.num_bytes}")
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise damaged("the shard is missing") from error
    index = read_idx(shard.path.with_suffix(".idx"))
    reason = _index_problem(split, number, index)
    if reason:
        raise damaged(f"its .idx {reason}")
    table = _read_checksums(shard.path.with_suffix(".crc"), len(index)) if checksums else None
    return _OpenShard(view, index, table)


def _index_problem(split: Split, number: int, index: ShardIndex) -> str:
    """Return why an index cannot be that of the shard, or an empty string."""
    shard = split.shards[number]
    if len(index) != shard.num_samples:
        return f"lists {len(index)} samples instead of {shard.num_samples}"
    if index.image_ext != "jpg" or index.target_ext != TARGET_EXTENSIONS[split.task]:
        return f"lists .{index.image_ext} and .{index.target_ext} members"
    first = int(split.starts[number])
    for position, name in enumerate(index.names):
        if name != f"{format_key(first + position)}.jpg":
            return f"names {name} where {format_key(first + position)}.jpg belongs"
    for offset, size in (
        (index.image_offset, index.image_size),
        (index.target_offset, index.target_size),
    ):
        if np.any(offset < _BLOCK) or np.any(size < 0) or np.any(offset > shard.num_bytes - size):
            return "points outside the tar"
    return ""


def _read_checksums(path: Path, num_samples: int) -> np.ndarray:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedShardError(f"{path} is missing; copy the data set again") from error
    if len(data) != 8 * num_samples:
        raise DamagedShardError(
            f"{path} has {len(data)} bytes instead of {8 * num_samples}; copy the data set again"
        )
    return np.frombuffer(data, dtype="<u4")


def parse_target(data: bytes | memoryview, task: str, *, num_classes: int | None = None) -> Target:
    """Parse the bytes of a ``.cls`` or ``.json`` member.

    Args:
        data: The member's bytes.
        task: ``classification`` (a class number in ASCII) or ``detection`` (JSON).
        num_classes: Classes there are; class numbers outside are refused, because on a GPU they
            would end in a device assert. None: any number is taken.

    Raises:
        ValueError: with the reason, if the bytes are no such target.
    """
    assert task in TARGET_EXTENSIONS
    target = _parse_class(data) if task == "classification" else _parse_boxes(data)
    if num_classes is not None:
        reason = class_problem(target, num_classes)
        if reason:
            raise ValueError(reason)
    return target


def class_problem(target: Target, num_classes: int) -> str:
    """Return which class number of a target is outside 0 to num_classes - 1, or empty."""
    numbers = target.labels.tolist() if target.label < 0 else [target.label]
    if not numbers or (min(numbers) >= 0 and max(numbers) < num_classes):
        return ""
    wrong = next(number for number in numbers if not 0 <= number < num_classes)
    return f"class number {wrong} for {num_classes} classes"


def _parse_class(data: bytes | memoryview) -> Target:
    text = bytes(data)
    if not text.isdigit():
        raise ValueError(f"its .cls member is {text[:20]!r}, not a class number")
    return Target(
        label=int(text),
        boxes=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int64),
        difficult=np.zeros(0, np.bool_),
        width=0,
        height=0,
    )


def _parse_boxes(data: bytes | memoryview) -> Target:
    try:
        value: dict[str, Any] = json.loads(bytes(data))
        boxes = np.array(value["boxes"], dtype=np.float32).reshape(-1, 4)
        labels = np.array(value["labels"], dtype=np.int64)
        difficult = np.array(value["difficult"], dtype=np.bool_)
        width, height = int(value["width"]), int(value["height"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its .json member is no target ({type(error).__name__})") from error
    if not (labels.shape == difficult.shape == (len(boxes),)) or len(value["boxes"]) != len(boxes):
        raise ValueError("its .json member has boxes, labels and difficult of different lengths")
    if width < 1 or height < 1 or not np.all(np.isfinite(boxes)):
        raise ValueError("its .json member has an impossible size or box")
    return Target(-1, boxes, labels, difficult, width, height)
