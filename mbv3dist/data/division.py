"""How batches divide: over ranks, accumulation steps and lanes, and what to say if they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Named in messages: recipes and `mbv3dist plan` call the same numbers differently.
FLAGS = {
    "global_batch_size": "--data.global_batch_size, or --global-batch of plan",
    "block_shards": "--data.block_shards, or --block-shards of plan",
    "lanes": "--data.lanes, or --lanes of plan",
    "tail": "--data.tail, or --tail of plan",
}


def check_division(batch: int, world_size: int, accumulation_steps: int) -> None:
    """Raise ValueError, naming valid values, unless every micro-batch is equally large."""
    parts = world_size * accumulation_steps
    if world_size < 1 or accumulation_steps < 1:
        raise ValueError(
            f"world size and accumulation steps must be at least 1, got {world_size} and "
            f"{accumulation_steps}"
        )
    if batch % parts == 0:
        return
    shared = f"{world_size} processes"
    if accumulation_steps > 1:
        shared += f" x {accumulation_steps} accumulation steps"
    batches = [n for n in (batch // parts * parts, (batch // parts + 1) * parts) if n > 0]
    cure = f"choose a global batch size of {one_of(batches)} ({FLAGS['global_batch_size']})"
    if batch % accumulation_steps == 0:
        worlds = nearest_divisors(batch // accumulation_steps, world_size)
        cure += f", or start {one_of(worlds)} processes"
    raise ValueError(f"global batch size {batch} does not divide by {shared}; {cure}")


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """Return the divisors of `number` next to `wanted`, the smaller first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    below = [n for n in divisors if n <= wanted]
    above = [n for n in divisors if n > wanted]
    return below[-1:] + above[:1]


def one_of(values: Sequence[int]) -> str:
    """Return the values as words."""
    return " or ".join(str(value) for value in values)


def evaluation_range(num_samples: int, *, rank: int, world_size: int, batch_size: int = 1) -> range:
    """Return the samples that `rank` evaluates: the ranks' ranges hold each sample exactly once.

    A range begins at a multiple of the batch size, so that batches are the same for any world
    size. Ranges differ in length by one batch at most, and can be empty.
    """
    assert 0 <= rank < world_size
    num_batches = -(-num_samples // batch_size)
    first, end = (num_batches * r // world_size * batch_size for r in (rank, rank + 1))
    return range(first, min(end, num_samples))
