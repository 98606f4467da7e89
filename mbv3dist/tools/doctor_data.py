"""Rates of the way to a batch, measured on this machine: disk or network, checksums, decoding.

Decoding is measured through the loader that training uses, from a part of the split that fits into
the page cache and has just been read, so that no disk takes part in it.
"""

from __future__ import annotations

import dataclasses
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.config import TrainConfig
from mbv3dist.data.index import ShardTable, Split
from mbv3dist.data.joined import JoinedSplit
from mbv3dist.data.manifest import Table
from mbv3dist.data.plan import Plan
from mbv3dist.data.remote import Remote
from mbv3dist.data.store import CacheOptions

_BLOCK = 4 << 20  # bytes of a sequential read
_PROBES = 64  # places of the files where the page cache is asked
_RAW = b"\x93NUMPY"  # how pictures stored as pixels begin
_EPOCHS = 1_000_000  # more than any measurement reads


def head_split(split: Split, max_bytes: int) -> Split:
    """Returns the first shards of a split, at least one; of joined splits, of the first one."""
    if isinstance(split, JoinedSplit):
        split = split.parts[0]
    table = split.shards.table
    # Empty shards in front count as none of those to read.
    fits = np.cumsum(table.num_bytes) <= max_bytes
    has_samples = np.cumsum(table.num_samples) > 0
    count = max(int(fits.sum()), int(np.argmax(has_samples)) + 1)
    part = Table(
        num_samples=table.num_samples[:count],
        num_bytes=table.num_bytes[:count],
        first_key=table.first_key[:count],
        digest=table.digest[:count],
        urls=None if table.urls is None else table.urls[:count],
    )
    return dataclasses.replace(split, shards=ShardTable(split.root, split.name, part))


def measure_disk(
    paths: Sequence[Path], *, piece_bytes: int, num_threads: int, seconds: float
) -> dict[str, Any]:
    """Reads files that the page cache was asked to forget.

    Args:
        paths: shards.
        piece_bytes: of a read in the middle of a shard: a sample's, as training reads them.
        num_threads: that read such pieces at a time.
        seconds: for either way of reading.

    Returns:
        {sequential_mb_per_s, mb_per_s, num_threads, cached_share_before, cached_share}: `mb_per_s`
        is that of samples in random order; the last two say how much of the files lay in the page
        cache when the command began, and when the reading did (None where the system does not
        tell): above 0 the cache answered, not the disk.
    """
    files = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        before = cached_share(files)
        _forget(files)
        cached = cached_share(files)
        _forget(files)  # being asked, a system may have begun to read
        random = _read_pieces(files, piece_bytes, num_threads=num_threads, seconds=seconds)
        _forget(files)
        sequential = _read_through(files, seconds=seconds)
    finally:
        for file in files:
            os.close(file)
    return {
        "mb_per_s": random,
        "sequential_mb_per_s": sequential,
        "num_threads": num_threads,
        "cached_share_before": before,
        "cached_share": cached,
    }


def cached_share(files: Sequence[int]) -> float | None:
    """The share of open files that lies in the page cache, by samples; None if unknown."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    buffer, hits, asked = bytearray(1), 0, 0
    for file in files:
        size = os.fstat(file).st_size
        for number in range(max(1, _PROBES // len(files))):
            offset = size * number // max(1, _PROBES // len(files))
            try:
                hits += os.preadv(file, [buffer], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                pass  # not in memory
            except OSError:
                return None  # this file system cannot say
            asked += 1
    return hits / asked


def warm_up(paths: Sequence[Path], *, seconds: float) -> None:
    """Reads files into the page cache, for so long."""
    files = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        _read_through(files, seconds=seconds)
    finally:
        for file in files:
            os.close(file)


def _forget(files: Sequence[int]) -> None:
    if hasattr(os, "posix_fadvise"):
        for file in files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_through(files: Sequence[int], *, seconds: float) -> float:
    """MB/s (a million bytes) of reading from the beginning on."""
    buffer = bytearray(_BLOCK)
    total, start = 0, time.perf_counter()
    for file in files:
        offset = 0
        while (count := os.preadv(file, [buffer], offset)) > 0:
            offset += count
            if time.perf_counter() - start > seconds:
                break
        total += offset
        if time.perf_counter() - start > seconds:
            break
    return total / (time.perf_counter() - start) / 1e6


def _read_pieces(
    files: Sequence[int], piece_bytes: int, *, num_threads: int, seconds: float
) -> float:
    """MB/s of reading pieces in random order, each once at most."""
    places = [
        (file, offset)
        for file in files
        for offset in range(0, max(1, os.fstat(file).st_size - piece_bytes + 1), piece_bytes)
    ]
    order = np.random.default_rng(0).permutation(len(places)).tolist()
    end = time.perf_counter() + seconds

    def read(numbers: list[int]) -> int:
        total = 0
        for number in numbers:
            total += len(os.pread(places[number][0], piece_bytes, places[number][1]))
            if time.perf_counter() > end:
                break
        return total

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        total = sum(pool.map(read, [order[n::num_threads] for n in range(num_threads)]))
    return total / (time.perf_counter() - start) / 1e6


def measure_network(split: Split, *, seconds: float) -> float:
    """MB/s of one connection that reads the head of a remote split's first shard."""
    assert split.remote is not None
    shard = split.shards[0]
    source, piece = Remote(split.remote), 1 << 20
    total, start = 0, time.perf_counter()
    while total < shard.num_bytes and time.perf_counter() - start < seconds:
        stop = min(total + piece, shard.num_bytes)
        total += len(source.read_range(shard.url, total, stop))
        piece = min(2 * piece, 8 << 20)
    return total / (time.perf_counter() - start) / 1e6


