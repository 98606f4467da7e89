"""webdataset: the pipeline of its documentation with PIL, and one that decodes with torchvision."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, type-arg, misc"
# (of packages that only the peers' environment has)

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
import webdataset as wds
from torchvision.io import ImageReadMode, decode_jpeg

from pixel_peers.folder import class_samples
from pixel_peers.torchvision_peer import uint8_transform, v1_transform

SHARD_SAMPLES = 128


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"webdataset": wds.__version__, "torchvision": torchvision.__version__}


def prepare(folder: Path, out: Path) -> None:
    """Write tars with its ShardWriter."""
    pattern = str(out / "%06d.tar")
    with wds.ShardWriter(pattern, maxcount=SHARD_SAMPLES, verbose=0) as writer:
        for number, (path, label) in enumerate(class_samples(folder)):
            writer.write({"__key__": f"{number:09d}", "jpg": path.read_bytes(), "cls": label})


def decode_tensor(data: bytes) -> torch.Tensor:
    """Decode a JPEG to uint8 [3, H, W]."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def _number(data: bytes) -> int:
    return int(data)


def _same(value: Any) -> Any:
    return value


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch."""
    torch.set_num_threads(1)
    urls = sorted(str(path) for path in Path(job["place"]).glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000)
    if name == "webdataset_pil":
        steps = (v1_transform(job["size"]), _same)
        dataset = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(*steps)
    else:
        view = uint8_transform(job["size"])
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(decode_tensor, _number)
        dataset = dataset.map_tuple(view, _same)
    dataset = dataset.batched(job["batch"])
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=job["workers"])
    return lambda: ((images, torch.as_tensor(labels)) for images, labels in loader)
