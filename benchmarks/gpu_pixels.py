"""What pixels cost on the device: normalisation, colours, resizing of packed crops, JPEG decoding.

Each figure stands beside its floor, the bytes that have to be moved over the rate of a large copy
on the same device, because these kernels do little arithmetic. Inputs rotate among several sets, so
that they do not come from the cache; times are of events on the device. JPEGs are decoded as
regions of RandomResizedCrop, by each library that decodes on the device.

Without a GPU it measures the references on the CPU, which only shows that it runs.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import roofline
import torch
from harness import finish, header, parser, spread, table
from machine import versions
from PIL import Image

from mbv3dist.config import ViewConfig
from mbv3dist.data.draws import Draws
from mbv3dist.data.gpu_decode import (
    NvImageCodecEngine,
    TorchvisionEngine,
    check_engine,
    decode_regions,
)
from mbv3dist.data.resize import reach
from mbv3dist.data.views import make_view
from mbv3dist.ops.color import adjust_color, normalize_images
from mbv3dist.ops.resample import resample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)
SETS = 6  # of inputs: together larger than the cache
SOURCES = {"256 px": (341, 256), "originals": (500, 375)}


def timed_ms(runs: list[Callable[[], object]], device: torch.device) -> float:
    """Return the milliseconds of one of the runs, after another round of them to warm up."""
    for run in runs:
        run()
    if device.type != "cuda":
        started = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - started) * 1e3 / len(runs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    roofline.hold_up()  # so that short kernels are not timed by how fast they are sent
    start.record()
    for run in runs:
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / len(runs)


def crops(rng: np.random.Generator, batch: int, sides: tuple[int, int], size: int) -> dict:
    """Packed random pixels of RandomResizedCrop's regions, on the CPU; and the regions."""
    config = ViewConfig(name="random_resized_crop")
    width, height = sides
    layout, places, regions, end = [], [], [], 0
    for _ in range(batch):
        draws = Draws(0, epoch=0, sample=int(rng.integers(1 << 30)))
        view, _ = make_view(
            config, width=width, height=height, size=size, boxes=np.zeros((0, 4)), draws=draws
        )
        x0, x1 = reach(view.src[0], view.src[2], size, width)
        y0, y1 = reach(view.src[1], view.src[3], size, height)
        layout.append((end, 3 * (x1 - x0), y1 - y0, x1 - x0))
        place = view.vector()
        place[[0, 2]] -= x0
        place[[1, 3]] -= y0
        places.append(place)
        regions.append((x0, y0, x1, y1))
        end += 3 * (x1 - x0) * (y1 - y0)
    return {
        "pixels": torch.from_numpy(rng.integers(0, 256, end, dtype=np.uint8)),
        "layout": torch.tensor(layout, dtype=torch.int64),
        "places": torch.from_numpy(np.stack(places)),
        "regions": np.array(regions, np.int64),
    }


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Return bytes per ms of a large copy on the device, read and written ones."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    return 2 * num_bytes / timed_ms([partial(t.copy_, source) for t in targets], device)


def random_colors(generator: torch.Generator, batch: int) -> torch.Tensor:
    """SSD's distortion: each change for every second sample."""
    color = torch.rand(batch, 6, generator=generator)
    color = color * torch.tensor([0.25, 1, 1, 0.1, 0, 0]) + torch.tensor(
        [0.875, 0.5, 0.5, -0.05, 0, 0]
    )
    is_off = torch.rand(batch, 4, generator=generator) < 0.5
    color[:, :4] = torch.where(is_off, torch.tensor([1.0, 1.0, 1.0, 0.0]), color[:, :4])
    color[:, 4] = torch.randint(0, 2, (batch,), generator=generator)
    color[:, 5] = torch.randint(0, 6, (batch,), generator=generator)
    return color


