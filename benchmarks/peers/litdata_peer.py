"""LitData: chunks by its `BinaryWriter`, `StreamingDataset` and `StreamingDataLoader`.

Ranks are told by WORLD_SIZE, GLOBAL_RANK and NNODES (one node). As its documentation says,
training shuffles and drops the last batches, evaluation does neither.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata  # type: ignore[import-untyped,import-not-found,unused-ignore]
import numpy as np
import torch
from litdata.utilities.env import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    _DistributedEnv,
)

from peers import protocol
from peers.damage import Target
from peers.protocol import Delivery, Request
from peers.samples import read_samples
from peers.traffic import traffic

NAME = "LitData"
VARIANTS = {"default": {"order", "damage"}}
WORKERS = (0, 2)
SETTINGS = {
    "default": "local chunks, shuffle=True, drop_last=True, StreamingDataLoader, num_workers 0, 2",
    "evaluation": "shuffle=False, drop_last=False",
    "damage": "shuffle=False, drop_last=False; it stores no checksums",
}
CHUNK_SAMPLES = 44
_TOUCHED: list[int] = []


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"litdata": litdata.__version__, "torch": torch.__version__}


def pack(source: Path, out: Path, variant: str) -> None:
    """Write the samples as chunks."""
    del variant
    writer = litdata.streaming.writer.BinaryWriter(str(out / "chunks"), chunk_size=CHUNK_SAMPLES)
    for number, (key, picture, label) in enumerate(read_samples(source)):
        writer.add_item(number, {"key": key, "jpg": picture, "cls": label})
    writer.done()
    writer.merge()


def shards(place: Path, variant: str) -> list[Path]:
    """Return the packed files, in order."""
    del variant
    files = (place / "chunks").glob("*.bin")
    return sorted(files, key=lambda path: [int(n) for n in path.stem.split("-")[1:]])


def live(place: Path, variant: str, path: Path) -> Path:
    """Return the file that is read for a packed one."""
    del place, variant
    return path


def header(position: int, offset: int) -> tuple[int, int]:
    """Return where a chunk's table says where a sample ends: uint32, after number and begin."""
    del offset
    return 4 * (2 + position), 4


def break_index(place: Path, variant: str, case: str, target: Target, other: Path) -> str:
    """Damage index.json and return its name, or nothing where there is no such case."""
    del place, variant
    path = target.path.parent / "index.json"
    index = json.loads(path.read_text())
    if case == "checksum":
        return ""
    if case == "no index":
        path.unlink()
        return path.name
    rows = {row["filename"]: row for row in index["chunks"]}
    mine, its = rows[target.path.name], rows[other.name]
    mine["filename"], its["filename"] = its["filename"], mine["filename"]
    path.write_text(json.dumps(index))
    return path.name


def _take(sample: dict[str, Any]) -> dict[str, Any]:
    """The transform: where a picture would be decoded, its bytes are copied out of the chunk."""
    _TOUCHED.append(int(sample["key"]))
    return {"key": sample["key"], "jpg": bytes(sample["jpg"])}


def _as_list(samples: list[Any]) -> list[Any]:
    return samples


def _loader(place: Path, *, shuffle: bool, batch_size: int, workers: int) -> Any:
    dataset = litdata.StreamingDataset(
        str(place / "chunks"), shuffle=shuffle, drop_last=shuffle, transform=_take
    )
    return litdata.StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=workers, collate_fn=_as_list
    )


def deliver(request: Request) -> Delivery:
    """Read as one rank."""
    loader = _loader(
        request.place,
        shuffle=not request.evaluate,
        batch_size=request.batch_size,
        workers=request.workers,
    )
    first = 0
    if request.state is not None:
        loader.load_state_dict(request.state)
        first = request.state["current_epoch"] - 1
    entries: list[protocol.Entry] = []
    state = None
    for epoch in range(first, request.epochs):
        if request.stop is None:
            ids = ([sample["key"] for sample in batch] for batch in loader)
            entries += protocol.collect(ids, request, epoch=epoch)
            continue
        for batch in loader:
            keys = [sample["key"] for sample in batch]
            entries += protocol.collect([keys], request, epoch=epoch, first=len(entries))
            if len(entries) == request.stop:
                state = loader.state_dict()
                break
        break
    return Delivery(entries, state, touched=_TOUCHED)


