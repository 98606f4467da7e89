"""Packs prepared samples into one shard: the tar, its ``.idx`` and its ``.crc``.

Tars are ustar with nothing that differs from run to run (time 0, owner 0, mode 0644, no PAX
headers), members ``KEY.jpg`` (or ``KEY.npy``) and ``KEY.cls`` or ``KEY.json``. The ``.idx`` is what
DALI's wds2idx v1.2 writes for them; the ``.crc`` holds a little-endian uint32 per member.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mbv3dist.convert.files import UnusableFileError, fill, open_regular, open_sized
from mbv3dist.convert.pictures import load_picture, picture_problem
from mbv3dist.convert.structure import scan_is_whole
from mbv3dist.data.formats import PictureError
from mbv3dist.data.idx import INDEX_VERSION, format_key

BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE
_BUFFER_BYTES = 1 << 20
_MAX_OPEN = 64  # spool files
_NAME_BYTES = 100
_BLANK = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")  # its size is 0
# What the name, the size and the checksum, which counts as blanks, add comes on top.
_BLANK_SUM = sum(_BLANK[:124]) + sum(_BLANK[135:148]) + 8 * ord(" ") + sum(_BLANK[156:])


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample's bytes wait: the picture in its own file or, with the target, in a spool.

    Attributes:
        key: Its key, as a number.
        spool: Number of the spool file that holds the target.
        path: The picture's file, or None if it lies in the spool too.
        picture_offset: Its first byte in the spool.
        picture_size: Bytes.
        picture_crc: Their CRC-32, or that of the header alone.
        target_offset: First byte of the target in the spool.
        target_size: Bytes.
        scan: Bytes of that header, where the rest has not been looked at; else 0.
        has_restarts: Whether restart markers may stand in that rest.
    """

    key: int
    spool: int
    path: str | None
    picture_offset: int
    picture_size: int
    picture_crc: int
    target_offset: int
    target_size: int
    scan: int = 0
    has_restarts: bool = False


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
    entries: Sequence[Entry], extensions: tuple[str, str], spools: Path, folder: Path, number: int
) -> dict[str, Any]:
    """Write ``NUMBER.tar``, ``.idx`` and ``.crc`` into a folder, each under its name when whole.

    Args:
        entries: The shard's samples, in order, their keys without gaps.
        extensions: Of the picture, ``jpg`` or ``npy``, and of the target, ``cls`` or ``json``.
        spools: Folder of the spool files.
        folder: Where the shard goes.
        number: The shard's number.

    Returns:
        {nsamples, filesize, sha256, first_key}; also kept as ``NUMBER.done`` beside the shards'
        folder. If pictures turn out to be bad: {late: [[position of the entry, reason], ...]}, and
        there is no shard.

    Raises:
        ValueError: if a picture changed since it was prepared.
    """
    path = folder / f"{number:06d}.tar"
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    lines, checksums = [f"{INDEX_VERSION} {len(entries)}"], bytearray()
    late: list[tuple[int, str]] = []
    with open(temporary, "wb", buffering=0) as file, _Spools(spools) as spool_files:
        tar = TarWriter(file)
        for position, entry in enumerate(entries):
            key = format_key(entry.key)
            names = [f"{key}.{extension}" for extension in extensions]
            offset, room = tar.add(names[0], entry.picture_size)
            try:
                checksums += _read_picture(entry, spool_files, room).to_bytes(4, "little")
            except (PictureError, OSError) as error:
                if not entry.scan:
                    raise
                late.append((position, picture_problem(error)))
                continue
            target_offset, room = tar.add(names[1], entry.target_size)
            if not spool_files.read(entry.spool, entry.target_offset, room):
                raise _changed(spools)
            checksums += zlib.crc32(room).to_bytes(4, "little")
            lines.append(
                f"{extensions[0]} {offset} {entry.picture_size} {names[0]} "
                f"{extensions[1]} {target_offset} {entry.target_size} {names[1]}"
            )
        if not late:
            tar.finish()
            _sync(file)
    if late:
        temporary.unlink()
        return {"late": late}
    os.replace(temporary, path)
    write_file(path.with_suffix(".idx"), ("\n".join(lines) + "\n").encode("ascii"))
    write_file(path.with_suffix(".crc"), bytes(checksums))
    row = {
        "nsamples": len(entries),
        "filesize": tar.position,
        "sha256": tar.digest.hexdigest(),
        "first_key": entries[0].key,
    }
    write_file(done_file(folder, number), json.dumps(row).encode("ascii"))
    return row


