"""Packs prepared samples into one shard: the tar, its ``.idx`` and its ``.crc``.

Tars are ustar with nothing that differs from run to run (time 0, owner 0, mode 0644, no PAX
headers), members ``KEY.jpg`` and ``KEY.cls`` or ``KEY.json``. The ``.idx`` is what DALI's
wds2idx v1.2 writes for them; the ``.crc`` holds a little-endian uint32 per member.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mbv3dist.convert.files import UnusableFileError, read_bounded
from mbv3dist.data.idx import INDEX_VERSION, format_key

BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample's bytes wait: the picture in its own file or, with the target, in a spool.

    Attributes:
        key: Its key, as a number.
        spool: Number of the spool file that holds the target.
        path: The picture's file, or None if it lies in the spool too.
        picture_offset: Its first byte in the spool.
        picture_size: Bytes.
        picture_crc: Their CRC-32.
        target_offset: First byte of the target in the spool.
        target_size: Bytes.
    """

    key: int
    spool: int
    path: str | None
    picture_offset: int
    picture_size: int
    picture_crc: int
    target_offset: int
    target_size: int


def padded(size: int) -> int:
    """Return a size rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def cut_shards(picture_sizes: np.ndarray, target_sizes: np.ndarray, shard_bytes: int) -> list[int]:
    """Return the first sample of each shard, then the number of samples.

    Shards hold equal numbers of samples (to one), as few shards as keep them near the size.

    Args:
        picture_sizes: int64 [n], bytes.
        target_sizes: int64 [n], bytes.
        shard_bytes: Size that a tar is kept near.
    """
    count = len(picture_sizes)
    if not count:
        return [0]
    blocks = 2 * count + sum(
        int((-(-sizes // BLOCK)).sum()) for sizes in (picture_sizes, target_sizes)
    )
    num_shards = min(count, max(1, -(-blocks * BLOCK // shard_bytes)))
    return [number * count // num_shards for number in range(num_shards + 1)]


def pack_shard(
    entries: Sequence[Entry], extension: str, spools: Path, folder: Path, number: int
) -> dict[str, Any]:
    """Write ``NUMBER.tar``, ``.idx`` and ``.crc`` into a folder, each under its name when whole.

    Args:
        entries: The shard's samples, in order, their keys without gaps.
        extension: ``cls`` or ``json``.
        spools: Folder of the spool files.
        folder: Where the shard goes.
        number: The shard's number.

    Returns:
        {nsamples, filesize, sha256, first_key}; also kept as ``NUMBER.done`` beside the shards'
        folder.

    Raises:
        ValueError: if a picture changed since it was prepared.
    """
    writer = _TarWriter()
    path = folder / f"{number:06d}.tar"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    lines, checksums = [f"{INDEX_VERSION} {len(entries)}"], bytearray()
    with open(temporary, "wb") as file:
        for entry in entries:
            picture, target = _contents(entry, spools)
            key = format_key(entry.key)
            parts = []
            for suffix, data in (("jpg", picture), (extension, target)):
                name = f"{key}.{suffix}"
                offset = writer.add(file, name, data)
                parts.append(f"{suffix} {offset} {len(data)} {name}")
                checksums += zlib.crc32(data).to_bytes(4, "little")
            lines.append(" ".join(parts))
        writer.finish(file)
        _sync(file)
    os.replace(temporary, path)
    write_file(path.with_suffix(".idx"), ("\n".join(lines) + "\n").encode("ascii"))
    write_file(path.with_suffix(".crc"), bytes(checksums))
    row = {
        "nsamples": len(entries),
        "filesize": writer.position,
        "sha256": writer.digest.hexdigest(),
        "first_key": entries[0].key,
    }
    write_file(done_file(folder, number), json.dumps(row).encode("ascii"))
    return row


def done_file(folder: Path, number: int) -> Path:
    """Return the file that says that a shard is whole; it is never published."""
    return folder.parent / f"{number:06d}.done"


def _contents(entry: Entry, spools: Path) -> tuple[bytes, bytes]:
    """Return picture and target bytes of an entry."""
    with open(spools / f"{entry.spool:06d}.bin", "rb") as spool:
        spool.seek(entry.target_offset)
        target = spool.read(entry.target_size)
        if entry.path is None:
            spool.seek(entry.picture_offset)
            picture = spool.read(entry.picture_size)
    if entry.path is not None:
        try:
            picture = read_bounded(entry.path, entry.picture_size)
        except UnusableFileError:
            picture = b""  # it has grown, or is no file any more
    if zlib.crc32(picture) != entry.picture_crc or len(target) != entry.target_size:
        raise ValueError(
            f"{entry.path or spools} changed while it was converted; start the conversion again"
        )
    return picture, target


class _TarWriter:
    """Appends members to a tar and keeps its length and digest."""

    def __init__(self) -> None:
        self.position = 0
        self.digest = hashlib.sha256()

    def add(self, file: BinaryIO, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        info = tarfile.TarInfo(name)  # its defaults: mode 0644, owner 0, no names, time 0
        info.size = len(data)
        header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
        assert len(header) == BLOCK
        self._write(file, header)
        offset = self.position
        self._write(file, data)
        self._write(file, bytes(padded(len(data)) - len(data)))
        return offset

    def finish(self, file: BinaryIO) -> None:
        """Append the end mark, filled up to a whole record as tar does."""
        end = self.position + 2 * BLOCK
        self._write(file, bytes(-(-end // RECORD) * RECORD - self.position))

    def _write(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self.digest.update(data)
        self.position += len(data)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, in one piece or piece by piece, so that it is never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            _sync(file)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system lets us."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
