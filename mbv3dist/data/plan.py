"""Who reads which sample when: the order of a whole training run, from numbers alone.

A run reads positions q = step * G + j. `Plan` maps every position to a sample (its pack index) so
that each epoch holds every sample exactly once, global batches are the same on every world size,
neighbouring positions come from few shards, and any step can be computed without the steps before
it. docs/streaming.md has the maths and the proof. Only numpy: no torch, no files.

Symbols, as in the documentation: N samples, G global batch size, C lanes of L = G / C positions,
P ranks, B shards in a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mbv3dist.data import draws

MAX_DEFAULT_LANES = 64
TAILS = ("carry", "drop")
_Value = TypeVar("_Value")
# Named in messages: recipes and `mbv3dist plan` call the same numbers differently.
_FLAGS = {
    "global_batch_size": "--data.global_batch_size, or --global-batch of plan",
    "block_shards": "--data.block_shards, or --block-shards of plan",
    "lanes": "--data.lanes, or --lanes of plan",
    "tail": "--data.tail, or --tail of plan",
}


@dataclass(frozen=True)
class StepPlan:
    """What one rank reads in one step, in order; b = global batch size / world size."""

    index: np.ndarray
    """int64 [b]: pack index of the sample."""
    epoch: np.ndarray
    """int64 [b]: epoch the sample is read in, from 0."""
    weight: np.ndarray
    """float32 [b]: 1, or 0 for the overrun of the run's last step."""


