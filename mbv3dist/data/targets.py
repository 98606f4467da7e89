"""What is known about many pictures: the targets of a chunk of samples, parsed together.

Those that are as `convert` writes them are parsed by compiled code (members.py), which costs no
GIL; if there is another one, all of the chunk go through target.py, which accepts every form of
JSON and says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbv3dist.data.members import parse_boxes, parse_classes
from mbv3dist.data.reader import Members
from mbv3dist.data.target import Target, parse_target

_BYTES_PER_BOX = 8  # in JSON, and more


@dataclass
class Targets:
    """The targets of n pictures with T boxes in all.

    Attributes:
        classes: int64 [n], class numbers, or -1 for detection.
        starts: int64 [n + 1], where each picture's boxes start.
        boxes: float32 [T, 4], xyxy picture pixels.
        labels: int64 [T].
        difficult: bool [T].
        sizes: int32 [n, 2], width and height that the targets state; 0 for classification.
    """

    classes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    sizes: np.ndarray

    def one(self, n: int) -> Target:
        """Return the target of one picture."""
        own = slice(self.starts[n], self.starts[n + 1])
        return Target(
            label=int(self.classes[n]),
            boxes=self.boxes[own],
            labels=self.labels[own],
            difficult=self.difficult[own],
            width=int(self.sizes[n, 0]),
            height=int(self.sizes[n, 1]),
        )


def parse_targets(
    members: Members, task: str, *, num_classes: int
) -> tuple[Targets, dict[int, ValueError]]:
    """Parse the targets of n samples, as `target.parse_target` does each.

    Args:
        members: The samples' members.
        task: "classification" or "detection".
        num_classes: Classes there are.

    Returns:
        The targets, and what is wrong with some, by their place among the samples; these have no
        boxes and class -1.
    """
    count = len(members.places)
    addresses, lengths = members.addresses[:, 1].copy(), members.sizes[:, 1].copy()
    room = int(lengths.sum()) // _BYTES_PER_BOX + 1 if task == "detection" else 0
    targets = Targets(
        np.full(count, -1, np.int64),
        np.zeros(count + 1, np.int64),
        np.empty((room, 4), np.float32),
        np.empty(room, np.int64),
        np.empty(room, np.bool_),
        np.zeros((count, 2), np.int32),
    )
    if task == "classification":
        num_odd = parse_classes(addresses, lengths, num_classes, targets.classes)
    else:
        num_odd = parse_boxes(
            addresses,
            lengths,
            num_classes,
            targets.starts,
            targets.sizes,
            targets.boxes,
            targets.labels,
            targets.difficult,
            np.empty(count, np.bool_),
        )
        total = int(targets.starts[-1])
        targets.boxes, targets.labels = targets.boxes[:total], targets.labels[:total]
        targets.difficult = targets.difficult[:total]
    return _parse_slowly(members, task, num_classes) if num_odd else (targets, {})


def _parse_slowly(
    members: Members, task: str, num_classes: int
) -> tuple[Targets, dict[int, ValueError]]:
    nothing = Target(
        -1, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_), 0, 0
    )
    parsed, errors = [], {}
    for n, data in enumerate(members.targets):
        try:
            parsed.append(parse_target(data, task, num_classes=num_classes))
        except ValueError as error:
            parsed.append(nothing)
            errors[n] = error
    targets = Targets(
        np.array([target.label for target in parsed], np.int64),
        np.cumsum([0, *(len(target.boxes) for target in parsed)]),
        np.concatenate([target.boxes for target in parsed]),
        np.concatenate([target.labels for target in parsed]),
        np.concatenate([target.difficult for target in parsed]),
        np.array([(target.width, target.height) for target in parsed], np.int32),
    )
    return targets, errors


def size_errors(
    targets: Targets, sizes: np.ndarray, known: dict[int, ValueError]
) -> dict[int, ValueError]:
    """Return an error for each picture (int32 [n, 2], width and height) whose target is another's.

    Those that are known to be wrong are passed over.
    """
    return {
        n: ValueError(
            f"the picture has {sizes[n, 0]} x {sizes[n, 1]} pixels, its .json member says "
            f"{targets.sizes[n, 0]} x {targets.sizes[n, 1]}"
        )
        for n in np.flatnonzero((targets.sizes != sizes).any(axis=1)).tolist()
        if n not in known
    }
