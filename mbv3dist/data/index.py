"""What is in a data set: splits, shards, and where each sample comes from.

A data set OUT holds for each split ``SPLIT/000000.tar`` with a ``.idx`` and a ``.crc`` beside it,
``SPLIT.json`` (wids-v1 plus task, classes, ...), ``SPLIT.sources.tsv`` and ``SPLIT.labels.npy``;
large splits also have a ``SPLIT.manifest``. OUT is a folder or the URL of one. Only NumPy and the
standard library are needed here, and fsspec for URLs.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from mbv3dist.data import remote
from mbv3dist.data.files import UnusableFileError, read_bounded
from mbv3dist.data.idx import PICTURE_EXTENSIONS, RAW_PREFIX, TARGET_EXTENSIONS, format_key
from mbv3dist.data.manifest import (
    Table,
    manifest_path,
    read_manifest,
    regular_url,
    table_from_rows,
)
from mbv3dist.data.sources import Sources
from mbv3dist.messages import has_control, shown

TASKS = tuple(TARGET_EXTENSIONS)
_REPORT_SUFFIXES = (".report.json", ".failed.json")
_CURE = "make one with `mbv3dist convert voc|imagefolder SRC --out OUT --split NAME`"
_COPY_AGAIN = "copy the data set again or convert again with --overwrite"
_MAX_HEAD = 4096
_MAX_CLASS_NAME = 1000
_MANIFEST_FROM_BYTES = 1 << 20  # of SPLIT.json: smaller ones have no manifest at their source


@dataclass(frozen=True)
class Shard:
    """One tar of a split.

    Attributes:
        path: Where it lies on this machine, or would lie in the cache.
        url: Its place relative to the data set's root, such as ``train/000000.tar``.
        num_samples: Samples in it.
        num_bytes: Size of the tar in bytes.
        sha256: Hex digest of the whole tar.
        first_key: Key of its first sample, as a number.
    """

    path: Path
    url: str
    num_samples: int
    num_bytes: int
    sha256: str
    first_key: int


class ShardTable(Sequence[Shard]):
    """The shards of a split, made one by one when asked for: a billion samples have many."""

    def __init__(self, root: Path, split: str, table: Table) -> None:
        self.table = table
        self._root = root
        self._split = split

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        """Return a shard, or several."""
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return self._shard(range(len(self))[number])

    def _shard(self, number: int) -> Shard:
        table = self.table
        url = table.urls[number] if table.urls is not None else regular_url(self._split, number)
        return Shard(
            path=self._root / url,
            url=url,
            num_samples=int(table.num_samples[number]),
            num_bytes=int(table.num_bytes[number]),
            sha256=table.digest[number].tobytes().hex(),
            first_key=int(table.first_key[number]),
        )


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set; samples are numbered by their pack index, 0 to ``len - 1``.

    Attributes:
        root: Folder of the data set; of a remote one, its place in the cache.
        name: Name of the split.
        task: ``detection`` or ``classification``.
        classes: Names of the foreground classes, numbered from 0.
        shards: The tars, in pack order.
        num_boxes: Boxes in the split (0 for classification).
        remote: URL of the data set, or None for a local one.
        format: What picture members are: ``jpeg``, or ``raw`` pixels.
    """

    root: Path
    name: str
    task: str
    classes: tuple[str, ...]
    shards: ShardTable
    num_boxes: int
    remote: str | None = None
    format: str = "jpeg"

    def __len__(self) -> int:
        return int(self._start_view[-1])

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard: int64 [num_shards]."""
        return self.shards.table.num_samples

    @property
    def shard_bytes(self) -> np.ndarray:
        """Size of each tar in bytes: int64 [num_shards]."""
        return self.shards.table.num_bytes

    @cached_property
    def starts(self) -> np.ndarray:
        """Pack index of each shard's first sample, then the total: int64 [num_shards + 1]."""
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(self.shard_sizes)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 hex over task, classes and the shards' digests; free of location."""
        content = json.dumps([self.task, list(self.classes)]).encode("utf-8")
        return hashlib.sha256(content + self.shards.table.digest.tobytes()).hexdigest()

    @cached_property
    def where(self) -> str:
        """The data set's folder or URL, for messages."""
        return str(self.root) if self.remote is None else remote.redact(self.remote)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard number and the position in it of a sample.

        Raises:
            ValueError: if there is no such sample.
        """
        view = self._start_view
        if not 0 <= index < view[-1]:
            raise ValueError(
                f"sample {index} does not exist: split {self.name!r} has samples 0 to "
                f"{len(self) - 1}"
            )
        shard = bisect_right(view, index) - 1
        return shard, int(index) - view[shard]

    def key(self, index: int) -> str:
        """Return the sample's key: its pack index in 9 digits, as a rule (see ``first_key``)."""
        shard, position = self.locate(index)
        return format_key(int(self.shards.table.first_key[shard]) + position)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return the keys of many samples: what ``key`` does for int64 [n] pack indices."""
        shard = np.searchsorted(self.starts, indices, side="right") - 1
        keys = indices - self.starts[shard] + self.shards.table.first_key[shard]
        return [format_key(key) for key in keys.tolist()]

    def source(self, index: int) -> str:
        """Return the original path of the picture, relative to the converted folder.

        Raises:
            ValueError: if ``SPLIT.sources.tsv`` is missing or has other samples.
        """
        key = self.key(index)
        found, source = self._sources.find(key)
        if found != key:
            raise ValueError(
                f"{self.name}.sources.tsv: has no line for {key} (found {shown(found)} in its "
                f"place); {_COPY_AGAIN}"
            )
        return source

    def labels(self) -> np.ndarray:
        """Return int32 [N]: each sample's class; for detection its rarest, -1 without boxes.

        Raises:
            ValueError: if ``SPLIT.labels.npy`` is missing or belongs to another split.
        """
        path = self._file(f"{self.name}.labels.npy")
        # Conversion writes one exact header, so it is compared: NumPy's parser of it raises a dozen
        # kinds of errors on damaged bytes.
        head = labels_header(len(self))
        try:
            data = read_bounded(path, len(head) + 4 * len(self))
        except UnusableFileError:
            data = b""
        if not data.startswith(head) or len(data) != len(head) + 4 * len(self):
            raise ValueError(
                f"{path} does not list the labels of {len(self)} samples; {_COPY_AGAIN}"
            )
        return np.frombuffer(data, "<i4", offset=len(head))

    def sample(self, index: int) -> dict[str, Any]:
        """Return ``{"jpg": bytes, "cls": int}`` or ``{"jpg": bytes, "json": {...}}``.

        Raw pixels are under ``npy`` instead. For notebooks; training reads through ``Reader``.
        """
        from mbv3dist.data.reader import Reader

        with Reader(self, verify="always") as reader:
            picture, target = reader.read(index)
            value = json.loads(bytes(target))
            # By its bytes: a split that is joined of several may hold both kinds.
            kind = "raw" if picture[: len(RAW_PREFIX)] == RAW_PREFIX else "jpeg"
            return {PICTURE_EXTENSIONS[kind]: bytes(picture), TARGET_EXTENSIONS[self.task]: value}

    @cached_property
    def _start_view(self) -> memoryview:
        """Starts without NumPy's overhead per element: bisecting these is ten times faster."""
        return memoryview(self.starts.data)

    @cached_property
    def _sources(self) -> Sources:
        return Sources(self._file(f"{self.name}.sources.tsv"))

    def _file(self, name: str) -> Path:
        """Return a file of the split, fetched first if the data set is remote."""
        if self.remote is not None:
            remote.fetch_metadata(self.remote, [name], self.root)
        path = self.root / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy the data set again, with all its files")
        return path


