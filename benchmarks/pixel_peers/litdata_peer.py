"""LitData: chunks that hold JPEG files, decoded by its own serializer to uint8 tensors."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, type-arg, misc"
# (of packages that only the peers' environment has)

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import litdata
import torch
from PIL import Image

from pixel_peers.folder import class_samples
from pixel_peers.torchvision_peer import uint8_transform


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"litdata": litdata.__version__, "torch": torch.__version__}


def prepare(folder: Path, out: Path) -> None:
    """Write chunks of 64 MB; its JPEG serializer keeps a file's bytes."""
    place = out / "chunks"
    writer = litdata.streaming.writer.BinaryWriter(str(place), chunk_bytes="64MB")
    for number, (path, label) in enumerate(class_samples(folder)):
        with Image.open(path) as image:
            writer.add_item(number, {"image": image, "class": label})
    writer.done()
    writer.merge()


class Pictures(litdata.StreamingDataset):
    """Chunks with a transform, as in its ImageNet example."""

    view: Any = None

    def __getitem__(self, index: Any) -> tuple[Any, int]:
        sample = super().__getitem__(index)
        return self.view(sample["image"]), sample["class"]


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch."""
    del name
    torch.set_num_threads(1)
    dataset = Pictures(str(Path(job["place"]) / "chunks"), shuffle=True, drop_last=False)
    dataset.view = uint8_transform(job["size"])
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=job["batch"], num_workers=job["workers"]
    )
    return lambda: ((images, torch.as_tensor(labels)) for images, labels in loader)
