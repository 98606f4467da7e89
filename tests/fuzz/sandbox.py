"""Watches what our code does with an input: files, programs, connections, messages, warnings.

Python tells an audit hook of every file it opens and every program it starts, wherever that lies;
the sandbox's folders are compared besides, for what native code might do.
"""

from __future__ import annotations

import io
import linecache
import os
import re
import site
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numba.core.caching
import numpy as np
from PIL import Image

import mbv3dist

from .seeds import Case, Seeds

PACKAGE = os.path.dirname(os.path.abspath(mbv3dist.__file__)) + os.sep
MAX_MESSAGE = 2500  # characters; a path and a list of names may be long, a file's content not
MAX_PROBLEM = 22_000  # of bad input in a conversion: a path of 5000 letters, each escaped
# What a terminal obeys or takes for something else.
_UNSHOWABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_WRITES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "os.utime",
}
_BESIDE = ("os.remove", "os.rmdir")  # their last argument is an open folder, or -1
_FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class", "pty.spawn"),
    *("urllib.Request", "http.client.connect", "ftplib.connect", "webbrowser.open"),
)
_NUMBA_CACHE = numba.core.caching.__file__


@dataclass(frozen=True)
class Target:
    """A way into our code.

    Attributes:
        make: Makes an input.
        run: Feeds it to our code, in a sandbox's folder; returns whether it was accepted.
        weight: Share of the inputs.
        on_disk: Whether the files are to lie in the sandbox's ``in``.
        is_pipeline: Whether it runs whole commands.
        headroom: Bytes of memory that an input may need.
    """

    make: Callable[[Random, Seeds], Case]
    run: Callable[[Case, Path, Seeds], bool]
    weight: float
    on_disk: bool = False
    is_pipeline: bool = False
    headroom: int = 1 << 30


class Finding(Exception):  # noqa: N818
    """Something that must not happen; the message says what."""


class Watch:
    """What was seen while an input ran.

    Attributes:
        problems: What must not happen.
        warnings: Libraries' warnings, which a user would see on standard error.
    """

    def __init__(self, box: Path) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._writable = os.path.realpath(box / "out") + os.sep
        self._readable = [
            os.path.realpath(place) + os.sep
            for place in (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), PACKAGE)
        ]
        self._readable += [os.path.realpath(place) + os.sep for place in site.getsitepackages()]
        self._readable += [os.path.dirname(os.path.abspath(__file__)) + os.sep]
        self._readable += [f"{PACKAGE.rstrip(os.sep)}.egg-info{os.sep}"]  # the version
        self._readable += [os.path.abspath(box) + os.sep, os.path.realpath(box) + os.sep]
        self._readable += [
            "/proc/",
            "/sys/",
            "/dev/null",
            "/dev/urandom",
            "/usr/",
            "/etc/localtime",
            "/etc/ld.so",
        ]

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Judge an audit event."""
        if event == "open":
            path, mode, flags = arguments[:3]
            if not isinstance(path, str | bytes):
                return
            name = os.fsdecode(path)
            where = os.path.abspath(name)
            # A name alone is below the folder we stand in, or below an open one (`dir_fd`).
            inside = not os.path.isabs(name) and os.pardir not in name.split(os.sep)
            if _is_writing(mode, flags):
                self._check_write(event, path, None)
            elif not inside and not where.startswith(tuple(self._readable)):
                self.problems.append(f"reads {where!r}")
        elif event in _WRITES:
            paths = [path for path in arguments if isinstance(path, str | bytes)]
            handle = next((n for n in arguments[::-1] if type(n) is int and n >= 0), None)
            for path in paths:
                self._check_write(event, path, handle if event in _BESIDE else None)
        elif event in _FORBIDDEN:
            self.problems.append(f"{event} {arguments!r:.200}")

    def _check_write(self, event: str, path: str | bytes, handle: int | None) -> None:
        given = os.fsdecode(path)
        if handle is not None and not os.path.isabs(given):
            given = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), given)
        # The folder is followed through links; the name itself is what is made or taken away.
        folder, name = os.path.split(os.path.abspath(given))
        where = os.path.join(os.path.realpath(folder), name)
        if not where.startswith(self._writable) and where != os.devnull:
            self.problems.append(f"{event} outside the output: {where!r}")


def _is_writing(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str) and set(mode) & set("wax+"):
        return True
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    return isinstance(flags, int) and bool(flags & writing)


_watch: Watch | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    # Looking at frames is an event too.
    if event in ("open", "pickle.find_class") and _watch and _is_loading_compiled_code():
        return
    if _watch is not None:
        _watch.note(event, arguments)


def _is_loading_compiled_code() -> bool:
    """Whether Numba reads its cache: forms that `load_compiled_code` does not call come later."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == _NUMBA_CACHE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def load_compiled_code() -> None:
    """Have Numba compile what is compiled, or unpickle it from its cache, before we watch."""
    from mbv3dist.config import ViewConfig
    from mbv3dist.convert.pixels import shrink
    from mbv3dist.data.decode import Picture
    from mbv3dist.data.members import check_headers
    from mbv3dist.data.pixels import Pictures
    from mbv3dist.data.reader import Members
    from mbv3dist.data.shrunk import shrunk
    from mbv3dist.data.targets import parse_targets
    from mbv3dist.data.view_kernels import ViewMaker
    from mbv3dist.data.views import View

    jpeg, raw = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    np.save(raw, np.zeros((16, 16, 3), np.uint8))
    files = [memoryview(jpeg.getvalue()), memoryview(raw.getvalue())]
    ones = np.ones(2, np.int64)
    boxes = np.ones((2, 4), np.float32)
    maker = ViewMaker(ViewConfig(name="ssd"), size=16, seed=0)
    views = maker.make(ones, ones, np.full((2, 2), 16, np.int32), boxes, np.arange(3))
    canvases = np.zeros((2, 16, 16, 3), np.uint8)
    Pictures(files).draw(
        views.src, views.dst, views.flip, canvases=canvases, places=np.arange(2), fill=(0, 0, 0)
    )
    for file in files:
        Picture(file).draw(View((0, 0, 16, 16), (0, 0, 16, 16)), canvases[0])
    shrink(np.zeros((16, 16, 3), np.uint8), (8, 8))
    shrink(np.asarray(Image.new("RGB", (16, 16))), (8, 8))
    shrunk(jpeg.getvalue(), (16, 16), (8, 8))
    address = np.frombuffer(files[0], np.uint8).__array_interface__["data"][0]
    members = Members([0], files[:1], files[:1], np.full((1, 2), address), np.ones((1, 2), int))
    for task in ("classification", "detection"):
        parse_targets(members, task, num_classes=1)
    check_headers(
        np.full((1, 2), address + 512),  # of a buffer that is longer than that
        np.ones((1, 2), np.int64),
        np.ones(1, np.int64),
        np.zeros((1, 2, 8), np.uint8),
        np.ones(1, np.bool_),
    )


