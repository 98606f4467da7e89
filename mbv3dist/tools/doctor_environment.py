"""What a machine has that training depends on: cores, memory, disks, GPUs, decoder, limits.

Everything is read, nothing is changed; what a system does not tell is None.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import mbv3dist
from mbv3dist.data.decode import decoder_version
from mbv3dist.messages import one_line

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # bytes; an unlimited cgroup of version 1 shows a number near 2^63


def environment(folder: str | Path = ".") -> dict[str, Any]:
    """Returns the facts, ready for JSON; `folder` is where the data set lies, or runs go."""
    import torch

    return {
        "versions": {
            "mbv3dist": mbv3dist.__version__,
            "python": platform.python_version(),
            **{name: package_version(name) for name in _PACKAGES},
            "cuda": torch.version.cuda,
        },
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "load_1min": round(os.getloadavg()[0], 1),
        "torch_threads": torch.get_num_threads(),
        "memory": memory(),
        "disk": disk(folder),
        "shm_bytes": _shm_bytes(),
        "open_files": open_files(),
        "gpu": gpu(),
        "nccl": _nccl_version(),
        "decoder": {
            "name": decoder_version()[0],
            "version": decoder_version()[1],
            "nvimgcodec": _find("nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13"),
            "numba": _find("numba", "numba"),
        },
    }


def package_version(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find(module: str, distribution: str) -> str | None:
    """The version of a module that can be imported; "unknown" where no distribution tells it."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        found = False
    return (package_version(distribution) or "unknown") if found else None


def cpu_name() -> str:
    """The processor's name, or the machine's where it has none."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return one_line(line.partition(":")[2].strip(), 80)
    return platform.processor() or platform.machine()


def cores() -> dict[str, Any]:
    """The machine's cores, those this process may run on, and what a quota leaves of them."""
    in_machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else in_machine
    quota = cpu_quota()
    usable = allowed if quota is None else min(allowed, max(1, int(quota)))
    return {"machine": in_machine, "affinity": allowed, "quota": quota, "usable": usable}


def cpu_quota(cgroup: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The least number of cores that any control group around this process leaves it."""
    quotas = []
    for folder in _groups(cgroup, membership, "cpu"):
        pair = _words(folder / "cpu.max")  # version 2: "max 100000" or "150000 100000"
        if len(pair) != 2:
            pair = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(pair) == 2 and pair[0].isdecimal() and pair[1].isdecimal() and int(pair[1]) > 0:
            quotas.append(int(pair[0]) / int(pair[1]))
    return min(quotas, default=None)


def memory_limit(
    cgroup: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The least memory in bytes that any control group around this process allows."""
    limits = []
    for folder in _groups(cgroup, membership, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if len(words) == 1 and words[0].isdecimal() and int(words[0]) < _UNLIMITED:
                limits.append(int(words[0]))
    return min(limits, default=None)


def _groups(cgroup: Path, membership: Path, controller: str) -> list[Path]:
    """Folders of the control groups of this process, both versions, up to the root."""
    folders = [cgroup, cgroup / controller]
    try:
        lines = membership.read_text(errors="replace").splitlines()
    except OSError:
        return folders
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root = cgroup
        elif controller in controllers.split(","):
            root = cgroup / controller
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").split()
    except OSError:
        return []


def memory() -> dict[str, int | None]:
    """Bytes of the machine's memory, and of what this process can still have."""
    values: dict[str, int] = {}
    for line in _lines("/proc/meminfo"):
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            values[name] = int(words[0]) * 1024
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    if total is None and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit()
    known = [value for value in (available, limit) if value is not None]
    return {"total_bytes": total, "limit_bytes": limit, "available_bytes": min(known, default=None)}


def disk(folder: str | Path) -> dict[str, Any]:
    """File system of a folder (or of the nearest parent that exists) and its free bytes."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return {"file_system": file_system(path), "free_bytes": shutil.disk_usage(path).free}


def file_system(path: Path) -> str | None:
    """The kind of file system a path lies on, such as ext4 or nfs4."""
    best, kind = -1, None
    for line in _lines("/proc/self/mounts"):
        words = line.split()
        if len(words) < 3:
            continue
        mount = Path(words[1].replace("\\040", " "))
        if (mount == path or mount in path.parents) and len(mount.parts) >= best:
            best, kind = len(mount.parts), words[2]
    return kind


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _shm_bytes() -> int | None:
    shm = Path("/dev/shm")
    return shutil.disk_usage(shm).total if shm.is_dir() else None


def open_files() -> int | None:
    """How many files this process may have open at a time (`ulimit -n`)."""
    if sys.platform == "win32":
        return None
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def gpu() -> dict[str, Any]:
    """Whether torch can compute on GPUs here, on which, and if not, why not."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch warns of drivers that are too old
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        reason = one_line(str(caught[0].message), 200) if caught else _why_no_gpu()
        return {"usable": False, "reason": reason, "devices": []}
    devices = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        devices.append(
            {
                "name": facts.name,
                "memory_bytes": total,
                "free_bytes": free,
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    return {
        "usable": True,
        "reason": None,
        "devices": devices,
        "bf16": torch.cuda.is_bf16_supported(),
    }


def _why_no_gpu() -> str:
    import torch

    has_driver = Path("/proc/driver/nvidia/version").exists()
    if torch.version.cuda is None:
        return "torch is built without CUDA" + (", though the driver is there" * has_driver)
    if not has_driver:
        return "no NVIDIA driver was found"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={one_line(visible, 40)!r} shows torch none"
    return "the driver is there, but shows no GPU"


def _nccl_version() -> str | None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())
