"""VOC average precision: hand-computed cases and a brute-force reference."""

import numpy as np
import pytest

from mbv3dist.evaluation.voc import area_ap, eleven_point_ap, iou_matrix, score_classes

BOX = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]


def score(detections, truth, num_classes=1, iou_threshold=0.5):
    """detections: (picture, box, score, label); truth: (picture, box, label, difficult)."""
    return score_classes(
        num_classes=num_classes,
        pictures=np.array([d[0] for d in detections], dtype=np.int64),
        boxes=np.array([d[1] for d in detections], dtype=np.float64).reshape(-1, 4),
        scores=np.array([d[2] for d in detections], dtype=np.float64),
        labels=np.array([d[3] for d in detections], dtype=np.int64),
        truth_pictures=np.array([t[0] for t in truth], dtype=np.int64),
        truth_boxes=np.array([t[1] for t in truth], dtype=np.float64).reshape(-1, 4),
        truth_labels=np.array([t[2] for t in truth], dtype=np.int64),
        truth_difficult=np.array([t[3] for t in truth], dtype=bool),
        iou_threshold=iou_threshold,
    )


def test_iou_is_half_open():
    iou = iou_matrix(
        np.array([BOX]), np.array([BOX, [5, 0, 15, 10], [10, 0, 20, 10], [3, 3, 3, 3]])
    )
    assert iou.tolist() == [[1.0, 50 / 150, 0.0, 0.0]]


def test_perfect_detection_scores_one():
    (result,) = score([(0, BOX, 0.9, 0)], [(0, BOX, 0, False)])
    assert (result.area_ap, result.eleven_point_ap, result.num_objects) == (1.0, 1.0, 1)


def test_hand_computed_curve():
    # Hits and misses by score: hit, miss, hit, miss, of 4 objects in all.
    truth = [(i, BOX, 0, False) for i in range(4)]
    detections = [(0, BOX, 0.9, 0), (1, FAR, 0.8, 0), (1, BOX, 0.7, 0), (2, FAR, 0.6, 0)]
    (result,) = score(detections, truth)
    # Recall .25 at precision 1, recall .5 at precision 2/3.
    assert result.area_ap == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    # Recall 0, .1, .2 -> 1; .3, .4, .5 -> 2/3; beyond -> 0.
    assert result.eleven_point_ap == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


def test_second_detection_of_an_object_is_false():
    detections = [(0, BOX, 0.9, 0), (0, BOX, 0.8, 0), (1, BOX, 0.7, 0)]
    (result,) = score(detections, [(0, BOX, 0, False), (1, BOX, 0, False)])
    assert result.area_ap == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_detection_claims_only_its_best_object():
    # Both detections overlap object A most; object B stays unfound although the second reaches it.
    near = [0.0, 0.0, 10.0, 12.0]
    detections = [(0, BOX, 0.9, 0), (0, BOX, 0.8, 0)]
    (result,) = score(detections, [(0, BOX, 0, False), (0, near, 0, False)])
    assert result.area_ap == pytest.approx(0.5)


def test_difficult_objects_count_neither_way():
    easy, hard = (0, BOX, 0, False), (0, FAR, 0, True)
    on_easy, on_hard = (0, BOX, 0.5, 0), (0, FAR, 0.9, 0)
    (result,) = score([on_easy, on_hard, on_hard], [easy, hard])
    assert (result.area_ap, result.num_objects) == (1.0, 1)
    (result,) = score([on_easy], [easy, hard])
    assert result.area_ap == 1.0
    # Below the threshold a detection near a difficult object is an ordinary false positive.
    (result,) = score([on_easy, (0, [50, 50, 60, 54], 0.9, 0)], [easy, hard])
    assert result.area_ap == 0.5


def test_class_without_countable_objects_has_no_score():
    results = score([(0, BOX, 0.9, 0)], [(0, BOX, 1, True)], num_classes=3)
    assert [(r.area_ap, r.eleven_point_ap, r.num_objects) for r in results] == [(None, None, 0)] * 3


