"""What tests of hostile input share: commands run apart, their peak memory, what was touched."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
# A conversion or verification of a few small files stands at some 70 MB of resident memory, most
# of it NumPy and Pillow. Nothing below may need much more, whatever it claims to be.
MAX_PEAK_MB = 400
MAX_SECONDS = 60


def add(path, size=(16, 12), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path, **save)


def mbv3dist(*words):
    """Run the command; return exit code, output, the lines on standard error and peak MB."""
    program = (
        "import re, sys; from mbv3dist.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally:\n"
        "    status = open('/proc/self/status').read() if sys.platform == 'linux' else ''\n"
        "    print('\\npeak', *re.findall(r'VmHWM:\\s*(\\d+)', status) or '0')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output, _, peak = done.stdout.rpartition("\npeak ")
    assert int(peak) > 1000 or sys.platform != "linux"
    return done.returncode, output, done.stderr.splitlines(), int(peak) >> 10


def refused(words, match):
    """Check that a command ends with one line that says this, and stays small."""
    code, _, lines, peak = mbv3dist(*words)
    assert code == 2 and len(lines) == 1 and match in lines[0], lines
    assert peak < MAX_PEAK_MB


def snapshot(folder, *, without=None):
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if without is None or without not in (path, *path.parents)
    }
