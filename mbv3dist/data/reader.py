"""Bytes of samples out of shards, by the ``.idx`` beside each tar.

A sample is one read of its two members with their tar headers. Reads are positioned (pread), not
mapped: a file that is cut short while the run goes on, or a network disk that fails, is then an
error with a name, where a mapped file would end the process. A shard is opened when it is first
needed; the number held open is bounded, the one longest unused goes first.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import numpy as np

from mbv3dist.data.files import UnusableFileError
from mbv3dist.data.idx import (
    DamagedShardError,
    ShardIndex,
    format_key,
    read_idx,
)
from mbv3dist.data.index import Split
from mbv3dist.data.members import check_headers
from mbv3dist.data.shard_checks import BLOCK, header_problem, index_problem, read_checksums
from mbv3dist.data.shards import LocalShards, ShardBytes, ShardStore, is_changed
from mbv3dist.data.target import Target, parse_target
from mbv3dist.messages import one_line

__all__ = ["DamagedShardError", "Members", "Reader"]

# An open shard is a file descriptor; half of the usual limit of 1024 leaves room for all else.
MAX_OPEN_SHARDS = 512
VERIFY = ("open", "first", "always")


@dataclass
class _OpenShard:
    """A shard with its index and, once a checksum was asked for, checksums (uint32 [2N])."""

    bytes: ShardBytes
    index: ShardIndex
    checksums: np.ndarray | None = None

    def __post_init__(self) -> None:
        index = self.index
        columns = index.image_offset, index.image_size, index.target_offset, index.target_size
        # Python's ints out of a memoryview come five times as fast as out of an array.
        self._columns = [np.ascontiguousarray(column).data for column in columns]

        # The names behind the keys, for members.check_headers.
        names = [
            name.encode("ascii").ljust(8, b"\0") for name in (index.image_ext, index.target_ext)
        ]
        self.extensions = list(b"".join(names))

    def span(self, position: int) -> tuple[int, int, int, int]:
        """Return offset and size of a sample's picture and of its target."""
        image_offset, image_size, target_offset, target_size = self._columns
        return (
            image_offset[position],
            image_size[position],
            target_offset[position],
            target_size[position],
        )


class _Found(NamedTuple):
    """A sample's bytes, `start` in its shard on."""

    place: int
    number: int
    position: int
    shard: _OpenShard
    data: bytes
    start: int


@dataclass
class Members:
    """The members of n samples in memory.

    Attributes:
        places: Which of those asked for they are.
        pictures: Their pictures.
        targets: Their targets.
        addresses: int64 [n, 2], of the first bytes of picture and target.
        sizes: int64 [n, 2], bytes of both.
    """

    places: list[int]
    pictures: list[memoryview]
    targets: list[memoryview]
    addresses: np.ndarray
    sizes: np.ndarray

    def select(self, chosen: list[int]) -> Members:
        """Return some of them."""
        return Members(
            [self.places[n] for n in chosen],
            [self.pictures[n] for n in chosen],
            [self.targets[n] for n in chosen],
            self.addresses[chosen],
            self.sizes[chosen],
        )


def _members(found: list[_Found]) -> Members:
    count = len(found)
    addresses, sizes = np.empty((count, 2), np.int64), np.empty((count, 2), np.int64)
    pictures, targets = [], []
    for n, item in enumerate(found):
        _, image_size, target_offset, target_size = item.shard.span(item.position)
        second = target_offset - item.start
        view = memoryview(item.data)
        base = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        addresses[n] = base + BLOCK, base + second
        sizes[n] = image_size, target_size
        pictures.append(view[BLOCK : BLOCK + image_size])
        targets.append(view[second : second + target_size])
    return Members([item.place for item in found], pictures, targets, addresses, sizes)


