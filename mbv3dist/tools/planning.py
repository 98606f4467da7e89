"""`mbv3dist plan`: a run in numbers before it starts, or which rank reads which sample when."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.data.forecast import (
    forecast,
    format_bytes,
    make_world,
    plan_lines,
    plan_summary,
)
from mbv3dist.data.idx import format_key
from mbv3dist.data.joined import JoinedSplit, choose_pass, open_splits
from mbv3dist.data.passes import Pass
from mbv3dist.data.plan import Plan


@dataclass(frozen=True)
class Source:
    """What is planned over: a data set, or sizes that somebody thinks of.

    Attributes:
        shard_sizes: Samples in each shard: int64 [S].
        shard_bytes: Bytes of each shard: int64 [S].
        samples: What a pass holds; None for each sample once.
        keys: Names of pack indices (int64 [n]).
        has_cache: Whether shards go through a cache: those of remote data sets, and imagined ones.
    """

    shard_sizes: np.ndarray
    shard_bytes: np.ndarray
    samples: Pass | None
    keys: Callable[[np.ndarray], list[str]]
    has_cache: bool


def open_source(
    data: Sequence[str | Path],
    split: str | None,
    *,
    weights: Sequence[float] = (),
    balance_classes: bool = False,
    cache_dir: str | Path | None = None,
) -> Source:
    """Return data sets as something to plan over; arguments as `open_splits`, `choose_pass`."""
    if not data:
        raise ValueError("name a data set to plan over, or sizes: --samples N")
    if split is None:
        raise ValueError("name the split to plan over: --split NAME")
    opened = open_splits(data, split, cache_dir=cache_dir)
    samples = choose_pass(opened, weights=weights, balance_classes=balance_classes)
    parts = opened.parts if isinstance(opened, JoinedSplit) else (opened,)
    is_remote = any(part.remote is not None for part in parts)
    return Source(opened.shard_sizes, opened.shard_bytes, samples, opened.keys, is_remote)


def imagined_source(num_samples: int, shard_samples: int, sample_bytes: int) -> Source:
    """Return shards of equally many samples (the last one has the rest), all equally large."""
    assert num_samples > 0 and shard_samples > 0
    sizes = np.full(-(-num_samples // shard_samples), shard_samples, dtype=np.int64)
    sizes[-1] = num_samples - shard_samples * (len(sizes) - 1)

    def keys(indices: np.ndarray) -> list[str]:
        return [format_key(index) for index in indices.tolist()]

    return Source(sizes, sizes * sample_bytes, None, keys, True)


def print_plan(args: Namespace) -> None:
    """Do what the flags of `mbv3dist plan` say.

    Raises:
        ValueError: for flags that do not go together, or as what they start.
        OSError: if a data set cannot be read.
    """
    if args.steps and not args.keys:
        raise ValueError("--steps chooses lines of --keys; give both")
    if args.samples is None:
        source = open_source(
            args.data, args.split, weights=args.weights, balance_classes=args.balance_classes
        )
    elif args.data or args.split or args.weights or args.balance_classes:
        raise ValueError("--samples imagines a data set; give it without a data set and its flags")
    else:
        source = imagined_source(args.samples, args.shard_samples, args.sample_bytes)
    plan = Plan(
        source.shard_sizes,
        global_batch_size=args.global_batch,
        epochs=args.epochs,
        seed=args.seed,
        lanes=args.lanes,
        block_shards=args.block_shards,
        tail=args.tail,
        samples=source.samples,
    )
    plan.check_world(args.world_size)
    if args.keys:
        first, last = _step_range(args.steps, plan.num_steps)
        steps = range(first, last)
        for line in plan_lines(plan, keys=source.keys, world_size=args.world_size, steps=steps):
            sys.stdout.write(line + "\n")
        return
    facts = plan_summary(plan, world_size=args.world_size) | forecast(
        plan,
        make_world(args.world_size, args.ranks_per_node),
        shard_bytes=source.shard_bytes,
        cache_limit_bytes=round(args.cache_gb * 1e9) if source.has_cache else None,
    )
    print(json.dumps(facts, indent=2) if args.json else forecast_text(facts))


def forecast_text(facts: dict[str, Any]) -> str:
    """Return `plan_summary` and `forecast` together as a page to read."""
    lines = [
        f"{facts['samples']} samples in {facts['shards']} shards, {format_bytes(facts['bytes'])}; "
        f"{facts['epochs']} epoch(s) of {facts['steps_per_epoch']:.6g} steps, {facts['steps']} "
        f"in all",
        f"batch of {facts['global_batch_size']}: {facts['world_size']} rank(s) x "
        f"{facts['batch_size_per_rank']}; {facts['nodes']} node(s) of {facts['ranks_per_node']}",
        f"{facts['lanes']} lane(s), blocks of {facts['block_shards']} shards, tail "
        f"{facts['tail']} (overrun {facts['overrun']}, left out per epoch "
        f"{facts['left_out_per_epoch']}), seed {facts['seed']}, plan version "
        f"{facts['plan_version']}",
        "",
        f"{'in the first epoch':<32}{'min':>12}{'mean':>12}{'max':>12}",
    ]
    rows = (
        ("samples per rank", "samples_per_rank", _number),
        ("bytes read per rank", "bytes_per_rank", format_bytes),
        ("bytes read per node", "bytes_per_node", format_bytes),
        ("bytes of shards fetched per node", "fetched_bytes_per_node", format_bytes),
        ("shards open at once, per rank", "shards_open_per_rank", _number),
        ("shards open at once, per node", "shards_open_per_node", _number),
        ("shards in a rank's batch", "shards_per_rank_batch", _number),
        ("shards in a global batch", "shards_per_global_batch", _number),
    )
    for text, name, form in rows:
        values = facts[name]
        cells = [form(values[key]) if key in values else "" for key in ("min", "mean", "max")]
        bound = f"  (never above {values['bound']})" if "bound" in values else ""
        lines.append(f"{text:<32}" + "".join(f"{cell:>12}" for cell in cells) + bound)
    lines += [
        f"(shards open and in batches: of {len(facts['sampled_steps'])} step(s))",
        "",
        f"fullest rank over mean: {facts['balance']['samples_per_rank']:.4f} in samples, "
        f"{facts['balance']['bytes_per_rank']:.4f} in bytes",
        f"fetches per shard and epoch, all nodes together: {facts['fetches_per_shard']:.3f}",
        f"cache needed per node for remote shards: {format_bytes(facts['cache_bytes_needed'])}",
    ]
    return "\n".join(lines + [f"advice: {line}" for line in facts["advice"]])


def _number(value: float) -> str:
    return f"{value}" if isinstance(value, int) else f"{value:.1f}"


def _step_range(text: str | None, num_steps: int) -> tuple[int, int]:
    if text is None:
        return 0, num_steps
    first, separator, last = text.partition(":")
    try:
        span = int(first or 0), int(last or num_steps) if separator else int(first) + 1
    except ValueError:
        raise ValueError(f"--steps {text}: expected A:B, two step numbers") from None
    if not 0 <= span[0] <= span[1] <= num_steps:
        raise ValueError(f"--steps {text}: expected 0 <= A <= B <= {num_steps}, the run's steps")
    return span
