"""What smaller pictures cost, and whether raw ones are worth their bytes: parts of convert.py."""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import numpy as np
from convert_systems import SIDE
from PIL import Image
from pixel_peers import pictures

SMALL = 32  # pixels, as CIFAR's
BATCH = 64


def repeated(work: Path, name: str, folder: Path, samples: int) -> Path:
    """Return a folder with so many copies of the pictures, each a file with bytes of its own."""
    out = work / name
    if not out.is_dir():
        pictures.copy_folder(pictures.list_folder(folder), out, samples=samples)
    return out


def measure_quality(work: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compare JPEGs of the final size with the pixels that they were made of."""
    from mbv3dist.convert.pictures import open_picture, shrunk_size
    from mbv3dist.convert.pixels import jpeg_bytes, pixels_at, raw_bytes

    files = pictures.list_folder(folder)
    kinds = [(80, False), (90, False), (95, False), (90, True)]
    rows: dict[tuple[int, bool], list[tuple[float, float, int]]] = {kind: [] for kind in kinds}
    raw, distance = [], []
    for path in files:
        picture = open_picture(path.read_bytes())
        size = shrunk_size(picture.size, shorter=SIDE)
        pixels = pixels_at(picture, size)
        raw.append(len(raw_bytes(pixels)))
        exact = np.asarray(picture.image.resize(size, Image.Resampling.BILINEAR)).astype(int)
        distance.append(np.abs(exact - pixels).max())
        for (quality, full_chroma), found in rows.items():
            data = jpeg_bytes(pixels, quality=quality, full_chroma=full_chroma)
            error = np.asarray(Image.open(io.BytesIO(data))).astype(float) - pixels
            noise = float((error**2).mean())
            psnr = 10 * np.log10(255**2 / noise) if noise else np.inf
            found.append((float(np.abs(error).mean()), float(psnr), len(data)))
    return {
        "side": SIDE,
        "largest_distance_to_pillow": int(max(distance)),
        "raw_bytes": round(float(np.mean(raw))),
        "by_quality": {
            f"{quality}, {'4:4:4' if full_chroma else '4:2:0'}": {
                "mean_absolute_difference": round(float(np.mean([row[0] for row in found])), 3),
                "worst_picture": round(max(row[0] for row in found), 3),
                "psnr_db": round(float(np.mean([row[1] for row in found])), 2),
                "bytes": round(float(np.mean([row[2] for row in found]))),
            }
            for (quality, full_chroma), found in rows.items()
        },
    }


def measure_raw(work: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Read JPEG and raw data sets of the same pictures through the loader."""
    from mbv3dist.config import ViewConfig

    crop, shift = ViewConfig(name="random_resized_crop"), ViewConfig(name="random_crop", padding=4)
    small = args.small or _small_folder(work, folder)
    results = {}
    for name, source, side, size, view in (
        ("256", folder, SIDE, 224, crop),
        ("32", small, None, SMALL, shift),
    ):
        # Enough samples for whole batches of an epoch.
        samples = repeated(work, f"raw {name}", source, args.raw_samples)
        results[name] = _raw_beside_jpeg(work, samples, side, size, view, args)
    return {"threads": args.workers, "sizes": results}


def _small_folder(work: Path, folder: Path) -> Path:
    out = work / "small"
    for path in pictures.list_folder(folder):
        target = out / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.resize((SMALL, SMALL), Image.Resampling.BILINEAR).save(target, quality=95)
    return out


def _raw_beside_jpeg(
    work: Path, folder: Path, side: int | None, size: int, view: Any, args: argparse.Namespace
) -> dict[str, Any]:
    from mbv3dist.convert.imagefolder import convert_imagefolder
    from mbv3dist.data.index import open_split
    from mbv3dist.data.loader import Loader
    from mbv3dist.data.plan import Plan

    out, splits = work / "raw sets" / folder.name, {}
    for form in ("jpeg", "raw"):
        convert_imagefolder(folder, out / form, split="train", resize=side, format=form, workers=1)
        splits[form] = open_split(out / form, "train")

    with ExitStack() as stack:
        batches = {}
        for form, split in splits.items():
            plan = Plan(split.shard_sizes, global_batch_size=BATCH, epochs=10_000, seed=0)
            loader = Loader(split, plan, view=view, size=size, seed=0, num_threads=args.workers)
            batches[form] = iter(stack.enter_context(loader))
            for _ in range(len(split) // BATCH):  # checksums are compared in the first epoch
                next(batches[form])
        count = max(args.raw_batches, 4)

        def run(form: str) -> Callable[[], float]:
            def deliver() -> None:
                for _ in range(count):
                    next(batches[form])

            def once() -> float:
                for _ in range(4):  # what was made ahead while the other was measured
                    next(batches[form])
                return harness.per_second(count * BATCH, deliver)

            return once

        speeds = harness.interleave({form: run(form) for form in splits}, rounds=args.rounds)
    size_of = {form: int(split.shard_bytes.sum()) / len(split) for form, split in splits.items()}
    shutil.rmtree(out)
    return {
        "bytes_per_sample": {form: round(value) for form, value in size_of.items()},
        "images_per_s": {form: harness.spread(values) for form, values in speeds.items()},
        "ratio": harness.ratio(speeds["raw"], speeds["jpeg"]),
        "bytes_ratio": round(size_of["raw"] / size_of["jpeg"], 2),
    }


def quality_lines(part: dict[str, Any]) -> list[str]:
    """Return what `measure_quality` found, as text."""
    rows = [
        [
            f"JPEG {quality}",
            f"{row['mean_absolute_difference']:.2f}",
            f"{row['worst_picture']:.2f}",
            f"{row['psnr_db']:.1f}",
            f"{row['bytes'] / 1000:.1f}",
        ]
        for quality, row in part["by_quality"].items()
    ]
    rows.append(["raw", "0", "0", "-", f"{part['raw_bytes'] / 1000:.1f}"])
    head = ["stored as", "mean absolute difference", "worst picture", "PSNR (dB)", "KB"]
    text = (
        f"Shorter side {part['side']}. The pixels before JPEG differ from Pillow's antialiased "
        f"resize by at most {part['largest_distance_to_pillow']} level(s)."
    )
    return [text, "", *harness.table(head, rows)]


def raw_lines(part: dict[str, Any]) -> list[str]:
    """Return what `measure_raw` found, as text."""
    rows = []
    for name, row in part["sizes"].items():
        size, speed = row["bytes_per_sample"], row["images_per_s"]
        rows.append(
            [
                name,
                f"{size['jpeg'] / 1000:.1f}",
                f"{size['raw'] / 1000:.1f}",
                f"{row['bytes_ratio']:.1f}",
                f"{speed['jpeg']['median']:.0f}",
                f"{speed['raw']['median']:.0f}",
                f"{row['ratio']['ratio']:.2f} ({row['ratio']['low']:.2f} to "
                f"{row['ratio']['high']:.2f})",
            ]
        )
    head = ["pixels", "JPEG KB", "raw KB", "x bytes", "JPEG images/s", "raw images/s", "x"]
    return [f"Loader, {part['threads']} threads.", "", *harness.table(head, rows)]
