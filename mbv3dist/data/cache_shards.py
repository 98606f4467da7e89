"""Open shards of a cache: a whole one on the disk, and one that is read in ranges."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from mbv3dist.data.cache_folder import unpin

MAX_RANGES = 4  # a shard read more often than this is wanted as a whole, whatever was announced


class WholeShard:
    """A shard in the cache, which stays there until it is closed.

    Args:
        file: Descriptor of the pinned file; closed with the last reference, because another thread
            may still read when `close` is called.
        num_bytes: Its size.
    """

    def __init__(self, file: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._file = file

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset on; fewer than `size` at the end of the file."""
        return os.pread(self._file, size, offset)

    def close(self) -> None:
        """Let the cache remove it, should it need the room."""
        unpin(self._file)

    def __del__(self) -> None:
        os.close(self._file)


class RangedShard:
    """A shard of which a sample or two are read from the source; turns whole if it gets more.

    Args:
        index: Descriptor of the shard's pinned ``.idx``.
        num_bytes: Size of the shard.
        read_range: Reads [start, stop) from the source.
        open_whole: Brings the shard into the cache.
    """

    def __init__(
        self,
        index: int,
        num_bytes: int,
        *,
        read_range: Callable[[int, int], bytes],
        open_whole: Callable[[], WholeShard],
    ) -> None:
        self.num_bytes = num_bytes
        self._index = index
        self._read_range = read_range
        self._open_whole = open_whole
        self._lock = threading.Lock()
        self._reads = 0
        self._whole: WholeShard | None = None

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset on; fewer than `size` at the end of the file."""
        with self._lock:
            self._reads += 1
            if self._whole is None and self._reads > MAX_RANGES:
                self._whole = self._open_whole()
            whole = self._whole
        if whole is not None:
            return whole.read_at(offset, size)
        stop = min(offset + size, self.num_bytes)
        return self._read_range(offset, stop) if stop > offset else b""

    def close(self) -> None:
        """Let the cache remove what it has of the shard, should it need the room."""
        with self._lock:
            unpin(self._index)
            if self._whole is not None:
                self._whole.close()

    def __del__(self) -> None:
        os.close(self._index)
