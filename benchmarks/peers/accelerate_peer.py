"""Accelerate's prepared torch DataLoader over a map-style data set of the same samples.

Ranks are told by RANK, WORLD_SIZE and the rest of torchrun's variables; the group is gloo. It
stores nothing of its own, so that it has no part in the damage table.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset

from peers import protocol
from peers.protocol import Delivery, Request
from peers.samples import read_samples

NAME = "Accelerate"
VARIANTS: dict[str, set[str]] = {"seedable": {"order"}, "default": {"order"}}
WORKERS = (0, 2)
SETTINGS = {
    "seedable": "DataLoader(shuffle=True) prepared with use_seedable_sampler=True, set_seed(0), "
    "even_batches=True (default); resumed by save_state, load_state and skip_first_batches",
    "default": "the same with the default DataLoaderConfiguration",
    "evaluation": "shuffle=False, even_batches=True (default), gather_for_metrics",
}
_TOUCHED: list[int] = []


class Pictures(Dataset):  # type: ignore[type-arg]
    """Key and picture by number."""

    def __init__(self, place: Path):
        self.samples = pickle.loads((place / "samples.pickle").read_bytes())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> int:
        key, _, _ = self.samples[number]
        _TOUCHED.append(key)
        return int(key)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The same as a stream, which `skip_first_batches` can only read through."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __iter__(self) -> Iterator[int]:
        return (self.pictures[number] for number in range(len(self.pictures)))


class Numbers(Dataset):  # type: ignore[type-arg]
    """As many samples as asked for, without data."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"accelerate": accelerate.__version__, "torch": torch.__version__}


def pack(source: Path, out: Path, variant: str) -> None:
    """Keep the samples as they are; pickled by this process for its own children."""
    del variant
    (out / "samples.pickle").write_bytes(pickle.dumps(read_samples(source)))


def _prepared(request: Request, dataset: Any) -> tuple[Accelerator, Any]:
    set_seed(0)
    configuration = DataLoaderConfiguration(
        use_seedable_sampler=request.variant == "seedable", data_seed=None
    )
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    loader = DataLoader(
        dataset,
        batch_size=request.batch_size,
        shuffle=not request.evaluate and not isinstance(dataset, IterableDataset),
        num_workers=request.workers,
    )
    return accelerator, accelerator.prepare(loader)


def deliver(request: Request) -> Delivery:
    """Read as one rank."""
    accelerator, loader = _prepared(request, Pictures(request.place))
    if request.evaluate:
        gathered: list[int] = []
        entries: list[protocol.Entry] = []
        for number, batch in enumerate(loader):
            entries += protocol.collect([batch.tolist()], request, epoch=0, first=number)
            gathered += accelerator.gather_for_metrics(batch).tolist()
        return Delivery(entries, extra={"gathered": gathered})
    folder = request.place / "state"
    first, skip = 0, 0
    if request.state is not None:
        accelerator.load_state(str(folder))
        first, skip = request.state["epoch"], request.state["step"]
    entries = []
    state = None
    for epoch in range(first, request.epochs):
        loader.set_epoch(epoch)
        batches = loader
        if epoch == first and skip:
            batches = accelerator.skip_first_batches(loader, skip)
        else:
            skip = 0
        for number, batch in enumerate(batches, start=skip):
            entries += protocol.collect([batch.tolist()], request, epoch=epoch, first=number)
            if len(entries) == request.stop:
                accelerator.save_state(str(folder))
                state = {"epoch": epoch, "step": number + 1}
                break
        if state is not None:
            break
    touched, extra = list(_TOUCHED), None
    if request.state is not None and request.world_size == 1:
        extra = {"stream_read_again": _skip_in_stream(request)}
    return Delivery(entries, state, touched=touched, extra=extra)


def _skip_in_stream(request: Request) -> int:
    """Return how many of the skipped samples a stream reads before the first batch after them."""
    assert request.state is not None
    accelerator, loader = _prepared(request, Stream(Pictures(request.place)))
    _TOUCHED.clear()
    next(iter(accelerator.skip_first_batches(loader, request.state["step"])))
    return min(len(_TOUCHED), int(request.state["step"]) * request.batch_size)


def scale(job: dict[str, Any]) -> dict[str, Any]:
    """Return the time to the first batch after `skip_first_batches` on as many samples."""
    request = Request(Path(), "seedable", 1, 0, job["global_batch"], 1)
    times: dict[str, float] = {}
    for share in job["shares"]:
        accelerator, loader = _prepared(request, Numbers(sum(job["shard_sizes"])))
        steps = int(sum(job["shard_sizes"]) * share) // job["global_batch"]
        started = time.perf_counter()
        next(iter(accelerator.skip_first_batches(loader, steps)))
        times[str(share)] = round(1000 * (time.perf_counter() - started), 2)
    what = "skip_first_batches on a map-style data set to the first batch, nothing read"
    return {"resume_ms": times, "resume_what": what}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    protocol.main(sys.modules["__main__"])
    os._exit(0)
