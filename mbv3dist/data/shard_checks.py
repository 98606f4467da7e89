"""What is wrong with a shard: its index, a member's header, its file of checksums."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mbv3dist.data.files import UnusableFileError, read_bounded
from mbv3dist.data.idx import (
    PICTURE_EXTENSIONS,
    TARGET_EXTENSIONS,
    DamagedShardError,
    ShardIndex,
    format_key,
)
from mbv3dist.data.index import Split

BLOCK = 512  # bytes of a tar header; members are padded to whole ones


def header_problem(header: bytes, name: bytes, size: int) -> str:
    """Return why a tar header is not that of the named member."""
    expected = name.decode("ascii")
    found = header[:100].rstrip(b"\0")
    if found != name:
        shown = found[:40].decode("ascii", "backslashreplace")
        return f"index and tar disagree: {expected} expected, {shown!r} found"
    try:
        stored = int(header[124:135], 8)
    except ValueError:
        return f"the tar header of {expected} is damaged"
    return f"index and tar disagree: {expected} has {stored} bytes in the tar, {size} in the index"


def index_problem(split: Split, number: int, index: ShardIndex) -> str:
    """Return why an index cannot be that of the shard, or an empty string."""
    shard = split.shards[number]
    if len(index) != shard.num_samples:
        return f"lists {len(index)} samples instead of {shard.num_samples}"
    if (
        index.image_ext not in PICTURE_EXTENSIONS.values()
        or index.target_ext != TARGET_EXTENSIONS[split.task]
    ):
        return f"lists .{index.image_ext} and .{index.target_ext} members"
    if len(index) and index.first_key != shard.first_key:
        return (
            f"starts with sample {format_key(index.first_key)}, not {format_key(shard.first_key)}"
        )
    for size in (index.image_size, index.target_size):
        if np.any((size < 0) | (size > shard.num_bytes)):
            return "has an impossible size"
    # Members follow each other, headers and padding between: no sample can reach into another.
    image_end = index.image_offset + -(-index.image_size // BLOCK) * BLOCK
    target_end = index.target_offset + -(-index.target_size // BLOCK) * BLOCK
    starts = np.concatenate((np.zeros(1, np.int64), target_end[:-1]))
    wrong = (index.image_offset != starts + BLOCK) | (index.target_offset != image_end + BLOCK)
    if wrong.any():
        place = int(np.argmax(wrong))
        return f"and the tar disagree from sample {format_key(index.first_key + place)} on"
    if len(index) and int(target_end[-1]) > shard.num_bytes:
        return "points outside the tar"
    return ""


def read_checksums(path: Path, num_samples: int) -> np.ndarray:
    """Return the checksums of a shard's members, uint32 [2N].

    Raises:
        DamagedShardError: The file is missing or is no such file.
    """
    try:
        data = read_bounded(path, 8 * num_samples + 8)
    except FileNotFoundError as error:
        raise DamagedShardError(f"{path} is missing; copy the data set again") from error
    except UnusableFileError as error:
        raise DamagedShardError(f"{path}: {error}; copy the data set again") from error
    if len(data) != 8 * num_samples:
        raise DamagedShardError(
            f"{path} has {len(data)} bytes instead of {8 * num_samples}; copy the data set again"
        )
    return np.frombuffer(data, dtype="<u4")
