"""Locks between processes, of one machine or of several that share a file system.

A lock is held on an open file, so the system lets go of it when its process dies.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock that a file stands for.

    Args:
        path: The file, made if needed; the last that holds it takes it away.
        shared: Let others that ask for it shared hold it as well.
        wait: Wait for those that hold it.

    Raises:
        ValueError: if another process holds it and ``wait`` is not set.
        OSError: if the file system has no locks.
    """
    if os.name != "posix":
        yield
        return
    handle = _acquire(path, shared, wait)
    try:
        yield
    finally:
        _release(handle, path, shared)


def _release(handle: int, path: Path, shared: bool) -> None:
    import fcntl

    try:
        if shared:  # taken away only by who holds the lock alone
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


def _acquire(path: Path, shared: bool, wait: bool) -> int:
    import fcntl

    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        # Open for writing: network file systems grant no exclusive lock otherwise.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, kind)
            # Whoever held it may have taken the file away: then this is a lock on nothing.
            if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(
                f"another conversion is writing to {path.parent} (it holds {path.name}); wait "
                "until it ends"
            ) from error
        except FileNotFoundError:
            pass  # taken away between the two calls
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                raise OSError(
                    f"the file system of {path.parent} cannot lock files "
                    f"({os.strerror(error.errno)}); convert to another folder and copy the result"
                ) from error
            raise
        os.close(handle)
