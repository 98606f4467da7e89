"""What an order of samples means for the shards behind it: mixing, fetches, shards held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def traffic(order: np.ndarray, sizes: Sequence[int], *, nodes: int) -> dict[str, Any]:
    """Return what one epoch costs in shards.

    Args:
        order: Samples by step, int64 [steps, G], -1 for none; node n reads the n-th part of each
            row.
        sizes: Samples in each shard.
        nodes: Nodes, each with a cache that keeps a shard from its first to its last use.

    Returns:
        shards_per_batch: Mean over the full global batches of the shards in each.
        fetched_per_shard: Nodes that need a shard, summed over shards, over the number of shards.
        held_max: The most shards that a node has begun and not finished at a time.
    """
    num_steps = len(order)
    num_shards = len(sizes)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    shard = np.searchsorted(ends, order, side="right")  # [steps, G]
    shard[order < 0] = -1
    full = (order >= 0).all(axis=1)
    per_batch = [len(np.unique(row)) for row in shard[full]]
    fetched, held = 0, 0
    for part in np.array_split(shard, nodes, axis=1):
        first = np.full(num_shards, num_steps, dtype=np.int64)
        last = np.full(num_shards, -1, dtype=np.int64)
        step = np.broadcast_to(np.arange(num_steps)[:, None], part.shape)
        used = part >= 0
        np.minimum.at(first, part[used], step[used])
        np.maximum.at(last, part[used], step[used])
        needed = last >= 0
        fetched += int(needed.sum())
        change = np.zeros(num_steps + 1, dtype=np.int64)
        np.add.at(change, first[needed], 1)
        np.add.at(change, last[needed] + 1, -1)
        held = max(held, int(np.cumsum(change).max()))
    return {
        "shards_per_batch": round(float(np.mean(per_batch)), 1),
        "fetched_per_shard": round(fetched / num_shards, 3),
        "held_max": held,
    }