def test_nothing_detected_scores_zero():
    (result,) = score([], [(0, BOX, 0, False)])
    assert (result.area_ap, result.eleven_point_ap) == (0.0, 0.0)


def test_threshold_is_inclusive():
    half = [0.0, 0.0, 10.0, 5.0]
    (result,) = score([(0, half, 0.9, 0)], [(0, BOX, 0, False)])
    assert result.area_ap == 1.0
    (result,) = score([(0, [0, 0, 10, 4.9], 0.9, 0)], [(0, BOX, 0, False)])
    assert result.area_ap == 0.0


def test_eleven_points_are_reached_exactly():
    # k of 10 objects found is recall k/10, which must count as reaching that point.
    for found in range(11):
        recall = np.arange(1, found + 1) / 10
        assert eleven_point_ap(recall, np.ones(found)) == pytest.approx(
            (found + 1) / 11 if found else 0.0
        )


def test_area_uses_the_envelope():
    recall, precision = np.array([0.2, 0.2, 0.6]), np.array([0.5, 0.4, 0.8])
    assert area_ap(recall, precision) == pytest.approx(0.6 * 0.8)


def brute_force(detections, truth, label, threshold):
    """The devkit's loop, written out detection by detection."""
    objects = [t for t in truth if t[2] == label]
    positives = sum(not t[3] for t in objects)
    if positives == 0:
        return None, None
    ranked = sorted((d for d in detections if d[3] == label), key=lambda d: (-d[2], d[0]))
    taken, outcomes = set(), []
    for picture, box, _, _ in ranked:
        best, best_iou = -1, -1.0
        for k, (truth_picture, truth_box, _, _) in enumerate(objects):
            if truth_picture == picture:
                width = min(box[2], truth_box[2]) - max(box[0], truth_box[0])
                height = min(box[3], truth_box[3]) - max(box[1], truth_box[1])
                both = max(width, 0.0) * max(height, 0.0)
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, truth_box)]
                iou = both / (sum(areas) - both)
                if iou > best_iou:
                    best, best_iou = k, iou
        if best_iou < threshold:
            outcomes.append(0)
        elif not objects[best][3]:
            outcomes.append(0 if best in taken else 1)
            taken.add(best)
    points = [
        (sum(outcomes[: k + 1]) / positives, sum(outcomes[: k + 1]) / (k + 1))
        for k in range(len(outcomes))
    ]

    def best_precision(at):
        return max((p for r, p in points if r >= at - 1e-12), default=0.0)

    area = sum(best_precision(k / positives) / positives for k in range(1, positives + 1))
    eleven = sum(best_precision(k / 10) for k in range(11)) / 11
    return area, eleven


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force_in_any_order_of_pictures(seed):
    rng = np.random.default_rng(seed)

    def box():
        corner = rng.uniform(0, 30, 2)
        return [*corner, *(corner + rng.uniform(10, 25, 2))]

    truth = [
        (int(rng.integers(6)), box(), int(rng.integers(3)), bool(rng.random() < 0.25))
        for _ in range(25)
    ]
    detections = []
    for picture, near, label, _ in truth:
        for _ in range(rng.integers(4)):
            moved = [v + rng.normal(0, 2) for v in near]
            detections.append((picture, moved, round(float(rng.random()), 1), label))
        detections.append((picture, box(), round(float(rng.random()), 1), label))
    expected = [brute_force(detections, truth, label, 0.5) for label in range(4)]
    # Pictures in any order; a picture's own detections keep their order, which breaks ties.
    pictures = rng.permutation(6)
    shuffled = [d for p in pictures for d in detections if d[0] == p]
    shuffled_truth = [t for p in pictures for t in truth if t[0] == p]
    for found in (detections, shuffled):
        objects = truth if found is detections else shuffled_truth
        for result, (area, eleven) in zip(score(found, objects, 4), expected, strict=True):
            assert result.area_ap == pytest.approx(area)
            assert result.eleven_point_ap == pytest.approx(eleven)
