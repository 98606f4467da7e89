"""Open shards, and where they are had from: this machine's disks, or (cache.py) a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from mbv3dist.data.files import open_regular
from mbv3dist.data.index import Split


class ShardBytes(Protocol):
    """One open shard; safe to share between threads."""

    num_bytes: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes from an offset on; fewer than `size` at the end of the file."""

    def close(self) -> None:
        """Let go of it; nobody reads any more."""


class ShardStore(Protocol):
    """Where the shards of a split are had from: this machine's disk, or a cache of remote ones."""

    def open(self, shard: int) -> ShardBytes:
        """Open a shard; blocks until it is there."""

    def idx_path(self, shard: int) -> Path:
        """Its ``.idx`` as a local file."""

    def crc_path(self, shard: int) -> Path:
        """Its ``.crc`` as a local file."""

    def advance(self, step: int) -> list[int]:
        """Steps before `step` are done: the shards that nobody needs any more."""

    def close(self) -> None:
        """Stop all work."""


class LocalShards:
    """The store of a split on a local or network disk."""

    def __init__(self, split: Split):
        self._split = split

    def open(self, shard: int) -> ShardBytes:
        """As `ShardStore.open`."""
        return LocalShard(self._split.shards[shard].path)

    def idx_path(self, shard: int) -> Path:
        """As `ShardStore.idx_path`."""
        return self._split.shards[shard].path.with_suffix(".idx")

    def crc_path(self, shard: int) -> Path:
        """As `ShardStore.crc_path`."""
        return self._split.shards[shard].path.with_suffix(".crc")

    def advance(self, step: int) -> list[int]:
        """Nothing has to be let go of early."""
        return []

    def close(self) -> None:
        """Nothing to stop."""


class LocalShard:
    """An open tar."""

    def __init__(self, path: Path):
        self._file = open_regular(path)
        status = os.fstat(self._file)
        self.num_bytes = status.st_size
        self._opened_as = status.st_size, status.st_mtime_ns

    def read_at(self, offset: int, size: int) -> bytes:
        """As `ShardBytes.read_at`."""
        return os.pread(self._file, size, offset)

    @property
    def is_changed(self) -> bool:
        """Whether somebody wrote to the file since it was opened."""
        status = os.fstat(self._file)
        return (status.st_size, status.st_mtime_ns) != self._opened_as

    def close(self) -> None:
        """Nothing yet: a thread may be reading; the last reference closes the file."""

    def __del__(self) -> None:
        if hasattr(self, "_file") and os is not None:  # at exit, modules go first
            os.close(self._file)


def is_changed(source: ShardBytes) -> bool:
    """Return whether somebody wrote to a shard of the disk since it was opened."""
    return isinstance(source, LocalShard) and source.is_changed
