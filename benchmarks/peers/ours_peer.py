"""mbv3dist itself, by its Python interface; runs in the project's own environment.

Ranks are arguments, not environment variables; threads take the place of worker processes.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mbv3dist
from mbv3dist import Loader, Plan, open_split
from mbv3dist.config import ViewConfig
from mbv3dist.data.loader import eval_batches
from mbv3dist.data.reader import Reader
from mbv3dist.data.state import data_state, resume_step
from peers import protocol
from peers.damage import Target, write_at
from peers.protocol import Delivery, Request
from peers.traffic import traffic

NAME = "mbv3dist"
VARIANTS = {"default": {"order", "damage"}}
WORKERS = (1, 2, 5)
SETTINGS = {
    "default": "Plan and Loader with their defaults (tail=carry, block_shards=4); threads 1, 2, 5",
    "evaluation": "eval_batches, two threads",
    "damage": "Reader with its default, verify=first, in the order of a Plan",
}
SIDE = 8
VIEW = ViewConfig(name="resize")
_TOUCHED: list[int] = []


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"mbv3dist": mbv3dist.__version__, "torch": torch.__version__, "numpy": np.__version__}


def pack(source: Path, out: Path, variant: str) -> None:
    """Copy the data set."""
    del variant
    shutil.copytree(source.parent, out / "data")


def shards(place: Path, variant: str) -> list[Path]:
    """Return the packed files, in order."""
    del variant
    return sorted((place / "data" / "train").glob("*.tar"))


def live(place: Path, variant: str, path: Path) -> Path:
    """Return the file that is read for a packed one."""
    del place, variant
    return path


def header(position: int, offset: int) -> tuple[int, int]:
    """Return where the name stands in the tar header of a picture."""
    del position
    return offset - 512, 16


def break_index(place: Path, variant: str, case: str, target: Target, other: Path) -> str:
    """Damage .idx or .crc beside the tar and return its name."""
    del place, variant
    path = target.path.with_suffix(".crc" if case == "checksum" else ".idx")
    if case == "checksum":
        write_at(path, 8 * target.position, b"\x00\x01\x02\x03")
    elif case == "no index":
        path.unlink()
    else:
        shutil.copy(other.with_suffix(".idx"), path)
    return path.name


def deliver(request: Request) -> Delivery:
    """Read as one rank."""
    split = open_split(request.place / "data", "train")
    if request.evaluate:
        batches = eval_batches(
            split,
            view=VIEW,
            size=SIDE,
            batch_size=request.batch_size,
            rank=request.rank,
            world_size=request.world_size,
            num_threads=request.workers,
        )
        ids = (batch.index.tolist() for batch in batches)
        return Delivery(protocol.collect(ids, request, epoch=0))
    plan = Plan(
        [shard.num_samples for shard in split.shards],
        global_batch_size=request.global_batch,
        epochs=request.epochs,
        seed=0,
    )
    _watch_reader()
    loader = Loader(
        split,
        plan,
        view=VIEW,
        size=SIDE,
        seed=0,
        rank=request.rank,
        world_size=request.world_size,
        num_threads=request.workers,
        start_step=resume_step(request.state, split, plan)[0] if request.state else 0,
    )
    entries: list[protocol.Entry] = []
    state = None
    for step, batch in loader:
        epochs = torch.where(batch.weight > 0, batch.epoch, -1)  # -1: the run's overrun
        entries.append({"step": [0, step], "ids": batch.index.tolist(), "epochs": epochs.tolist()})
        if len(entries) == request.stop:
            state = data_state(split, plan, step + 1)
            break
    return Delivery(entries, state, touched=_TOUCHED)


def _watch_reader() -> None:
    """Have this process's readers remember which samples they read."""
    read_chunk = Reader.read_chunk

    def watched(self: Reader, indices: Any, first: Any) -> Any:
        _TOUCHED.extend(int(index) for index in indices)
        return read_chunk(self, indices, first)

    vars_of_reader: Any = Reader
    vars_of_reader.read_chunk = watched


def read(place: Path, variant: str) -> Iterator[tuple[int, bytes] | None]:
    """Yield key and picture, None at the end of an epoch."""
    del variant
    split = open_split(place / "data", "train")
    plan = Plan([shard.num_samples for shard in split.shards], global_batch_size=48, epochs=2)
    last = 0
    with Reader(split) as reader:
        for step in range(plan.num_steps):
            part = plan.step(step)
            for index, epoch in zip(part.index.tolist(), part.epoch.tolist(), strict=True):
                if epoch > last:
                    yield None
                    last = epoch
                yield index, bytes(reader.read(index, first=epoch == 0)[0])


def scale(job: dict[str, Any]) -> dict[str, Any]:
    """Plan an epoch over an index without shards: its traffic, and the time a resume takes."""
    sizes = np.array(job["shard_sizes"], dtype=np.int64)
    batch = job["global_batch"]
    result: dict[str, Any] = {"traffic": {}, "resume_ms": {}}
    for blocks in (4, 1, 16):
        plan = Plan(sizes, global_batch_size=batch, epochs=2, seed=0, block_shards=blocks)
        order = np.full((-(-int(sizes.sum()) // batch), batch), -1, dtype=np.int64)
        for step in range(len(order)):
            part = plan.step(step)
            order[step] = np.where(part.epoch == 0, part.index, -1)
        result["traffic"][f"B={blocks}"] = {
            str(nodes): traffic(order, job["shard_sizes"], nodes=nodes) for nodes in job["nodes"]
        }
    for share in job["shares"]:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            plan = Plan(sizes, global_batch_size=batch, epochs=90, seed=0)
            plan.step(int(plan.num_steps * share), rank=0, world_size=job["ranks"])
            times.append(1000 * (time.perf_counter() - started))
        result["resume_ms"][str(share)] = round(sorted(times)[1], 2)
    result["resume_what"] = (
        "a new Plan of 90 epochs and its step at that share, on rank 0, median of 3"
    )
    return result


if __name__ == "__main__":
    protocol.main(sys.modules["__main__"])
    os._exit(0)
