"""What ``mbv3dist inspect`` prints: task, classes and the size of each split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbv3dist.data.index import open_split, require_splits


def inspect_dataset(out: str | Path, splits: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe a data set from its ``SPLIT.json`` files alone.

    Args:
        out: Folder or URL of the data set.
        splits: Names of the splits; default: all, where files can be listed (not by http).

    Returns:
        {task, classes, splits: {NAME: {samples, boxes, shards, bytes, format}}}.

    Raises:
        ValueError: if there is no finished split, or splits disagree on task or classes.
    """
    opened = [open_split(out, name) for name in splits or require_splits(out)]
    first = opened[0]
    for split in opened[1:]:
        if (split.task, split.classes) != (first.task, first.classes):
            raise ValueError(
                f"splits {first.name!r} and {split.name!r} in {first.where!r} differ in task or "
                "class list; convert one of them again with --overwrite and the other's --classes"
            )
    return {
        "task": first.task,
        "classes": list(first.classes),
        "splits": {
            split.name: {
                "samples": len(split),
                "boxes": split.num_boxes,
                "shards": len(split.shards),
                "bytes": int(split.shard_bytes.sum()),
                "format": split.format,
            }
            for split in opened
        },
    }
