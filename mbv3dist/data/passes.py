"""Which samples a pass (an epoch) over the data holds, and how often.

A plain pass holds each sample once. With a weight per data set, or with balanced classes, samples
come in groups, and a pass takes a fixed number of entries, the group's quota, from each. Pass e
takes the places [e * quota, (e + 1) * quota) of the group's samples laid end to end for ever, so
that after any number of passes the samples of a group have been read equally often, to one, and
no sample is ever forgotten. The order within a pass is the plan's affair. Only NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# An entry is a sample and which of its copies in the pass it is: index + (copy << COPY_SHIFT).
COPY_SHIFT = 40
_CACHED_EPOCHS = 3


class Pass(Protocol):
    """What the plan asks; `num_entries` is the same for each pass."""

    num_entries: int

    def sizes(self, epoch: int) -> np.ndarray:
        """Entries in each shard in this pass: int64 [num_shards]."""

    def entries(self, epoch: int, shard: int) -> np.ndarray:
        """The shard's entries in this pass, in pack order: int64 [its size]."""

    def state(self) -> dict[str, Any]:
        """What decides the passes, ready for JSON."""


class WholePass:
    """Each sample once."""

    def __init__(self, shard_sizes: np.ndarray):
        self._sizes = shard_sizes
        self._starts = _starts(shard_sizes)
        self.num_entries = int(self._starts[-1])

    def sizes(self, epoch: int) -> np.ndarray:
        """As `Pass.sizes`."""
        return self._sizes

    def entries(self, epoch: int, shard: int) -> np.ndarray:
        """As `Pass.entries`."""
        return np.arange(self._starts[shard], self._starts[shard + 1])

    def state(self) -> dict[str, Any]:
        """As `Pass.state`."""
        return {}


class WeightedPass:
    """Data set d is read `weights[d]` times in a pass: a whole number of times and a part.

    Args:
        shard_sizes: Samples in each shard, all data sets one behind the other.
        num_shards: Shards of each data set.
        weights: Of each data set, at least 0; 0 leaves it out.

    Raises:
        ValueError: For weights that are too many, too few, negative, or leave nothing.
    """

    def __init__(
        self, shard_sizes: np.ndarray, *, num_shards: Sequence[int], weights: Sequence[float]
    ):
        if len(weights) != len(num_shards):
            raise ValueError(
                f"{len(weights)} weights for {len(num_shards)} data sets; give one for each in "
                "--data.weights"
            )
        if not all(0 <= weight < 1e6 for weight in weights) or not any(weights):
            raise ValueError(
                f"weights are {' '.join(f'{w:g}' for w in weights)}; --data.weights takes numbers "
                "of 0 or more, one of them above 0"
            )
        assert sum(num_shards) == len(shard_sizes)
        self._starts = _starts(shard_sizes)
        self._shards = _starts(np.asarray(num_shards, dtype=np.int64))
        self._first = self._starts[self._shards]  # first sample of each data set, then the end
        counts = np.diff(self._first).tolist()
        self.weights = [float(weight) for weight in weights]
        # A weight above 0 is at least a sample in a pass.
        self._quotas = [
            max(round(w * n), min(n, 1)) if w else 0 for w, n in zip(weights, counts, strict=True)
        ]
        self.num_entries = sum(self._quotas)

    def sizes(self, epoch: int) -> np.ndarray:
        """As `Pass.sizes`."""
        parts = []
        for number, quota in enumerate(self._quotas):
            low, high = self._shards[number], self._shards[number + 1]
            bounds = self._starts[low : high + 1] - self._first[number]
            parts.append(_read_counts(bounds, int(bounds[-1]), quota, epoch))
        return np.concatenate(parts)

    def entries(self, epoch: int, shard: int) -> np.ndarray:
        """As `Pass.entries`."""
        number = int(np.searchsorted(self._shards, shard, side="right")) - 1
        first, end = self._first[number], self._first[number + 1]
        start, stop = self._starts[shard], self._starts[shard + 1]
        bounds = np.arange(start, stop + 1) - first
        return _entries(start, _read_counts(bounds, int(end - first), self._quotas[number], epoch))

    def state(self) -> dict[str, Any]:
        """As `Pass.state`."""
        return {"weights": self.weights, "shards_of_data_sets": np.diff(self._shards).tolist()}


