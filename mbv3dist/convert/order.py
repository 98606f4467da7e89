"""Which sample is packed where, settled before any picture is read.

A record has a known number of places: one, or one for each object when objects are cut out. All
places of a split are permuted together, and part i of n packs the i-th stretch of that order. So
parts need nothing of each other, and one behind the other they hold the samples in the order of
an undivided conversion. A place whose input turns out bad is left empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbv3dist.convert.records import Job, Options, Settings

_SHUFFLE_PURPOSE = 0x5061636B  # keeps these draws apart from all others of the same seed
_CUT_PURPOSE = 0x43757456


@dataclass(frozen=True, eq=False)
class Share:
    """What one part packs of a split, and which records it needs for that.

    Attributes:
        first: Number of its first place in the order: the key of its first sample.
        places: int64 [n], places in the order in which they are packed. Places are numbered
            through all records, in the records' order.
        records: int64 [m], the records that it prepares, ascending.
        owned: bool [m]: the one part that counts a record, should several need it.
    """

    first: int
    places: np.ndarray
    records: np.ndarray
    owned: np.ndarray


class PackOrder:
    """The order of all places of a split.

    Attributes:
        starts: int64 [num_records + 1], the first place of each record, then their number.
    """

    def __init__(self, job: Job, settings: Settings, seed: int) -> None:
        counts = np.ones(len(job.records), dtype=np.int64)
        if settings.label_from in ("crops", "largest"):
            counts[:] = [len(record.boxes) for record in job.records]
        if settings.label_from == "largest":
            np.minimum(counts, 1, out=counts)
        self.starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        words = random_words(int(self.starts[-1]), seed, _SHUFFLE_PURPOSE)
        self._order = np.argsort(words, kind="stable")

    def share(self, number: int, count: int) -> Share:
        """Return what part ``number`` (from 1) of ``count`` packs."""
        part = stretch(len(self._order), number, count)
        places = self._order[part]
        needed = np.searchsorted(self.starts, np.sort(places), side="right") - 1
        placeless = np.flatnonzero(np.diff(self.starts) == 0)  # read as well: they may be damaged
        placeless = placeless[stretch(len(placeless), number, count)]
        records = np.union1d(needed, placeless)
        owned = np.isin(self.starts[records], places) | np.isin(records, placeless)
        return Share(part.start, places, records, owned)


def stretch(total: int, number: int, count: int) -> slice:
    """Return which of ``total`` things belong to part ``number`` (from 1) of ``count``."""
    return slice((number - 1) * total // count, number * total // count)


def cut_validation(job: Job, options: Options) -> list[Job]:
    """Return the job alone, or with its ``val`` split cut from it.

    The cut is made by class where records have one, else at random; both sides keep the order of
    the records. A class of two or more has samples on both sides.

    Raises:
        ValueError: if that leaves nothing for ``val``.
    """
    if not options.val_fraction:
        return [job]
    records = job.records
    labels = np.array([record.label for record in records], dtype=np.int64)
    chosen = np.zeros(len(records), dtype=np.bool_)
    words = random_words(len(records), options.seed, _CUT_PURPOSE)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = int(len(members) * options.val_fraction + 0.5)
        count = min(max(count, 1), len(members) - 1)
        chosen[members[np.argsort(words[members], kind="stable")[:count]]] = True
    # With bad input in the source, that is what is said, later.
    if records and not chosen.any() and not job.problems:
        raise ValueError(
            f"--val-fraction {options.val_fraction:g} leaves none of {len(records)} pictures for "
            "'val': a class needs two to give one; add pictures or leave --val-fraction out"
        )
    validation = [record for record, val in zip(records, chosen, strict=True) if val]
    job.records = [record for record, val in zip(records, chosen, strict=True) if not val]
    return [job, Job("val", validation)]


def random_words(count: int, seed: int, purpose: int) -> np.ndarray:
    """Return uint64 [count] that are the same on every platform and NumPy release."""
    return np.random.Philox(key=[seed, purpose]).random_raw(count)
