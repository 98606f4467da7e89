"""What a rank's plan asks of the cache: which shards now, which soon, and how much room that takes.

No files and no network here, and no locks: `ShardCache` calls it under its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mbv3dist.data.needs import Need

RANGED_SAMPLES = 2  # a shard of which no more is wanted ...
RANGED_SHARE = 16  # ... and which is this many times larger is read in ranges


class NeedWindow:
    """The needs from the present step to a little ahead, taken from a stream of all.

    Looking ahead ends where the shards that are not needed yet would fill as much room as those
    that are (one block more of each lane), or more than this rank's share of the cache: what is
    fetched earlier would push out shards that the plan still has use for.

    Args:
        needs: In the order of their first steps.
        shard_bytes: int64 [S].
        shard_sizes: Samples, int64 [S].
        step: Where the run starts.
        ahead: Steps that may be read at the same time after the one that is being finished.
        least_shards: Shards to look ahead for at least, if there is room.
        room_bytes: This rank's share of the cache.
    """

    def __init__(
        self,
        needs: Iterator[Need],
        *,
        shard_bytes: np.ndarray,
        shard_sizes: np.ndarray,
        step: int,
        ahead: int,
        least_shards: int,
        room_bytes: int,
    ) -> None:
        self.step = step
        self._needs = needs
        self._bytes = shard_bytes
        self._sizes = shard_sizes
        self._ahead = ahead
        self._least_shards = least_shards
        self._room = room_bytes
        self._window: list[Need] = []
        self._by_shard: dict[int, list[Need]] = {}
        self._first_end = step  # the least last step in the window
        self._last_start = step  # the greatest first step in it
        self._ended = False
        self._extend(step)

    def advance(self, step: int) -> list[int]:
        """Steps before `step` are done: return the shards that are not needed now any more."""
        self.step = max(step, self.step)
        soon = self.step + self._ahead
        if self._first_end >= self.step and (self._ended or self._last_start > soon):
            return []  # as in most steps
        self._extend(self.step)
        if self._first_end >= self.step:
            return []
        done = {need.shard for need in self._window if need.last_step < self.step}
        self._window = [need for need in self._window if need.last_step >= self.step]
        self._by_shard = {}
        for need in self._window:
            self._by_shard.setdefault(need.shard, []).append(need)
        self._extend(self.step)
        live = {need.shard for need in self._window if need.first_step <= soon}
        return sorted(done - live)

    def upcoming(self) -> list[int]:
        """Return the shards that should be here, in the order in which they are needed."""
        return [need.shard for need in self._upcoming()]

    def horizon(self) -> int:
        """Return for how many steps what is looked ahead for will be of use.

        Ranks look ahead about equally far: what the node needs within these steps, some rank has
        fetched or is going to.
        """
        return max((need.last_step - self.step for need in self._upcoming()), default=0)

    def _upcoming(self) -> Iterator[Need]:
        total, now, later, num_later = 0, 0, 0, 0
        for need in self._window:
            if self.is_ranged(need.shard):
                continue
            total += self._size(need)
            if need.first_step <= self.step:
                now += self._stays(need)
            elif total <= self._room and (later < now or num_later < self._least_shards):
                later += self._size(need)
                num_later += 1
            else:
                return
            yield need

    def distance(self, shard: int) -> int | None:
        """Return in how many steps a shard of the window is needed; None for any other."""
        needs = self._by_shard.get(shard)
        return max(needs[0].first_step - self.step, 0) if needs else None

    def is_ranged(self, shard: int) -> bool:
        """Return whether so little of a shard is wanted that it need not be here as a whole."""
        wanted = sum(need.num_samples for need in self._by_shard.get(shard, ()))
        return 0 < wanted <= RANGED_SAMPLES and int(self._sizes[shard]) >= RANGED_SHARE * wanted

    def peak_bytes(self) -> int:
        """Return the most that is needed at once from the first block of each lane to its second.

        Blocks hold equal numbers of shards, so later ones are alike.
        """
        live = [need.last_step for need in self._window if need.first_step <= self.step]
        self._extend(max(live, default=self.step) + 1)
        changes: list[tuple[int, int, int]] = []
        for need in self._window:
            if not self.is_ranged(need.shard):
                changes.append((max(need.first_step - self._ahead, self.step), 0, need.shard))
                changes.append((need.last_step + 1, -1, need.shard))
        users: dict[int, int] = {}
        total = peak = 0
        for _, sign, shard in sorted(changes):
            before = users.get(shard, 0)
            users[shard] = before + (1 if sign == 0 else -1)
            if min(before, users[shard]) == 0:
                total += int(self._bytes[shard]) * (1 if sign == 0 else -1)
            peak = max(peak, total)
        return peak

    def _size(self, need: Need) -> int:
        return int(self._bytes[need.shard])

    def _stays(self, need: Need) -> int:
        """A block that ends with this step counts no more: the next one is under way."""
        return self._size(need) if need.last_step > self.step else 0

    def _extend(self, step: int) -> None:
        """Take needs from the stream: all that begin by `step` and `ahead`, and the next ones."""
        now = sum(self._stays(need) for need in self._window if need.first_step <= self.step)
        waiting = [need for need in self._window if need.first_step > self.step]
        later, num_later = sum(self._size(need) for need in waiting), len(waiting)
        last = self._window[-1].first_step if self._window else self.step
        while not self._ended and (
            last <= step + self._ahead or later < now or num_later < self._least_shards
        ):
            need = next(self._needs, None)
            if need is None:
                self._ended = True
                break
            last = need.first_step
            self._window.append(need)
            self._by_shard.setdefault(need.shard, []).append(need)
            if need.first_step <= self.step:
                now += self._stays(need)
            else:
                later += self._size(need)
                num_later += 1
        self._last_start = last
        self._first_end = min((need.last_step for need in self._window), default=self.step)


def shard_lookup(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 8 bytes of the shards' digests in order, and whose they are.

    Args:
        digests: uint8 [S, 32].
    """
    heads = np.ascontiguousarray(digests[:, :8]).view(">u8").ravel()
    order = np.argsort(heads, kind="stable")
    return heads[order], order
