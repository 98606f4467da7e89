"""The cache folder on disk: its bound, its locks and its leftovers, for all processes of a node.

    FOLDER/.lock               guards `.ledger`, evictions and the making of files
    FOLDER/.ledger             bytes in the data sets' folders, files in the making at full size
    FOLDER/NAME-DIGEST/        one data set: its descriptions, and for each shard
        train/000000.SHA.tar .idx .crc   whole and true to the split's SHA-256, which they carry
        train/000000.SHA.tar.partial     in the making

Everything that could outlive its process is a file lock, which the kernel takes back when the
process dies however it dies: whoever makes a file holds its `.partial` exclusively, whoever reads a
shard holds it shared, and only what nobody holds is removed. So there are no process numbers, no
time-outs and no clean-up that a killed run could miss.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
# A shard's files: its URL without ending, part of its SHA-256, the ending.
_UNIT = re.compile(r"(.+\.[0-9a-f]{16})(\.tar|\.idx|\.crc)$")
_MIRROR = re.compile(r".+-[0-9a-f]{16}$")
_PINNED = (".tar", ".idx")  # the files of a shard that readers lock
_CURE = "free some space or choose another folder with --data.cache_dir"
_REASONS = {
    errno.EROFS: "its file system is read-only; choose another one with --data.cache_dir",
    errno.EACCES: "no permission to write; choose another one with --data.cache_dir",
    errno.EPERM: "no permission to write; choose another one with --data.cache_dir",
    errno.ENOTDIR: "a file is in its place; choose another one with --data.cache_dir",
    errno.EEXIST: "a file is in its place; choose another one with --data.cache_dir",
    errno.ENOSPC: f"the disk is full; {_CURE}, or lower --data.cache_gb",
    errno.EDQUOT: f"the disk quota is used up; {_CURE}, or lower --data.cache_gb",
    errno.ENOLCK: "its file system has no file locks; choose a local disk with --data.cache_dir",
    errno.ENOTSUP: "its file system has no file locks; choose a local disk with --data.cache_dir",
    errno.ENOSYS: "its file system has no file locks; choose a local disk with --data.cache_dir",
    errno.EMFILE: "too many open files; raise the limit (`ulimit -n`) or lower --data.lanes",
    errno.ENFILE: "too many open files on this machine",
}


class CacheFolderError(OSError):
    """The cache folder cannot be used; the message says why and what to do."""


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into one line that names the folder and the cure."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None or isinstance(error, CacheFolderError):
            raise
        clear = CacheFolderError(f"cache folder {folder}: {reason}")
        clear.errno = error.errno
        raise clear from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, against other processes and against other threads of this one."""
    with folder_errors(path.parent):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with folder_errors(path.parent):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@dataclass(frozen=True)
class Unit:
    """What the cache holds of one shard.

    Attributes:
        stem: Path of its files without ``.tar``, ``.idx`` and ``.crc``.
        num_bytes: Of all its files.
        used_at: When it was last opened, in seconds since the epoch.
    """

    stem: str
    num_bytes: int
    used_at: float


