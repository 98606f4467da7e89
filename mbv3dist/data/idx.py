"""A shard's ``.idx``: where the members of each sample lie in its tar (DALI's wds2idx, v1.2).

The first line is ``v1.2 COUNT``; then a line per sample with four fields for each of its two
members: extension, offset of the data, size, name. Only NumPy is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbv3dist.data.files import UnusableFileError, read_bounded

MAX_IDX_BYTES = 256 << 20  # some three million samples; shards have thousands
PICTURE_EXTENSIONS = {"jpeg": "jpg", "raw": "npy"}
RAW_PREFIX = b"\x93NUMPY"  # how a raw picture member begins
TARGET_EXTENSIONS = {"detection": "json", "classification": "cls"}
KEY_DIGITS = 9
INDEX_VERSION = "v1.2"
_FIELDS = 8  # of a line
_PICTURES = (b"jpg", b"npy")
_TARGETS = (b"cls", b"json", b"")  # "" where there is no sample


class DamagedShardError(ValueError):
    """A shard, its index or one of its samples is not what the data set says it is."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A parsed ``.idx``: where the two members of each sample lie in the tar, in bytes.

    Attributes:
        image_offset: int64 [num_samples], first byte of the picture's data.
        image_size: int64 [num_samples].
        target_offset: int64 [num_samples], first byte of the target's data.
        target_size: int64 [num_samples].
        image_ext: ``jpg``, or ``npy`` for raw pixels.
        target_ext: ``cls`` or ``json``.
        first_key: Key of the first sample as a number; the others follow it without gaps.
    """

    image_offset: np.ndarray
    image_size: np.ndarray
    target_offset: np.ndarray
    target_size: np.ndarray
    image_ext: str
    target_ext: str
    first_key: int

    def __len__(self) -> int:
        return len(self.image_offset)


def format_key(key: int) -> str:
    """Return a key as it stands in names: 9 digits, more if it needs them."""
    return f"{key:0{KEY_DIGITS}d}"


def read_idx(path: str | Path) -> ShardIndex:
    """Parse a shard's ``.idx``.

    Raises:
        DamagedShardError: if the file is missing or is no such index.
    """
    path = Path(path)
    try:
        data = read_bounded(path, MAX_IDX_BYTES)
    except UnusableFileError as error:
        raise _bad(path, str(error)) from error
    except FileNotFoundError as error:
        raise DamagedShardError(
            f"{path} is missing; copy the data set again or convert again with --overwrite"
        ) from error
    return parse_idx(data, path)


def parse_idx(data: bytes, path: Path) -> ShardIndex:
    """Parse the bytes of an ``.idx``; `path` is for messages, errors as in ``read_idx``."""
    header, _, rest = data.partition(b"\n")
    words = header.split(b" ")
    if len(words) != 2 or words[0] != INDEX_VERSION.encode() or not words[1].isdigit():
        shown = header[:40].decode("ascii", "backslashreplace")
        raise _bad(path, f"its first line is {shown!r}, not '{INDEX_VERSION} COUNT'")
    fields = rest.split()
    count = len(fields) // _FIELDS
    # Compared as text: a number of many thousand digits must not be worked out.
    if words[1].lstrip(b"0") != str(count).encode().lstrip(b"0") or rest.count(b"\n") != count:
        shown = words[1][:20].decode("ascii")
        lines = rest.count(b"\n")
        raise _bad(path, f"it has {lines} whole lines for {shown} samples")
    if len(fields) != count * _FIELDS or (rest and not rest.endswith(b"\n")):
        raise _bad(path, "a line does not list two members")
    return _build(fields, count, path)


def _build(fields: list[bytes], count: int, path: Path) -> ShardIndex:
    """Make the index of the fields of all lines, one behind the other."""
    image_ext, target_ext = fields[0:1] or [b"jpg"], fields[4:5] or [b""]
    for column, expected in ((0, image_ext[0]), (4, target_ext[0])):
        found = fields[column::_FIELDS]
        if found.count(expected) != count:
            line = next(n for n, extension in enumerate(found) if extension != expected) + 2
            raise _bad(path, f"line {line} does not list two members")
    if image_ext[0] not in _PICTURES or target_ext[0] not in _TARGETS:
        raise _bad(path, "it lists other members than .jpg or .npy and .cls or .json")
    # One number of a million digits would make a column of millions.
    if (
        max((len(word) for column in (1, 2, 5, 6) for word in fields[column::_FIELDS]), default=0)
        > 18
    ):
        raise _bad(path, "an offset or size is too large")
    try:
        columns = [
            np.array(fields[column::_FIELDS], dtype="S").astype(np.int64) for column in (1, 2, 5, 6)
        ]
    except (ValueError, OverflowError) as error:
        raise _bad(path, "an offset or size is no number") from error
    first = fields[3].partition(b".")[0] if fields else b"0"
    if not first.isdigit() or len(first) > 18:
        raise _bad(path, f"it names {fields[3][:40].decode('ascii', 'backslashreplace')!r}")
    first_key = int(first)
    for column, extension in ((3, image_ext[0]), (7, target_ext[0])):
        suffix = "." + extension.decode()
        names = [(format_key(first_key + n) + suffix).encode() for n in range(count)]
        found = fields[column::_FIELDS]
        if found != names:
            place = next(n for n in range(count) if found[n] != names[n])
            shown = found[place][:40].decode("ascii", "backslashreplace")
            raise _bad(path, f"it names {shown!r} where {names[place].decode()} belongs")
    image_offset, image_size, target_offset, target_size = columns
    return ShardIndex(
        image_offset,
        image_size,
        target_offset,
        target_size,
        image_ext=image_ext[0].decode(),
        target_ext=target_ext[0].decode(),
        first_key=first_key,
    )


def _bad(path: Path, reason: str) -> DamagedShardError:
    return DamagedShardError(
        f"{path}: {reason}; copy the data set again or convert again with --overwrite"
    )
