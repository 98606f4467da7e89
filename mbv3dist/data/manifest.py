"""``SPLIT.manifest``: the shard table of a large split in binary, opened without parsing text.

``SPLIT.json`` is the truth and the manifest a copy of it, used only if it carries the SHA-256 of
that very file. Layout, little-endian: magic, uint64 length of the header, the header (JSON: that
digest, the number of shards, all of ``SPLIT.json`` but its list), then per shard int64 samples,
int64 bytes, int64 first key, and the tar's SHA-256 in 32 bytes, each column in one piece.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.messages import has_control, shown

MIN_SHARDS = 10_000  # below, parsing SPLIT.json takes some milliseconds and nobody needs a copy
_MAGIC = b"mbv3dist manifest 1\n"
_DIGEST_BYTES = 32
_MAX_URL = 1000  # characters of a shard's place
_MIN_SAMPLE_BYTES = 4 * 512  # two members of a header and a block each


@dataclass(frozen=True, eq=False)
class Table:
    """The shards of a split in columns.

    Attributes:
        num_samples: int64 [S].
        num_bytes: int64 [S], sizes of the tars.
        first_key: int64 [S], key of each shard's first sample as a number.
        digest: uint8 [S, 32], SHA-256 of the tars.
        urls: Places relative to the data set, or None where they are ``SPLIT/000000.tar`` ...
    """

    num_samples: np.ndarray
    num_bytes: np.ndarray
    first_key: np.ndarray
    digest: np.ndarray
    urls: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.num_samples)


def manifest_path(json_path: Path) -> Path:
    """Return where the manifest of a ``SPLIT.json`` lies."""
    return json_path.with_suffix(".manifest")


def regular_url(split: str, number: int) -> str:
    """Return the place that conversion gives a shard."""
    return f"{split}/{number:06d}.tar"


def write_manifest(json_path: Path) -> None:
    """Write the manifest of a finished ``SPLIT.json``, or remove it if the split needs none.

    Raises:
        OSError: if it cannot be written.
    """
    path = manifest_path(json_path)
    data = json_path.read_bytes()
    description: dict[str, Any] = json.loads(data)
    rows = description.pop("shardlist")
    table = table_from_rows(rows, json_path.stem)
    if len(rows) < MIN_SHARDS or table.urls is not None:
        path.unlink(missing_ok=True)
        return
    header = {
        "json_sha256": hashlib.sha256(data).hexdigest(),
        "num_shards": len(rows),
        "description": description,
    }
    text = json.dumps(header).encode("utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            for column in (table.num_samples, table.num_bytes, table.first_key):
                file.write(column.astype("<i8").tobytes())
            file.write(table.digest.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_manifest(json_path: Path) -> tuple[dict[str, Any], Table] | None:
    """Return the description (without ``shardlist``) and the table, or None if there is no copy.

    A manifest of another ``SPLIT.json`` (edited or replaced since), or a cut-off one, counts as
    none: the JSON file is then read instead.
    """
    path = manifest_path(json_path)
    if not path.is_file():  # a pipe of that name would make us wait for ever
        return None
    data = path.read_bytes()
    start = len(_MAGIC) + 8
    length = int.from_bytes(data[start - 8 : start], "little")
    if not data.startswith(_MAGIC) or length > len(data):
        return None
    try:
        header = json.loads(data[start : start + length])
        description, count = header["description"], int(header["num_shards"])
        digest = header["json_sha256"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    at = start + length
    if count < 0 or len(data) != at + count * (24 + _DIGEST_BYTES):
        return None
    with open(json_path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            return None
    columns = np.frombuffer(data, "<i8", 3 * count, at).reshape(3, count).astype(np.int64)
    num_samples, num_bytes, first_key = columns
    digests = np.frombuffer(data, np.uint8, count * _DIGEST_BYTES, at + 24 * count)
    if not isinstance(description, dict) or (columns < 0).any():
        return None
    try:
        _check_numbers(num_samples, num_bytes)
    except ValueError:
        return None
    return description, Table(
        num_samples, num_bytes, first_key, digests.reshape(count, _DIGEST_BYTES), None
    )


def table_from_rows(rows: list[dict[str, Any]], split: str) -> Table:
    """Return the table of a ``shardlist``.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: if a row is none.
    """
    num_samples = np.array([_count(row, "nsamples") for row in rows], dtype=np.int64)
    num_bytes = np.array([_count(row, "filesize") for row in rows], dtype=np.int64)
    _check_numbers(num_samples, num_bytes)
    starts = np.concatenate(([0], np.cumsum(num_samples)))[:-1]
    first_key = np.array(
        [_count(row, "first_key") if "first_key" in row else -1 for row in rows], dtype=np.int64
    )
    # Only data sets converted in parts, with bad input left out, have keys that skip numbers.
    first_key = np.where(first_key < 0, starts, first_key)
    digests = b"".join(_digest(row) for row in rows)
    urls: tuple[str, ...] | None = tuple(_url(row) for row in rows)
    if urls == tuple(regular_url(split, number) for number in range(len(rows))):
        urls = None
    digest = np.frombuffer(digests, np.uint8).reshape(len(rows), _DIGEST_BYTES)
    return Table(num_samples, num_bytes, first_key, digest, urls)


def _check_numbers(num_samples: np.ndarray, num_bytes: np.ndarray) -> None:
    """Refuse more samples than a tar can hold: what is planned for them takes memory."""
    wrong = np.flatnonzero(num_samples > num_bytes // _MIN_SAMPLE_BYTES)
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"nsamples is {num_samples[place]} and filesize {num_bytes[place]} for shard {place}, "
            "too small for so many"
        )
    if num_samples.sum(dtype=np.float64) > 1 << 62:
        raise ValueError("more samples than there can be")


def _count(row: dict[str, Any], key: str) -> int:
    value = row[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} is {shown(value)}, not a count")
    return value


def _digest(row: dict[str, Any]) -> bytes:
    digest = bytes.fromhex(row["sha256"])
    if len(digest) != _DIGEST_BYTES:
        raise ValueError(f"sha256 is {shown(row['sha256'])}")
    return digest


def _url(row: dict[str, Any]) -> str:
    url = row["url"]
    parts = url.split("/")
    strange = ":" in url or "\\" in url or has_control(url) or len(url) > _MAX_URL
    if strange or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"shard {shown(url)} is not a relative path in the data set")
    return str(url)
