"""Files that may be anything: opened only if they are files, read with a limit."""

from __future__ import annotations

import os
import stat

MAX_PICTURE_BYTES = 512 * 1024 * 1024


class UnusableFileError(ValueError):
    """A file that is not read at all; the message is the reason."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises:
        UnusableFileError: if it is a pipe, a device or the like.
        OSError: if it cannot be opened.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UnusableFileError("it is a pipe, a device or the like, not a file")
    return file


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return a regular file's bytes.

    Raises:
        UnusableFileError: if it is no regular file, or larger than ``limit`` bytes.
        OSError: if it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # A file that claims no size, as those in /proc, or grows is caught by reading one more.
        data = file.read(min(size, limit) + 1)
        if len(data) <= limit and len(data) > size:
            data += file.read(limit + 1 - len(data))
    if len(data) > limit:
        raise UnusableFileError(f"it has more than {limit >> 20} MiB")
    return data
