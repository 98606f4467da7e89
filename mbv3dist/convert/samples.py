"""The prepared samples of a part in columns, because there may be millions: 66 bytes for each."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbv3dist.convert.order import Share
from mbv3dist.convert.records import Problem, Record
from mbv3dist.convert.writer import Entry

_ROWS = 10_000
CHUNK = 64  # records that a worker prepares at a time
_COLUMNS = np.dtype(
    [
        ("place", "<i8"),
        ("record", "<i8"),
        ("picture_offset", "<i8"),
        ("target_offset", "<i8"),
        ("picture_size", "<i8"),
        ("picture_crc", "<u4"),
        ("target_size", "<i4"),
        ("spool", "<i4"),
        ("num_boxes", "<i4"),
        ("num_labels", "<i4"),
        ("scan", "<i4"),
        ("has_restarts", "?"),
        ("copied", "?"),
    ]
)


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a part, in pack order.

    Attributes:
        first: Key of the first; the others follow without gaps.
        table: Structured array [n]: ``place`` among all places of the split, ``record``,
            ``spool`` and where in it the bytes lie, ``copied`` if the picture is its file's, ...
        labels: int32, the classes of the first sample (each once), of the second, ...;
            ``num_labels`` of the table says how many each has.
    """

    first: int
    table: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    def entries(self, low: int, high: int, records: Sequence[Record]) -> list[Entry]:
        """Return what packing needs of samples low to high, high left out."""
        table = self.table[low:high]
        columns = (
            "record",
            "copied",
            "spool",
            "picture_offset",
            "picture_size",
            "picture_crc",
            "target_offset",
            "target_size",
            "scan",
            "has_restarts",
        )
        rows = zip(*(table[name].tolist() for name in columns), strict=True)
        return [
            Entry(key, spool, records[record].path if copied else None, *where)
            for key, (record, copied, spool, *where) in enumerate(rows, start=self.first + low)
        ]

    def sources(self, records: Sequence[Record], starts: np.ndarray | None) -> Iterator[str]:
        """Yield where each sample comes from.

        Args:
            records: All records of the split.
            starts: First place of each record if samples are objects cut out (then ``#NUMBER``,
                the object's in its XML, is added), else None.
        """
        for low in range(0, len(self), _ROWS):  # in pieces: Python's integers are large
            rows = self.table[low : low + _ROWS]
            for place, number in zip(rows["place"].tolist(), rows["record"].tolist(), strict=True):
                record = records[number]
                if starts is None:
                    yield record.source
                else:
                    yield f"{record.source}#{record.boxes[place - starts[number]].number}"


def read_chunks(
    folder: Path, share: Share, starts: np.ndarray
) -> tuple[Samples, list[Problem], Counter[str]]:
    """Read what ``prepare_chunk`` left in a folder; return samples, problems and counts.

    Args:
        folder: Where the chunks lie.
        share: What this part packs.
        starts: First place of each record of the split.
    """
    tables, labels = [np.zeros(0, _COLUMNS)], [np.zeros(0, np.int32)]
    problems: list[Problem] = []
    counts: Counter[str] = Counter()
    for spool, first in enumerate(range(0, len(share.records), CHUNK)):
        result = json.loads((folder / f"{spool:06d}.json").read_bytes())
        records = share.records[first : first + CHUNK].tolist()
        rows, flat = [], []
        for position, place, copied, offset, size, crc, target, length, *about in result["samples"]:
            record = records[position]
            place += int(starts[record])
            scan, has_restarts, boxes, found = about
            where = (offset, target, size, crc, length, spool)
            rows.append((place, record, *where, boxes, len(found), scan, has_restarts, copied))
            flat += found
        tables.append(np.array(rows, _COLUMNS))
        labels.append(np.array(flat, np.int32))
        problems += [Problem(*row) for row in result["problems"]]
        counts += Counter(result["counts"])
    table, flat_labels = np.concatenate(tables), np.concatenate(labels)
    # Samples come by record, and so by place; bad input has left places empty.
    rows_at = np.searchsorted(table["place"], share.places)
    order = rows_at[np.isin(share.places, table["place"])]
    flat_labels = take_ragged(flat_labels, table["num_labels"], order)
    return Samples(share.first, table[order], flat_labels), problems, counts


def take_ragged(values: np.ndarray, counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the values of rows in another order.

    Args:
        values: The values of all rows, one row behind the other.
        counts: int [n], how many each row has.
        order: int [m], the rows wanted.
    """
    starts = np.cumsum(counts, dtype=np.int64) - counts
    taken = counts[order].astype(np.int64)
    shift = np.repeat(starts[order] - (np.cumsum(taken) - taken), taken)
    return values[shift + np.arange(len(shift))]


def sample_labels(num_labels: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return one class per sample, int32 [n]: the one that the fewest samples have; -1 for none.

    Args:
        num_labels: int [n], how many classes each sample has.
        labels: Those of the first sample (each once), then those of the second, ...
        num_classes: Classes there are.
    """
    by_rarity = np.argsort(np.bincount(labels, minlength=num_classes), kind="stable")
    rank = np.empty(num_classes, np.int64)
    rank[by_rarity] = np.arange(num_classes)
    chosen = np.full(len(num_labels), -1, np.int32)
    filled = num_labels > 0
    if filled.any():
        counts = num_labels[filled].astype(np.int64)
        rarest = np.minimum.reduceat(rank[labels], np.cumsum(counts) - counts)
        chosen[filled] = by_rarity[rarest]
    return chosen


def npy_bytes(values: np.ndarray) -> bytes:
    """Return an array as the bytes of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()
