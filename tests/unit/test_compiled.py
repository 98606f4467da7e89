"""Compiled code is kept between processes, apart for each version of it, or not at all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mbv3dist.data
from mbv3dist.data import compiled

DATA = Path(mbv3dist.data.__file__).parent
USE = """
import time
import numpy as np
started = time.perf_counter()
from mbv3dist.data.members import parse_classes
out = np.zeros(1, np.int64)
assert parse_classes(np.zeros(1, np.int64), np.zeros(1, np.int64), 3, out) == 1
print(len(parse_classes.stats.cache_hits))
"""


def run(cache, **environment):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)} | environment
    result = subprocess.run(
        [sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=True
    )
    return int(result.stdout), result.stderr


def test_the_second_process_loads_what_the_first_compiled(tmp_path):
    assert run(tmp_path) == (0, "")
    assert run(tmp_path) == (1, "")
    assert len(list((tmp_path / "compiled").iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="no /proc")
def test_without_a_folder_it_compiles_and_says_so():
    hits, message = run("/proc/self/nowhere")
    assert hits == 0
    assert "compiled code cannot be kept" in message
    assert "NUMBA_CACHE_DIR" in message


def test_all_files_with_compiled_code_are_in_its_name():
    """A file that is forgotten there would be used in its old form after a change."""
    users = {path.name for path in DATA.glob("*.py") if "@compiled" in path.read_text("utf-8")}
    imported = set()
    for name in users:
        text = (DATA / name).read_text("utf-8")
        imported |= {
            f"{part}.py" for part in re.findall(r"from mbv3dist\.data\.(\w+) import", text)
        }
        for line in re.findall(r"from mbv3dist\.data import (.*)", text):
            imported |= {f"{part.strip()}.py" for part in line.split(",")}
    assert users <= set(compiled.FILES)
    # What they import for constants that are compiled in; the others hold none.
    assert imported - set(compiled.FILES) <= {"compiled.py", "decode.py", "packed.py"}


def test_the_name_changes_with_the_contents(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    before = compiled.cache_folder.__wrapped__()
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: read(self) + b"#" * (self.name == "resize.py")
    )
    assert compiled.cache_folder.__wrapped__() != before


def test_a_user_s_own_cache_setting_is_left_alone():
    import numba

    before = numba.config.CACHE_DIR
    function = compiled.compiled(lambda x: x + 1)
    assert function(np.int64(2)) == 3
    assert before == numba.config.CACHE_DIR
