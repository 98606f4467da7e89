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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mbv3dist.data.index import INDEX_VERSION, format_key

BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample's bytes wait: the picture in its own file or, with the target, in a spool.

    Attributes:
        spool: Number of the spool file that holds the target.
        path: The picture's file, or None if it lies in the spool too.
        picture_offset: Its first byte in the spool.
        picture_size: Bytes.
        target_offset: First byte of the target in the spool.
        target_size: Bytes.
    """

    spool: int
    path: str | None
    picture_offset: int
    picture_size: int
    target_offset: int
    target_size: int

    @property
    def packed_size(self) -> int:
        """Bytes that the sample takes in a tar."""
        return 2 * BLOCK + padded(self.picture_size) + padded(self.target_size)


def padded(size: int) -> int:
    """Return a size rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def cut_shards(entries: Sequence[Entry], shard_bytes: int) -> list[int]:
    """Return the first sample of each shard, then the number of samples.

    Shards hold equal numbers of samples (to one), as few shards as keep them near the size.
    """
    total = sum(entry.packed_size for entry in entries)
    num_shards = min(len(entries), max(1, -(-total // shard_bytes)))
    return [number * len(entries) // num_shards for number in range(num_shards + 1)]


def pack_shard(
    entries: Sequence[Entry], first: int, extension: str, spools: Path, folder: Path, number: int
) -> dict[str, Any]:
    """Write ``NUMBER.tar``, ``.idx`` and ``.crc`` into a folder, each under its name when whole.

    Args:
        entries: The shard's samples, in order.
        first: Pack index of the first.
        extension: ``cls`` or ``json``.
        spools: Folder of the spool files.
        folder: Where the shard goes.
        number: The shard's number.

    Returns:
        {nsamples, filesize, sha256}; also kept as ``NUMBER.done`` beside the shards' folder.

    Raises:
        ValueError: if a picture changed since it was prepared.
    """
    writer = _TarWriter()
    path = folder / f"{number:06d}.tar"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    lines, checksums = [f"{INDEX_VERSION} {len(entries)}"], bytearray()
    with open(temporary, "wb") as file:
        for position, (picture, target) in enumerate(_contents(entries, spools)):
            key = format_key(first + position)
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
    }
    write_file(done_file(folder, number), json.dumps(row).encode("ascii"))
    return row


def done_file(folder: Path, number: int) -> Path:
    """Return the file that says that a shard is whole; it is never published."""
    return folder.parent / f"{number:06d}.done"


def _contents(entries: Sequence[Entry], spools: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield picture and target bytes of each entry."""
    for entry in entries:
        with open(spools / f"{entry.spool:06d}.bin", "rb") as spool:
            spool.seek(entry.target_offset)
            target = spool.read(entry.target_size)
            if entry.path is None:
                spool.seek(entry.picture_offset)
                picture = spool.read(entry.picture_size)
        if entry.path is not None:
            with open(entry.path, "rb") as file:
                picture = file.read()
        if len(picture) != entry.picture_size or len(target) != entry.target_size:
            raise ValueError(
                f"{entry.path or spools} changed while it was converted; start the conversion again"
            )
        yield picture, target


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


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
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
