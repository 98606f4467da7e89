"""What is in a data set: splits, shards and where each sample's bytes lie.

A data set OUT holds for each split ``SPLIT/000000.tar`` with a ``.idx`` (DALI's v1.2 index) and a
``.crc`` beside it, ``SPLIT.json`` (wids-v1 plus task, classes, ...) and ``SPLIT.sources.tsv``.
Only NumPy and the standard library are needed here.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

TASKS = ("detection", "classification")
TARGET_EXTENSIONS = {"detection": "json", "classification": "cls"}
KEY_DIGITS = 9
INDEX_VERSION = "v1.2"
_REPORT_SUFFIXES = (".report.json", ".failed.json")
_CURE = "make one with `mbv3dist convert voc|imagefolder SRC --out OUT --split NAME`"


class DamagedShardError(ValueError):
    """A shard, its index or one of its samples is not what the data set says it is."""


@dataclass(frozen=True)
class Shard:
    """One tar of a split.

    Attributes:
        path: Where it lies on this machine.
        url: Its place relative to the data set's root, such as ``train/000000.tar``.
        num_samples: Samples in it.
        num_bytes: Size of the tar in bytes.
        sha256: Hex digest of the whole tar.
    """

    path: Path
    url: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """A parsed ``.idx``: where the two members of each sample lie in the tar, in bytes.

    Attributes:
        image_offset: int64 [num_samples], first byte of the picture's data.
        image_size: int64 [num_samples].
        target_offset: int64 [num_samples], first byte of the target's data.
        target_size: int64 [num_samples].
        image_ext: ``jpg``.
        target_ext: ``cls`` or ``json``.
        names: Name of each sample's picture member, such as ``000000123.jpg``.
    """

    image_offset: np.ndarray
    image_size: np.ndarray
    target_offset: np.ndarray
    target_size: np.ndarray
    image_ext: str
    target_ext: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Split:
    """One split of a data set; samples are numbered by their pack index, 0 to ``len - 1``.

    Attributes:
        root: Folder of the data set.
        name: Name of the split.
        task: ``detection`` or ``classification``.
        classes: Names of the foreground classes, numbered from 0.
        shards: The tars, in pack order.
        num_boxes: Boxes in the split (0 for classification).
        fingerprint: SHA-256 hex over task, classes and the shards' digests; free of location.
    """

    root: Path
    name: str
    task: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    num_boxes: int
    fingerprint: str

    def __len__(self) -> int:
        return self._start_list[-1]

    @cached_property
    def starts(self) -> np.ndarray:
        """Pack index of each shard's first sample, then the total: int64 [num_shards + 1]."""
        counts = np.array([0] + [shard.num_samples for shard in self.shards], dtype=np.int64)
        return np.cumsum(counts)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard number and the position in it of a sample.

        Raises:
            ValueError: if there is no such sample.
        """
        self._check_index(index)
        shard = bisect_right(self._start_list, index) - 1
        return shard, int(index) - self._start_list[shard]

    def key(self, index: int) -> str:
        """Return the sample's key, its pack index in 9 digits."""
        self._check_index(index)
        return format_key(index)

    def source(self, index: int) -> str:
        """Return the original path of the picture, relative to the converted folder.

        Raises:
            ValueError: if ``SPLIT.sources.tsv`` is missing or has other samples.
        """
        self._check_index(index)
        data, ends = self._sources
        start = int(ends[index - 1]) + 1 if index else 0
        key, _, source = data[start : int(ends[index])].decode("utf-8").partition("\t")
        if key != format_key(index):
            raise ValueError(
                f"{self.name}.sources.tsv: line {index + 1} has key {key!r} instead of "
                f"{format_key(index)}; copy the data set again or convert again with --overwrite"
            )
        return source

    def sample(self, index: int) -> dict[str, Any]:
        """Return ``{"jpg": bytes, "cls": int}`` or ``{"jpg": bytes, "json": {...}}``.

        For notebooks; training reads through ``Reader``.
        """
        from mbv3dist.data.reader import Reader

        with Reader(self, verify="always") as reader:
            picture, target = reader.read(index)
            value = json.loads(bytes(target))
            return {"jpg": bytes(picture), TARGET_EXTENSIONS[self.task]: value}

    @cached_property
    def _start_list(self) -> list[int]:
        """Starts as plain integers: bisecting these is ten times faster than NumPy's search."""
        return [int(start) for start in self.starts]

    @cached_property
    def _sources(self) -> tuple[bytes, np.ndarray]:
        """Bytes of the sources file and the position of each line's end."""
        path = self.root / f"{self.name}.sources.tsv"
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy the data set again, with all its files")
        data = path.read_bytes()
        ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
        if len(ends) != len(self):
            raise ValueError(
                f"{path} has {len(ends)} lines for {len(self)} samples; copy the data set again"
            )
        return data, ends

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise ValueError(
                f"sample {index} does not exist: split {self.name!r} has samples 0 to "
                f"{len(self) - 1}"
            )


def format_key(index: int) -> str:
    """Return the key of a pack index: 9 digits."""
    return f"{index:0{KEY_DIGITS}d}"


