"""Files that people asked for: whole or absent, and an error that names them and a cure.

What the system says of a write names no file when the disk is full, and a temporary one when the
place cannot be written to.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path, *, num_bytes: int | None = None) -> Iterator[None]:
    """Have an OSError of what is done to write a file name that file and a cure.

    Args:
        path: The file or folder, as whoever asked for it knows it.
        num_bytes: What it takes, if that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        takes = "" if num_bytes is None else f" (it takes {num_bytes / 1e6:.1f} MB)"
        cure = f"free some{takes} or choose another place"
        if error.errno not in _FULL:
            cure = "choose another place"
        # The same number gives the same class: a PermissionError stays one.
        raise OSError(error.errno, f"{error.strerror}; {cure}", str(path)) from error


def check_place(out: Path) -> None:
    """Refuse a place where nothing can be written, before the work that is to be written there.

    Args:
        out: File, or folder with its own parents; missing folders are not made, nothing is left.

    Raises:
        OSError: Nothing can be made there.
    """
    with writing(out):
        folder = out.parent
        while not os.path.lexists(folder):
            folder = folder.parent
        # Trying is the only sure way: modes say nothing about read-only and special file systems.
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=folder)
        os.close(handle)
        os.unlink(name)


def check_folder(folder: Path, name: str, *, flag: str = "--out") -> None:
    """Refuse a folder for results that is a file, or where nothing can be written; makes nothing.

    Args:
        folder: The folder; it and those above may be missing.
        name: A file that is to be written there.
        flag: How the folder was given.

    Raises:
        ValueError: It, or what should be a folder above it, is a file.
        OSError: Nothing can be made there.
    """
    for path in (folder, *folder.parents):
        if path.is_dir():
            break
        if path.exists():
            where = f"{flag} {folder}" if path == folder else f"{flag} {folder}: {path}"
            raise ValueError(f"{where} is a file; give a folder")
    check_place(folder / name)


def write_whole(out: Path, content: bytes) -> None:
    """Write a file so that it appears under its name whole, or not at all.

    Args:
        out: The file; missing folders are made.
        content: All of it.

    Raises:
        OSError: It cannot be written; nothing is left of it, and an older file stays.
    """
    with writing(out, num_bytes=len(content)):
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)  # a temporary file is made for its owner alone
            os.replace(name, out)
        finally:
            Path(name).unlink(missing_ok=True)
