"""The last part of a batch's way: to the device, beside the model's work, and into pixels.

On a GPU, copies and what the device makes of them (resizing packed crops, decoding files; see
data/packed.py) run on a stream of their own, so that they overlap with the step before; the
model's stream waits for them by an event, the host does not wait.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mbv3dist.data.batch import Batch
from mbv3dist.data.decode_choice import Decode, DecodeChoice, choose_decode
from mbv3dist.data.gpu_decode import Crops, Engine, decode_regions, open_engine
from mbv3dist.data.loader import Loader
from mbv3dist.data.packed import Compressed, PackedCrops
from mbv3dist.ops.color import normalize_images
from mbv3dist.ops.resample import resample
from mbv3dist.training.processes import is_distributed

_IMAGENET = (0.5, 0.5, 0.5)  # any: only the time counts


class ToDevice:
    """Moves batches of one rank to its device and makes their pictures there, if that is left."""

    def __init__(self, device: torch.device, decode: Decode = "cpu", engine: Engine | None = None):
        """Open what decodes.

        Args:
            device: Where batches go.
            decode: As the loader's.
            engine: What decodes on the device; by default what `open_engine` finds.

        Raises:
            ValueError: With `decode="gpu"`, nothing here decodes on the device.
        """
        self.device = device
        self._engine = engine
        if decode == "gpu" and engine is None:
            self._engine, _ = open_engine(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Memory that is not torch's stays until the device has read it.
        self._kept: deque[tuple[torch.cuda.Event, Crops]] = deque()

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, with its pictures; safe for the current stream."""
        if self._stream is None:
            return self._move(batch)
        with torch.cuda.stream(self._stream):
            moved = self._move(batch)
            done = torch.cuda.Event()
            done.record(self._stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for value in vars(moved).values():
            if isinstance(value, Tensor):
                value.record_stream(current)
        return moved

    def _move(self, batch: Batch) -> Batch:
        image = None
        if batch.crops is not None:
            image = self._resize(batch.crops)
        elif batch.compressed is not None:
            image = self._decode(batch.compressed)
        moved = batch.to(self.device)  # last: damage met while decoding is in its weights
        if image is not None:
            moved.image = image
        return moved

    def _resize(self, crops: PackedCrops) -> Tensor:
        pixels, layout, places = (
            part.to(self.device, non_blocking=True)
            for part in (crops.pixels, crops.layout, crops.places)
        )
        return resample(pixels, layout, places, size=crops.size, fill=crops.fill)

    def _decode(self, files: Compressed) -> Tensor:
        assert self._engine is not None
        crops = decode_regions(
            self._engine,
            files.data,
            files.sizes,
            files.regions,
            device=self.device,
            decode_on_cpu=files.decode_on_cpu,
            is_jpeg=files.is_jpeg,
        )
        for place, error in sorted(crops.damaged.items()):
            files.report(place, error)
        places = torch.from_numpy(files.places).to(self.device, non_blocking=True)
        image = resample(crops.pixels, crops.layout, places, size=files.size, fill=files.fill)
        if self._stream is not None:
            done = torch.cuda.Event()
            done.record(self._stream)
            self._kept.append((done, crops))
            while self._kept[0][0].query() and len(self._kept) > 1:
                self._kept.popleft()
        return image


def check_decode(wanted: str, device: torch.device) -> None:
    """Raise ValueError where the device cannot do what data.decode asks for."""
    if wanted in ("hybrid", "gpu") and device.type != "cuda":
        raise ValueError(
            f"--data.decode {wanted} needs a CUDA device, and this run computes on {device.type}; "
            "set it to auto or cpu"
        )


def choose_for_run(
    wanted: Literal["auto", "cpu", "hybrid", "gpu"],
    device: torch.device,
    make_loader: Callable[[Decode], Loader],
    *,
    deterministic: bool = False,
) -> DecodeChoice:
    """Return how a run decodes, and why: as asked, or what is fastest here.

    Args:
        wanted: data.decode.
        device: Of this rank.
        make_loader: Makes the run's loader; asked for batches to measure, nothing is kept of it.
        deterministic: Whether the run shall be the same bit for bit; "auto" is then "cpu".

    Raises:
        ValueError: The device cannot do it.
    """
    check_decode(wanted, device)
    if wanted != "auto":
        return DecodeChoice(wanted, f"decode: {wanted}, as asked")
    if deterministic:
        return DecodeChoice("cpu", "decode: cpu, since the run is deterministic")
    if not len(make_loader("cpu")):
        return DecodeChoice("cpu", "decode: cpu, since no step is left")
    with contextlib.ExitStack() as stack:
        ways: dict[Decode, Callable[[], Callable[[], int]]] = {
            decode: partial(_make_ready, decode, device, make_loader, stack)
            for decode in ("cpu", "hybrid", "gpu")
        }
        # All ranks measure, so that the load is that of the run; the first one decides.
        choice = choose_decode(device.type, ways)
    if is_distributed():
        box: list[Any] = [choice]
        dist.broadcast_object_list(box, src=0)
        choice = box[0]
    return choice


def _make_ready(
    decode: Decode,
    device: torch.device,
    make_loader: Callable[[Decode], Loader],
    stack: contextlib.ExitStack,
) -> Callable[[], int]:
    """Return what takes a batch all the way to the model's input, and counts its pictures."""
    to_device = ToDevice(device, decode)
    loader = stack.enter_context(make_loader(decode))
    batches = _endless(loader)

    def run() -> int:
        batch = to_device(next(batches))
        normalize_images(batch.image, mean=_IMAGENET, std=_IMAGENET)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(batch)

    return run


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        for _, batch in loader:
            yield batch
