"""Post-process on a CPU against torchvision's own, on ten thousand random pictures and more.

Sizes from no anchor to 5,000, 1 to 91 classes, chains, copies, overlaps at the threshold, boxes
without area, equal scores, nothing above the threshold, NaN. "Equal" is to the last bit, in order.
Where scores of a picture are equal, torchvision's method runs with its sorts made stable (see
`nms_cases.py`); where all are distinct it runs as it is.
"""

import numpy as np
import pytest
from nms_cases import (
    difference,
    has_ties,
    mismatches,
    random_case,
    torchvision_detections,
)

from mbv3dist.ops.nms import postprocess, postprocess_reference

SIZES = {  # batches, pictures of each, most anchors, most classes
    "tiny": (640, 8, 12, 2),
    "small": (520, 8, 60, 5),
    "classes": (40, 8, 40, 91),
    "medium": (60, 8, 700, 4),
    "large": (24, 4, 5000, 2),
}


def test_there_are_ten_thousand():
    assert sum(number * batch for number, batch, _, _ in SIZES.values()) >= 10_000


@pytest.mark.parametrize("name", SIZES)
def test_equals_torchvision(name: str) -> None:
    number, batch, most_anchors, most_classes = SIZES[name]
    rng = np.random.default_rng(list(SIZES).index(name))
    wrong, kinds = [], {True: 0, False: 0}
    for turn in range(number):
        num_anchors = most_anchors if turn == 0 else int(rng.integers(0, most_anchors + 1))
        num_classes = most_classes if turn == 1 else int(rng.integers(1, most_classes + 1))
        case = random_case(rng, batch=batch, num_anchors=num_anchors, num_classes=num_classes)
        ours = case.run(postprocess)
        tied = has_ties(case)
        kinds[tied] += 1
        differing = mismatches(ours, torchvision_detections(case, stable=tied))
        if turn % 8 == 0:
            differing += difference(ours, case.run(postprocess_reference))
        if differing:
            wrong.append((turn, num_anchors, num_classes, differing, case.options))
    assert not wrong
    assert min(kinds.values()) > number / 8  # ties and none: both were met
