"""Which shards a rank needs when: what the cache of remote shards follows.

A lane reads block after block (see plan.py), and all shards of a block from its first step to its
last, because their samples are mixed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mbv3dist.data.plan import Plan


@dataclass(frozen=True)
class Need:
    """A shard that is read from between two steps, both included."""

    shard: int
    first_step: int
    last_step: int
    num_samples: int
    """Entries of the shard in these steps, over all ranks that share the lane."""


def rank_needs(
    plan: Plan, start_step: int = 0, *, rank: int = 0, world_size: int = 1
) -> Iterator[Need]:
    """Yield the shards that a rank needs from a step on, in the order of their first steps."""
    assert 0 <= rank < world_size
    plan = plan.clone()  # the caller's may be in use by another thread
    lanes = plan.rank_lanes(range(rank, rank + 1), world_size)
    streams = [_lane_needs(plan, lane, start_step) for lane in lanes]
    return heapq.merge(*streams, key=lambda need: need.first_step)


def _lane_needs(plan: Plan, lane: int, start_step: int) -> Iterator[Need]:
    for block, first_step, last_step in plan.lane_blocks(lane, start_step):
        layout = plan.layout(block.epoch)
        bounds = layout.shard_starts[block.places.start : block.places.stop + 1]
        counts = np.diff(np.clip(bounds, block.low, block.high)).tolist()
        shards = layout.shard_order[block.places.start : block.places.stop].tolist()
        # Of a block under way, no more than its steps still hold.
        most = (last_step - first_step + 1) * plan.lane_size
        for shard, count in zip(shards, counts, strict=True):
            yield Need(shard, first_step, last_step, min(count, most))


def range_needs(starts: np.ndarray, indices: range, batch_size: int) -> Iterator[Need]:
    """Yield the shards of an evaluation: samples in pack order, a step per batch.

    Args:
        starts: First sample of each shard, then the end: int64 [S + 1].
        indices: The samples that are read.
        batch_size: Samples in a step.
    """
    if not len(indices):
        return
    first = int(np.searchsorted(starts, indices.start, side="right")) - 1
    last = int(np.searchsorted(starts, indices.stop - 1, side="right")) - 1
    for shard in range(first, last + 1):
        low = max(int(starts[shard]), indices.start) - indices.start
        high = min(int(starts[shard + 1]), indices.stop) - indices.start
        if high > low:
            yield Need(shard, low // batch_size, (high - 1) // batch_size, high - low)


def next_use(plan: Plan, shard: int, step: int, *, ranks: range, world_size: int) -> int | None:
    """Return the first step from `step` on in which one of `ranks` may need a shard.

    Looks to the end of the next epoch: None means not before that.
    """
    lanes = plan.rank_lanes(ranks, world_size)
    now = plan.epoch_of(min(step, plan.num_steps - 1) * plan.global_batch_size)
    for epoch in range(now, now + 2):
        uses = [first for first, last in _block_steps(plan, shard, epoch, lanes) if last >= step]
        if uses:
            return max(step, min(uses))
    return None


def _block_steps(plan: Plan, shard: int, epoch: int, lanes: range) -> Iterator[tuple[int, int]]:
    """Yield first and last step of each block of some lanes that a shard is in."""
    layout = plan.layout(epoch)
    found = np.flatnonzero(layout.shard_order == shard)
    if not len(found):
        return
    low, high = layout.shard_starts[found[0] : found[0] + 2].tolist()
    for lane in lanes:
        lane_start, lane_end = layout.lane_starts[lane : lane + 2]
        if low < lane_end and lane_start < high:
            block = plan.find_block(epoch, lane, max(low, lane_start))
            yield (
                plan.lane_place(epoch, lane, block.low) // plan.lane_size,
                plan.lane_place(epoch, lane, block.high - 1) // plan.lane_size,
            )