@dataclass(frozen=True)
class _EpochLayout:
    """One epoch's sample axis: the shards one behind the other, cut into a segment per lane."""

    shard_order: np.ndarray  # int64 [num_shards]
    shard_starts: np.ndarray  # int64 [num_shards + 1], axis positions
    lane_starts: list[int]  # C + 1 axis positions


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

    Raises:
        ValueError: For values outside their limits, naming the flag.
    """

    version = 1

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
    ):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        assert self.shard_sizes.ndim == 1
        assert (self.shard_sizes >= 0).all()
        self.num_samples = int(self.shard_sizes.sum())
        self.global_batch_size = int(global_batch_size)
        self.epochs = int(epochs)
        self.seed = int(seed)
        self.block_shards = int(block_shards)
        self.tail = tail
        self._check_numbers()
        self.lanes = self._choose_lanes(lanes)
        self.lane_size = self.global_batch_size // self.lanes

        # Of a carry epoch the steps are a fraction; of a drop epoch a whole number.
        if tail == "carry":
            self.steps_per_epoch: float = self.num_samples / self.global_batch_size
            self.num_steps = -(-self.epochs * self.num_samples // self.global_batch_size)
        else:
            self.steps_per_epoch = self.num_samples // self.global_batch_size
            self.num_steps = self.epochs * self.steps_per_epoch

        self._shard_first = np.concatenate(([0], np.cumsum(self.shard_sizes)))
        # Small caches: a step costs its lookups. They are not safe for several threads at a time.
        self._epochs: dict[int, _EpochLayout] = {}
        self._blocks: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # by epoch and lane
        self._shards: dict[tuple[int, int], np.ndarray] = {}  # by epoch and shard

    def _check_numbers(self) -> None:
        for name in ("global_batch_size", "block_shards"):
            value = getattr(self, name)
            if value < 1:
                words = name.replace("_", " ")
                raise ValueError(f"{words} must be at least 1, got {value} ({_FLAGS[name]})")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}; set --epochs")
        if self.tail not in TAILS:
            raise ValueError(f"tail must be carry or drop, got {self.tail!r} ({_FLAGS['tail']})")
        draws.check_seed(self.seed)
        if self.num_samples == 0:
            raise ValueError("the split holds no samples, so there is nothing to plan; convert one")
        if self.tail == "drop" and self.num_samples < self.global_batch_size:
            raise ValueError(
                f"tail=drop leaves nothing of {self.num_samples} samples at global batch size "
                f"{self.global_batch_size}; choose tail=carry ({_FLAGS['tail']}) or a global batch "
                f"size of {self.num_samples} or less ({_FLAGS['global_batch_size']})"
            )

    def _choose_lanes(self, lanes: int | None) -> int:
        batch = self.global_batch_size
        if lanes is None:
            return max(n for n in range(1, min(batch, MAX_DEFAULT_LANES) + 1) if batch % n == 0)
        if lanes < 1 or batch % lanes:
            near = _nearest_divisors(batch, max(lanes, 1))
            raise ValueError(
                f"lanes must divide the global batch size {batch}, got {lanes}; "
                f"choose {_one_of(near)} ({_FLAGS['lanes']})"
            )
        return int(lanes)

    def check_world(self, world_size: int, accumulation_steps: int = 1) -> None:
        """Raise ValueError, naming valid values, unless every micro-batch is equally large."""
        parts = world_size * accumulation_steps
        if world_size < 1 or accumulation_steps < 1:
            raise ValueError(
                f"world size and accumulation steps must be at least 1, got {world_size} and "
                f"{accumulation_steps}"
            )
        batch = self.global_batch_size
        if batch % parts == 0:
            return
        shared = f"{world_size} processes"
        if accumulation_steps > 1:
            shared += f" x {accumulation_steps} accumulation steps"
        batches = [n for n in (batch // parts * parts, (batch // parts + 1) * parts) if n > 0]
        cure = f"choose a global batch size of {_one_of(batches)} ({_FLAGS['global_batch_size']})"
        if batch % accumulation_steps == 0:
            worlds = _nearest_divisors(batch // accumulation_steps, world_size)
            cure += f", or start {_one_of(worlds)} processes"
        raise ValueError(f"global batch size {batch} does not divide by {shared}; {cure}")

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
        return StepPlan(index=np.concatenate(pieces), epoch=epoch, weight=weight)

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
        """Append the pack indices [start, start + count) of a lane's segment to `pieces`."""
        layout = self._layout(epoch)
        at = layout.lane_starts[lane] + start
        end = at + count
        key = (epoch, lane)
        while at < end:
            first, indices = self._blocks.get(key, (0, None))
            if indices is None or not first <= at < first + len(indices):
                # A lane reads on from block to block, so only its present one is kept.
                first, indices = self._make_block(layout, epoch, lane, at)
                _store(self._blocks, key, (first, indices), limit=2 * self.lanes)
            piece = indices[at - first : end - first]
            pieces.append(piece)
            at += len(piece)

    def _layout(self, epoch: int) -> _EpochLayout:
        layout = self._epochs.get(epoch)
        if layout is None:
            layout = _store(self._epochs, epoch, self._make_layout(epoch), limit=8)
        return layout

    def _make_layout(self, epoch: int) -> _EpochLayout:
        num_shards = len(self.shard_sizes)
        order = draws.permutation(
            num_shards, seed=self.seed, purpose=draws.SHARD_ORDER, epoch=epoch
        )
        shard_starts = np.concatenate(([0], np.cumsum(self.shard_sizes[order])))
        start, end = self._epoch_start(epoch), self._epoch_start(epoch + 1)
        counts = [self._count(end, c) - self._count(start, c) for c in range(self.lanes)]
        lane_starts = [0, *np.cumsum(counts).tolist()]
        assert lane_starts[-1] == end - start <= self.num_samples
        return _EpochLayout(order, shard_starts, lane_starts)

    def _make_block(
        self, layout: _EpochLayout, epoch: int, lane: int, at: int
    ) -> tuple[int, np.ndarray]:
        """Return the block of `lane` that holds axis position `at`: its first position, indices."""
        starts = layout.shard_starts
        lane_start, lane_end = layout.lane_starts[lane : lane + 2]
        # side="right" steps over empty shards.
        first, holder = (np.searchsorted(starts, (lane_start, at), side="right") - 1).tolist()
        block = (holder - first) // self.block_shards
        low_shard = first + block * self.block_shards
        high_shard = min(low_shard + self.block_shards, len(self.shard_sizes))
        low = max(lane_start, int(starts[low_shard]))
        high = min(lane_end, int(starts[high_shard]))
        parts = []
        for place in range(low_shard, high_shard):
            base = int(starts[place])
            samples = self._shard_samples(epoch, int(layout.shard_order[place]))
            parts.append(samples[max(low - base, 0) : max(high - base, 0)])
        indices = np.concatenate(parts)
        assert len(indices) == high - low
        key = {"epoch": epoch, "major": lane, "minor": block}
        order = draws.permutation(len(indices), seed=self.seed, purpose=draws.WITHIN_BLOCK, **key)
        return low, indices[order]

    def _shard_samples(self, epoch: int, shard: int) -> np.ndarray:
        """Return a shard's pack indices in this epoch's order, so that a cut takes any of them."""
        first, size = int(self._shard_first[shard]), int(self.shard_sizes[shard])
        samples = self._shards.get((epoch, shard))
        if samples is None:
            order = draws.permutation(
                size, seed=self.seed, purpose=draws.WITHIN_SHARD, epoch=epoch, major=shard
            )
            # Only a shard that is cut is asked for by several lanes, one soon after the other.
            samples = _store(self._shards, (epoch, shard), order + first, limit=8)
        return samples

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
        }


