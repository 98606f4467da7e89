"""timm: `create_dataset` and `create_loader` with its prefetcher, which normalises."""

# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, type-arg, misc"
# (of packages that only the peers' environment has)

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader


def versions() -> dict[str, str]:
    """Return what ran."""
    return {"timm": timm.__version__, "torch": torch.__version__}


def prepare(folder: Path, out: Path) -> None:
    """Read the folder as it is."""
    del folder, out


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch. On this path colours, erasing and policies are off."""
    del name
    torch.set_num_threads(1)
    dataset = create_dataset("", root=job["folder"])
    loader = create_loader(
        dataset,
        input_size=(3, job["size"], job["size"]),
        batch_size=job["batch"],
        is_training=True,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=job["workers"],
        device=torch.device("cpu"),
        use_prefetcher=True,
    )
    return lambda: iter(loader)
