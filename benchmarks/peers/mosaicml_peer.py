"""MosaicML Streaming: MDS shards, `StreamingDataset` and `StreamingDataLoader`.

Ranks are told by RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (one node); the library makes
its gloo group itself. Everything else is its default but for `shuffle`. `hashed` downloads from
a second folder into an empty cache with `validate_hash`, its documented check of shards.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streaming  # type: ignore[import-untyped,import-not-found,unused-ignore]
import torch
import transformers  # type: ignore[import-untyped,import-not-found,unused-ignore]
from streaming.base.batching import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    generate_work,
)
from streaming.base.world import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    World,
)

from peers import protocol
from peers.damage import Target
from peers.protocol import Delivery, Request
from peers.samples import read_samples
from peers.traffic import traffic

NAME = "MosaicML Streaming"
VARIANTS = {"default": {"order", "damage"}, "hashed": {"damage"}}
WORKERS = (0, 2)
SETTINGS = {
    "default": "local shards, shuffle=True, otherwise defaults (py1e, relaxed partition, canonical "
    "nodes = nodes = 1), StreamingDataLoader",
    "hashed": "hashes=['xxh64'] when written, validate_hash='xxh64', remote folder, empty cache",
    "evaluation": "shuffle=False",
    "damage": "shuffle=False",
}
SHARD_BYTES = 40 * 1024
HASH = "xxh64"


class Logged(streaming.StreamingDataset):  # type: ignore[misc]
    """Remembers which samples were read in this process."""

    touched: list[int]

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return a sample."""
        item = super().get_item(sample_id, retry)
        self.touched.append(int(item["key"]))
        return item


