"""The files of a split's shards in the cache: their names, and how they get there."""

from __future__ import annotations

import enum
import logging
import os
import threading
from pathlib import Path
from typing import BinaryIO

from mbv3dist.data.cache_folder import CacheFolder, allocate, folder_errors, lock_partial
from mbv3dist.data.cache_room import Room
from mbv3dist.data.idx import INDEX_VERSION, DamagedShardError
from mbv3dist.data.index import Split
from mbv3dist.data.remote import Remote, RemoteError, mirror_folder

_LOG = logging.getLogger("mbv3dist")


class Filled(enum.Enum):
    """What came of making a file."""

    HERE = "here"
    BUSY = "somebody else is making it"
    NO_ROOM = "what is needed sooner fills the cache"


class ShardFiles:
    """Makes the files of a split's shards in a cache folder; safe to share between threads.

    Attributes:
        num_downloaded: Shards that were fetched as a whole.
    """

    def __init__(self, split: Split, remote: Remote, folder: CacheFolder, room: Room) -> None:
        self.num_downloaded = 0
        self._split = split
        self._remote = remote
        self._folder = folder
        self._room = room
        assert split.remote is not None
        self._mirror = mirror_folder(split.remote, folder.path)
        self._lock = threading.Lock()

    def path(self, shard: int, suffix: str) -> Path:
        """Return a file's place; another version of the data set has others, by the digest."""
        row = self._split.shards[shard]
        stem = row.url.removesuffix(".tar")
        return self._mirror / f"{stem}.{row.sha256[:16]}{suffix}"

    def url(self, shard: int, suffix: str = ".tar") -> str:
        """Return a file's URL for messages."""
        path = self._split.shards[shard].url.removesuffix(".tar") + suffix
        return self._remote.shown(path)

    def is_here(self, shard: int, suffix: str) -> bool:
        """Return whether a file is in the cache; one of a wrong size is removed."""
        path = self.path(shard, suffix)
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            return False
        if not self.has_right_size(shard, suffix, size):
            self._folder.discard(path)
            return False
        return True

    def has_right_size(self, shard: int, suffix: str, size: int) -> bool:
        """Return whether a file can be the one of that shard."""
        return suffix != ".tar" or size == self._split.shards[shard].num_bytes

    def fill(self, shard: int, suffix: str, *, beyond: int | None) -> Filled:
        """Make a file of a shard, unless it is here or in the making.

        Args:
            shard: Its number.
            suffix: ``.tar``, ``.idx`` or ``.crc``.
            beyond: Only shards that are needed in more steps than this may go for it; nobody
                waits. None: it is needed now, whatever is not in use goes, and room is waited for.
        """
        path = self.path(shard, suffix)
        if self.is_here(shard, suffix):
            return Filled.HERE
        with folder_errors(self._folder.path):
            partial = lock_partial(path)
        if partial is None:
            return Filled.BUSY
        with os.fdopen(partial, "r+b") as file:
            made = False
            try:
                if self.is_here(shard, suffix):
                    return Filled.HERE
                self._folder.empty(partial)  # a killed process may have left it
                with folder_errors(self._folder.path):
                    made = self._write(shard, suffix, file, beyond)
                if made:
                    self._folder.finish(path)
            finally:
                if not made:
                    self._folder.empty(partial, path)
        return Filled.HERE if made else Filled.NO_ROOM

    def _write(self, shard: int, suffix: str, file: BinaryIO, beyond: int | None) -> bool:
        """Write a file's bytes if there is room for them."""
        row = self._split.shards[shard]
        if suffix != ".tar":
            data = self._read_small(shard, suffix)
            if not self._room.reserve(file.fileno(), len(data), beyond=beyond):
                return False
            file.write(data)
            file.flush()
            return True
        if not self._room.reserve(file.fileno(), row.num_bytes, beyond=beyond):
            return False
        for small in (".idx", ".crc"):
            try:
                self.fill(shard, small, beyond=beyond)
            except (RemoteError, DamagedShardError) as error:
                _LOG.debug("%s", error)  # met again by whoever asks for that file
        allocate(file.fileno(), row.num_bytes)
        try:
            self._remote.download_to(row.url, file, sha256=row.sha256, num_bytes=row.num_bytes)
        except FileNotFoundError as error:
            raise self.missing(shard, suffix) from error
        with self._lock:
            self.num_downloaded += 1
        return True

    def _read_small(self, shard: int, suffix: str) -> bytes:
        """Return the bytes of an ``.idx`` or ``.crc`` of the right form."""
        row = self._split.shards[shard]
        path = row.url.removesuffix(".tar") + suffix
        for _ in range(2):
            try:
                data = self._remote.read(path)
            except FileNotFoundError as error:
                raise self.missing(shard, suffix) from error
            if suffix == ".crc":
                right = len(data) == 8 * row.num_samples
            else:
                head = f"{INDEX_VERSION} {row.num_samples}\n".encode()
                right = data.startswith(head) and data.count(b"\n") == row.num_samples + 1
            if right:
                return data
        raise DamagedShardError(
            f"{self.url(shard, suffix)} is not the {suffix} of a shard of {row.num_samples} "
            "samples; upload the data set again"
        )

    def missing(self, shard: int, suffix: str) -> DamagedShardError:
        """Return the error that says that the source has no such file."""
        return DamagedShardError(
            f"{self.url(shard, suffix)} is missing, though {self._split.name}.json lists the "
            "shard; upload the data set again"
        )
