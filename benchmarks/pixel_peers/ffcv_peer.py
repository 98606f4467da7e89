"""FFCV: a .beton of JPEGs, which it encodes itself (quality 95), uint8 to the end."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, type-arg, misc"
# (of packages that only the peers' environment has)

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ffcv
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image

from pixel_peers.folder import class_samples


def versions() -> dict[str, str]:
    """Return what ran."""
    assert ffcv is not None
    names = ("ffcv", "numba", "opencv-python-headless", "torch")
    return {name: importlib.metadata.version(name) for name in names}


class _Pictures:
    """What its writer takes: PIL images and class numbers by position."""

    def __init__(self, folder: Path):
        self.samples = class_samples(folder)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return Image.open(path).convert("RGB"), label


def prepare(folder: Path, out: Path) -> None:
    """Write the .beton."""
    image = RGBImageField(write_mode="jpg", jpeg_quality=95)
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(str(out / "pictures.beton"), fields, num_workers=2)
    writer.from_indexed_dataset(_Pictures(folder))


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch."""
    del name
    torch.set_num_threads(1)
    size = (job["size"], job["size"])
    pipelines = {
        "image": [
            RandomResizedCropRGBImageDecoder(size),
            RandomHorizontalFlip(),
            ToTensor(),
            ToTorchImage(),
        ],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    loader = Loader(
        str(Path(job["place"]) / "pictures.beton"),
        batch_size=job["batch"],
        num_workers=job["workers"],
        order=OrderOption.RANDOM,
        drop_last=False,
        os_cache=True,
        pipelines=pipelines,
    )
    return lambda: iter(loader)
