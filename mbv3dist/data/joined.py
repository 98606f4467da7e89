"""Several data sets read as one, such as VOC2007 and VOC2012: their shards one behind the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mbv3dist.data.index import Shard, ShardTable, Split, open_split
from mbv3dist.data.manifest import Table
from mbv3dist.data.passes import BalancedPass, Pass, WeightedPass
from mbv3dist.data.shards import ShardBytes, ShardStore


class _JoinedTable(ShardTable):
    """The shards of all parts."""

    def __init__(self, parts: Sequence[Split]) -> None:
        tables = [part.shards.table for part in parts]
        self.table = Table(
            num_samples=np.concatenate([table.num_samples for table in tables]),
            num_bytes=np.concatenate([table.num_bytes for table in tables]),
            first_key=np.concatenate([table.first_key for table in tables]),
            digest=np.concatenate([table.digest for table in tables]),
            urls=None,
        )
        self._parts = parts
        self._starts = np.cumsum([0, *(len(table) for table in tables)]).tolist()

    def _shard(self, number: int) -> Shard:
        part, own = self.part_of(number)
        return self._parts[part].shards[own]

    def part_of(self, number: int) -> tuple[int, int]:
        """Return the part that a shard is of, and its number there."""
        part = bisect_right(self._starts, number) - 1
        return part, number - self._starts[part]


@dataclass(frozen=True, eq=False)
class JoinedSplit(Split):
    """Splits of several data sets as one; keys carry the number of their data set, from 0.

    Attributes:
        parts: The splits, in order.
    """

    parts: tuple[Split, ...] = ()

    @cached_property
    def where(self) -> str:
        """The data sets' folders or URLs, for messages."""
        return " + ".join(part.where for part in self.parts)

    def key(self, index: int) -> str:
        """Return the sample's key behind the number of its data set: ``1:000000042``."""
        part, own = self.part_of(index)
        return f"{part}:{self.parts[part].key(own)}"

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return what ``key`` does for many samples."""
        return [self.key(index) for index in indices.tolist()]

    def source(self, index: int) -> str:
        """Return the original path of the picture; errors as in ``Split.source``."""
        part, own = self.part_of(index)
        return self.parts[part].source(own)

    def labels(self) -> np.ndarray:
        """Return int32 [N] over all parts, as ``Split.labels``."""
        return np.concatenate([part.labels() for part in self.parts])

    def part_of(self, index: int) -> tuple[int, int]:
        """Return the number of the data set that a sample is of, and its pack index there."""
        self.locate(index)
        part = int(np.searchsorted(self._part_starts, index, side="right")) - 1
        return part, int(index) - int(self._part_starts[part])

    @cached_property
    def _part_starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(part) for part in self.parts)])


class JoinedShards:
    """The store of a joined split: that of each part."""

    def __init__(self, split: JoinedSplit, stores: Sequence[ShardStore]):
        assert isinstance(split.shards, _JoinedTable)
        self._table = split.shards
        self._stores = stores
        self._sizes = [len(part.shards) for part in split.parts]

    def open(self, shard: int) -> ShardBytes:
        """As `ShardStore.open`."""
        part, own = self._table.part_of(shard)
        return self._stores[part].open(own)

    def idx_path(self, shard: int) -> Path:
        """As `ShardStore.idx_path`."""
        part, own = self._table.part_of(shard)
        return self._stores[part].idx_path(own)

    def crc_path(self, shard: int) -> Path:
        """As `ShardStore.crc_path`."""
        part, own = self._table.part_of(shard)
        return self._stores[part].crc_path(own)

    def advance(self, step: int) -> list[int]:
        """As `ShardStore.advance`."""
        freed, first = [], 0
        for store, size in zip(self._stores, self._sizes, strict=True):
            freed += [first + shard for shard in store.advance(step)]
            first += size
        return freed

    def close(self) -> None:
        """As `ShardStore.close`."""
        for store in self._stores:
            store.close()


def open_splits(
    data: Sequence[str | Path], split: str, *, cache_dir: str | Path | None = None
) -> Split:
    """Open a split of one data set, or of several as one.

    Args:
        data: Folders or URLs of the data sets.
        split: The split's name in all of them.
        cache_dir: As for ``open_split``.

    Raises:
        ValueError: as ``open_split``, or if the data sets differ in task or classes.
    """
    parts = tuple(open_split(item, split, cache_dir=cache_dir) for item in data)
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.fingerprint in [other.fingerprint for other in parts if other is not part]:
            raise ValueError(f"{part.where} is given twice; give each data set once, with a weight")
        if part.task != first.task:
            raise ValueError(
                f"{part.where} is a {part.task} data set and {first.where} a {first.task} one; "
                "data sets of one run must have the same task"
            )
        if part.classes != first.classes:
            raise ValueError(
                f"{part.where} and {first.where} differ in classes: "
                f"{_first_difference(first.classes, part.classes)}; convert both with the same "
                "--classes FILE"
            )
    return JoinedSplit(
        root=first.root,
        name=split,
        task=first.task,
        classes=first.classes,
        shards=_JoinedTable(parts),
        num_boxes=sum(part.num_boxes for part in parts),
        parts=parts,
    )


def choose_pass(
    split: Split, *, weights: Sequence[float] = (), balance_classes: bool = False
) -> Pass | None:
    """Return what a pass over a split holds: weighted, balanced, or None for each sample once.

    Args:
        split: One data set's split, or several joined.
        weights: One for each data set; empty for none.
        balance_classes: Every class equally often.

    Raises:
        ValueError: for impossible weights, both at a time, or if the split has no labels file.
    """
    if weights and balance_classes:
        raise ValueError("weights and balanced classes exclude each other; choose one")
    if balance_classes:
        return BalancedPass(split.shard_sizes, labels=split.labels())
    if weights:
        parts = split.parts if isinstance(split, JoinedSplit) else (split,)
        num_shards = [len(part.shards) for part in parts]
        return WeightedPass(split.shard_sizes, num_shards=num_shards, weights=weights)
    return None


def _first_difference(mine: Sequence[str], theirs: Sequence[str]) -> str:
    for number in range(max(len(mine), len(theirs))):
        pair = [names[number] if number < len(names) else "nothing" for names in (theirs, mine)]
        if pair[0] != pair[1]:
            return f"class {number} is {pair[0]!r} and {pair[1]!r}"
    return "none"