def kernel_jobs(
    device: torch.device, batch: int, size: int
) -> dict[str, tuple[list[Callable[[], object]], float]]:
    """Return what is timed, one run per input set, and the bytes that it has to move."""
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    shape = (batch, size, size, 3)
    images = [
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        .to(device)
        .permute(0, 3, 1, 2)
        for _ in range(SETS)
    ]
    color = random_colors(generator, batch).to(device)
    norm = {"mean": MEAN, "std": STD}
    pixels = batch * size * size * 3
    jobs = {}
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        name = str(dtype).removeprefix("torch.")
        jobs[f"normalise to {name}"] = (
            [partial(normalize_images, x, dtype=dtype, **norm) for x in images],
            pixels * (1 + width),
        )
        jobs[f"colours, normalise to {name}"] = (
            [partial(normalize_images, x, color=color, dtype=dtype, **norm) for x in images],
            pixels * (1 + width),
        )
    jobs["colours by the reference"] = (
        [partial(adjust_color, x, color) for x in images],
        2 * pixels,
    )
    for source, sides in SOURCES.items():
        packed = [crops(rng, batch, sides, size) for _ in range(SETS)]
        moved = [
            {name: item[name].to(device) for name in ("pixels", "layout", "places")}
            for item in packed
        ]
        read = float(np.mean([len(item["pixels"]) for item in moved]))
        options = {"size": (size, size), "fill": FILL}
        jobs[f"resize crops of {source} to uint8"] = (
            [partial(resample, **item, **options) for item in moved],
            read + pixels,
        )
        jobs[f"resize crops of {source} to bfloat16"] = (
            [partial(resample, **item, **options, **norm, dtype=torch.bfloat16) for item in moved],
            read + 2 * pixels,
        )
    return jobs


def measure_kernels(device: torch.device, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of all jobs; microseconds a picture and the share of the floor."""
    jobs = kernel_jobs(device, batch, size)
    rate = copy_rate(device, (1 << 30) if device.type == "cuda" else (1 << 24))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, (runs, _) in jobs.items():
            times[name].append(timed_ms(runs, device) * 1e3 / batch)
    return {
        "batch": batch,
        "size": size,
        "copy_gb_per_s": round(rate / 1e6, 1),
        "us_per_picture": {
            name: spread(values, digits=3) | {"floor": round(jobs[name][1] / rate * 1e3 / batch, 4)}
            for name, values in times.items()
        },
    }


def photographs(number: int, sides: tuple[int, int]) -> list[bytes]:
    """JPEGs of soft colours with noise, about as large as photographs of that size."""
    rng = np.random.default_rng(3)
    width, height = sides
    files = []
    for _ in range(number):
        small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        soft = Image.fromarray(small).resize(sides, Image.Resampling.BICUBIC)
        noisy = np.asarray(soft) + rng.integers(-12, 13, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def measure_decoders(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Images/s of decoding regions on the device, the host's part included."""
    results: dict[str, Any] = {}
    for source, sides in SOURCES.items():
        data = photographs(batch, sides)
        regions = crops(np.random.default_rng(4), batch, sides, 224)["regions"]
        sizes = np.full((batch, 2), sides, np.int32)

        def fail(place: int) -> np.ndarray:
            raise RuntimeError(f"the decoder refuses picture {place}")

        for kind in (NvImageCodecEngine, TorchvisionEngine):
            name = f"{kind.NAME}, {source}"
            try:
                engine = kind(device)
                check_engine(engine)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                results[name] = {"problem": str(error)}
                continue
            rates = []
            for _ in range(rounds + 1):
                started = time.perf_counter()
                decode_regions(engine, data, sizes, regions, device=device, decode_on_cpu=fail)
                torch.cuda.synchronize(device)
                rates.append(batch / (time.perf_counter() - started))
            kilobytes = sum(map(len, data)) / batch / 1e3
            results[name] = spread(rates[1:]) | {"kb_per_picture": round(kilobytes, 1)}
    return results


def as_text(report: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [f"Device: {report['device']}"]
    for part in report["kernels"]:
        title = f"{part['batch']} pictures of {part['size']} px, copy {part['copy_gb_per_s']} GB/s"
        rows = [
            (
                name,
                f"{value['median']:.3f}",
                f"{value['p10']:.3f}-{value['p90']:.3f}",
                f"{value['floor']:.3f}",
            )
            for name, value in part["us_per_picture"].items()
        ]
        lines += ["", title, "", *table(("", "us a picture", "10-90 %", "floor"), rows)]
    rows = [
        (name, value.get("problem") or f"{value['median']:.0f}")
        for name, value in report["decoders"].items()
    ]
    if rows:
        lines += ["", *table(("JPEG regions", "images/s"), rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parser(__doc__.splitlines()[0], rounds=9).parse_args()
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
    rounds = 2 if args.quick else args.rounds
    shapes = [(256, 224), (64, 320)] if is_gpu else [(4, 64)]
    report = header("gpu_pixels", sys.argv[1:])
    report |= {
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu (no GPU available)",
        "versions": versions("torch", "torchvision", "numpy"),
        "kernels": [measure_kernels(device, *shape, rounds) for shape in shapes],
        "decoders": measure_decoders(device, 256, rounds) if is_gpu else {},
    }
    finish(report, as_text(report), args)


if __name__ == "__main__":
    main()
