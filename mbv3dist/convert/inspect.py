"""What ``mbv3dist inspect`` prints: task, classes and the size of each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mbv3dist.data.index import open_split, require_splits


def inspect_dataset(out: str | Path) -> dict[str, Any]:
    """Describe a data set from its ``SPLIT.json`` files alone.

    Returns:
        {task, classes, splits: {NAME: {samples, boxes, shards, bytes}}}.

    Raises:
        ValueError: if there is no finished split, or splits disagree on task or classes.
    """
    splits = [open_split(out, name) for name in require_splits(out)]
    first = splits[0]
    for split in splits[1:]:
        if (split.task, split.classes) != (first.task, first.classes):
            raise ValueError(
                f"splits {first.name!r} and {split.name!r} in {str(out)!r} differ in task or class "
                "list; convert one of them again with --overwrite and the other's --classes"
            )
    return {
        "task": first.task,
        "classes": list(first.classes),
        "splits": {
            split.name: {
                "samples": len(split),
                "boxes": split.num_boxes,
                "shards": len(split.shards),
                "bytes": sum(shard.num_bytes for shard in split.shards),
            }
            for split in splits
        },
    }