@dataclass
class _Slot:
    """A place for an open shard; its lock keeps threads from opening one twice."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    shard: _OpenShard | None = None


class Reader:
    """Reads samples of a split by pack index; safe to share between threads.

    Args:
        split: An open split.
        verify: ``open`` checks sizes and index when a shard is opened and each member's tar
            header when it is read; ``first`` also checks each member's CRC-32 when a sample is
            read with ``first=True``; ``always`` does that with every read.
        max_open_shards: Number of shards held open.
        store: Where shards are had from; default: the disk, or on demand for a remote split.

    Raises:
        ValueError: if ``verify`` is none of these.
    """

    def __init__(
        self,
        split: Split,
        *,
        verify: str = "first",
        max_open_shards: int = MAX_OPEN_SHARDS,
        store: ShardStore | None = None,
    ) -> None:
        if verify not in VERIFY:
            raise ValueError(f"data.verify is {verify!r}; use 'open', 'first' or 'always'")
        assert max_open_shards >= 1
        self.split = split
        self.verify = verify
        self._store = store or default_store(split)
        self._max_open = max_open_shards
        self._open: OrderedDict[int, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, index: int, *, first: bool = True) -> tuple[memoryview, memoryview]:
        """Return a sample's picture bytes and target bytes.

        Args:
            index: Pack index of the sample.
            first: Whether the run reads the sample for the first time.

        Raises:
            DamagedShardError: if the shard or the sample is damaged.
            ValueError: if there is no such sample.
            OSError: if a disk or server fails.
        """
        found = self._fetch(index)
        number, position, data, start = found.number, found.position, found.data, found.start
        shard, table = found.shard, found.shard.index
        _, image_size, target_offset, target_size = shard.span(position)
        key = format_key(table.first_key + position).encode("ascii")
        checked = self.verify == "always" or (self.verify == "first" and first)
        checked = checked or is_changed(shard.bytes)
        checksums = self._checksums(number, shard) if checked else None
        whole = memoryview(data)
        members: list[memoryview] = []
        for offset, size, extension in (
            (BLOCK, image_size, table.image_ext),
            (target_offset - start, target_size, table.target_ext),
        ):
            header = offset - BLOCK
            name = b"%b.%b" % (key, extension.encode("ascii"))
            # Compared as bytes: slicing and comparing memoryviews takes three times as long.
            if (
                data[header : header + len(name) + 1] != name + b"\0"
                or data[header + 124 : header + 135] != b"%011o" % size
            ):
                problem = header_problem(data[header:offset], name, size)
                raise self.damage(index, f"{problem} (header at byte {start + header})")
            member = whole[offset : offset + size]
            if checksums is not None:
                expected = int(checksums[2 * position + len(members)])
                if zlib.crc32(member) != expected:
                    at = start + offset
                    raise self.damage(
                        index, f"checksum of its .{extension} member at byte {at} is wrong"
                    )
            members.append(member)
        return members[0], members[1]

    def read_chunk(
        self, indices: Sequence[int], first: Sequence[bool]
    ) -> tuple[Members, dict[int, BaseException]]:
        """Read many samples, with the checks of `read`.

        Args:
            indices: Pack indices.
            first: Whether each is read for the first time in the run.

        Returns:
            The members of those that can be read, and what `read` raises for the others, by
            their place in `indices`.
        """
        errors: dict[int, BaseException] = {}
        found: list[_Found] = []
        for place, index in enumerate(indices):
            try:
                found.append(self._fetch(index, place))
            except Exception as error:
                errors[place] = error
        members = _members(found)
        good = np.empty(len(found), np.bool_)
        keys = np.array([item.shard.index.first_key + item.position for item in found], np.int64)
        extensions = np.array([item.shard.extensions for item in found], np.uint8)
        bad = check_headers(
            members.addresses, members.sizes, keys, extensions.reshape(-1, 2, 8), good
        )
        sources = {item.number: item.shard.bytes for item in found}
        changed = {number for number, source in sources.items() if is_changed(source)}
        for n, item in enumerate(found):
            checked = self.verify == "always" or (self.verify == "first" and first[item.place])
            if checked or item.number in changed:
                try:
                    good[n] &= self._has_checksums(item, members, n)
                except Exception as error:
                    errors[item.place] = error
            bad += not good[n]
        if bad or errors:
            # Once more, one by one: `read` says what is wrong.
            for n, item in enumerate(found):
                if not good[n] and item.place not in errors:
                    try:
                        self.read(indices[item.place], first=first[item.place])
                    except Exception as error:
                        errors[item.place] = error
                    else:
                        reason = "it was changed while it was read"
                        errors[item.place] = self.damage(indices[item.place], reason)
            members = _members([item for item in found if item.place not in errors])
        return members, errors

    def _fetch(self, index: int, place: int = 0) -> _Found:
        """Read a sample's bytes, from the header of its picture to the end of its target."""
        number, position = self.split.locate(index)
        shard = self._shard(number)
        image_offset, _, target_offset, target_size = shard.span(position)
        start = image_offset - BLOCK
        size = target_offset + target_size - start
        data = shard.bytes.read_at(start, size)
        if len(data) < size:
            reason = f"the tar ends at byte {start + len(data)}; it was cut short while it was read"
            raise self.damage(index, reason)
        return _Found(place, number, position, shard, data, start)

    def _has_checksums(self, item: _Found, members: Members, n: int) -> bool:
        checksums = self._checksums(item.number, item.shard)
        expected = checksums[2 * item.position : 2 * item.position + 2].tolist()
        return bool(expected == [zlib.crc32(members.pictures[n]), zlib.crc32(members.targets[n])])

    def target(self, index: int) -> Target:
        """Return a sample's parsed target; errors as in ``read``."""
        data = self.read(index)[1]
        try:
            return parse_target(data, self.split.task, num_classes=len(self.split.classes))
        except ValueError as error:
            raise self.damage(index, str(error)) from error

    def damage(self, index: int, reason: str) -> DamagedShardError:
        """Return the error that names a sample's shard, key and source, and the reason."""
        split = self.split
        shard = split.shards[split.locate(index)[0]]
        try:
            source = one_line(split.source(index))
        except (ValueError, OSError):
            source = "source unknown"
        return DamagedShardError(
            f"{shard.url}: sample {split.key(index)} ({source}): {reason}; run `mbv3dist verify` "
            "on the data set, then copy that shard again or convert again with --overwrite"
        )

    def advance(self, step: int) -> None:
        """Say that steps before `step` are done, so that what only they needed can go."""
        for number in self._store.advance(step):
            self._drop(number)

    def close(self) -> None:
        """Let go of all shards; bytes already handed out stay valid."""
        for number in list(self._open):
            self._drop(number)
        self._store.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drop(self, number: int) -> None:
        with self._lock:
            slot = self._open.pop(number, None)
        if slot is not None and slot.shard is not None:
            slot.shard.bytes.close()

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            slot = self._open.get(number)
            if slot is None:
                slot = self._open[number] = _Slot()
            else:
                self._open.move_to_end(number)
            # Those of a cache go when the plan says so; here the oldest go.
            excess = len(self._open) - self._max_open
            over = list(self._open)[:excess] if excess > 0 else []
        for other in over:
            self._drop(other)
        if slot.shard is None:
            with slot.lock:  # not the reader's: other shards are read while this one comes
                if slot.shard is None:
                    slot.shard = self._open_shard(number)
        return slot.shard

    def _open_shard(self, number: int) -> _OpenShard:
        expected = int(self.split.shard_bytes[number])
        try:
            source = self._store.open(number)
        except FileNotFoundError as error:
            raise self._shard_damage(number, "the shard is missing") from error
        except UnusableFileError as error:
            raise self._shard_damage(number, str(error)) from error
        try:
            if source.num_bytes != expected:
                reason = f"it has {source.num_bytes} bytes, {self.split.name}.json says {expected}"
                raise self._shard_damage(number, reason)
            index = read_idx(self._store.idx_path(number))
            reason = index_problem(self.split, number, index)
            if reason:
                raise self._shard_damage(number, f"its .idx {reason}")
        except BaseException:
            source.close()
            raise
        return _OpenShard(source, index)

    def _shard_damage(self, number: int, reason: str) -> DamagedShardError:
        split = self.split
        first, last = int(split.starts[number]), int(split.starts[number + 1]) - 1
        return DamagedShardError(
            f"{split.shards[number].path}: {reason} (samples {split.key(first)} to "
            f"{split.key(last)} of split {split.name!r}); copy that shard again or convert again "
            "with --overwrite"
        )

    def _checksums(self, number: int, shard: _OpenShard) -> np.ndarray:
        if shard.checksums is None:
            shard.checksums = read_checksums(self._store.crc_path(number), len(shard.index))
        return shard.checksums


def default_store(split: Split) -> ShardStore:
    """Return where shards are had from without a plan: the disk, or a cache filled on demand."""
    from mbv3dist.data.joined import JoinedShards, JoinedSplit

    if isinstance(split, JoinedSplit):
        return JoinedShards(split, [default_store(part) for part in split.parts])
    if split.remote is None:
        return LocalShards(split)
    from mbv3dist.data.cache import on_demand_cache

    return on_demand_cache(split)