def read(place: Path, variant: str) -> Iterator[tuple[int, bytes] | None]:
    """Yield key and picture, None at the end of an epoch."""
    del variant
    loader = _loader(place, shuffle=False, batch_size=8, workers=0)
    for _ in range(2):
        for batch in loader:
            yield from ((sample["key"], sample["jpg"]) for sample in batch)
        yield None


def scale(job: dict[str, Any]) -> dict[str, Any]:
    """Plan an epoch over an index without chunks: its traffic, and the time a resume takes."""
    place = Path(job["root"]) / "synthetic"
    sizes = job["shard_sizes"]
    packed = Path(job["root"]) / "default" / "chunks" / "index.json"
    (place / "chunks").mkdir(parents=True)
    (place / "chunks" / "index.json").write_text(json.dumps(_index(packed, sizes)))
    result: dict[str, Any] = {"traffic": {"FullShuffle": {}}, "resume_ms": {}}
    for nodes in job["nodes"]:
        order = _order(place, sizes, nodes, job["global_batch"] // nodes)
        result["traffic"]["FullShuffle"][str(nodes)] = traffic(order, sizes, nodes=nodes)
    batch = job["global_batch"] // job["ranks"]
    environment = {"WORLD_SIZE": str(job["ranks"]), "GLOBAL_RANK": "0", "NNODES": "1"}
    os.environ.update(environment)
    for share in job["shares"]:
        for kind in ("same ranks", "half the ranks"):
            steps = int(sum(sizes) * share) // job["global_batch"]
            old_ranks = job["ranks"] * (1 if kind == "same ranks" else 2)
            took = _resume_ms(place, batch, steps, old_ranks)
            result["resume_ms"].setdefault(kind, {})[str(share)] = round(took, 2)
    for name in environment:
        del os.environ[name]
    result["resume_what"] = "load_state_dict and __iter__ without reading"
    return result


def _resume_ms(place: Path, batch: int, steps: int, old_ranks: int) -> float:
    """Return what it takes to go on after `steps` steps of `old_ranks` ranks."""
    loader = _loader(place, shuffle=True, batch_size=batch, workers=0)
    iter(loader.dataset)
    state = loader.dataset.state_dict(batch * steps, 0, batch)
    state |= {"world_size": old_ranks, "initial_world_size": old_ranks}
    fresh = _loader(place, shuffle=True, batch_size=batch, workers=0)
    started = time.perf_counter()
    fresh.load_state_dict(
        {
            "dataset": state,
            "current_epoch": 1,
            "num_samples_yielded": batch * steps,
            "latest_worker_idx": 0,
        }
    )
    iter(fresh.dataset)
    return 1000 * (time.perf_counter() - started)


def _order(place: Path, sizes: list[int], nodes: int, batch: int) -> np.ndarray:
    """Return the samples of each step, by node, as the library's own plan has them."""
    dataset = litdata.StreamingDataset(str(place / "chunks"), shuffle=True, drop_last=True)
    dataset.distributed_env = _DistributedEnv(nodes, 0, nodes)
    dataset.get_len(1, batch)  # makes the shuffler
    chunks, intervals = dataset.shuffler.get_chunks_and_intervals_per_workers(
        dataset.distributed_env, 1, batch, 1
    )
    starts = np.concatenate(([0], np.cumsum(sizes)))
    columns = []
    for mine, ranges in zip(chunks, intervals, strict=True):
        ids = [
            dataset.shuffler(np.arange(interval[1], interval[2]), len(sizes), 1, int(chunk))
            for chunk, interval in zip(mine, ranges, strict=True)
        ]
        # The library counts a chunk's samples from the data set's first one.
        flat = np.concatenate([np.asarray(part, dtype=np.int64) for part in ids])
        assert flat.max() < starts[-1]
        columns.append(flat[: len(flat) // batch * batch].reshape(-1, batch))
    steps = max(len(column) for column in columns)
    full = [
        np.pad(column, ((0, steps - len(column)), (0, 0)), constant_values=-1) for column in columns
    ]
    return np.concatenate(full, axis=1)


def _index(packed: Path, sizes: list[int]) -> dict[str, Any]:
    index: dict[str, Any] = json.loads(packed.read_text())
    row = index["chunks"][0]
    index["chunks"] = [
        row | {"chunk_size": size, "filename": f"chunk-0-{number}.bin"}
        for number, size in enumerate(sizes)
    ]
    return index


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    protocol.main(sys.modules["__main__"])
    os._exit(0)
