"""What a benchmark ran on: stands in every result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Return processor, cores, system, Python and the load just now."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 1),
    }


def commit() -> str:
    """Return the commit of the working tree, with a plus if files differ from it.

    A copy without git's folder has none: then it is what MBV3DIST_COMMIT says.
    """

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=ROOT, text=True, stderr=subprocess.PIPE)

    try:
        head, changes = git("rev-parse", "HEAD").strip(), git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MBV3DIST_COMMIT", "unknown")
    return head + ("+" if changes.strip() else "")


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of packages."""
    return {name: _version(name) for name in packages}


def _version(name: str) -> str:
    if name == "mbv3dist":  # may be on the path without being installed, as on a lent GPU machine
        import mbv3dist

        return mbv3dist.__version__
    return importlib.metadata.version(name)


def peak_mb() -> float:
    """Return the most memory this process has had resident, in MB of a million bytes.

    Where Linux tells: getrusage's figure starts with that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def in_new_process(script: str, part: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Run `--part` of a script in a new interpreter and return its figures."""
    command = [sys.executable, script, "--part", part, json.dumps(arguments)]
    figures: dict[str, float] = json.loads(subprocess.check_output(command, text=True))
    return figures
