"""PASCAL VOC average precision in numpy: 11-point (VOC07) and area under the curve (VOC10+).

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2.

The rules, for each class on its own:
- Detections are taken in falling order of score; equal scores keep the order of the input.
- A detection belongs to the object of its class and picture that it overlaps most. With an IoU
  of at least 0.5 it is a true positive if it is the first to claim that object, a false positive
  if the object was claimed before, and is ignored if the object is marked `difficult`.
- Difficult objects are not counted as objects to be found either.
- Boxes are half-open and 0-based, so a box is x2 - x1 wide (the devkit's "+ 1" belongs to its
  1-based inclusive boxes).

Shapes: D detections and M objects over all pictures.
    boxes: float [D, 4] or [M, 4], xyxy pixels; scores: float [D]; labels: int [D] or [M]
    pictures: int [D] or [M], which picture each belongs to
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


@dataclass(frozen=True)
class VocClassResult:
    """One class's score; both figures are None where the class has no object that counts.

    Attributes:
        num_objects: Objects that are not difficult.
        area_ap: Area under the interpolated precision-recall curve, in [0, 1].
        eleven_point_ap: Mean interpolated precision at recall 0, 0.1, ... 1.
    """

    num_objects: int
    area_ap: float | None
    eleven_point_ap: float | None


def iou_matrix(boxes1: Floats, boxes2: Floats) -> NDArray[np.float64]:
    """Intersection over union of every pair, float64 [N, M]; 0 where the union is empty.

    Args:
        boxes1: [N, 4], xyxy pixels.
        boxes2: [M, 4], xyxy pixels.
    """
    first = np.asarray(boxes1, dtype=np.float64)[:, None, :]
    second = np.asarray(boxes2, dtype=np.float64)[None, :, :]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(
        first[..., :2], second[..., :2]
    )
    intersection = np.prod(np.maximum(sides, 0.0), axis=-1)
    area1 = np.prod(np.maximum(first[..., 2:] - first[..., :2], 0.0), axis=-1)
    area2 = np.prod(np.maximum(second[..., 2:] - second[..., :2], 0.0), axis=-1)
    union = area1 + area2 - intersection
    iou: NDArray[np.float64] = np.zeros_like(union)
    np.divide(intersection, union, out=iou, where=union > 0)
    return iou


def area_ap(recall: Floats, precision: Floats) -> float:
    """Area under the curve whose precision is made non-increasing from the right (VOC10+).

    Args:
        recall: [D], rising, in [0, 1].
        precision: [D], in [0, 1].
    """
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def eleven_point_ap(recall: Floats, precision: Floats) -> float:
    """Mean over recall 0, 0.1, ... 1 of the best precision at that recall or beyond (VOC07).

    Args:
        recall: [D], rising, in [0, 1].
        precision: [D], in [0, 1].
    """
    total = 0.0
    for tenth in range(11):
        # Recall is a quotient of counts; 3 of 10 objects must reach 0.3 whatever the rounding.
        reached = recall >= tenth / 10 - 1e-12
        if reached.any():
            total += float(precision[reached].max())
    return total / 11


def _claimed_objects(
    pictures: Integers,
    boxes: Floats,
    truth_pictures: Integers,
    truth_boxes: Floats,
    iou_threshold: float,
) -> NDArray[np.int64]:
    """For each detection of one class the object it overlaps most, or -1 below the threshold.

    Both lists are sorted by picture.
    """
    claimed = np.full(len(boxes), -1, dtype=np.int64)
    for picture in np.intersect1d(pictures, truth_pictures):
        first, last = np.searchsorted(pictures, [picture, picture + 1])
        first_truth, last_truth = np.searchsorted(truth_pictures, [picture, picture + 1])
        iou = iou_matrix(boxes[first:last], truth_boxes[first_truth:last_truth])
        best = iou.argmax(axis=1)
        enough = iou[np.arange(len(best)), best] >= iou_threshold
        claimed[first:last] = np.where(enough, best + first_truth, -1)
    return claimed


def _score_class(
    pictures: Integers,
    boxes: Floats,
    scores: Floats,
    truth_pictures: Integers,
    truth_boxes: Floats,
    difficult: NDArray[np.bool_],
    iou_threshold: float,
) -> VocClassResult:
    """The result of one class, from its detections and objects sorted by picture."""
    num_objects = int(np.count_nonzero(~difficult))
    if num_objects == 0:
        return VocClassResult(num_objects=0, area_ap=None, eleven_point_ap=None)
    claimed = _claimed_objects(pictures, boxes, truth_pictures, truth_boxes, iou_threshold)
    claimed = claimed[np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")]
    on_difficult = (claimed >= 0) & difficult[claimed]
    claimed = claimed[~on_difficult]
    hit = np.zeros(len(claimed), dtype=bool)
    objects, first_claims = np.unique(claimed, return_index=True)
    hit[first_claims[objects >= 0]] = True
    true_positives = np.cumsum(hit)
    recall = true_positives / num_objects
    precision = true_positives / np.arange(1, len(hit) + 1)
    return VocClassResult(
        num_objects=num_objects,
        area_ap=area_ap(recall, precision),
        eleven_point_ap=eleven_point_ap(recall, precision),
    )


def score_classes(
    *,
    num_classes: int,
    pictures: Integers,
    boxes: Floats,
    scores: Floats,
    labels: Integers,
    truth_pictures: Integers,
    truth_boxes: Floats,
    truth_labels: Integers,
    truth_difficult: NDArray[np.bool_],
    iou_threshold: float = 0.5,
) -> list[VocClassResult]:
    """VOC average precision of every class (shapes at the top of this file).

    The order of the pictures does not matter; within one picture, detections with equal scores
    are taken in the order given.

    Returns:
        One result per class, in class order. The mean leaves out classes whose result is None.
    """
    order = np.argsort(pictures, kind="stable")
    truth_order = np.argsort(truth_pictures, kind="stable")
    results = []
    for label in range(num_classes):
        mine = order[labels[order] == label]
        true = truth_order[truth_labels[truth_order] == label]
        results.append(
            _score_class(
                pictures[mine],
                boxes[mine],
                scores[mine],
                truth_pictures[true],
                truth_boxes[true],
                truth_difficult[true].astype(bool),
                iou_threshold,
            )
        )
    return results