def measure_crc(*, seconds: float = 0.2) -> float:
    """MB/s of the checksum in one thread."""
    data = np.random.default_rng(0).bytes(1 << 20)
    total, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        zlib.crc32(data)
        total += len(data)
    return total / spent / 1e6


@dataclasses.dataclass(frozen=True)
class DecodeRate:
    """What a loader delivered.

    Attributes:
        images_per_s: Pictures in a second.
        mean_height: Of the original pictures, in pixels.
        mean_width: Likewise.
    """

    images_per_s: float
    mean_height: float
    mean_width: float


def measure_decode(
    split: Split,
    config: TrainConfig,
    *,
    num_threads: int,
    batch_size: int,
    seconds: float,
    cache: CacheOptions | None = None,
    **options: Any,
) -> DecodeRate:
    """Pictures per second that a loader delivers to somebody who does nothing else.

    Args:
        split: a part of a data set; what is read from it should be in the page cache.
        config: its view and canvas.
        num_threads: of the loader.
        batch_size: of a batch.
        seconds: from the second batch on; at least four batches are counted.
        cache: of remote shards.
        options: further ones of the loader.
    """
    count, heights, widths = 0, 0.0, 0.0
    start = 0.0
    loader = open_loader(
        split, config, num_threads=num_threads, batch_size=batch_size, cache=cache, **options
    )
    with loader:
        for step, batch in loader:
            if step == 0:  # threads have started, what is compiled has been
                start = time.perf_counter()
                continue
            count += len(batch)
            heights += float(batch.size[:, 0].sum())
            widths += float(batch.size[:, 1].sum())
            spent = time.perf_counter() - start
            if spent > seconds and step >= 4:
                break
    return DecodeRate(count / spent, heights / count, widths / count)


def open_loader(
    split: Split,
    config: TrainConfig,
    *,
    num_threads: int,
    batch_size: int,
    cache: CacheOptions | None = None,
    pin_memory: bool = False,
    **options: Any,
) -> Any:
    """Returns a loader of one rank as training opens it, with a plan that does not end."""
    from mbv3dist.data.loader import Loader

    plan = Plan(split.shard_sizes, global_batch_size=batch_size, epochs=_EPOCHS, seed=config.seed)
    return Loader(
        split,
        plan,
        view=config.data.view,
        size=config.model.input_size,
        seed=config.seed,
        num_threads=num_threads,
        prefetch=config.data.prefetch,
        pin_memory=pin_memory,
        verify="open",  # checksums are measured apart
        cache=cache,
        **options,
    )


def thread_counts(cores: int, asked: int) -> list[int]:
    """1, 2, 4, ... up to the cores, the cores themselves, and the recipe's number if it fits."""
    doubled = [1 << n for n in range(cores.bit_length()) if 1 << n <= cores]
    return sorted({*doubled, cores, min(asked, cores)})


def batch_for(images_per_s: float, *, num_threads: int, largest: int) -> int:
    """A batch that takes about a tenth of a second, for so many threads of such a rate each."""
    wanted = int(images_per_s * num_threads / 10)
    return max(4 * num_threads, 8, min(wanted, largest))


def describe_pictures(split: Split, *, count: int = 64) -> tuple[float, bool]:
    """Mean bytes of some pictures of a split, and whether they are stored as pixels."""
    from mbv3dist.data.reader import Reader

    count = min(count, len(split))
    with Reader(split, verify="open") as reader:
        pictures = [reader.read(n * len(split) // count)[0] for n in range(count)]
        is_raw = bytes(pictures[0][: len(_RAW)]) == _RAW
        return sum(len(picture) for picture in pictures) / count, is_raw


def draw_data_set(out: Path, *, count: int = 96) -> Path:
    """Draws pictures like small photographs (500 x 375, JPEG of some 85 KB) and converts them."""
    from PIL import Image

    from mbv3dist.convert.imagefolder import convert_imagefolder

    rng = np.random.default_rng(0)
    for number in range(count):
        folder = out / "pictures" / f"class_{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-24, 25, smooth.shape, dtype=np.int16)
        picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        picture.save(folder / f"{number:03d}.jpg", quality=90)
    convert_imagefolder(out / "pictures", out / "data", split="train", workers=1)
    return out / "data"
