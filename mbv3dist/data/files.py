"""Files that may be anything: opened only if they are files, read with a limit."""

from __future__ import annotations

import os
import stat

MAX_PICTURE_BYTES = 512 * 1024 * 1024
# Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class UnusableFileError(ValueError):
    """A file that is not read at all; the message is the reason."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        UnusableFileError: if it is a pipe, a device or the like.
        OSError: if it cannot be opened.
    """
    return open_sized(path)[0]


def open_sized(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open as `open_regular` does; return the descriptor and the file's bytes."""
    file = os.open(path, _FLAGS)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise UnusableFileError("it is a pipe, a device or the like, not a file")
    return file, status.st_size


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return a regular file's bytes.

    Raises:
        UnusableFileError: if it is no regular file, or larger than ``limit`` bytes.
        OSError: if it cannot be read.
    """
    file, num_bytes = open_sized(path)
    try:
        return read_open(file, num_bytes, limit)
    finally:
        os.close(file)


def read_open(file: int, num_bytes: int, limit: int) -> bytes:
    """Return the bytes of a file from `open_sized`; raises as `read_bounded` does."""
    with open(file, "rb", closefd=False) as stream:
        # A file that claims no size, as those in /proc, or grows is caught by reading one more.
        data = stream.read(min(num_bytes, limit) + 1)
        if len(data) <= limit and len(data) > num_bytes:
            data += stream.read(limit + 1 - len(data))
    if len(data) > limit:
        raise UnusableFileError(f"it has more than {limit >> 20} MiB")
    return data
