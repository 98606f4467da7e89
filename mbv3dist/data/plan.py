"""Who reads which sample when: the order of a whole training run, from numbers alone.

A run reads positions q = step * G + j. `Plan` maps every position to a sample (its pack index) so
that each epoch holds every entry of its pass exactly once, global batches are the same on every
world size, neighbouring positions come from few shards, and any step can be computed without the
steps before it. docs/streaming.md has the maths and the proof. Only numpy: no torch, no files.

Symbols, as in the documentation: N entries in a pass (the samples, unless data sets have weights
or classes are balanced), G global batch size, C lanes of L = G / C positions, P ranks, B shards
in a block.
"""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from mbv3dist.data import draws
from mbv3dist.data.division import FLAGS, check_division, nearest_divisors, one_of
from mbv3dist.data.passes import COPY_SHIFT, Pass, WholePass

MAX_DEFAULT_LANES = 64
TAILS = ("carry", "drop")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class StepPlan:
    """What one rank reads in one step, in order; b = global batch size / world size."""

    index: np.ndarray
    """int64 [b]: pack index of the sample."""
    epoch: np.ndarray
    """int64 [b]: epoch the sample is read in, from 0."""
    weight: np.ndarray
    """float32 [b]: 1, or 0 for the overrun of the run's last step."""
    copy: np.ndarray
    """int64 [b]: which of the sample's copies in the epoch it is; 0 unless it comes more often."""


@dataclass(frozen=True)
class Block:
    """A stretch of a lane whose samples are mixed with each other: axis positions [low, high)."""

    epoch: int
    lane: int
    number: int  # from the start of the lane's segment
    low: int
    high: int
    places: range  # of its shards in the epoch's shard order


@dataclass(frozen=True)
class EpochLayout:
    """One epoch's axis: the shards one behind the other, cut into a segment per lane."""

    shard_order: np.ndarray  # int64 [shards that are not empty in this epoch]
    shard_starts: np.ndarray  # int64 [the same + 1], axis positions
    lane_starts: list[int]  # C + 1 axis positions

    @cached_property
    def starts_view(self) -> memoryview:
        """`shard_starts` without NumPy's overhead per element, for bisecting."""
        return memoryview(self.shard_starts.data)


