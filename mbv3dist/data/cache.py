"""Remote shards in a local folder of bounded size, shared by all processes of a node.

A shard enters once for all processes, is checked against the split's SHA-256 on its way in, and
stays while the plan has use for it: what is needed last goes first. `cache_folder` keeps the books
on the disk, `cache_needs` says what is wanted; here shards are fetched, opened and chosen to go.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbv3dist.data.cache_files import Filled, ShardFiles
from mbv3dist.data.cache_folder import CacheFolder, Unit, folder_errors, pin
from mbv3dist.data.cache_needs import NeedWindow, shard_lookup
from mbv3dist.data.cache_room import NOT_NEEDED, ROOM_POLL_S, Room
from mbv3dist.data.cache_shards import RangedShard, WholeShard
from mbv3dist.data.index import Split
from mbv3dist.data.needs import Need
from mbv3dist.data.remote import Remote, RemoteError
from mbv3dist.data.shards import ShardBytes

DEFAULT_LIMIT_BYTES = 64 * 10**9
_POLL_S = 0.02  # how often a file that another process makes is looked for
_IDLE_S = 1.0  # a step that is done ends the pause
_INDEX_BYTES = 96  # of .idx and .crc, per sample, at most about
_LOG = logging.getLogger("mbv3dist")


@dataclass(frozen=True)
class CacheStats:
    """What a cache did so far, in this process; sizes in bytes.

    `peak_bytes` is the largest sum of all files in the folder, those in the making at full size,
    that this process brought about; `evicted` counts what it removed of any data set.
    """

    requests: int
    retries: int
    bytes_downloaded: int
    shards_downloaded: int
    ranges_read: int
    evicted: int
    peak_bytes: int


class ShardCache:
    """The shards of one remote split in a folder shared by all processes of the node.

    Safe to share between threads; threads that fetch ahead run until `close`.

    Args:
        split: A split with a URL.
        folder: The cache folder; data sets have folders of their own in it.
        limit_bytes: Bound of everything in it, over all processes. None: 64 GB, or what is there
            already if that is more.
        needs: What this rank's plan wants, in the order of first steps. None: shards are fetched
            when opened, in ranges first, and those longest unused go.
        next_use: Returns the step in which a shard is needed next by a rank of this node, or None.
        local_rank: This process among those of the node.
        local_world_size: Processes of the node that read by this plan.
        num_downloads: Threads that fetch ahead.
        start: First step.
        ahead: Steps that may be read at the same time: the loader's prefetched batches and one.
        same_needs: How many of the node's processes have the same needs as this one, it included
            (they share lanes).
        wait_s: How long to wait for room that other processes hold.
        remote: For tests: where files come from instead of ``split.remote``.

    Raises:
        ValueError: if the bound cannot hold what the plan reads at once.
        CacheFolderError: if the folder cannot be written.
    """

    def __init__(
        self,
        split: Split,
        *,
        folder: Path,
        limit_bytes: int | None,
        needs: Iterator[Need] | None = None,
        next_use: Callable[[int], int | None] | None = None,
        local_rank: int = 0,
        local_world_size: int = 1,
        num_downloads: int = 4,
        start: int = 0,
        ahead: int = 4,
        same_needs: int = 1,
        wait_s: float = 600.0,
        remote: Remote | None = None,
    ) -> None:
        assert split.remote is not None
        assert 0 <= local_rank < local_world_size and num_downloads >= 0
        self._split = split
        self._remote = remote or Remote(split.remote)
        path = Path(os.path.abspath(folder))
        self._folder = CacheFolder(path, limit_bytes or DEFAULT_LIMIT_BYTES)
        if limit_bytes is None:
            self._folder.limit_bytes = max(DEFAULT_LIMIT_BYTES, self._folder.used_bytes())
        self._next_use = next_use
        num_groups = -(-local_world_size // same_needs)
        self._window: NeedWindow | None = None
        if needs is not None:
            self._window = NeedWindow(
                needs,
                shard_bytes=split.shard_bytes + _INDEX_BYTES * split.shard_sizes,
                shard_sizes=split.shard_sizes,
                step=start,
                ahead=ahead,
                least_shards=num_downloads,
                room_bytes=self._folder.limit_bytes // num_groups,
            )
        self._heads, self._shards_by_head = shard_lookup(split.shards.table.digest)
        self._changed = threading.Condition()  # guards what follows, and the window
        self._closed = False
        self._here: set[int] = set()  # shards of the window that were seen in the cache
        self._not_before: dict[int, float] = {}  # when to look again for what others make
        self._fetching: set[int] = set()
        self._room_after = 0.0  # when to look again for room to fetch ahead
        self._ranges_read = 0
        self._use_lock = threading.Lock()  # plans are not for several threads
        self._room = Room(
            self._folder, self.steps_to, self._horizon, wait_s=wait_s, local_rank=local_rank
        )
        self._files = ShardFiles(split, self._remote, self._folder, self._room)
        peak_bytes = 0 if self._window is None else self._window.peak_bytes()
        self._room.enter(peak_bytes, num_groups)
        self._threads = [
            threading.Thread(target=self._fetch_ahead, name=f"mbv3dist-fetch-{n}", daemon=True)
            for n in range(num_downloads if self._window is not None else 0)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> CacheStats:
        """What was done so far."""
        counts = self._remote.counts
        return CacheStats(
            requests=counts.requests,
            retries=counts.retries,
            bytes_downloaded=counts.bytes_downloaded,
            shards_downloaded=self._files.num_downloaded,
            ranges_read=self._ranges_read,
            evicted=self._folder.evicted,
            peak_bytes=self._folder.peak_bytes,
        )

    def open(self, shard: int) -> ShardBytes:
        """Open a shard: blocks until it is here, or reads ranges if only a sample is wanted.

        Raises:
            DamagedShardError: if the source has no such shard, or another one.
            RemoteError: if the source cannot be read.
            CacheFolderError: if the disk or the bound leaves no room.
        """
        with self._changed:
            ranged = self._window is None or self._window.is_ranged(shard)
        if ranged and not self._files.is_here(shard, ".tar"):
            index = self._pin(shard, ".idx")
            return RangedShard(
                index,
                self._split.shards[shard].num_bytes,
                read_range=lambda start, stop: self._read_range(shard, start, stop),
                open_whole=lambda: self._open_whole(shard),
            )
        return self._open_whole(shard)

    def idx_path(self, shard: int) -> Path:
        """Return a shard's ``.idx`` as a local file, fetched if need be; errors as `open`."""
        return self._have(shard, ".idx")

    def crc_path(self, shard: int) -> Path:
        """Return a shard's ``.crc`` as a local file, fetched if need be; errors as `open`."""
        return self._have(shard, ".crc")

    def advance(self, step: int) -> list[int]:
        """Steps before `step` are done: return the shards that nobody here needs any more."""
        if self._window is None:
            return []
        with self._changed:
            gone = self._window.advance(step)
            self._here.difference_update(gone)
            for shard in gone:
                self._not_before.pop(shard, None)
            if gone:
                self._room_after = 0.0
                self._changed.notify_all()
        return gone

    def close(self) -> None:
        """Stop fetching; whole shards stay in the cache, open ones can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._remote.stop()
        self._room.close()
        for thread in self._threads:
            thread.join(5.0)

    def steps_to(self, unit: Unit) -> float | None:
        """Return in how many steps the node needs a shard; None if it is none of this cache.

        Without a plan: seconds since it was used last.
        """
        shard = self._shard_of(unit)
        if shard is None:
            return None
        if self._window is None:
            return max(time.time() - unit.used_at, 0.0)
        with self._changed:
            step = self._window.step
            distance = self._window.distance(shard)
        steps = NOT_NEEDED if distance is None else float(distance)
        if steps == 0.0 or self._next_use is None:
            return steps
        with self._use_lock:
            use = self._next_use(shard)  # another rank's may come before this one's
        return steps if use is None else min(steps, float(max(use - step, 0)))

    def _shard_of(self, unit: Unit) -> int | None:
        """Return the number of the shard that a unit holds; None if it is of another split."""
        head = int(unit.stem[-16:], 16)
        place = int(np.searchsorted(self._heads, head))
        if place == len(self._heads) or int(self._heads[place]) != head:
            return None
        shard = int(self._shards_by_head[place])
        return shard if str(self._files.path(shard, "")) == unit.stem else None

    # -- opening ---------------------------------------------------------------------------------

    def _open_whole(self, shard: int) -> WholeShard:
        file = self._pin(shard, ".tar")
        with self._changed:
            self._here.add(shard)
        return WholeShard(file, self._split.shards[shard].num_bytes)

    def _pin(self, shard: int, suffix: str) -> int:
        """Return the descriptor of a file that nobody removes until it is closed."""
        path = self._files.path(shard, suffix)
        while True:
            with folder_errors(self._folder.path):
                file = pin(path)
            if file is not None:
                if self._files.has_right_size(shard, suffix, os.fstat(file).st_size):
                    return file
                os.close(file)
                self._folder.discard(path)
            self._have(shard, suffix)

    def _have(self, shard: int, suffix: str) -> Path:
        """Return a file of a shard, made now if it is not here."""
        while self._files.fill(shard, suffix, beyond=None) is Filled.BUSY:
            if self._closed:
                raise RemoteError(
                    f"{self._files.url(shard, suffix)}: the cache was closed meanwhile"
                )
            with self._changed:
                self._changed.wait(_POLL_S)
        return self._files.path(shard, suffix)

    def _read_range(self, shard: int, start: int, stop: int) -> bytes:
        try:
            data = self._remote.read_range(self._split.shards[shard].url, start, stop)
        except FileNotFoundError as error:
            raise self._files.missing(shard, ".tar") from error
        with self._changed:
            self._ranges_read += 1
        return data

    # -- fetching --------------------------------------------------------------------------------

    def _fetch_ahead(self) -> None:
        """Fetch what the window says, one shard after the other, until the cache is closed."""
        while not self._closed:
            shard, beyond, pause = self._next_shard()
            if shard is None:
                with self._changed:
                    self._changed.wait(pause)
                continue
            filled = None
            try:
                filled = self._files.fill(shard, ".tar", beyond=beyond)
            except (OSError, ValueError) as error:
                # Whoever opens the shard meets the error, if it lasts.
                _LOG.debug("fetching ahead: %s", error)
            with self._changed:
                self._fetching.discard(shard)
                if filled is Filled.HERE:
                    self._here.add(shard)
                elif filled is Filled.NO_ROOM:
                    self._room_after = time.monotonic() + ROOM_POLL_S
                else:
                    pause = _POLL_S if filled is Filled.BUSY else 100 * ROOM_POLL_S
                    self._not_before[shard] = time.monotonic() + pause
                self._changed.notify_all()

    def _next_shard(self) -> tuple[int | None, int, float]:
        """Return the next shard to fetch, and how far away must be what goes for it.

        Nothing goes that is of use within the steps looked ahead for: some process has fetched it
        ahead, and would have to fetch it again. Without a shard: how long to wait for one.
        """
        assert self._window is not None
        with self._changed:
            now = time.monotonic()
            if now < self._room_after:
                return None, 0, self._room_after - now
            pause = _IDLE_S
            known = self._here | self._fetching
            for shard in self._window.upcoming():
                if shard in known:
                    continue
                delay = self._not_before.get(shard, 0.0) - now
                if delay <= 0:
                    self._fetching.add(shard)
                    return shard, self._window.horizon(), 0.0
                pause = min(pause, delay)
        return None, 0, pause

    def _horizon(self) -> int:
        with self._changed:
            return 0 if self._window is None else self._window.horizon()


def on_demand_cache(split: Split) -> ShardCache:
    """Return the cache of a remote split that is read without a plan, as in a notebook."""
    return ShardCache(split, folder=split.root.parent, limit_bytes=None)