def list_splits(data: str | Path) -> list[str]:
    """Return the names of the finished splits in a data set's folder, sorted.

    Raises:
        ValueError: if the folder does not exist.
    """
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"no data set folder {str(root)!r}; {_CURE}")
    names = []
    for path in sorted(root.glob("*.json")):
        if path.name.startswith(".") or path.name.endswith(_REPORT_SUFFIXES):
            continue
        if (root / path.stem).is_dir() and describes_split(path):
            names.append(path.stem)
    return names


def require_splits(data: str | Path) -> list[str]:
    """Return what ``list_splits`` does.

    Raises:
        ValueError: if the folder does not exist or has no finished split.
    """
    names = list_splits(data)
    if not names:
        raise ValueError(f"no finished split in {str(data)!r}; {_CURE}")
    return names


def describes_split(path: Path) -> bool:
    """Return whether a JSON file is a split's description, or a damaged one, not another's file."""
    if not path.is_file():
        return False
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError:
        # Cut off or zeroed by a crash: whoever opens the split names it. JSON lines are others'.
        return b"wids" in data or not data.strip(b"\0\n ")
    return isinstance(value, dict) and "wids_version" in value


def open_split(data: str | Path, split: str) -> Split:
    """Open one split of a data set.

    Args:
        data: Folder of the data set.
        split: Name of the split, such as ``train``.

    Raises:
        ValueError: if there is no such split or its ``SPLIT.json`` is not one of ours.
    """
    root = Path(data)
    names = require_splits(root)
    if split not in names:
        raise ValueError(
            f"no split {split!r} in {str(root)!r}; it has {', '.join(names)}: name one of these "
            "or convert the missing one"
        )
    path = root / f"{split}.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        return _build_split(root, split, description)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a split description of mbv3dist ({type(error).__name__}: {error}); "
            "copy the data set again or convert again with --overwrite"
        ) from error


def _build_split(root: Path, name: str, description: dict[str, Any]) -> Split:
    if description["wids_version"] != 1:
        raise ValueError(f"wids_version is {description['wids_version']!r}, not 1")
    task = description["task"]
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, not one of {', '.join(TASKS)}")
    shards = []
    for entry in description["shardlist"]:
        url = entry["url"]
        parts = PurePosixPath(url).parts
        if ":" in url or "\\" in url or ".." in parts or parts[:1] == ("/",):
            raise ValueError(f"shard {url!r} is not a relative path in the data set")
        shards.append(
            Shard(
                path=root / url,
                url=url,
                num_samples=_count(entry, "nsamples"),
                num_bytes=_count(entry, "filesize"),
                sha256=str(entry["sha256"]),
            )
        )
    classes = tuple(str(item) for item in description["classes"])
    return Split(
        root=root,
        name=name,
        task=task,
        classes=classes,
        shards=tuple(shards),
        num_boxes=_count(description, "boxes"),
        fingerprint=_fingerprint(task, classes, shards),
    )


def _count(row: dict[str, Any], key: str) -> int:
    value = row[key]
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, not a count")
    return value


def _fingerprint(task: str, classes: tuple[str, ...], shards: list[Shard]) -> str:
    content = json.dumps([task, list(classes), [shard.sha256 for shard in shards]])
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def read_idx(path: str | Path) -> ShardIndex:
    """Parse a shard's ``.idx`` (DALI's wds2idx v1.2, two members per sample).

    Raises:
        DamagedShardError: if the file is missing or is no such index.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="ascii").split("\n")
    except FileNotFoundError as error:
        raise DamagedShardError(
            f"{path} is missing; copy the data set again or convert again with --overwrite"
        ) from error
    except UnicodeDecodeError as error:
        raise _bad_index(path, "it is no ASCII text") from error
    header = lines[0].split(" ")
    if len(header) != 2 or header[0] != INDEX_VERSION or not header[1].isdigit():
        raise _bad_index(path, f"its first line is {lines[0][:40]!r}, not '{INDEX_VERSION} COUNT'")
    num_samples = int(header[1])
    if lines[-1] != "" or len(lines) != num_samples + 2:
        raise _bad_index(path, f"it has {len(lines) - 2} whole lines for {num_samples} samples")
    fields = [line.split(" ") for line in lines[1:-1]]
    for number, row in enumerate(fields):
        if len(row) != 8 or row[0] != fields[0][0] or row[4] != fields[0][4]:
            raise _bad_index(path, f"line {number + 2} does not list two members")
    try:
        table = np.array([(r[1], r[2], r[5], r[6]) for r in fields], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise _bad_index(path, "an offset or size is no number") from error
    table = table.reshape(num_samples, 4)
    return ShardIndex(
        image_offset=table[:, 0].copy(),
        image_size=table[:, 1].copy(),
        target_offset=table[:, 2].copy(),
        target_size=table[:, 3].copy(),
        image_ext=fields[0][0] if fields else "jpg",
        target_ext=fields[0][4] if fields else "",
        names=tuple(row[3] for row in fields),
    )


def _bad_index(path: Path, reason: str) -> DamagedShardError:
    return DamagedShardError(
        f"{path}: {reason}; copy the data set again or convert again with --overwrite"
    )