class Plan:
    """The order of a training run over shards of `shard_sizes` samples.

    Args:
        shard_sizes: Samples in each shard, in pack order; shards may be empty.
        global_batch_size: G, samples in a step over all ranks and accumulation steps.
        epochs: Passes over the data set.
        seed: Decides every permutation.
        lanes: C, a divisor of G. Default: the largest one not above 64.
        block_shards: B, shards whose samples a lane mixes with each other.
        tail: "carry" lets batches straddle epochs; "drop" leaves each epoch's remainder out.
        samples: What a pass holds, over the same shards; default: each sample once.

    Raises:
        ValueError: For values outside their limits, naming the flag.
    """

    version = 2

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        *,
        global_batch_size: int,
        epochs: int,
        seed: int = 0,
        lanes: int | None = None,
        block_shards: int = 4,
        tail: str = "carry",
        samples: Pass | None = None,
    ):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        assert self.shard_sizes.ndim == 1
        assert (self.shard_sizes >= 0).all()
        self.samples = samples or WholePass(self.shard_sizes)
        self.num_samples = self.samples.num_entries
        self.global_batch_size = int(global_batch_size)
        self.epochs = int(epochs)
        self.seed = int(seed)
        self.block_shards = int(block_shards)
        self.tail = tail
        self._check_numbers()
        self.lanes = self._choose_lanes(lanes)
        self.lane_size = self.global_batch_size // self.lanes

        # Steps per epoch: a fraction with carry, a whole number with drop.
        if tail == "carry":
            self.steps_per_epoch: float = self.num_samples / self.global_batch_size
            self.num_steps = -(-self.epochs * self.num_samples // self.global_batch_size)
        else:
            self.steps_per_epoch = self.num_samples // self.global_batch_size
            self.num_steps = self.epochs * self.steps_per_epoch

        # Small caches; not safe for several threads at a time.
        self._epochs: dict[int, EpochLayout] = {}
        self._blocks: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # by epoch and lane
        self._shards: dict[tuple[int, int], np.ndarray] = {}  # by epoch and shard

    def _check_numbers(self) -> None:
        for name in ("global_batch_size", "block_shards"):
            value = getattr(self, name)
            if value < 1:
                words = name.replace("_", " ")
                raise ValueError(f"{words} must be at least 1, got {value} ({FLAGS[name]})")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}; set --epochs")
        if self.tail not in TAILS:
            raise ValueError(f"tail must be carry or drop, got {self.tail!r} ({FLAGS['tail']})")
        draws.check_seed(self.seed)
        if self.num_samples == 0:
            raise ValueError("the split holds no samples, so there is nothing to plan; convert one")
        if self.tail == "drop" and self.num_samples < self.global_batch_size:
            raise ValueError(
                f"tail=drop leaves nothing of {self.num_samples} samples at global batch size "
                f"{self.global_batch_size}; choose tail=carry ({FLAGS['tail']}) or a global batch "
                f"size of {self.num_samples} or less ({FLAGS['global_batch_size']})"
            )

    def _choose_lanes(self, lanes: int | None) -> int:
        batch = self.global_batch_size
        if lanes is None:
            return max(n for n in range(1, min(batch, MAX_DEFAULT_LANES) + 1) if batch % n == 0)
        if lanes < 1 or batch % lanes:
            near = nearest_divisors(batch, max(lanes, 1))
            raise ValueError(
                f"lanes must divide the global batch size {batch}, got {lanes}; "
                f"choose {one_of(near)} ({FLAGS['lanes']})"
            )
        return int(lanes)

    def check_world(self, world_size: int, accumulation_steps: int = 1) -> None:
        """Raise ValueError, naming valid values, unless every micro-batch is equally large."""
        check_division(self.global_batch_size, world_size, accumulation_steps)

    def step(self, step: int, *, rank: int = 0, world_size: int = 1) -> StepPlan:
        """Return what `rank` of `world_size` reads in `step`, in order.

        The ranks' parts, one behind the other, are the same global batch for every world size.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is outside the run's {self.num_steps} steps")
        assert 0 <= rank < world_size
        self.check_world(world_size)
        part = self.global_batch_size // world_size
        place = np.arange(rank * part, (rank + 1) * part, dtype=np.int64)  # j in the global batch
        lane = place // self.lane_size
        position = step * self.global_batch_size + place  # q
        if self.tail == "carry":
            epoch = position // self.num_samples
            weight = (position < self.epochs * self.num_samples).astype(np.float32)
        else:
            epoch = np.full_like(position, step // int(self.steps_per_epoch))
            weight = np.ones(part, dtype=np.float32)

        # Neighbours of one epoch and lane are neighbours in the lane's segment: read them at once.
        changes = np.flatnonzero((epoch[1:] != epoch[:-1]) | (lane[1:] != lane[:-1])) + 1
        runs = [0, *changes.tolist(), part]
        pieces: list[np.ndarray] = []
        for start, stop in itertools.pairwise(runs):
            e, c = int(epoch[start]), int(lane[start])
            k = self._place_in_segment(int(position[start]), e, c)
            self._read_segment(e, c, k, stop - start, pieces)
        entry = np.concatenate(pieces)
        copy = entry >> COPY_SHIFT
        return StepPlan(index=entry - (copy << COPY_SHIFT), epoch=epoch, weight=weight, copy=copy)

    def lane_place(self, epoch: int, lane: int, at: int) -> int:
        """Return the number, over the whole run, of the lane's read at an axis position."""
        return (
            self._count(self._epoch_start(epoch), lane) + at - self.layout(epoch).lane_starts[lane]
        )

    def _count(self, position: int, lane: int) -> int:
        """How many positions below `position` lie on `lane`."""
        whole, rest = divmod(position, self.global_batch_size)
        size = self.lane_size
        return whole * size + min(max(rest - lane * size, 0), size)

    def _epoch_start(self, epoch: int) -> int:
        """First position of an epoch; with `drop`, positions count from the epoch's first."""
        if self.tail == "carry":
            return epoch * self.num_samples
        return epoch * int(self.steps_per_epoch) * self.global_batch_size

    def _place_in_segment(self, position: int, epoch: int, lane: int) -> int:
        return self._count(position, lane) - self._count(self._epoch_start(epoch), lane)

    def _read_segment(
        self, epoch: int, lane: int, start: int, count: int, pieces: list[np.ndarray]
    ) -> None:
        """Append the entries [start, start + count) of a lane's segment to `pieces`."""
        layout = self.layout(epoch)
        at = layout.lane_starts[lane] + start
        end = at + count
        key = (epoch, lane)
        while at < end:
            first, entries = self._blocks.get(key, (0, None))
            if entries is None or not first <= at < first + len(entries):
                # A lane reads on from block to block, so only its present one is kept.
                block = self.find_block(epoch, lane, at)
                if entries is None:
                    # A resumed plan's first step: a few reads, had without sorting the block.
                    pieces.append(self._block_entries(block, at, min(end, block.high)))
                    _store(self._blocks, key, (0, pieces[-1][:0]), limit=2 * self.lanes)
                    at += len(pieces[-1])
                    continue
                first, entries = block.low, self._block_entries(block, block.low, block.high)
                _store(self._blocks, key, (first, entries), limit=2 * self.lanes)
            piece = entries[at - first : end - first]
            pieces.append(piece)
            at += len(piece)

    def layout(self, epoch: int) -> EpochLayout:
        """Return how an epoch is laid out."""
        layout = self._epochs.get(epoch)
        if layout is None:
            layout = _store(self._epochs, epoch, self._make_layout(epoch), limit=8)
        return layout

    def _make_layout(self, epoch: int) -> EpochLayout:
        sizes = self.samples.sizes(epoch)
        order = draws.permutation(
            len(sizes), seed=self.seed, purpose=draws.SHARD_ORDER, epoch=epoch
        )
        ordered = sizes[order]
        if not ordered.all():
            order, ordered = order[ordered > 0], ordered[ordered > 0]
        shard_starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(ordered, out=shard_starts[1:])
        start, end = self._epoch_start(epoch), self._epoch_start(epoch + 1)
        counts = [self._count(end, c) - self._count(start, c) for c in range(self.lanes)]
        lane_starts = [0, *itertools.accumulate(counts)]
        assert lane_starts[-1] == end - start <= self.num_samples == shard_starts[-1]
        return EpochLayout(order, shard_starts, lane_starts)

    def find_block(self, epoch: int, lane: int, at: int) -> Block:
        """Return the block of `lane` that holds axis position `at`."""
        layout = self.layout(epoch)
        starts = layout.starts_view
        lane_start, lane_end = layout.lane_starts[lane : lane + 2]
        first, holder = (bisect_right(starts, x) - 1 for x in (lane_start, at))
        number = (holder - first) // self.block_shards
        low_place = first + number * self.block_shards
        high_place = min(low_place + self.block_shards, len(starts) - 1)
        low = max(lane_start, starts[low_place])
        high = min(lane_end, starts[high_place])
        if high < starts[high_place]:  # the lane ends first, so it needs no shard after that
            high_place = bisect_left(starts, high)
        return Block(epoch, lane, number, low, high, range(low_place, high_place))

    def _block_entries(self, block: Block, start: int, stop: int) -> np.ndarray:
        """Return what is read at axis positions [start, stop) of a block: int64 [stop - start]."""
        order = draws.permutation(
            block.high - block.low,
            seed=self.seed,
            purpose=draws.WITHIN_BLOCK,
            epoch=block.epoch,
            major=block.lane,
            minor=block.number,
            part=range(start - block.low, stop - block.low),
        )
        layout = self.layout(block.epoch)
        places = block.places
        bounds = layout.starts_view[places.start : places.stop + 1].tolist()
        if len(order) <= 2 * len(places):  # a few: without the other shards' entries
            found = []
            for at in (order + block.low).tolist():
                place = bisect_right(bounds, at) - 1
                base, end = bounds[place : place + 2]
                found.append(self._shard_entries(block, places[place], base, end)[at - base])
            return np.array(found, dtype=np.int64)
        parts = []
        for place, (base, end) in zip(places, itertools.pairwise(bounds), strict=True):
            part = self._shard_entries(block, place, base, end)
            parts.append(part[max(block.low - base, 0) : max(block.high - base, 0)])
        entries: np.ndarray = np.concatenate(parts)
        assert len(entries) == block.high - block.low
        mixed: np.ndarray = entries[order]
        return mixed

    def _shard_entries(self, block: Block, place: int, base: int, end: int) -> np.ndarray:
        """Return the entries of a block's shard, which is [base, end) on the axis."""
        layout = self.layout(block.epoch)
        shard = int(layout.shard_order[place])
        if layout.lane_starts[block.lane] <= base and end <= layout.lane_starts[block.lane + 1]:
            return self.samples.entries(block.epoch, shard)
        return self._cut_shard(block.epoch, shard)

    def _cut_shard(self, epoch: int, shard: int) -> np.ndarray:
        """Return a shard that lanes share in an order of its own, so that each gets any of it."""
        cut = self._shards.get((epoch, shard))
        if cut is None:
            entries = self.samples.entries(epoch, shard)
            order = draws.permutation(
                len(entries), seed=self.seed, purpose=draws.WITHIN_SHARD, epoch=epoch, major=shard
            )
            # Several lanes ask for it, one soon after the other.
            cut = _store(self._shards, (epoch, shard), entries[order], limit=8)
        return cut

    def rank_lanes(self, ranks: range, world_size: int) -> range:
        """Return the lanes that neighbouring ranks read from, whole or in part."""
        part = self.global_batch_size // world_size
        first, last = ranks.start * part, ranks.stop * part - 1
        return range(first // self.lane_size, last // self.lane_size + 1)

    def clone(self) -> Plan:
        """Return the same plan with caches of its own, for another thread."""
        plan = copy.copy(self)
        # Layouts never change; blocks are the other thread's own.
        plan._epochs, plan._blocks, plan._shards = dict(self._epochs), {}, {}
        return plan

    def lane_blocks(self, lane: int, start_step: int = 0) -> Iterator[tuple[Block, int, int]]:
        """Yield a lane's blocks from a step on, each with its first and last step.

        The first block may be under way: its first step is then `start_step`.
        """
        place, end = start_step * self.lane_size, self.num_steps * self.lane_size
        while place < end:
            step, rest = divmod(place, self.lane_size)
            position = step * self.global_batch_size + lane * self.lane_size + rest
            epoch = self.epoch_of(position)
            start = self.layout(epoch).lane_starts[lane]
            at = start + self._place_in_segment(position, epoch, lane)
            block = self.find_block(epoch, lane, at)
            place = min(place + block.high - at, end)
            yield block, step, (place - 1) // self.lane_size

    def epoch_of(self, position: int) -> int:
        """Return the epoch of a position."""
        if self.tail == "carry":
            return position // self.num_samples
        return position // self.global_batch_size // int(self.steps_per_epoch)

    def epochs_finished(self, step: int) -> int:
        """Return how many epochs are complete when `step` steps are done."""
        if self.tail == "drop":
            return step // int(self.steps_per_epoch)
        return min(step * self.global_batch_size // self.num_samples, self.epochs)

    def epochs_done(self, step: int) -> float:
        """Return the passes made after `step` steps, as a fraction: what schedules count in."""
        return min(step / self.steps_per_epoch, float(self.epochs))

    def state(self) -> dict[str, Any]:
        """Return what decides the order, ready for JSON and free of rank and world size."""
        return {
            "plan_version": self.version,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "lanes": self.lanes,
            "block_shards": self.block_shards,
            "tail": self.tail,
            "num_samples": self.num_samples,
            "num_shards": len(self.shard_sizes),
            **self.samples.state(),
        }


def _store(cache: dict[Any, _Value], key: Any, value: _Value, *, limit: int) -> _Value:
    """Set cache[key] and let the oldest entries go beyond `limit`; return the value."""
    cache.pop(key, None)
    cache[key] = value
    while len(cache) > limit:
        del cache[next(iter(cache))]
    return value
