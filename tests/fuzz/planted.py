"""Faults planted on purpose, so that a test can see that the harness finds them."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from .sandbox import Target
from .seeds import Case, Seeds

_EMPTY: dict[str, str] = {}


def _maker(name: str) -> Callable[[Random, Seeds], Case]:
    return lambda rng, seeds: Case(name, {"input": b"x"}, {})


def _traceback(case: Case, box: Path, seeds: Seeds) -> bool:
    return bool(_EMPTY["missing"])


def _library(case: Case, box: Path, seeds: Seeds) -> bool:
    return bool(int("no number"))


def _write(case: Case, box: Path, seeds: Seeds) -> bool:
    (box / "cwd" / "EVIL").write_bytes(b"x")
    return True


def _read(case: Case, box: Path, seeds: Seeds) -> bool:
    return bool(Path("/etc/passwd").read_bytes())


def _program(case: Case, box: Path, seeds: Seeds) -> bool:
    return os.system("true") == 0


def _thread(case: Case, box: Path, seeds: Seeds) -> bool:
    thread = threading.Thread(target=lambda: _EMPTY["missing"])
    thread.start()
    thread.join()
    return True


def _memory(case: Case, box: Path, seeds: Seeds) -> bool:
    return len(bytes(1 << 34)) > 0


def _hang(case: Case, box: Path, seeds: Seeds) -> bool:
    while True:
        time.sleep(0.1)


def _crash(case: Case, box: Path, seeds: Seeds) -> bool:
    return bool(ctypes.string_at(8))


PLANTED: dict[str, Target] = {
    f"planted_{function.__name__[1:]}": Target(
        _maker(f"planted_{function.__name__[1:]}"), function, 1.0
    )
    for function in (
        *(_traceback, _library, _write, _read, _program, _thread, _memory, _hang, _crash),
    )
}
