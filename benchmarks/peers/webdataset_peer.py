"""Stock webdataset on our tars, in its two documented ways.

`split` deals whole shards out to ranks and workers; `resampled` draws shards with replacement and
cuts epochs by `with_epoch`. Ranks are told by RANK and WORLD_SIZE. Shuffles are the deterministic
kind, with a seed and workers that live on, because the default ones differ from run to run.
"""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset as wds  # type: ignore[import-untyped,import-not-found,unused-ignore]

from peers import protocol
from peers.damage import Target, write_at
from peers.protocol import Delivery, Request

NAME = "webdataset"
VARIANTS = {"split": {"order", "damage"}, "resampled": {"order"}}
WORKERS = (0, 2)
SETTINGS = {
    "split": "nodesplitter=split_by_node, shardshuffle=100, detshuffle=True, seed=0, "
    "detshuffle(100), batches of the asked size made after the workers, persistent workers",
    "resampled": "resampled=True, with_epoch(samples / global batch), shuffle(100)",
    "evaluation": "split, no shuffle",
    "damage": "no shuffle, default handler (reraise)",
}
BUFFER = 100  # the documented 1000 would hold the whole of this small data set


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"webdataset": wds.__version__}


def pack(source: Path, out: Path, variant: str) -> None:
    """Copy our tars: they are its format."""
    del variant
    for shard in source.glob("*.tar"):
        shutil.copy(shard, out)


def shards(place: Path, variant: str) -> list[Path]:
    """Return the files that are read, in order."""
    del variant
    return sorted(place.glob("*.tar"))


def live(place: Path, variant: str, path: Path) -> Path:
    """Return the file that is read for a packed one."""
    del place, variant
    return path


def header(position: int, offset: int) -> tuple[int, int]:
    """Return where the name stands in the tar header of a picture."""
    del position
    return offset - 512, 16


def break_index(place: Path, variant: str, case: str, target: Target, other: Path) -> str:
    """Damage the only stored checksum, a tar header's, and return the file's name."""
    del place, variant, other
    if case != "checksum":
        return ""
    write_at(target.path, target.offset - 512 + 148, b"000000")
    return target.path.name


def deliver(request: Request) -> Delivery:
    """Read as one rank; there is no state to go on from."""
    urls = [str(path) for path in shards(request.place, request.variant)]
    epochs = 1 if request.evaluate else request.epochs
    loader = _loader(urls, request)
    entries: list[protocol.Entry] = []
    for epoch in range(epochs):
        room = None if request.stop is None else request.stop - len(entries)
        entries += protocol.collect(loader, request, epoch=epoch, room=room)
    return Delivery(entries)


def _loader(urls: list[str], request: Request) -> Any:
    if request.variant == "resampled":
        total = sum(1 for _ in _plain(urls))
        dataset = wds.WebDataset(urls, resampled=True, nodesplitter=None, seed=0)
        dataset = dataset.shuffle(BUFFER).map(_key)
        steps = math.ceil(total / request.global_batch)
        loader = wds.WebLoader(dataset, batch_size=None, num_workers=request.workers)
        return loader.listed(request.batch_size).with_epoch(steps)
    dataset = wds.WebDataset(
        urls,
        nodesplitter=wds.split_by_node,
        shardshuffle=False if request.evaluate else 100,
        detshuffle=not request.evaluate,
        seed=0,
    )
    if not request.evaluate:
        dataset = dataset.compose(wds.detshuffle(BUFFER, seed=0))
    loader = wds.WebLoader(
        dataset.map(_key),
        batch_size=None,
        num_workers=request.workers,
        persistent_workers=request.workers > 0,
    )
    return loader.listed(request.batch_size)


def _key(sample: dict[str, Any]) -> int:
    return int(sample["__key__"])


def _plain(urls: list[str]) -> Any:
    return wds.WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=None)


def read(place: Path, variant: str) -> Iterator[tuple[int, bytes] | None]:
    """Yield key and picture, None at the end of an epoch."""
    dataset = _plain([str(path) for path in shards(place, variant)])
    for _ in range(2):
        for sample in dataset:
            yield int(sample["__key__"]), sample["jpg"]
        yield None


def scale(job: dict[str, Any]) -> dict[str, Any]:
    """Return nothing: it has no index to plan from, and no resume."""
    del job
    return {}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    protocol.main(sys.modules["__main__"])
