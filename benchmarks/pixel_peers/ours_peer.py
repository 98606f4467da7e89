"""Ours: shards by `mbv3dist convert`, `Loader` with threads; uint8 until the device."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import mbv3dist
from mbv3dist.config import ViewConfig
from mbv3dist.data.decode import decoder_version
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import Loader
from mbv3dist.data.plan import Plan

# torchvision's RandomIoUCrop has the option 0.0 too, and no crop with the same probability.
SSD = ViewConfig(name="ssd", min_ious=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9), crop_probability=6 / 7)
CROP = ViewConfig(name="random_resized_crop")
ROUNDS = 10_000  # more epochs than a benchmark reads


def versions() -> dict[str, str]:
    """Return what ran."""
    name, version = decoder_version()
    return {"mbv3dist": mbv3dist.__version__, "torch": torch.__version__, name: version}


def prepare(folder: Path, out: Path) -> None:
    """Convert the class folder or VOC folder with the command that users type."""
    voc = (folder / "JPEGImages").is_dir()
    kind, split = ("voc", "trainval") if voc else ("imagefolder", "train")
    command = [sys.executable, "-m", "mbv3dist", "convert", kind, str(folder)]
    subprocess.run([*command, "--out", str(out / "ours"), "--split", split], check=True)


def open_loader(name: str, job: dict[str, Any]) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what starts an epoch: the next one of a run that never ends, as in training.

    Checksums are compared in the run's first epoch, which is warm-up, or with `ours_checked` at
    every read. `ours_delayed` sleeps at each batch: a benchmark has to see that.
    """
    torch.set_num_threads(1)
    task = job["task"]
    split = open_split(Path(job["place"]) / "ours", "trainval" if task == "detection" else "train")
    plan = Plan(split.shard_sizes, global_batch_size=job["batch"], epochs=ROUNDS, seed=0)
    loader = Loader(
        split,
        plan,
        view=SSD if task == "detection" else CROP,
        size=job["size"],
        seed=0,
        num_threads=job["workers"],
        verify="always" if name == "ours_checked" else "first",
    )
    steps = len(split) // job["batch"]
    assert len(split) % job["batch"] == 0
    batches = iter(loader)

    def epoch() -> Iterator[tuple[Any, Any]]:
        for _ in range(steps):
            _, batch = next(batches)
            if name == "ours_delayed":
                time.sleep(job["delay_s"])
            yield batch.image, batch.index if batch.label is None else batch.label

    for _ in epoch():
        pass
    return epoch