def labels_header(num_samples: int) -> bytes:
    """Return how a ``SPLIT.labels.npy`` begins; the labels follow as little-endian int32."""
    header = io.BytesIO()
    description = {"descr": "<i4", "fortran_order": False, "shape": (num_samples,)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def list_splits(data: str | Path) -> list[str]:
    """Return the names of the finished splits in a data set's folder, sorted.

    Raises:
        ValueError: if the folder does not exist, or its server cannot list files.
    """
    if remote.is_url(str(data)):
        names = remote.Remote(str(data)).list()
        found = [name[: -len(".json")] for name in names if name.endswith(".json")]
        return sorted(name for name in found if not f"{name}.json".endswith(_REPORT_SUFFIXES))
    root = Path(remote.to_local(str(data)))
    if not root.is_dir():
        raise ValueError(f"no data set folder {str(root)!r}; {_CURE}")
    return [path.stem for path in sorted(root.glob("*.json")) if _is_split(path)]


def _is_split(path: Path) -> bool:
    if path.name.startswith(".") or path.name.endswith(_REPORT_SUFFIXES):
        return False
    return path.with_suffix("").is_dir() and describes_split(path)


def require_splits(data: str | Path) -> list[str]:
    """Return what ``list_splits`` does.

    Raises:
        ValueError: if the folder does not exist or has no finished split.
    """
    names = list_splits(data)
    if not names:
        raise ValueError(f"no finished split in {remote.redact(str(data))!r}; {_CURE}")
    return names


def training_split(data: str | Path) -> str:
    """Name a data set's train or trainval split, or its only one; ValueError if there are more."""
    names = require_splits(data)
    usual = [name for name in ("train", "trainval") if name in names] or names
    if len(names) > 1 and usual is names:
        raise ValueError(f"{shown(str(data))} has {', '.join(names)}: name one with --split")
    return usual[0]


def describes_split(path: Path) -> bool:
    """Return whether a JSON file is a split's description, or a damaged one, not another's file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if b'"wids_version"' in file.read(_MAX_HEAD):
            return True  # as conversion writes it: no need to parse 100 MB to see that
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        # Cut off or zeroed by a crash: whoever opens the split names it. JSON lines are others'.
        return b"wids" in data or not data.strip(b"\0\n ")
    return isinstance(value, dict) and "wids_version" in value


def open_split(data: str | Path, split: str, *, cache_dir: str | Path | None = None) -> Split:
    """Open one split of a data set.

    Args:
        data: Folder of the data set, or its http(s), s3, gs or hf URL.
        split: Name of the split, such as ``train``.
        cache_dir: Where files of a remote data set go; default: ``$MBV3DIST_CACHE`` or the user's
            cache folder.

    Raises:
        ValueError: if there is no such split or its ``SPLIT.json`` is not one of ours.
        OSError: if a remote data set cannot be read.
    """
    url = None
    if remote.is_url(str(data)):
        url = remote.check_url(str(data))
        root = remote.mirror_folder(url, Path(cache_dir or remote.default_cache_dir()))
        _fetch_description(url, split, root)
    else:
        root = Path(remote.to_local(str(data)))
        if not _is_split(root / f"{split}.json"):
            names = require_splits(root)
            raise ValueError(
                f"no split {split!r} in {str(root)!r}; it has {', '.join(names)}: name one of "
                "these or convert the missing one"
            )
    path = root / f"{split}.json"
    try:
        return _build_split(root, split, path, url)
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} is not a split description of mbv3dist ({type(error).__name__}: {error}); "
            + _COPY_AGAIN
        ) from error


def _fetch_description(url: str, split: str, root: Path) -> None:
    """Bring ``SPLIT.json``, and the manifest of a large one, into the cache."""
    name = f"{split}.json"
    try:
        remote.fetch_metadata(url, [name], root)
        if (root / name).stat().st_size >= _MANIFEST_FROM_BYTES:
            remote.fetch_metadata(url, [manifest_path(root / name).name], root)
    except FileNotFoundError as error:
        if not (root / name).is_file():
            raise ValueError(
                f"no split {split!r} at {remote.redact(url)}; check the URL and the split's name"
            ) from error


def _build_split(root: Path, name: str, path: Path, url: str | None) -> Split:
    copy = read_manifest(path)
    if copy is not None:
        description, table = copy
    else:
        description = json.loads(path.read_bytes())
        table = table_from_rows(description["shardlist"], name)
    if description["wids_version"] != 1:
        raise ValueError(f"wids_version is {shown(description['wids_version'])}, not 1")
    task = description["task"]
    if task not in TASKS:
        raise ValueError(f"task is {shown(task)}, not one of {', '.join(TASKS)}")
    boxes = description["boxes"]
    if not isinstance(boxes, int) or boxes < 0:
        raise ValueError(f"boxes is {shown(boxes)}, not a count")
    form = description.get("format", "jpeg")
    if form not in PICTURE_EXTENSIONS:
        raise ValueError(f"format is {shown(form)}, not one of {', '.join(PICTURE_EXTENSIONS)}")
    classes = description["classes"]
    if not isinstance(classes, list) or not all(isinstance(item, str) for item in classes):
        raise ValueError("classes is no list of names")
    for label in classes:
        if not label or len(label) > _MAX_CLASS_NAME or has_control(label):
            raise ValueError(f"class {shown(label)} is empty, too long or holds control characters")
    shards = ShardTable(root, name, table)
    return Split(root, name, task, tuple(classes), shards, boxes, url, form)