def check_entries(entries: Sequence[Entry]) -> list[tuple[int, str]]:
    """Read the pictures of which only headers have been looked at.

    Returns:
        The bad ones: [(position of the entry, reason), ...].
    """
    late = []
    for position, entry in enumerate(entries):
        if entry.scan:
            try:
                _read_picture(entry, _Spools(Path()), memoryview(bytearray(entry.picture_size)))
            except (PictureError, OSError) as error:
                late.append((position, picture_problem(error)))
    return late


def done_file(folder: Path, number: int) -> Path:
    """Return the file that says that a shard is whole; it is never published."""
    return folder.parent / f"{number:06d}.done"


def _read_picture(entry: Entry, spools: _Spools, room: memoryview) -> int:
    """Read an entry's picture to where it goes; return its CRC-32.

    Raises:
        PictureError: if it is bad, of which only the header has been looked at before.
        ValueError: if it is not what it was.
    """
    if entry.path is None:
        is_there = spools.read(entry.spool, entry.picture_offset, room)
    else:
        try:
            file, num_bytes = open_sized(entry.path)
        except UnusableFileError as error:
            raise _changed(entry.path) from error
        try:
            is_there = num_bytes == len(room) and fill(file, 0, room)
        finally:
            os.close(file)
    checksum = zlib.crc32(room)
    known = zlib.crc32(room[: entry.scan]) if entry.scan else checksum
    if not is_there or known != entry.picture_crc:
        raise _changed(entry.path or spools.folder)
    if entry.scan and not scan_is_whole(room, entry.scan, has_restarts=entry.has_restarts):
        load_picture(bytes(room))  # decoding tells
    return checksum


def _changed(what: str | Path) -> ValueError:
    return ValueError(f"{what} changed while it was converted; start the conversion again")


class _Spools:
    """The spool files of a folder, of which those used last are kept open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, room: memoryview) -> bool:
        """Fill the room from an offset of a spool on; return whether there was enough."""
        file = self._files.get(number)
        if file is None:
            file = self._files[number] = open_regular(self.folder / f"{number:06d}.bin")
            if len(self._files) > _MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(number)
        return fill(file, offset, room)

    def __enter__(self) -> _Spools:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            os.close(file)


class TarWriter:
    """Appends members to a tar through one buffer, in which files are read, checked and hashed.

    Writing pieces of a megabyte out of memory that stays in use is several times faster than
    what tarfile does: allocating, copying and writing for each member.

    Attributes:
        position: Bytes so far, also those that wait in the buffer.
        digest: SHA-256 of what was written.
    """

    def __init__(self, file: BinaryIO | FileIO) -> None:
        self.position = 0
        self.digest = hashlib.sha256()
        self._file = file
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._used = 0

    def add(self, name: str, size: int) -> tuple[int, memoryview]:
        """Append a member; return the offset of its data in the tar, and where to put the data.

        The data must be there before the next call.
        """
        total = BLOCK + padded(size)
        if self._used + total > len(self._buffer):
            self._flush()
            if total > len(self._buffer):
                self._buffer = memoryview(bytearray(total))
        start = self._used + BLOCK
        self._buffer[self._used : start] = tar_header(name, size)
        self._used += total
        self._buffer[start + size : self._used] = bytes(total - BLOCK - size)
        self.position += total
        return self.position - total + BLOCK, self._buffer[start : start + size]

    def finish(self) -> None:
        """Append the end mark, filled up to a whole record as tar does."""
        self._flush()
        size = -(-(self.position + 2 * BLOCK) // RECORD) * RECORD - self.position
        self._buffer[:size] = bytes(size)
        self._used = size
        self.position += size
        self._flush()

    def _flush(self) -> None:
        data = self._buffer[: self._used]
        self.digest.update(data)
        while data:
            data = data[self._file.write(data) :]
        self._used = 0


def tar_header(name: str, size: int) -> bytes:
    """Return a member's ustar header: mode 0644, owner 0, no names, time 0."""
    label, octal = name.encode("ascii"), b"%011o" % size
    assert len(label) <= _NAME_BYTES and len(octal) == 11
    checksum = _BLANK_SUM + sum(label) + sum(octal)
    parts = (
        label.ljust(_NAME_BYTES, b"\0"),
        _BLANK[_NAME_BYTES:124],
        octal,
        _BLANK[135:148],
        b"%06o\0 " % checksum,
        _BLANK[156:],
    )
    return b"".join(parts)


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


def _sync(file: BinaryIO | FileIO) -> None:
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
