"""What a resumed loader reads, and how long the list of shards takes: parts of resume.py."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import in_new_process, peak_mb

from mbv3dist.data.idx import read_idx
from mbv3dist.data.index import open_split
from mbv3dist.data.manifest import manifest_path, regular_url, write_manifest
from mbv3dist.data.plan import Plan
from mbv3dist.data.shards import LocalShard


def measure_reads(*, quick: bool) -> list[dict[str, Any]]:
    """Resume a `Loader` in the middle of an epoch and count what it reads of which sample."""
    from mbv3dist.config import ViewConfig
    from mbv3dist.data.loader import Loader  # brings torch

    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = small_data_set(Path(folder), 120 if quick else 600)
        split = open_split(data, "train")
        read: list[tuple[int, int, int]] = []
        original = LocalShard.read_at

        def counting(self: LocalShard, offset: int, size: int) -> bytes:
            read.append((os.fstat(self._file).st_ino, offset, size))
            return original(self, offset, size)

        setattr(LocalShard, "read_at", counting)  # noqa: B010
        try:
            for fraction in (0.01, 0.5, 0.99):
                plan = Plan(split.shard_sizes, global_batch_size=12, epochs=1, lanes=4)
                step = max(int(fraction * plan.num_steps), 1)
                read.clear()
                view = ViewConfig()
                with Loader(split, plan, view=view, size=32, seed=0, start_step=step) as loader:
                    next(iter(loader))
                results.append({"point": fraction, "step": step, **judge(split, plan, step, read)})
        finally:
            setattr(LocalShard, "read_at", original)  # noqa: B010
    return results


def judge(split: Any, plan: Plan, step: int, read: list[tuple[int, int, int]]) -> dict[str, int]:
    """Return whose bytes were read: of the resumed step and those prepared ahead, or of others."""
    steps = [set(plan.step(s).index.tolist()) for s in range(plan.num_steps)]
    of_step = {index: number for number, samples in enumerate(steps) for index in samples}
    result = {"samples": 0, "bytes_this_step": 0, "bytes_ahead": 0, "bytes_again": 0}
    numbers = {shard.path.stat().st_ino: number for number, shard in enumerate(split.shards)}
    for file, offset, size in read:
        number = numbers[file]
        table = read_idx(split.shards[number].path.with_suffix(".idx"))
        position = int(np.searchsorted(table.image_offset, offset, side="right"))
        owner = of_step[int(split.starts[number]) + position]
        key = "again" if owner < step else "this_step" if owner == step else "ahead"
        result[f"bytes_{key}"] += size
        result["samples"] += 1
    opened = {numbers[file] for file, _, _ in read}
    ahead = set().union(*steps[step : step + 5])  # the loader prepares some batches ahead
    needed = {split.locate(index)[0] for index in ahead}
    return {
        **result,
        "shards_opened": len(opened),
        "shards_not_needed": len(opened - needed),
        "shards": len(split.shards),
    }


def small_data_set(folder: Path, num_pictures: int) -> Path:
    """Write noise pictures and convert them into some 25 shards."""
    from PIL import Image

    from mbv3dist.convert.imagefolder import convert_imagefolder

    rng = np.random.default_rng(0)
    (folder / "pictures" / "noise").mkdir(parents=True)
    for number in range(num_pictures):
        picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture.save(folder / "pictures" / "noise" / f"{number:04d}.jpg", quality=90)
    convert_imagefolder(
        folder / "pictures",
        folder / "data",
        split="train",
        workers=1,
        shard_bytes=num_pictures * 160,
    )
    return folder / "data"


def measure_manifest(script: str, *, quick: bool) -> list[dict[str, Any]]:
    """Open splits of many shards from the text and from the binary copy, each in new processes.

    `script` with `--part open` does `open_process`.
    """
    results = []
    for num_shards in (20_000,) if quick else (100_000, 430_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            path = write_description(Path(folder), num_shards)
            write_manifest(path)
            manifest = manifest_path(path)
            figures: dict[str, Any] = {
                "shards": num_shards,
                "json_mb": round(path.stat().st_size / 1e6, 1),
                "manifest_mb": round(manifest.stat().st_size / 1e6, 1),
            }
            for name in ("manifest", "json"):
                if name == "json":
                    manifest.unlink()
                runs = [
                    in_new_process(script, "open", {"folder": folder})
                    for _ in range(1 if quick else 3)
                ]
                for key in runs[0]:
                    figures[f"{name}_{key}"] = round(float(np.median([r[key] for r in runs])), 1)
            results.append(figures)
    return results


def write_description(folder: Path, num_shards: int) -> Path:
    """Write a SPLIT.json of shards that nobody has, line by line."""
    digests = np.random.default_rng(0).bytes(32 * num_shards)
    (folder / "train").mkdir()
    path = folder / "train.json"
    head = {"wids_version": 1, "task": "classification", "classes": ["one"], "boxes": 0}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + ', "shardlist": [\n')
        for number in range(num_shards):
            row = {
                "url": regular_url("train", number),
                "nsamples": 1000,
                "filesize": 110_000_000 + number,
                "sha256": digests[32 * number : 32 * number + 32].hex(),
            }
            file.write(json.dumps(row) + (",\n" if number + 1 < num_shards else "\n]}\n"))
    return path


def open_process(folder: str) -> dict[str, float]:
    """In a new process: time and memory of opening a split."""
    before = peak_mb()
    started = time.perf_counter()
    split = open_split(folder, "train")
    seconds = time.perf_counter() - started
    assert len(split) == 1000 * len(split.shards)
    return {"ms": seconds * 1e3, "mb_used": peak_mb() - before}