class BalancedPass:
    """Every class equally often in a pass of about N entries; pictures without one, once.

    Needs a few bytes of memory per sample, unlike the other passes.

    Args:
        shard_sizes: Samples in each shard.
        labels: int [N], the class that each sample counts for, in pack order; -1 for none.

    Raises:
        ValueError: When no sample has a class.
    """

    def __init__(self, shard_sizes: np.ndarray, *, labels: np.ndarray):
        self._starts = _starts(shard_sizes)
        assert len(labels) == self._starts[-1]
        self.classes, group = np.unique(labels, return_inverse=True)
        counts = np.bincount(group, minlength=len(self.classes))
        has_class = self.classes >= 0
        if not has_class.any():
            raise ValueError("no sample has a class to balance; leave --data.balance_classes out")
        each = max(1, round(int(counts[has_class].sum()) / int(has_class.sum())))
        self._quotas = np.where(has_class, each, counts)
        self._counts = counts
        self._group = group.astype(np.int32)
        # Each sample's place among those of its class.
        order = np.argsort(group, kind="stable")
        self._rank = np.empty(len(labels), dtype=np.int64)
        self._rank[order] = np.arange(len(labels)) - np.repeat(_starts(counts)[:-1], counts)
        self.num_entries = int(self._quotas.sum())
        self._epochs: dict[int, np.ndarray] = {}

    def sizes(self, epoch: int) -> np.ndarray:
        """As `Pass.sizes`."""
        return np.diff(np.concatenate(([0], np.cumsum(self._copies(epoch))))[self._starts])

    def entries(self, epoch: int, shard: int) -> np.ndarray:
        """As `Pass.entries`."""
        start, stop = self._starts[shard], self._starts[shard + 1]
        return _entries(start, self._copies(epoch)[start:stop])

    def state(self) -> dict[str, Any]:
        """As `Pass.state`."""
        return {"balance_classes": True}

    def _copies(self, epoch: int) -> np.ndarray:
        """How often each sample comes in this pass: int64 [N]."""
        copies = self._epochs.get(epoch)
        if copies is None:
            quota, count = self._quotas[self._group], self._counts[self._group]
            # A sample's places are its rank, rank + count, rank + 2 count, ...
            ends = [
                (places - self._rank + count - 1) // count
                for places in (epoch * quota, (epoch + 1) * quota)
            ]
            copies = ends[1] - ends[0]
            self._epochs[epoch] = copies
            while len(self._epochs) > _CACHED_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
        return copies


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))


def _read_counts(bounds: np.ndarray, count: int, quota: int, epoch: int) -> np.ndarray:
    """How many places of pass `epoch` fall between each two neighbouring bounds.

    The group's `count` samples are laid end to end for ever; bounds are int64 [n + 1] in
    [0, count]; the result is int64 [n].
    """
    if count == 0:
        return np.zeros(len(bounds) - 1, dtype=np.int64)

    def below(place: int) -> np.ndarray:
        whole, rest = divmod(place, count)
        places: np.ndarray = whole * bounds + np.minimum(bounds, rest)
        return places

    counts: np.ndarray = np.diff(below((epoch + 1) * quota) - below(epoch * quota))
    return counts


def _entries(first: int, copies: np.ndarray) -> np.ndarray:
    """The entries of neighbouring samples from `first`, each as often as `copies` says."""
    index = np.repeat(np.arange(first, first + len(copies)), copies)
    copy = np.arange(len(index)) - np.repeat(np.cumsum(copies) - copies, copies)
    entries: np.ndarray = index + (copy << COPY_SHIFT)
    return entries
