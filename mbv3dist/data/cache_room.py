"""Room in the cache: whether the plan fits, what goes to make room, and waiting for it."""

from __future__ import annotations

import bisect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from mbv3dist.data.cache_folder import CacheFolder, CacheFolderError, Unit

ROOM_POLL_S = 0.1  # how often room is looked for
NOT_NEEDED = 1e9  # "steps" until a shard is needed that no plan asks for
FRESH_S = 300.0  # a shard that another run opened since counts as in use
_OF_ANOTHER_RUN = 0.5  # these go before what is needed now, and after all else
_STRANGER = 1e12
_LOG = logging.getLogger("mbv3dist")

# Of all caches open in this process: data sets that are read together share a folder.
_open_rooms: weakref.WeakSet[Room] = weakref.WeakSet()


class Room:
    """Makes room in a cache folder for one `ShardCache`.

    Args:
        folder: The folder.
        steps_to: Returns in how many steps a unit is needed; None if it is not of that cache.
        horizon: Returns the steps within which what is needed has been fetched ahead.
        wait_s: How long to wait for room that others hold.
        local_rank: This process among those of the node, for messages.
    """

    def __init__(
        self,
        folder: CacheFolder,
        steps_to: Callable[[Unit], float | None],
        horizon: Callable[[], int],
        *,
        wait_s: float,
        local_rank: int,
    ) -> None:
        self.folder = folder
        self.steps_to = steps_to
        self.peak_bytes = 0  # what the plan needs at once, over the node's processes
        self._horizon = horizon
        self._wait_s = wait_s
        self._local_rank = local_rank
        self._lock = threading.Lock()
        # By the steps until they are needed, as they were when this was made: last goes first.
        self._ranking: list[tuple[float, str, Unit]] = []
        self._ranked_until = 0.0
        self._closed = threading.Event()
        self._waited = False

    def close(self) -> None:
        """End waiting, and no longer have a say in what goes."""
        self._closed.set()
        _open_rooms.discard(self)

    def enter(self, peak_bytes: int, num_ranks: int) -> None:
        """Have a say in what goes; refuse a plan that could not go on within the bound.

        Args:
            peak_bytes: What one process needs at once.
            num_ranks: Processes of the node with needs of their own.

        Raises:
            ValueError: naming the room needed and the flags.
        """
        self.peak_bytes = peak_bytes * num_ranks
        rooms = [*self._rooms(), self]
        units = self.folder.units()
        used = self.folder.used_bytes()
        fixed = max(used - sum(unit.num_bytes for unit in units), 0)  # descriptions
        total = fixed + sum(room.peak_bytes for room in rooms)
        limit = self.folder.limit_bytes
        if total > limit:
            raise ValueError(
                f"the cache of {_gb(limit)} cannot hold what is read at once: {_gb(total)} "
                f"({num_ranks} x {_gb(peak_bytes)} for the processes of this node, "
                f"{_gb(total - self.peak_bytes)} for other splits and descriptions); set "
                f"--data.cache_gb to {_gb(total, up=True)[:-3]} or more, or lower --data.lanes or "
                "--data.block_shards"
            )
        _open_rooms.add(self)
        if used > limit:  # a larger bound's, of an earlier run
            with self._lock:
                self._rank()
                units = [unit for _, _, unit in reversed(self._ranking)]
                self.folder.reserve(0, units, lambda: None)
                self._ranked_until = 0.0

    def reserve(self, file: int, num_bytes: int, *, beyond: int | None) -> bool:
        """Give a file in the making its size, within the bound.

        Args:
            file: Its descriptor.
            num_bytes: Its size.
            beyond: What is needed in more steps than this may go; False if that is not enough.
                None: whatever nobody uses may go, and room is waited for.

        Raises:
            CacheFolderError: if there was no room in time, or never can be.
        """
        limit = self.folder.limit_bytes
        if num_bytes > limit:
            raise CacheFolderError(
                f"cache folder {self.folder.path}: a file of {_gb(num_bytes)} does not fit into a "
                f"cache of {_gb(limit)}; raise --data.cache_gb"
            )
        started = time.monotonic()
        while not self._try(file, num_bytes, -1 if beyond is None else beyond):
            if beyond is not None:
                return False
            self._wait(num_bytes, time.monotonic() - started)
        return True

    def _try(self, file: int, num_bytes: int, beyond: int) -> bool:
        """Reserve, removing what may go; False if all of that is not enough."""

        def make() -> None:
            os.ftruncate(file, num_bytes)

        if self.folder.reserve(num_bytes, [], make):
            return True
        with self._lock:
            # An old ranking will do for what is far away; what is near goes by a new one only.
            if time.monotonic() > self._ranked_until:
                self._rank()
            if self._evict(num_bytes, beyond if beyond >= 0 else self._horizon(), make):
                return True
            if beyond >= 0:
                return False
            self._rank()
            return self._evict(num_bytes, beyond, make)

    def _evict(self, num_bytes: int, beyond: int, make: Callable[[], None]) -> bool:
        """Reserve, removing what the ranking says; False if that is not enough."""
        while victims := self._victims(num_bytes, beyond):
            fits = self.folder.reserve(num_bytes, victims, make)
            for unit in victims:  # those that did not have to go
                bisect.insort(self._ranking, (self._value(unit), unit.stem, unit))
            if fits:
                return True
        return False

    def _victims(self, num_bytes: int, beyond: int) -> list[Unit]:
        """Take units off the ranking that may go, a few more than are needed."""
        victims: list[Unit] = []
        total = 0
        while self._ranking and total < 2 * num_bytes:
            # Steps have passed since the ranking was made: what came nearer goes back into it.
            _, stem, unit = self._ranking.pop()
            value = self._value(unit)
            if self._ranking and value < self._ranking[-1][0]:
                bisect.insort(self._ranking, (value, stem, unit))
                continue
            if value <= beyond:
                self._ranking.append((value, stem, unit))
                break
            victims.append(unit)
            total += unit.num_bytes
        return victims

    def _rank(self) -> None:
        started = time.monotonic()
        units = self.folder.units()
        self._ranking = sorted((self._value(unit), unit.stem, unit) for unit in units)
        now = time.monotonic()
        # Of a hundred thousand shards the ranking takes a second; it must not take all the time.
        self._ranked_until = now + 5 * (now - started)

    def _value(self, unit: Unit) -> float:
        """Return in how many steps a unit is needed: the farthest goes first."""
        for room in self._rooms():
            steps = room.steps_to(unit)
            if steps is not None:
                return steps
        age = time.time() - unit.used_at
        return _OF_ANOTHER_RUN if age < FRESH_S else _STRANGER + age

    def _rooms(self) -> list[Room]:
        """Return all of this process in the same folder."""
        return [room for room in _open_rooms if room.folder.path == self.folder.path]

    def _wait(self, num_bytes: int, waited_s: float) -> None:
        folder = self.folder
        if self._closed.wait(ROOM_POLL_S):
            raise CacheFolderError(f"cache folder {folder.path}: closed while waiting for room")
        if not self._waited:
            self._waited = True
            _LOG.warning(
                "cache folder %s: its %s are full of shards in use; process %d of this node waits",
                folder.path,
                _gb(folder.limit_bytes),
                self._local_rank,
            )
        if waited_s > self._wait_s:
            used = folder.pinned_bytes()
            raise CacheFolderError(
                f"cache folder {folder.path}: no room for {_gb(num_bytes)} in {waited_s:.0f} s; "
                f"{_gb(used)} of {_gb(folder.limit_bytes)} are in use by this run and others; set "
                f"--data.cache_gb to {_gb(used + num_bytes, up=True)[:-3]} or more, lower "
                "--data.lanes or --data.block_shards, or give each run its own --data.cache_dir"
            )


def _gb(num_bytes: int, *, up: bool = False) -> str:
    """Return a size in GB with three digits, rounded up if it is advice."""
    if up:
        num_bytes += num_bytes // 100
    return f"{num_bytes / 1e9:.3g} GB"
