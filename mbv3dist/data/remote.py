"""Data sets behind http(s), s3, gs and hf URLs: what is asked of a server, and asked again.

fsspec and its backends do the talking and are imported when a URL is used. Everything is read in
ranges of at most `PART_BYTES`, so that a cut connection costs one part and never a whole shard.
Messages never hold credentials: each goes through `redact`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mbv3dist.data import network_errors
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.network_errors import EndedError, RemoteError, ShortBodyError
from mbv3dist.data.urls import (
    SCHEMES,
    check_url,
    default_cache_dir,
    is_url,
    join_url,
    mirror_folder,
    redact,
    split_credentials,
    to_local,
)

__all__ = [
    "SCHEMES",
    "Remote",
    "RemoteCounts",
    "RemoteError",
    "check_url",
    "default_cache_dir",
    "fetch_metadata",
    "is_url",
    "mirror_folder",
    "redact",
    "to_local",
]

PART_BYTES = 8 << 20
_MAX_PAUSE_S = 20.0
_ARRIVALS = 3  # times a file with a wrong checksum is fetched before it counts as damaged
_PACKAGES = {"http": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_VERSION_KEYS = ("etag", "ETag", "generation", "md5Hash", "blob_id", "Content-MD5", "Digest")
_TIME_KEYS = ("Last-Modified", "LastModified", "last_modified", "mtime", "updated")
_Value = TypeVar("_Value")


@dataclass
class RemoteCounts:
    """What was asked of the server."""

    requests: int = 0
    retries: int = 0
    bytes_downloaded: int = 0


class Remote:
    """One data set URL; safe to share between threads, and usable on both sides of a fork.

    Args:
        url: The data set; its files are named relative to it.
        retries: How often a request is repeated after connection errors, timeouts, cut bodies and
            answers 408, 425, 429 and 5xx.
        timeout_s: Longest time to wait for a connection or for the next bytes.
        backoff_s: Longest pause before the first retry; it doubles with each one.

    Raises:
        ValueError: for a URL that `check_url` refuses.
    """

    def __init__(
        self, url: str, *, retries: int = 6, timeout_s: float = 60.0, backoff_s: float = 0.5
    ) -> None:
        self.url = check_url(url)
        self.counts = RemoteCounts()
        # Handed over apart from the URL, credentials are in nothing that a backend says or logs.
        self._base, self._credentials, self._query = split_credentials(self.url)
        scheme = self.url.partition(":")[0]
        self._scheme = {"https": "http", "gcs": "gs"}.get(scheme, scheme)
        self._retries = retries
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._lock = threading.Lock()
        self._filesystem: tuple[int, Any] | None = None  # of this process id
        self._stopped = threading.Event()
        self._random = random.Random()  # not the module's: the user may have seeded that

    def shown(self, path: str) -> str:
        """Return a file's URL for messages."""
        return redact(join_url(self._base, path))

    def stop(self) -> None:
        """Make requests that wait for their next try, and all later ones, fail at once."""
        self._stopped.set()

    def info(self, path: str) -> dict[str, Any]:
        """Return ``size`` (or None) and whatever the server gives to tell versions apart.

        Raises:
            FileNotFoundError: if there is no such file.
            RemoteError: if the server cannot be asked.
        """
        value = self._ask(path, "read", _fresh_info)
        found = {key: str(value[key]) for key in _VERSION_KEYS + _TIME_KEYS if value.get(key)}
        return {"size": value.get("size"), **found}

    def size(self, path: str) -> int | None:
        """Return a file's size in bytes, or None if the server does not say; errors as `info`."""
        size = self.info(path)["size"]
        return None if size is None else int(size)

    def exists(self, path: str) -> bool:
        """Return whether there is such a file; errors as `info`."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def list(self) -> list[str]:
        """Return the names of the files directly in the data set's folder.

        Raises:
            ValueError: for http, where folders cannot be listed.
            FileNotFoundError, RemoteError: as `info`.
        """
        if self._scheme == "http":
            raise ValueError(
                f"{self.shown('')}: the files of a web server cannot be listed; name the split "
                "with --split"
            )
        rows = self._ask("", "list", lambda fs, url: fs.ls(url, detail=True))
        return sorted(row["name"].rpartition("/")[2] for row in rows if row["type"] == "file")

    def read(self, path: str) -> bytes:
        """Return a whole small file; errors as `info`."""
        data: bytes = self._ask(path, "read", lambda fs, url: fs.cat_file(url))
        self._count(bytes_downloaded=len(data))
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a file that is at least as long.

        Raises:
            FileNotFoundError, RemoteError: as `info`; also if the reply is short each time.
        """

        def ask(fs: Any, url: str) -> bytes:
            options = {"cache_type": "none"} if self._scheme == "hf" else {}
            data: bytes = fs.cat_file(url, start=start, end=stop, **options)
            self._count(bytes_downloaded=len(data))
            if len(data) >= stop and len(data) > stop - start:
                return data[start:stop]  # a server without ranges sent the whole file
            if len(data) == stop - start:
                return data
            # Cut on its way, which another try mends, or at its source, which none does?
            self._count(requests=1)
            size = _fresh_info(fs, url).get("size")
            if size is not None and size < stop:
                raise EOFError(f"it ends at byte {size}, before byte {stop}")
            raise ShortBodyError(f"{len(data)} bytes came instead of {stop - start}")

        return self._ask(path, "read", ask) if stop > start else b""

    def download(
        self, path: str, target: Path, *, sha256: str | None, num_bytes: int | None
    ) -> None:
        """Write a file to `target`, which appears when it is whole; errors as `download_to`."""
        partial = target.with_name(f".{target.name}.partial")
        try:
            with open(partial, "wb") as file:
                self.download_to(path, file, sha256=sha256, num_bytes=num_bytes)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def download_to(
        self, path: str, file: BinaryIO, *, sha256: str | None, num_bytes: int | None
    ) -> None:
        """Write a file from the start of an open one; its checksum is computed on the way.

        Raises:
            DamagedShardError: if its size or checksum is wrong each time it is fetched.
            FileNotFoundError, RemoteError: as `info`.
            OSError: if the disk refuses the bytes.
        """
        reason = ""
        for _ in range(_ARRIVALS):
            file.seek(0)
            digest, written = self._stream(path, file, num_bytes)
            if num_bytes is not None and written != num_bytes:
                reason = f"it has {written} bytes instead of {num_bytes}"
            elif sha256 is not None and digest != sha256:
                reason = f"its SHA-256 is {digest[:16]}... instead of {sha256[:16]}..."
            else:
                file.flush()
                return
            self._count(retries=1)
        raise DamagedShardError(
            f"{self.shown(path)}: {reason} ({_ARRIVALS} times); it is damaged or "
            "of another version than the split's description: upload the data set again"
        )

    def upload(self, source: Path, path: str) -> None:
        """Copy a local file to the data set.

        Raises:
            ValueError: for http, where nothing can be written.
            RemoteError: if the server refuses.
        """
        self._check_writable()
        self._ask(path, "write", lambda fs, url: fs.put_file(str(source), url))

    def delete(self, path: str) -> None:
        """Remove a file; errors as `upload`, and FileNotFoundError if there is none."""
        self._check_writable()
        self._ask(path, "delete", lambda fs, url: fs.rm_file(url))

    def _check_writable(self) -> None:
        if self._scheme == "http":
            raise ValueError(
                f"{self.shown('')}: a web server takes no files; write to an s3, gs or hf URL or "
                "to a folder"
            )

    def _stream(self, path: str, file: BinaryIO, num_bytes: int | None) -> tuple[str, int]:
        """Write all parts of a file; return their SHA-256 and their length."""
        size = self.size(path) if num_bytes is None else num_bytes
        digest = hashlib.sha256()
        if size is None:
            data = self.read(path)
            digest.update(data)
            file.write(data)
            return digest.hexdigest(), len(data)
        for start in range(0, size, PART_BYTES):
            try:
                data = self.read_range(path, start, min(start + PART_BYTES, size))
            except EndedError:
                return "", self.size(path) or 0
            digest.update(data)
            file.write(data)
        return digest.hexdigest(), size

    def _ask(self, path: str, verb: str, call: Callable[[Any, str], _Value]) -> _Value:
        """Call with filesystem and URL, repeatedly if need be; all errors are one clean line."""
        url, shown = join_url(self._base, path), self.shown(path)
        filesystem = self._get_filesystem()
        attempt = 0
        while True:
            attempt += 1
            self._count(requests=1)
            try:
                if self._stopped.is_set():
                    raise RemoteError(f"{shown}: reading was stopped")
                return call(filesystem, url)
            except RemoteError:
                raise
            except Exception as error:
                # `from None` here and below: what the backend says may hold credentials.
                if network_errors.is_absent(error):
                    raise FileNotFoundError(f"{shown} does not exist") from None
                reason = network_errors.reason_of(error)
                if not network_errors.is_transient(error) or attempt > self._retries:
                    times = "" if attempt == 1 else f" after {attempt} tries"
                    kind = EndedError if network_errors.has_ended(error) else RemoteError
                    raise kind(
                        f"{shown}: cannot {verb} it{times}: {reason}; check the URL, the "
                        "network and the credentials, then start again"
                    ) from None
            self._count(retries=1)
            pause = min(_MAX_PAUSE_S, self._backoff_s * 2 ** (attempt - 1))
            # Jitter: ranks that failed together must not come back together.
            self._stopped.wait(pause * self._random.uniform(0.5, 1.0))

    def _count(self, **numbers: int) -> None:
        with self._lock:
            for name, number in numbers.items():
                setattr(self.counts, name, getattr(self.counts, name) + number)

    def _get_filesystem(self) -> Any:
        with self._lock:
            # Connections must not be shared with a forked child.
            if self._filesystem is None or self._filesystem[0] != os.getpid():
                self._filesystem = os.getpid(), self._make_filesystem()
            return self._filesystem[1]

    def _make_filesystem(self) -> Any:
        options: dict[str, Any] = {}
        try:
            if self._scheme == "http":
                aiohttp = importlib.import_module("aiohttp")
                wait = self._timeout_s
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=wait, sock_read=wait)
                # Compressed on the way, ranges would be those of other bytes.
                headers = {"Accept-Encoding": "identity"}
                options["client_kwargs"] = {
                    "timeout": timeout,
                    "headers": headers,
                    "trust_env": True,  # HTTPS_PROXY, NO_PROXY, .netrc
                }
                if self._credentials is not None:
                    pair = base64.b64encode(":".join(self._credentials).encode("utf-8"))
                    headers["Authorization"] = f"Basic {pair.decode('ascii')}"
                if self._query:
                    options["params"] = self._query
            elif self._scheme == "s3":
                wait = self._timeout_s
                options["max_concurrency"] = 1  # else each whole file costs a request for its size
                options["config_kwargs"] = {
                    "connect_timeout": wait,
                    "read_timeout": wait,
                    "retries": {"total_max_attempts": 1, "mode": "standard"},  # done here
                }
            fsspec = importlib.import_module("fsspec")
            filesystem = fsspec.filesystem(self._scheme, skip_instance_cache=True, **options)
        except ImportError as error:
            package = _PACKAGES[self._scheme]
            raise ValueError(
                f"{self.shown('')}: reading {self._scheme} URLs needs the package {package} "
                f"({redact(str(error))}); pip install {package}"
            ) from None
        if self._scheme == "s3":
            filesystem.retries = 1
        return filesystem