class CacheFolder:
    """A folder of at most `limit_bytes`, shared by processes and threads.

    Opening it removes what killed processes left and counts what is there.

    Raises:
        CacheFolderError: if it cannot be written.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self.evicted = 0
        self._ledger = _Ledger(path)
        with folder_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self.recount()

    def recount(self) -> int:
        """Remove leftovers, count all files anew and return the sum in bytes."""
        with self._ledger.lock():
            used = 0
            for entry in self._files():
                if not entry.name.endswith(PARTIAL) or not _remove_leftover(entry.path):
                    with contextlib.suppress(FileNotFoundError):
                        used += os.stat(entry.path).st_size
            self._ledger.write(used)
        return used

    def used_bytes(self) -> int:
        """Return the ledger's sum."""
        with self._ledger.lock():
            return self._used()

    def reserve(self, num_bytes: int, victims: list[Unit], make: Callable[[], None]) -> bool:
        """Count `num_bytes` more, removing units from the front of `victims` as need be.

        Args:
            num_bytes: Size of the file in the making.
            victims: What may go, in this order; those looked at are taken off the list.
            make: Gives the file its full size, so that whoever counts sees it.

        Returns:
            Whether there was room.
        """
        with self._ledger.lock(), folder_errors(self.path):
            used = self._used()
            while used + num_bytes > self.limit_bytes and victims:
                used -= self._evict(victims.pop(0))
            fits = used + num_bytes <= self.limit_bytes
            if fits:
                used += num_bytes
                self.peak_bytes = max(self.peak_bytes, used)
            # Counted before it is there: killed in between, the ledger says too much until the
            # next start, never too little.
            self._ledger.write(used)
            if fits:
                try:
                    make()
                except BaseException:
                    self._ledger.write(used - num_bytes)
                    raise
        return fits

    def finish(self, path: Path) -> None:
        """Give a file in the making its name; whoever counts sees it once, before or after."""
        with self._ledger.lock(), folder_errors(self.path):
            os.replace(f"{path}{PARTIAL}", path)

    def empty(self, file: int, path: Path | None = None) -> None:
        """Take an unfinished file of this process, or one left by a killed one, off the sum.

        Args:
            file: Its descriptor; the file is emptied.
            path: What it would have become, to remove it altogether.
        """
        with self._ledger.lock(), folder_errors(self.path):
            num_bytes = os.fstat(file).st_size
            if num_bytes:
                os.ftruncate(file, 0)
                self._ledger.write(self._used() - num_bytes)
            if path is not None:
                os.unlink(f"{path}{PARTIAL}")

    def discard(self, path: Path) -> None:
        """Remove a finished file that proved wrong, unless somebody reads it."""
        match = _UNIT.match(str(path))
        assert match
        with self._ledger.lock(), folder_errors(self.path):
            self._ledger.write(self._used() - self._evict(Unit(match[1], 0, 0.0)))

    def units(self) -> list[Unit]:
        """Return what is there of each shard of each data set."""
        sizes: dict[str, int] = {}
        times: dict[str, float] = {}
        for entry in self._files():
            match = _UNIT.match(entry.path)
            if match:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    stem = match[1]
                    sizes[stem] = sizes.get(stem, 0) + status.st_size
                    times[stem] = max(times.get(stem, 0.0), status.st_mtime)
        return [Unit(stem, size, times[stem]) for stem, size in sizes.items()]

    def pinned_bytes(self) -> int:
        """Return the bytes of the units that somebody reads at this moment."""
        total = 0
        with self._ledger.lock():
            for unit in self.units():
                with contextlib.ExitStack() as locks:
                    if not _lock_unit(unit.stem, locks):
                        total += unit.num_bytes
        return total

    def _evict(self, unit: Unit) -> int:
        """Remove a unit nobody reads; return the bytes won. The caller holds the node's lock."""
        won = 0
        with contextlib.ExitStack() as locks:
            if not _lock_unit(unit.stem, locks):
                return 0
            for suffix in (".tar", ".idx", ".crc"):
                with contextlib.suppress(FileNotFoundError):
                    size = os.stat(unit.stem + suffix).st_size
                    os.unlink(unit.stem + suffix)
                    won += size
        self.evicted += 1 if won else 0
        return won

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Yield the files in the data sets' folders; what else lies beside these is not ours."""
        folders = [
            entry.path
            for entry in os.scandir(self.path)
            if _MIRROR.match(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
        while folders:
            with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        yield entry

    def _used(self) -> int:
        used = self._ledger.read()
        if used is None:  # somebody emptied the folder under us; what lies there is the truth
            used = sum(entry.stat().st_size for entry in self._files())
        return used


class _Ledger:
    """The bytes in a cache folder, as a number in a file; read and written under its lock."""

    def __init__(self, folder: Path) -> None:
        self._lock_path = folder / ".lock"
        self._path = folder / ".ledger"

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self._lock_path)

    def read(self) -> int | None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(self._path.read_bytes())
        return None

    def write(self, used: int) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(file, b"%020d\n" % max(used, 0), 0)
        finally:
            os.close(file)


def count_metadata(folder: Path, num_bytes: int) -> None:
    """Add a data set's descriptions to the sum of a cache folder, if it has one already.

    Descriptions wait for no room; the next shard that enters makes room for them.
    """
    ledger = _Ledger(folder)
    with ledger.lock():
        used = ledger.read()
        if used is not None:
            ledger.write(used + num_bytes)


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make a file that appears when it is whole."""
    while (file := lock_partial(path)) is None:
        time.sleep(0.01)
    with os.fdopen(file, "r+b") as partial:
        try:
            os.ftruncate(file, 0)
            write(partial)
            partial.flush()
            os.replace(f"{path}{PARTIAL}", path)
        except BaseException:
            os.unlink(f"{path}{PARTIAL}")
            raise


def lock_partial(path: Path) -> int | None:
    """Open and lock the file in which `path` is made; None if somebody is making it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"{path}{PARTIAL}"
    while True:
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, name):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its maker finished or gave up between our two calls


def pin(path: Path) -> int | None:
    """Open a finished file so that nobody removes it until it is closed; None if there is none."""
    while True:
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_at(file, str(path)):
                with contextlib.suppress(PermissionError):  # it may be another user's
                    os.utime(file)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def unpin(file: int) -> None:
    """Let go of a pinned file without closing it: whoever still reads from it can go on."""
    fcntl.flock(file, fcntl.LOCK_UN)


def allocate(file: int, num_bytes: int) -> None:
    """Take the disk space of a file that has its size already, where the file system can."""
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _lock_unit(stem: str, locks: contextlib.ExitStack) -> bool:
    """Lock a shard's files for removal; False if somebody reads one, or makes the tar to them."""
    if os.path.exists(f"{stem}.tar{PARTIAL}"):
        return False
    for suffix in _PINNED:
        try:
            file = os.open(stem + suffix, os.O_RDWR)
        except FileNotFoundError:
            continue
        except PermissionError:  # another user's, who shares the folder
            return False
        locks.callback(os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _remove_leftover(path: str) -> bool:
    """Remove a partial file whose maker is dead; False if it lives."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _is_at(file: int, path: str) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    status = os.fstat(file)
    return (status.st_dev, status.st_ino) == (there.st_dev, there.st_ino)
