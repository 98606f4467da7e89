"""How an epoch spreads over ranks and nodes: samples, bytes, shards, and what a cache must hold.

All of it follows from the plan's numbers, with arrays over shards, lanes or ranks and no loop over
samples, so that it answers for a billion samples on ten thousand ranks as well. docs/streaming.md
has the symbols: place j in [0, G) of a global batch, lanes of L places, an epoch's axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mbv3dist.data.plan import EpochLayout, Plan

# Of a step that reads the data set over and over, no more epochs are looked at one by one.
_MAX_EPOCHS = 64
_STEPS_AT_ONCE = 5  # the one that trains and, as the loader reads ahead, those being prepared
_LANES_AT_ONCE = 1024  # whose blocks are in memory at a time


@dataclass(frozen=True)
class World:
    """The ranks of a run and the nodes they are on."""

    num_ranks: int
    ranks_per_node: int

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self.num_ranks // self.ranks_per_node


class Places(NamedTuple):
    """A stretch [low, high) of an epoch's shard order for each of some groups: int64 [groups]."""

    low: np.ndarray
    high: np.ndarray


class Sizes:
    """Bytes along an epoch's axis.

    Args:
        plan: The plan.
        layout: Of the epoch.
        shard_bytes: Of each shard's tar, in pack order.
    """

    def __init__(self, plan: Plan, layout: EpochLayout, shard_bytes: np.ndarray):
        order = layout.shard_order
        entries = np.diff(layout.shard_starts)
        # A shard's samples count as equally large; how often each is read is the pass's affair.
        mean = shard_bytes[order] / np.maximum(plan.shard_sizes[order], 1)
        self.whole = _running_sum(shard_bytes[order])  # int64: of whole tars
        self._read = _running_sum(mean * entries)  # float64: of samples that are read
        self._starts = layout.shard_starts

    def read_before(self, at: np.ndarray) -> np.ndarray:
        """Return the bytes of what is read at axis positions below each of `at`."""
        return np.asarray(np.interp(at, self._starts, self._read))


def rank_bounds(plan: Plan, num_groups: int) -> np.ndarray:
    """Return where the parts of ranks (or nodes) begin in the batch, and the end: int64 [n + 1]."""
    part = plan.global_batch_size // num_groups
    return np.arange(0, plan.global_batch_size + 1, part)


def reads_below(plan: Plan, epoch: int, places: np.ndarray) -> np.ndarray:
    """Return how many reads of an epoch are at places of the batch below each of `places`."""
    start, end = epoch_positions(plan, epoch)

    def below(position: int) -> np.ndarray:
        whole, rest = divmod(position, plan.global_batch_size)
        return np.asarray(whole * places + np.minimum(places, rest))

    return np.asarray(below(end) - below(start))


def epoch_positions(plan: Plan, epoch: int) -> tuple[int, int]:
    """Return an epoch's first position in the run and the one after its last."""
    length = plan.num_samples
    if plan.tail == "drop":
        length = int(plan.steps_per_epoch) * plan.global_batch_size
    return epoch * length, (epoch + 1) * length


def bytes_read(plan: Plan, sizes: Sizes, epoch: int, num_groups: int) -> np.ndarray:
    """Return the bytes of the samples that each rank (or node) reads in an epoch: float64 [n].

    A lane's bytes are exact, taking a shard's samples as equally large. Ranks that share a lane
    get its samples at random: what they read of it is counted by their number of samples.
    """
    lane_starts = np.asarray(plan.layout(epoch).lane_starts)
    below = reads_below(plan, epoch, rank_bounds(plan, num_groups))
    return np.diff(np.interp(below, lane_starts, sizes.read_before(lane_starts)))


def places_met(plan: Plan, epoch: int, num_groups: int, lanes: int | None = None) -> Places:
    """Return the stretch of an epoch's shards that each rank (or node) needs something of.

    Args:
        plan: The plan.
        epoch: Which epoch.
        num_groups: Ranks, or nodes.
        lanes: As if the plan had this many.
    """
    size = plan.global_batch_size // (lanes or plan.lanes)
    bounds = rank_bounds(plan, num_groups)
    first, last = bounds[:-1] // size, (bounds[1:] - 1) // size
    low = reads_below(plan, epoch, first * size)
    high = reads_below(plan, epoch, (last + 1) * size)
    return _places(plan.layout(epoch).shard_starts, low, high)


def _places(starts: np.ndarray, low: np.ndarray, high: np.ndarray) -> Places:
    """Return the places of the shards that hold the axis positions [low, high)."""
    first = np.searchsorted(starts, low, side="right") - 1
    return Places(first, np.where(high > low, np.searchsorted(starts, high, side="left"), first))


