"""DALI on the CPU: files, decoding of the random crop, antialiased resize, flip; uint8 NHWC."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, type-arg, misc"
# (of packages that only the peers' environment has)

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nvidia.dali as dali
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIClassificationIterator


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"nvidia-dali": dali.__version__, "torch": torch.__version__}


def prepare(folder: Path, out: Path) -> None:
    """Read the folder as it is."""
    del folder, out


@pipeline_def  # type: ignore[untyped-decorator, unused-ignore]
def _pictures(folder: str, size: int) -> Any:
    data, labels = fn.readers.file(file_root=folder, random_shuffle=True, name="Reader")
    images = fn.decoders.image_random_crop(
        data,
        device="cpu",
        output_type=types.RGB,
        random_aspect_ratio=[3 / 4, 4 / 3],
        random_area=[0.08, 1.0],
        num_attempts=10,
    )
    images = fn.resize(
        images,
        device="cpu",
        resize_x=size,
        resize_y=size,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    images = fn.flip(images, horizontal=fn.random.coin_flip(probability=0.5))
    return images, labels


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch."""
    del name
    torch.set_num_threads(1)
    pipeline = _pictures(
        job["folder"],
        job["size"],
        batch_size=job["batch"],
        num_threads=job["workers"],
        device_id=None,
        seed=0,
    )
    loader = DALIClassificationIterator(
        pipeline,
        reader_name="Reader",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        auto_reset=True,
    )
    return lambda: ((batch[0]["data"], batch[0]["label"].flatten()) for batch in loader)
