"""The systems of convert.py, each in a process of its own: `python -m convert_systems NAME`.

A job names a class folder and a folder to write to; the answer says how long it took. Peers are
used as their documentation shows, with one process, since none of them has more.
"""

from __future__ import annotations

import io
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixel_peers.serve import answer_jobs

SHARD_BYTES = 128 << 20
SIDE, QUALITY = 256, 90


def pictures(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield files and class numbers in random order."""
    found = []
    for number, place in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        found += [(path, number) for path in sorted(place.iterdir())]
    random.Random(0).shuffle(found)
    yield from found


def ours(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Convert with the function behind the command; also tell how fast it is once started."""
    from mbv3dist.convert.imagefolder import convert_imagefolder

    ticks: list[tuple[float, int]] = []
    report = convert_imagefolder(
        job["folder"],
        out,
        split="train",
        workers=job["workers"],
        resize=job.get("resize"),
        shard_bytes=SHARD_BYTES,
        progress=lambda done, total: ticks.append((time.perf_counter(), done)),
    )
    split = report.splits["train"]
    # Preparing ends in the middle. It is timed from when every worker has ended its first chunk.
    inside = [tick for tick in ticks if 0 < tick[1] <= split.samples][job["workers"] - 1 :]
    steady = 0.0
    if len(inside) > 1:
        steady = (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])
    return {"samples": split.samples, "prepared_per_s": steady, "counts": split.counts}


def shard_writer(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """webdataset: read each file, hand it over with its class."""
    import webdataset

    options = {"mtime": 0} if job["mtime_0"] else {}
    pattern, samples = str(out / "train-%06d.tar"), 0
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, verbose=0, **options) as sink:
        for path, number in pictures(Path(job["folder"])):
            with open(path, "rb") as stream:
                image = stream.read()
            sink.write({"__key__": f"{samples:07d}", "jpg": image, "cls": number})
            samples += 1
    return {"samples": samples}


def pillow(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Decode, resize with antialiasing, encode; all into one file."""
    from PIL import Image

    samples = 0
    with open(out / "all", "wb") as file:
        for path, _ in pictures(Path(job["folder"])):
            with Image.open(path) as image:
                rgb = image.convert("RGB")
            size = shrunk(rgb.size)
            small = rgb if size == rgb.size else rgb.resize(size, Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=QUALITY)
            file.write(buffer.getvalue())
            samples += 1
    return {"samples": samples}


def torchvision(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """The same on tensors."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg, read_file
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)
    samples = 0
    with open(out / "all", "wb") as file:
        for path, _ in pictures(Path(job["folder"])):
            image = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
            width, height = shrunk((image.shape[2], image.shape[1]))
            small = functional.resize(image, [height, width], antialias=True)
            file.write(encode_jpeg(small, quality=QUALITY).numpy().tobytes())
            samples += 1
    return {"samples": samples}


def shrunk(size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) with the shorter side at most SIDE."""
    scale = min(SIDE / min(size), 1.0)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


SYSTEMS = {
    "ours": (ours, ("mbv3dist",)),
    "webdataset": (shard_writer, ("webdataset",)),
    "pillow": (pillow, ("PIL",)),
    "torchvision": (torchvision, ("torch", "torchvision")),
}


def handle(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Do one job, timed from an empty folder to the last byte written."""
    if job.get("versions"):
        from machine import versions

        packages = {"PIL": "pillow"}
        return versions(*(packages.get(module, module) for module in SYSTEMS[name][1]))
    out = Path(job["out"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path, _ in pictures(Path(job["folder"])):  # into the page cache
        path.read_bytes()
    started = time.perf_counter()
    answer = SYSTEMS[name][0](job, out)
    answer["seconds"] = time.perf_counter() - started
    answer["bytes_written"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return answer


if __name__ == "__main__":
    chosen = sys.argv[1]
    answer_jobs(lambda job: handle(chosen, job))