@contextmanager
def watched(box: Path) -> Iterator[Watch]:
    """Watch this process; only files under the sandbox's ``out`` may be written."""
    global _watch, _installed
    if not _installed:  # a hook cannot be taken away again
        sys.addaudithook(_hook)
        _installed = True
    watch = Watch(box)
    old_hook = threading.excepthook

    def note_thread(error: Any) -> None:
        watch.problems.append(f"a thread ended with {error.exc_type.__name__}: {error.exc_value}")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        threading.excepthook = note_thread
        _watch = watch
        try:
            yield watch
        finally:
            _watch = None
            threading.excepthook = old_hook
    for item in seen:
        text = f"{item.category.__name__}: {item.message}"
        if os.path.abspath(item.filename).startswith(PACKAGE):
            watch.problems.append(f"our code warns: {text}")
        else:
            watch.warnings.append(text)


def list_tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (size, time of change) of all files below a folder, links not followed."""
    found = {}
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(path, name))
            size = status.st_size if name in files else -1
            found[os.path.join(path, name)] = (size, status.st_mtime_ns if size >= 0 else 0)
    return found


def text_problem(text: str, *, num_lines: int = 1, limit: int = MAX_MESSAGE) -> str:
    """Return what is wrong with a message that a user sees, or an empty string."""
    lines = text.split("\n")
    if len(lines) != num_lines:
        return f"a message of {len(lines)} lines instead of {num_lines}: {text!r:.300}"
    if not text.strip():
        return "an empty message"
    for line in lines:
        if _UNSHOWABLE.search(line):
            return f"a message with control characters: {line!r:.300}"
        if len(line) > limit:
            return f"a message of {len(line)} characters: {line!r:.300}"
    return ""


def require(condition: bool, what: str) -> None:
    """Report a finding unless a condition holds."""
    if not condition:
        raise Finding(what)


def check_text(text: str, *, limit: int = MAX_MESSAGE) -> None:
    """Report a finding unless a text can be shown on a line."""
    require(not (problem := text_problem(text, limit=limit)), problem)


def error_problem(error: Exception) -> str:
    """Return why an error is not what a user may meet, or an empty string.

    It must be a ValueError or OSError, of one line, and raised by us (or by the system, with the
    name of the file): what a library says about its own innards names neither file nor cure.
    """
    from mbv3dist.cli import _describe
    from mbv3dist.convert.records import ConversionError

    kind = type(error)
    if not isinstance(error, ValueError | OSError):
        return f"traceback: {kind.__name__}: {error!s:.300} ({_place(error)})"
    named_by_system = isinstance(error, OSError) and error.filename is not None
    if not named_by_system and not _is_ours(error):
        return f"message of a library: {kind.__name__}: {error!s:.300} ({_place(error)})"
    num_lines, limit = 1, MAX_MESSAGE
    if isinstance(error, ConversionError):
        num_lines, limit = len(error.problems) + 2, MAX_PROBLEM
    problem = text_problem(_describe(error), num_lines=num_lines, limit=limit)
    return f"{problem} ({_place(error)})" if problem else ""


def _innermost(error: BaseException) -> tuple[str, int]:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else ("", 0)


def _is_ours(error: Exception) -> bool:
    file, line = _innermost(error)
    text = linecache.getline(file, line).strip()
    return os.path.abspath(file).startswith(PACKAGE) and text.startswith("raise")


def _place(error: Exception) -> str:
    """Return the last of our lines that an error passed, and the line that raised it."""
    ours, trace = "", error.__traceback__
    while trace is not None:
        file = os.path.abspath(trace.tb_frame.f_code.co_filename)
        if file.startswith(PACKAGE):
            ours = f"{file[len(PACKAGE) :]}:{trace.tb_lineno}"
        trace = trace.tb_next
    file, line = _innermost(error)
    return f"{ours}, raised in {os.path.basename(file)}:{line}"