def cache_bytes(plan: Plan, sizes: Sizes, epoch: int, world: World) -> np.ndarray:
    """Return what each node's cache must hold at a time in an epoch: int64 [nodes].

    That is, for each lane of a rank, the shards of the blocks that the steps under way read from
    (one block as a rule) and of the next, which is fetched meanwhile: the most over the epoch.
    Ranks that share lanes need it once. It is never less than the cache itself asks for, except
    at the end of an epoch or with shards of very different sizes.
    """
    layout = plan.layout(epoch)
    lane_starts = np.asarray(layout.lane_starts)
    low, high = _places(layout.shard_starts, lane_starts[:-1], lane_starts[1:])
    block = plan.block_shards * plan.num_samples / len(layout.shard_order)  # samples, on average
    held = plan.block_shards * (2 + int(_STEPS_AT_ONCE * plan.lane_size / block))  # shards
    num_blocks = -(-(high - low) // plan.block_shards)
    lane = np.repeat(np.arange(plan.lanes), num_blocks)
    number = np.arange(len(lane)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    start = low[lane] + number * plan.block_shards
    stop = np.minimum(start + held, high[lane])
    most = np.zeros(plan.lanes, dtype=np.int64)
    np.maximum.at(most, lane, sizes.whole[stop] - sizes.whole[start])
    if plan.epochs > 1:  # a lane that is shorter than that goes on with the next epoch's shards
        most *= -(-held // np.maximum(high - low, 1))
    total = _running_sum(most)
    bounds = rank_bounds(plan, world.num_ranks)
    first, last = bounds[:-1] // plan.lane_size, (bounds[1:] - 1) // plan.lane_size
    # Lanes of a rank that share a shard need it once; the epoch after this one brings others.
    met = places_met(plan, epoch, world.num_ranks)
    at_most = min(plan.epochs, 2) * (sizes.whole[met.high] - sizes.whole[met.low])
    by_rank = np.minimum(total[last + 1] - total[first], at_most)
    ranks_of_lane = max(plan.lane_size * world.num_ranks // plan.global_batch_size, 1)
    groups = -(-world.ranks_per_node // ranks_of_lane)
    by_node = groups * by_rank.reshape(world.num_nodes, world.ranks_per_node).max(axis=1)
    return np.asarray(np.minimum(by_node, sizes.whole[-1]))


def open_bound(plan: Plan, num_groups: int) -> int:
    """Return the most shards that a rank (or node) can have open in a step.

    For shards as they are in the first epoch; the proof is in docs/streaming.md.
    """
    layout = plan.layout(0)
    num_shards = len(layout.shard_order)
    if plan.tail == "carry" and plan.num_samples < plan.global_batch_size:
        return num_shards  # more than two epochs can meet in a step
    bounds = rank_bounds(plan, num_groups)
    lanes = (bounds[1:] - 1) // plan.lane_size - bounds[:-1] // plan.lane_size + 1
    reads = min(plan.global_batch_size // num_groups, plan.lane_size)  # of a lane
    smallest = int(np.diff(layout.shard_starts).min())
    blocks = 4 + max(reads - 4, 0) // (plan.block_shards * smallest)
    return min(num_shards, int(lanes.max()) * plan.block_shards * blocks)


class StepShards(NamedTuple):
    """Distinct shards in one step; the arrays are int64 [those that were counted]."""

    open_by_rank: np.ndarray
    open_by_node: np.ndarray
    read_by_rank: np.ndarray
    read_by_all: int


def step_shards(plan: Plan, step: int, world: World) -> StepShards:
    """Count the shards that ranks and nodes hold open and read from in a step.

    A rank holds the shards of a block open while it reads from the block. Of a step with more than
    `_MAX_EPOCHS` epochs, only ranks and nodes up to that one are counted; if there are none, each
    reads the data over and over, and so from all shards.
    """
    part = plan.global_batch_size // world.num_ranks
    ranks = min(world.num_ranks, _MAX_EPOCHS * plan.num_samples // part)
    nodes = ranks // world.ranks_per_node
    every = _all_shards(plan, step)
    opened = _open_shards(plan, step, world, ranks)
    read = _read_shards(plan, step, world, ranks)
    return StepShards(
        open_by_rank=opened.count(ranks) if ranks else np.array([every]),
        open_by_node=opened.merge(world.ranks_per_node).count(nodes)
        if nodes
        else np.array([every]),
        read_by_rank=read.count(ranks) if ranks else np.array([every]),
        read_by_all=int(read.merge(ranks).count(1)[0]) if ranks == world.num_ranks else every,
    )


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of a group and a shard, each as group * num_shards + shard."""

    numbers: np.ndarray
    num_shards: int

    @classmethod
    def collect(cls, parts: list[tuple[np.ndarray, np.ndarray]], num_shards: int) -> _Pairs:
        """Return the pairs in (group, shard) arrays."""
        numbers = [group * num_shards + shard for group, shard in parts]
        return cls(np.unique(np.concatenate([np.zeros(0, np.int64), *numbers])), num_shards)

    def merge(self, size: int) -> _Pairs:
        """Return the pairs of groups of `size` neighbouring groups."""
        group, shard = np.divmod(self.numbers, self.num_shards)
        return self.collect([(group // max(size, 1), shard)], self.num_shards)

    def count(self, num_groups: int) -> np.ndarray:
        """Return the shards of each of the first groups: int64 [num_groups]."""
        return np.bincount(self.numbers // self.num_shards, minlength=num_groups)[:num_groups]


def _step_epochs(plan: Plan, step: int) -> range:
    first = step * plan.global_batch_size
    return range(plan.epoch_of(first), plan.epoch_of(first + plan.global_batch_size - 1) + 1)


def _all_shards(plan: Plan, step: int) -> int:
    """Return how many shards have a sample in the step's epochs."""
    epochs = _step_epochs(plan, step)[:_MAX_EPOCHS]
    return int(np.any([plan.samples.sizes(epoch) > 0 for epoch in epochs], axis=0).sum())


def _open_shards(plan: Plan, step: int, world: World, ranks: int) -> _Pairs:
    """Return the shards of the blocks that each of the first `ranks` reads from."""
    found = []
    for epoch, rank, lane, start, stop in _pieces(plan, step, world, ranks):
        layout = plan.layout(epoch)
        starts, lane_starts = layout.shard_starts, np.asarray(layout.lane_starts)
        places = _places(starts, lane_starts[:-1], lane_starts[1:])
        first, end = places.low[lane], places.high[lane]
        holder, last = (np.searchsorted(starts, at, side="right") - 1 for at in (start, stop - 1))
        low = first + (holder - first) // plan.block_shards * plan.block_shards
        high = first + ((last - first) // plan.block_shards + 1) * plan.block_shards
        count = np.minimum(high, end) - low
        place = np.arange(count.sum()) + np.repeat(low - np.cumsum(count) + count, count)
        found.append((np.repeat(rank, count), layout.shard_order[place]))
    return _Pairs.collect(found, len(plan.shard_sizes))


def _pieces(
    plan: Plan, step: int, world: World, ranks: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield by epoch the stretches of a step that lie in one rank and one lane.

    Each: epoch, then rank, lane, first and end position on the epoch's axis, int64 [pieces].
    """
    size = plan.lane_size
    part = plan.global_batch_size // world.num_ranks
    begin = step * plan.global_batch_size
    for epoch in _step_epochs(plan, step):
        start, end = epoch_positions(plan, epoch)
        low, high = max(start - begin, 0), min(end - begin, ranks * part)
        if low >= high:
            break
        cuts = np.union1d(np.arange(0, high, part), np.arange(0, high, size))
        cuts = np.unique(np.clip(np.append(cuts, high), low, high))
        lane = cuts[:-1] // size
        # The lane has been read `step * size` times before this step, some of it in other epochs.
        whole, rest = divmod(start, plan.global_batch_size)
        before = whole * size + np.clip(rest - lane * size, 0, size)
        lane_starts = np.asarray(plan.layout(epoch).lane_starts)
        at = lane_starts[lane] + step * size + cuts[:-1] - lane * size - before
        yield epoch, cuts[:-1] // part, lane, at, at + np.diff(cuts)


def _read_shards(plan: Plan, step: int, world: World, ranks: int) -> _Pairs:
    """Return the shards of the samples that each of the first `ranks` reads."""
    starts = _running_sum(plan.shard_sizes)
    part = plan.global_batch_size // world.num_ranks
    # Several ranks at once, but no more blocks in memory than a rank of a real run may have.
    at_once = world.num_ranks
    if ranks < world.num_ranks or plan.lanes > _LANES_AT_ONCE:
        at_once = next(
            n
            for n in reversed(divisors(world.num_ranks))
            if n == 1 or (n <= ranks and n * plan.lanes <= _LANES_AT_ONCE * world.num_ranks)
        )
    found = []
    for first in range(0, ranks, at_once):
        index = (
            plan.clone()
            .step(step, rank=first // at_once, world_size=world.num_ranks // at_once)
            .index
        )
        rank = first + np.arange(len(index)) // part
        found.append((rank, np.searchsorted(starts, index, side="right") - 1))
    return _Pairs.collect(found, len(plan.shard_sizes))


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _running_sum(values: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, values.dtype), np.cumsum(values)))
