"""Where a run's shards are had from: local disks, the cache of remote ones, or several of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mbv3dist.data.index import Split
from mbv3dist.data.joined import JoinedShards, JoinedSplit
from mbv3dist.data.needs import Need
from mbv3dist.data.shards import LocalShards, ShardStore
from mbv3dist.data.urls import default_cache_dir

DEFAULT_CACHE_BYTES = 64 * 10**9


@dataclass(frozen=True)
class CacheOptions:
    """How remote shards are kept on this node.

    Attributes:
        folder: The cache's folder; None for the default (see ``remote.default_cache_dir``).
        limit_bytes: What the folder may hold at most, over all processes of the node.
        local_rank: This process among those of the node.
        local_world_size: Processes of the run on this node.
    """

    folder: Path | None = None
    limit_bytes: int = DEFAULT_CACHE_BYTES
    local_rank: int = 0
    local_world_size: int = 1


def node_options(folder: str = "", limit_bytes: int = DEFAULT_CACHE_BYTES) -> CacheOptions:
    """Return the options with this process's place on its node as launchers set it."""
    return CacheOptions(
        folder=Path(folder) if folder else None,
        limit_bytes=limit_bytes,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def open_store(
    split: Split,
    options: CacheOptions,
    *,
    needs: Callable[[], Iterator[Need]],
    next_use: Callable[[int], int | None],
    start: int = 0,
    ahead: int,
    same_needs: int = 1,
) -> ShardStore:
    """Return where the shards of a split are had from, following a plan.

    Args:
        split: One data set's, or several joined.
        options: Of the cache.
        needs: Called for each remote data set: what this rank reads, in order.
        next_use: The step in which this node reads a shard again, or None.
        start: First step.
        ahead: Steps that are read at the same time: those the loader prefetches, and one.
        same_needs: Processes of the node that have the same needs, because they share lanes.

    Raises:
        ValueError: if the cache cannot hold what the plan needs at a time.
        OSError: if the cache's folder cannot be used.
    """
    parts = split.parts if isinstance(split, JoinedSplit) else (split,)
    stores: list[ShardStore] = []
    first = 0
    for part in parts:
        shards = range(first, first + len(part.shards))
        first = shards.stop
        if part.remote is None:
            stores.append(LocalShards(part))
            continue
        from mbv3dist.data.cache import ShardCache

        stores.append(
            ShardCache(
                part,
                folder=options.folder or default_cache_dir(),
                limit_bytes=options.limit_bytes,
                needs=_own_needs(needs(), shards),
                next_use=_own_next_use(next_use, shards),
                local_rank=options.local_rank,
                local_world_size=options.local_world_size,
                start=start,
                ahead=ahead,
                same_needs=min(same_needs, options.local_world_size),
            )
        )
    return JoinedShards(split, stores) if isinstance(split, JoinedSplit) else stores[0]


def _own_needs(needs: Iterator[Need], shards: range) -> Iterator[Need]:
    """Yield the needs of one data set, whose shards have these numbers in the run."""
    for need in needs:
        if need.shard in shards:
            own = need.shard - shards.start
            yield Need(own, need.first_step, need.last_step, need.num_samples)


def _own_next_use(
    next_use: Callable[[int], int | None], shards: range
) -> Callable[[int], int | None]:
    return lambda shard: next_use(shard + shards.start)