def _fresh_info(filesystem: Any, url: str) -> dict[str, Any]:
    filesystem.invalidate_cache()
    value: dict[str, Any] = filesystem.info(url)
    if value.get("type") == "directory":
        raise FileNotFoundError(url)
    return value


def fetch_metadata(url: str, names: Sequence[str], mirror: Path) -> None:
    """Bring small files of a data set into its folder in the cache, unless they are there.

    A copy is kept while size and version (ETag, time of change) at the source stay the same. Of the
    processes of a node one fetches and the others wait.

    Raises:
        FileNotFoundError: if the data set has no such file; a copy of an earlier one is removed.
        RemoteError, ValueError: as `Remote`.
        OSError: if the cache folder cannot be used.
    """
    from mbv3dist.data.cache_folder import folder_errors, locked

    remote = Remote(url)
    with folder_errors(mirror.parent):
        mirror.mkdir(parents=True, exist_ok=True)
    with locked(mirror / ".lock"):
        for name in names:
            with folder_errors(mirror.parent):
                _refresh(remote, name, mirror)


def _refresh(remote: Remote, name: str, mirror: Path) -> None:
    from mbv3dist.data.cache_folder import count_metadata, write_file

    path, note = mirror / name, mirror / f".{name}.source"
    before = _size_of(path) + _size_of(note)
    try:
        info = remote.info(name)
    except FileNotFoundError:
        note.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        count_metadata(mirror.parent, -before)
        raise
    if len(info) > 1 and path.is_file() and info["size"] in (None, _size_of(path)):
        with contextlib.suppress(FileNotFoundError, ValueError):
            if json.loads(note.read_bytes()) == info:
                return
    # In this order, a run killed in between fetches again.
    note.unlink(missing_ok=True)
    size = info["size"]
    write_file(path, lambda file: remote.download_to(name, file, sha256=None, num_bytes=size))
    write_file(note, lambda file: file.write(json.dumps(info).encode("utf-8")))
    count_metadata(mirror.parent, _size_of(path) + _size_of(note) - before)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
