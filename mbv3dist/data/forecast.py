"""A run in numbers before it starts, and who reads what: what `mbv3dist plan` prints.

The forecast is of the run's first epoch; `spread.py` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mbv3dist.data.division import nearest_divisors, one_of
from mbv3dist.data.plan import Plan
from mbv3dist.data.spread import (
    Sizes,
    World,
    bytes_read,
    cache_bytes,
    divisors,
    open_bound,
    places_met,
    rank_bounds,
    reads_below,
    step_shards,
)

DEFAULT_RANKS_PER_NODE = 8
GOOD_FETCHES = 1.1  # times that a shard is fetched in an epoch, by all nodes together
_MAX_STEPS = 16
_MAX_WORK = 8_000_000  # samples in the blocks of all sampled steps: half a second
_WORK_PER_BLOCK = 1500


def make_world(world_size: int, ranks_per_node: int | None = None) -> World:
    """Return the ranks on their nodes; default: as many on each as divide, up to 8.

    Raises:
        ValueError: if the ranks do not fill whole nodes.
    """
    if ranks_per_node is None:
        most = min(world_size, DEFAULT_RANKS_PER_NODE)
        ranks_per_node = max(n for n in range(1, most + 1) if world_size % n == 0)
    if ranks_per_node < 1 or world_size % ranks_per_node:
        near = nearest_divisors(world_size, max(ranks_per_node, 1))
        raise ValueError(
            f"{world_size} ranks do not fill nodes of {ranks_per_node}; choose {one_of(near)} "
            "(--ranks-per-node)"
        )
    return World(world_size, ranks_per_node)


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


def forecast(
    plan: Plan, world: World, *, shard_bytes: np.ndarray, cache_limit_bytes: int | None = None
) -> dict[str, Any]:
    """Return what the run's first epoch asks of ranks and nodes, ready for JSON.

    Args:
        plan: The plan.
        world: Ranks and nodes.
        shard_bytes: Size of each shard: int64 [S].
        cache_limit_bytes: What a node's cache of remote shards may hold; None without one.
    """
    plan.check_world(world.num_ranks)
    sizes = Sizes(plan, plan.layout(0), shard_bytes)
    samples = np.diff(reads_below(plan, 0, rank_bounds(plan, world.num_ranks)))
    by_rank = bytes_read(plan, sizes, 0, world.num_ranks)
    by_node = bytes_read(plan, sizes, 0, world.num_nodes)
    met = places_met(plan, 0, world.num_nodes)
    fetched = sizes.whole[met.high] - sizes.whole[met.low]
    needed = int(cache_bytes(plan, sizes, 0, world).max())
    fetches = int((met.high - met.low).sum())
    result = {
        "nodes": world.num_nodes,
        "ranks_per_node": world.ranks_per_node,
        "bytes": int(shard_bytes.sum()),
        "samples_per_rank": _range(samples),
        "bytes_per_rank": _range(by_rank),
        "bytes_per_node": _range(by_node),
        "balance": {
            "samples_per_rank": _imbalance(samples),
            "bytes_per_rank": _imbalance(by_rank),
            "bytes_per_node": _imbalance(by_node),
        },
        **_sampled(plan, world),
        "shards_fetched": fetches,
        "fetches_per_shard": fetches / len(plan.layout(0).shard_order),
        "fetched_bytes_per_node": _range(fetched),
        "cache_bytes_needed": needed,
        "cache_bytes": cache_limit_bytes,
    }
    advice = _lanes_advice(plan, world, result["fetches_per_shard"], int(shard_bytes.sum()))
    if cache_limit_bytes is not None and needed > cache_limit_bytes:
        enough = -(-needed // 10**8) / 10
        advice.append(
            f"a node needs a cache of {format_bytes(needed)} to read on while it fetches, it has "
            f"{format_bytes(cache_limit_bytes)}: train with --data.cache_gb {enough:g} or fewer "
            "--data.block_shards"
        )
    if plan.global_batch_size > plan.num_samples:
        advice.append(
            f"a step reads the data {plan.global_batch_size / plan.num_samples:.3g} times: "
            "choose a smaller global batch"
        )
    return {**result, "advice": advice}


def _sampled(plan: Plan, world: World) -> dict[str, Any]:
    """Count the shards in some of the epoch's steps, as many as are quickly read."""
    num_steps = min(max(-(-plan.num_samples // plan.global_batch_size), 1), plan.num_steps)
    block = plan.block_shards * plan.num_samples // len(plan.layout(0).shard_order)
    block = min(block, plan.num_samples // plan.lanes) + _WORK_PER_BLOCK
    work = plan.lanes * block + plan.global_batch_size
    count = min(max(_MAX_WORK // work, 1), _MAX_STEPS, num_steps)
    steps = [num_steps * (2 * n + 1) // (2 * count) for n in range(count)]  # spread evenly
    found = [step_shards(plan, step, world) for step in steps]

    def over_groups(counts: list[np.ndarray], **more: int) -> dict[str, float]:
        everyone = np.concatenate(counts)
        return {"mean": float(everyone.mean()), "max": int(everyone.max()), **more}

    return {
        "sampled_steps": steps,
        "shards_open_per_rank": over_groups(
            [each.open_by_rank for each in found], bound=open_bound(plan, world.num_ranks)
        ),
        "shards_open_per_node": over_groups(
            [each.open_by_node for each in found], bound=open_bound(plan, world.num_nodes)
        ),
        "shards_per_rank_batch": over_groups([each.read_by_rank for each in found]),
        "shards_per_global_batch": over_groups([np.array([each.read_by_all]) for each in found]),
    }


def _lanes_advice(plan: Plan, world: World, fetches: float, num_bytes: int) -> list[str]:
    """Say which number of lanes, or which shards, would spare the nodes each other's shards."""
    if fetches < GOOD_FETCHES or world.num_nodes == 1:
        return []
    shards = len(plan.layout(0).shard_order)
    text = f"each shard is fetched {fetches:.3g} times an epoch by {world.num_nodes} nodes: "
    best, least = plan.lanes, fetches
    for lanes in divisors(plan.global_batch_size):
        met = places_met(plan, 0, world.num_nodes, lanes)
        would_be = float((met.high - met.low).sum() / shards)
        if lanes > plan.lanes and would_be < least - 0.005:
            best, least = lanes, would_be
            if least < GOOD_FETCHES:
                break
    if best != plan.lanes:
        text += f"--lanes {best} would bring it to {least:.3g}"
    if least >= GOOD_FETCHES:
        # A node's stretch of the epoch begins and ends inside a shard.
        shard = num_bytes / (10 * world.num_nodes)
        text += ", and " if best != plan.lanes else ""
        text += f"shards of {format_bytes(shard)} (--shard-mb of convert) to {GOOD_FETCHES}"
    return [text]


def plan_lines(
    plan: Plan,
    *,
    keys: Callable[[np.ndarray], list[str]],
    world_size: int = 1,
    steps: range | None = None,
) -> Iterator[str]:
    """Yield `step TAB rank TAB key TAB key ...` for each step and rank (`mbv3dist plan --keys`).

    Positions of weight 0 are left out, so that the lines of an epoch hold each key as often as its
    pass does: once, as a rule.
    """
    plan.check_world(world_size)
    part = plan.global_batch_size // world_size
    for step in range(plan.num_steps) if steps is None else steps:
        whole = plan.step(step)
        for rank in range(world_size):
            mine = slice(rank * part, (rank + 1) * part)
            index = whole.index[mine][whole.weight[mine] > 0]
            yield "\t".join([str(step), str(rank), *keys(index)])


def _range(values: np.ndarray) -> dict[str, float]:
    """Return min, mean and max; whole numbers, since they are samples or bytes."""
    return {
        "min": round(float(values.min())),
        "mean": round(float(values.mean()), 1),
        "max": round(float(values.max())),
    }


def _imbalance(values: np.ndarray) -> float:
    mean = float(values.mean())
    return float(values.max()) / mean if mean else 1.0


def format_bytes(value: float) -> str:
    """Return a number of bytes in a unit to read: 1.28 GB."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if value >= 10**power:
            return f"{value / 10**power:.4g} {unit}"
    return f"{value:.0f} bytes"
