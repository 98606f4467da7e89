"""From measured rates to what bounds training and what to change: arithmetic and words only.

All rates are compared as pictures per second of one node. A picture passes disk, decoding, the copy
to the device and the training step, each beside the others, so the slowest one sets the pace. On a
machine without GPUs steps and decoding share the cores; the slower one is still the larger share of
the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

_CLEARLY = 1.1  # times as fast, to be worth a word
_ENOUGH_CACHE = 0.8  # of the memory that is available may hold the data set
_NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "ceph", "beegfs", "9p")
_OPEN_FILES = 1024  # shards, threads, libraries, sockets
_SHM_BYTES = 512 << 20
_FREE_DISK_BYTES = 2 << 30
_BUSY_GPU_BYTES = 2 << 30

WORDS = {"disk": "reading", "decode": "decoding", "copy": "the copy to the GPU", "step": "the step"}


@dataclass(frozen=True)
class StepRate:
    """Pictures per second of the training steps of one rank."""

    batch_size: int
    precision: str
    images_per_s: float


@dataclass(frozen=True)
class Findings:
    """What was measured and set; rates per second, sizes in bytes, sides in pixels.

    Attributes:
        device: cpu or cuda.
        ranks: Processes of the run on this node.
        cores: That this process may use.
        machine_cores: That the machine has.
        num_threads: Decoding threads of a rank, as the recipe says.
        decode: Pictures/s by threads of the whole node, for 1 thread at least.
        steps: As the recipe says first, then what else was tried.
        decode_mode: data.decode of the run; `decode` is that of cpu.
        ways: Pictures/s that one rank gets onto its GPU, by data.decode; empty on a CPU.
        is_detection: Whether boxes are found, so that small things in pictures matter.
        needs_side: Shorter side in pixels that the view has use for.
        picture_bytes: Mean size of the pictures' files.
        sample_bytes: Mean size of all that a shard holds for a sample.
        height: Mean, of the stored pictures.
        width: Mean.
        is_raw: Whether pictures are stored as pixels.
        data_bytes: Of the split's shards.
        input_size: Side of the canvas.
        reads_every_epoch: Whether the shards come from the disk (or network) in each epoch, because
            memory (or the cache) cannot hold them.
        disk_mb_per_s: Of the disk, or the network if `is_remote`; None: unknown, or the page cache
            answered.
        is_remote: Whether shards come by URL.
        file_system: Where the shards lie.
        memory_bytes: Available.
        crc_mb_per_s: In one thread.
        verify: data.verify.
        copy_mb_per_s: Of one rank; None on a CPU.
        has_decoder: Whether nvImageCodec and numba are installed.
    """

    device: str
    ranks: int
    cores: int
    machine_cores: int
    num_threads: int
    decode: Mapping[int, float]
    steps: tuple[StepRate, ...]
    needs_side: int
    picture_bytes: float
    sample_bytes: float
    height: float
    width: float
    data_bytes: int
    input_size: int
    decode_mode: str = "cpu"
    ways: Mapping[str, float] = field(default_factory=dict)
    is_detection: bool = False
    is_raw: bool = False
    reads_every_epoch: bool = False
    disk_mb_per_s: float | None = None
    is_remote: bool = False
    file_system: str | None = None
    memory_bytes: int | None = None
    crc_mb_per_s: float | None = None
    verify: str = "first"
    copy_mb_per_s: float | None = None
    has_decoder: bool = True


def decode_rate(decode: Mapping[int, float], num_threads: int) -> float:
    """The rate of so many threads, between those measured on a line; flat beyond the last."""
    counts = sorted(decode)
    if num_threads <= counts[0]:
        return decode[counts[0]]
    for low, high in pairwise(counts):
        if num_threads <= high:
            share = (num_threads - low) / (high - low)
            return decode[low] + share * (decode[high] - decode[low])
    return decode[counts[-1]]


def limits(found: Findings) -> dict[str, float]:
    """Pictures per second that each part of the way allows a node; parts that never bound, none."""
    values = {
        "decode": _way_rate(found, found.decode_mode),
        "step": found.steps[0].images_per_s * found.ranks,
    }
    if found.reads_every_epoch and found.disk_mb_per_s is not None:
        values["disk"] = _disk_images(found)
    if found.copy_mb_per_s is not None:
        canvas_bytes = 3 * found.input_size**2
        values["copy"] = found.copy_mb_per_s * 1e6 / canvas_bytes * found.ranks
    return values


def _way_rate(found: Findings, mode: str) -> float:
    """Pictures per second of a node with this value of data.decode and the threads as set."""
    threads = found.num_threads * found.ranks
    if mode not in found.ways or mode == "cpu":
        return decode_rate(found.decode, threads)
    # Measured with one rank's threads; the ranks of a node share its cores.
    return found.ways[mode] * found.ranks * min(1.0, found.cores / threads)


def find_bound(values: Mapping[str, float]) -> str:
    """The part that is slowest: disk, decode, copy or step."""
    return min(values, key=lambda name: values[name])


def verdict(found: Findings) -> str:
    """What bounds training, in a sentence with the figures that say so."""
    values = limits(found)
    bound = find_bound(values)
    step = values.pop("step")
    data = min(values.values())
    text = f"{WORDS[bound]} bounds training: "
    if found.device == "cpu" and bound in ("step", "decode"):
        share = (1 / step) / (1 / step + 1 / data)
        share = share if bound == "step" else 1 - share
        return (
            f"{text}the cores compute {_rate(step)} or decode {_rate(data)}, so it is "
            f"{100 * share:.0f} % of their work"
        )
    if bound == "step":
        return (
            f"{text}the device takes {_rate(step)}, data comes at {_rate(data)} "
            f"({data / step:.1f} times that); the device does not wait"
        )
    return (
        f"{text}it allows {_rate(data)}, the device could take {_rate(step)}; the device waits "
        f"about {100 * (1 - data / step):.0f} % of the time"
    )


def advise(found: Findings) -> list[str]:
    """What to change, most useful first; empty if nothing is worth it."""
    values = limits(found)
    bound = find_bound(values)
    if bound == "decode":
        lines = _about_decoding(found, values["step"])
    elif bound == "disk":
        lines = _about_disk(found, values)
    elif bound == "copy":
        lines = [
            f"copies reach {found.copy_mb_per_s or 0:,.0f} MB/s: see that the GPU sits in a full "
            "PCIe slot (nvidia-smi -q shows its link) and that nothing else copies to it"
        ]
    else:
        lines = _about_step(found)
    return lines + _about_first_epoch(found, values) + _about_settings(found)


def _about_decoding(found: Findings, wanted: float) -> list[str]:
    lines = []
    now = _way_rate(found, found.decode_mode)
    threads = _best_threads(found, wanted)
    faster = decode_rate(found.decode, threads * found.ranks)
    if faster > _CLEARLY * now:
        mode = " and --data.decode cpu" * (found.decode_mode != "cpu")
        lines.append(
            f"set --data.num_threads {threads}{mode} (now {found.num_threads}"
            f"{' and ' + found.decode_mode if mode else ''}): {_rate(now)} become {_rate(faster)}"
        )
    faster = max(now, faster)
    for mode in found.ways:
        rate = _way_rate(found, mode)
        if mode != found.decode_mode and rate > _CLEARLY * faster:
            lines.append(
                f"set --data.decode {mode} (now {found.decode_mode}): {_rate(now)} become "
                f"{_rate(rate)}"
            )
            faster = rate
    if not found.has_decoder and not found.is_raw:
        lines.append(
            "the fast decoder is not installed: pip install nvidia-nvimgcodec-cu13 numba (Linux)"
        )
    if faster * _CLEARLY < wanted:  # threads alone will not do
        lines += _about_pictures(found, wanted)
        lines += _about_cores(found, wanted)
    return lines


def _best_threads(found: Findings, wanted: float) -> int:
    """Threads of a rank that decode what the device takes, or else as much as they can."""
    most = max(found.decode.values())
    enough = min(0.95 * most, _CLEARLY * wanted)
    total = min(count for count, rate in found.decode.items() if rate >= enough)
    return max(1, total // found.ranks)


def _about_pictures(found: Findings, wanted: float) -> list[str]:
    """Smaller pictures, or pixels that need no decoding."""
    if found.is_raw:
        return []
    pixels = found.height * found.width
    size = f"{found.width:.0f} x {found.height:.0f} pixels, {found.picture_bytes / 1e3:.0f} KB"
    if found.is_detection:
        flag, side, ratio = "--max-side", 2 * found.needs_side, max(found.height, found.width)
    else:
        flag, side, ratio = "--resize", found.needs_side, min(found.height, found.width)
    fewer = (ratio / side) ** 2
    if fewer >= 1.5:
        return [
            f"convert again with {flag} {side}: pictures have {size} on average, and "
            f"{fewer:.1f} times fewer pixels would do for a canvas of {found.input_size}"
        ]
    raw = 3 * pixels
    total = raw * found.data_bytes / found.sample_bytes
    need = wanted * raw / 1e6
    fits = found.memory_bytes is not None and total < _ENOUGH_CACHE * found.memory_bytes
    if fits or (found.disk_mb_per_s or 0) > need:
        where = "memory holds it" if fits else f"the disk reads {found.disk_mb_per_s:,.0f} MB/s"
        return [
            f"convert again with --format raw, which needs no decoding: {total / 1e9:.3g} GB "
            f"instead of {found.data_bytes / 1e9:.3g}, read at {need:,.0f} MB/s; {where}"
        ]
    return []


def _about_cores(found: Findings, wanted: float) -> list[str]:
    most = max(found.decode)
    needed = math.ceil(wanted / (found.decode[most] / most))
    if needed <= found.cores:
        return []
    if found.machine_cores > found.cores:
        return [
            f"this process may use {found.cores} of the machine's {found.machine_cores} cores; "
            f"with about {needed} it could decode what the device takes: ask the scheduler or "
            "the container for more"
        ]
    each = math.ceil(needed / found.ranks)
    return [f"about {each} cores for each rank would decode what the device takes"]


def _about_disk(found: Findings, values: Mapping[str, float]) -> list[str]:
    rate = f"{found.disk_mb_per_s or 0:,.0f} MB/s"
    if found.is_remote:
        lines = [
            f"the network brings {rate} and the cache cannot hold the data set: raise "
            "--data.cache_gb, or copy the data set to a local disk"
        ]
    else:
        kind = found.file_system or "this disk"
        away = " over the network" if kind in _NETWORK_FILE_SYSTEMS else ""
        lines = [
            f"samples are read at {rate} from {kind}{away}, and memory is too small to keep the "
            f"{found.data_bytes / 1e9:,.1f} GB: copy the data set to a local NVMe disk, or take a "
            "machine with more memory"
        ]
    rest = min(rate for name, rate in values.items() if name != "disk")
    need = rest * found.sample_bytes / 1e6
    lines.append(f"a disk of {need:,.0f} MB/s would no longer be the bound")
    if found.is_raw:
        lines.append("convert without --format raw: JPEG takes a fraction of these bytes")
    else:
        lines += [x for x in _about_pictures(found, rest) if "--format raw" not in x]
    return lines


def _about_step(found: Findings) -> list[str]:
    now, *others = found.steps
    lines = []
    for other in others:
        if other.images_per_s <= _CLEARLY * now.images_per_s:
            continue
        gain = f"{_rate(now.images_per_s)} become {_rate(other.images_per_s)} on each GPU"
        if other.precision != now.precision:
            lines.append(f"train with --mixed_precision {other.precision}: {gain}")
        else:
            lines.append(
                f"a batch of {other.batch_size} for each GPU instead of {now.batch_size}: {gain} "
                "(--data.global_batch_size, and the learning rate with it)"
            )
    if found.device == "cpu":
        lines.append("steps run on the CPU: a GPU would make the difference, the loader cannot")
    return lines


def _about_first_epoch(found: Findings, values: Mapping[str, float]) -> list[str]:
    if found.reads_every_epoch or found.disk_mb_per_s is None:
        return []
    first, later = _disk_images(found), min(values.values())
    if first * _CLEARLY > later:
        return []
    source = "the network" if found.is_remote else "the disk"
    holder = "the cache" if found.is_remote else "memory"
    return [
        f"in the first epoch {source} allows {_rate(first)}; from the second on {holder} has the "
        "pictures"
    ]


def _about_settings(found: Findings) -> list[str]:
    lines = []
    if found.num_threads * found.ranks > found.cores:
        fewer = max(1, found.cores // found.ranks)
        if fewer < found.num_threads:
            lines.append(
                f"{found.num_threads} threads in {found.ranks} rank(s) are more than the "
                f"{found.cores} cores here: --data.num_threads {fewer} is enough"
            )
    if found.verify == "always" and found.crc_mb_per_s:
        checking = found.picture_bytes / found.crc_mb_per_s / 1e6
        share = checking / (checking + 1 / found.decode[min(found.decode)])
        if share > 0.1:
            lines.append(
                f"checksums take {100 * share:.0f} % of the threads' time: --data.verify first "
                "checks each sample once in a run"
            )
    return lines


def environment_advice(environment: Mapping[str, Any], *, ranks: int = 1) -> list[str]:
    """What is amiss with the machine itself."""
    gpu, cores = environment["gpu"], environment["cores"]
    lines = []
    if not gpu["usable"] and "driver is there" in str(gpu["reason"]):
        lines.append(f"torch cannot use the GPU: {gpu['reason']}; install a CUDA build of torch")
    for number, device in enumerate(gpu["devices"]):
        used = device["memory_bytes"] - device["free_bytes"]
        if used > _BUSY_GPU_BYTES:
            lines.append(
                f"GPU {number} ({device['name']}) has {used / 1e9:.1f} GB in use: something else "
                "runs on it"
            )
    if environment["load_1min"] > 0.5 * cores["usable"] + 1:
        lines.append(
            f"the machine is busy (load {environment['load_1min']} on {cores['usable']} cores): "
            "measure again when it is not"
        )
    files, shm = environment["open_files"], environment["shm_bytes"]
    if files is not None and files < _OPEN_FILES:
        lines.append(f"only {files} files may be open at a time: ulimit -n {4 * _OPEN_FILES}")
    if ranks > 1 and gpu["usable"] and shm is not None and shm < _SHM_BYTES:
        lines.append(
            f"/dev/shm has {shm / 1e6:.0f} MB, which NCCL can run out of: docker run --shm-size=1g"
        )
    if gpu["usable"] and environment["nccl"] is None and ranks > 1:
        lines.append("torch has no NCCL here, which several GPUs need")
    free = environment["disk"]["free_bytes"]
    if free < _FREE_DISK_BYTES:
        lines.append(f"only {free / 1e9:.1f} GB of disk are free, for checkpoints and caches")
    return lines


def _disk_images(found: Findings) -> float:
    return (found.disk_mb_per_s or 0) * 1e6 / found.sample_bytes


def _rate(images_per_s: float) -> str:
    digits = 0 if images_per_s >= 10 else 1
    return f"{images_per_s:,.{digits}f} images/s"