def evaluation_range(num_samples: int, *, rank: int, world_size: int) -> range:
    """Return the samples that `rank` evaluates: the ranks' ranges hold each sample exactly once.

    Ranges differ in length by one at most, and can be empty.
    """
    assert 0 <= rank < world_size
    return range(num_samples * rank // world_size, num_samples * (rank + 1) // world_size)


def plan_summary(plan: Plan, *, world_size: int = 1) -> dict[str, Any]:
    """Return the run in numbers, ready for JSON (`mbv3dist plan --json`)."""
    plan.check_world(world_size)
    epoch_length = plan.num_samples
    if plan.tail == "drop":
        epoch_length = int(plan.steps_per_epoch) * plan.global_batch_size
    return {
        "samples": plan.num_samples,
        "shards": len(plan.shard_sizes),
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": plan.num_steps,
        "epochs": plan.epochs,
        "global_batch_size": plan.global_batch_size,
        "world_size": world_size,
        "batch_size_per_rank": plan.global_batch_size // world_size,
        "lanes": plan.lanes,
        "block_shards": plan.block_shards,
        "tail": plan.tail,
        "left_out_per_epoch": plan.num_samples - epoch_length,
        "overrun": plan.num_steps * plan.global_batch_size - plan.epochs * epoch_length,
        "seed": plan.seed,
        "plan_version": plan.version,
    }


def plan_lines(plan: Plan, *, world_size: int = 1, steps: range | None = None) -> Iterator[str]:
    """Yield `step TAB rank TAB key TAB key ...` for each step and rank (`mbv3dist plan --keys`).

    Positions of weight 0 are left out, so that the lines of an epoch hold each key once.
    """
    plan.check_world(world_size)
    for step in range(plan.num_steps) if steps is None else steps:
        whole = plan.step(step)
        for rank in range(world_size):
            part = plan.global_batch_size // world_size
            mine = slice(rank * part, (rank + 1) * part)
            index = whole.index[mine][whole.weight[mine] > 0]
            yield "\t".join([str(step), str(rank), *(f"{i:09d}" for i in index.tolist())])


def _store(cache: dict[Any, _Value], key: Any, value: _Value, *, limit: int) -> _Value:
    """Set cache[key] and let the oldest entries go beyond `limit`; return the value."""
    cache.pop(key, None)
    cache[key] = value
    while len(cache) > limit:
        del cache[next(iter(cache))]
    return value


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """Return the divisors of `number` next to `wanted`, the smaller first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    below = [n for n in divisors if n <= wanted]
    above = [n for n in divisors if n > wanted]
    return below[-1:] + above[:1]


def _one_of(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)