def versions() -> dict[str, str]:
    """Return what ran."""
    return {
        "mosaicml-streaming": streaming.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def pack(source: Path, out: Path, variant: str) -> None:
    """Write the samples as MDS."""
    columns = {"key": "int", "jpg": "bytes", "cls": "int"}
    hashes = [HASH] if variant == "hashed" else None
    out = out / "remote" if variant == "hashed" else out / "mds"
    with streaming.MDSWriter(
        out=str(out), columns=columns, size_limit=SHARD_BYTES, hashes=hashes
    ) as writer:
        for key, picture, label in read_samples(source):
            writer.write({"key": key, "jpg": picture, "cls": label})


def shards(place: Path, variant: str) -> list[Path]:
    """Return the packed files, in order."""
    return sorted((place / ("remote" if variant == "hashed" else "mds")).glob("*.mds"))


def live(place: Path, variant: str, path: Path) -> Path:
    """Return the file that is read for a packed one: its copy in the cache, if there is one."""
    return place / "cache" / path.name if variant == "hashed" else path


def header(position: int, offset: int) -> tuple[int, int]:
    """Return where a shard's table says where a sample ends: uint32, after number and begin."""
    del offset
    return 4 * (2 + position), 4


def break_index(place: Path, variant: str, case: str, target: Target, other: Path) -> str:
    """Damage index.json and return its name, or nothing where there is no such case."""
    del place
    path = target.path.parent / "index.json"
    index = json.loads(path.read_text())
    rows = {row["raw_data"]["basename"]: row for row in index["shards"]}
    mine, its = rows[target.path.name], rows[other.name]
    if case == "no index":
        path.unlink()
        return path.name
    if case == "checksum":
        if variant != "hashed":
            return ""
        mine["raw_data"]["hashes"][HASH] = "0" * 16
    else:
        mine["raw_data"]["basename"], its["raw_data"]["basename"] = other.name, target.path.name
    path.write_text(json.dumps(index))
    return path.name


def _dataset(place: Path, variant: str, **options: Any) -> Logged:
    if variant == "hashed":
        where = {"remote": str(place / "remote"), "local": str(place / "cache")}
        options["validate_hash"] = HASH
    else:
        where = {"local": str(place / "mds")}
    dataset = Logged(**where, **options)
    dataset.touched = []
    return dataset


def _columns(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def deliver(request: Request) -> Delivery:
    """Read as one rank."""
    dataset = _dataset(
        request.place,
        request.variant,
        shuffle=not request.evaluate,
        batch_size=request.batch_size,
    )
    loader = streaming.StreamingDataLoader(
        dataset,
        batch_size=request.batch_size,
        num_workers=request.workers,
        collate_fn=_columns,
    )
    first = 0
    if request.state is not None:
        loader.load_state_dict(request.state)
        first = request.state["epoch"]
    entries: list[protocol.Entry] = []
    state = None
    for epoch in range(first, request.epochs):
        if request.stop is None:
            ids = (batch["key"] for batch in loader)
            entries += protocol.collect(ids, request, epoch=epoch)
            continue
        for batch in loader:
            entries += protocol.collect([batch["key"]], request, epoch=epoch, first=len(entries))
            if len(entries) == request.stop:
                state = loader.state_dict()
                break
        break
    return Delivery(entries, state, touched=dataset.touched)


def read(place: Path, variant: str) -> Iterator[tuple[int, bytes] | None]:
    """Yield key and picture, None at the end of an epoch."""
    dataset = _dataset(place, variant, shuffle=False, batch_size=8)
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=8, num_workers=0, collate_fn=_columns
    )
    for _ in range(2):
        for batch in loader:
            yield from zip(batch["key"], batch["jpg"], strict=True)
        yield None


def scale(job: dict[str, Any]) -> dict[str, Any]:
    """Plan an epoch over an index without shards: its traffic, and the time a resume takes."""
    place = Path(job["root"]) / "synthetic"
    place.mkdir()
    sizes = job["shard_sizes"]
    (place / "index.json").write_text(json.dumps(_index(sizes)))
    result: dict[str, Any] = {"traffic": {}, "resume_ms": {}}
    for algorithm in ("py1e", "py1br", "py1s"):
        result["traffic"][algorithm] = {}
        for nodes in job["nodes"]:
            batch = job["global_batch"] // nodes
            dataset = _planned(place, algorithm, nodes, batch)
            world = World(nodes, 1, 1, 0)
            work = generate_work("random", dataset, world, 0, 0)  # [nodes, 1, 1, steps, batch]
            order = work[:, 0, 0].transpose(1, 0, 2).reshape(work.shape[3], -1)
            result["traffic"][algorithm][str(nodes)] = traffic(order, sizes, nodes=nodes)
    world = World(1, job["ranks"], 1, 0)
    total = sum(sizes)
    for share in job["shares"]:
        dataset = _planned(place, "py1e", 1, job["global_batch"] // job["ranks"])
        times = []
        for _ in range(3):
            started = time.perf_counter()
            step = int(total * share) // job["global_batch"] * job["global_batch"]
            generate_work("random", dataset, world, 0, step)
            times.append(1000 * (time.perf_counter() - started))
        result["resume_ms"][str(share)] = round(sorted(times)[1], 2)
    result["resume_what"] = "generate_work, the plan of an epoch from a sample on, median of 3"
    return result


def _planned(place: Path, algorithm: str, nodes: int, batch: int) -> Logged:
    dataset = Logged(local=str(place), shuffle=True, shuffle_algo=algorithm, batch_size=batch)
    # What __iter__ sets from the world that it detects.
    dataset.num_canonical_nodes = 64 * nodes if algorithm == "py1s" else nodes
    dataset._set_shuffle_block_size(World(nodes, 1, 1, 0))
    return dataset


def _index(sizes: list[int]) -> dict[str, Any]:
    row = {
        "column_encodings": ["int"],
        "column_names": ["key"],
        "column_sizes": [8],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": 1 << 26,
        "version": 2,
        "zip_data": None,
    }
    rows = [
        row
        | {"samples": size}
        | {"raw_data": {"basename": f"shard.{n:05}.mds", "bytes": 1 << 26, "hashes": {}}}
        for n, size in enumerate(sizes)
    ]
    return {"version": 2, "shards": rows}


def _shared_memory() -> set[Path]:
    """Return the library's pieces of shared memory on this machine."""
    return {path for path in Path("/dev/shm").glob("*_*") if re.match(r"\d{6}_[a-z]", path.name)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    others = _shared_memory()
    protocol.main(sys.modules["__main__"])
    for leftover in _shared_memory() - others:  # of children that had to be killed
        leftover.unlink(missing_ok=True)
    os._exit(0)
