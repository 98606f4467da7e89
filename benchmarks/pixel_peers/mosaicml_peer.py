"""MosaicML Streaming: MDS shards read by its data set for vision, PIL images."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, type-arg, misc"
# (of packages that only the peers' environment has)

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import streaming
import torch
from PIL import Image
from streaming.vision.base import StreamingVisionDataset

from pixel_peers.folder import class_samples
from pixel_peers.torchvision_peer import v1_transform


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"mosaicml-streaming": streaming.__version__, "torch": torch.__version__}


def prepare(folder: Path, out: Path) -> None:
    """Write MDS; its `jpeg` encoding keeps a file's bytes."""
    columns = {"x": "jpeg", "y": "int"}
    with streaming.MDSWriter(out=str(out / "mds"), columns=columns) as writer:
        for path, label in class_samples(folder):
            with Image.open(path) as image:
                writer.write({"x": image, "y": label})


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch."""
    del name
    torch.set_num_threads(1)
    dataset = StreamingVisionDataset(
        local=str(Path(job["place"]) / "mds"),
        shuffle=True,
        batch_size=job["batch"],
        transform=v1_transform(job["size"]),
    )
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=job["batch"], num_workers=job["workers"]
    )
    return lambda: ((images, torch.as_tensor(labels)) for images, labels in loader)
