"""DetectionEvaluator: figures, independence of order and sharding, JSON, silence."""

import json

import numpy as np
import pytest

from mbv3dist.evaluation.detection import DetectionEvaluator

BOX = [0.0, 0.0, 40.0, 40.0]
FAR = [100.0, 100.0, 140.0, 140.0]
CLASSES = ("cell", "dot", "never")


def picture(detections=(), truth=()):
    """detections: (box, score, label); truth: (box, label, difficult)."""
    return {
        "boxes": [d[0] for d in detections],
        "scores": [d[1] for d in detections],
        "labels": [d[2] for d in detections],
        "truth_boxes": [t[0] for t in truth],
        "truth_labels": [t[1] for t in truth],
        "truth_difficult": [t[2] for t in truth],
    }


def evaluate(pictures, classes=CLASSES):
    evaluator = DetectionEvaluator(classes)
    for index, fields in pictures.items():
        evaluator.add(index, **fields)
    return evaluator.result()


def random_pictures(seed, count=12):
    rng = np.random.default_rng(seed)
    pictures = {}
    for index in range(count):
        num_objects = int(rng.integers(0, 5))
        corner = rng.uniform(0, 60, (num_objects, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(15, 60, (num_objects, 2))], axis=1)
        labels = rng.integers(0, 2, num_objects)
        moved = np.repeat(boxes, 3, axis=0) + rng.normal(0, 3, (3 * num_objects, 4))
        pictures[index] = {
            "boxes": moved,
            "scores": rng.uniform(0, 1, len(moved)).round(1),
            "labels": np.repeat(labels, 3),
            "truth_boxes": boxes,
            "truth_labels": labels,
            "truth_difficult": rng.random(num_objects) < 0.2,
        }
    return pictures


def test_perfect_detections_score_one_and_absent_classes_are_left_out():
    result = evaluate(
        {
            4: picture([(BOX, 0.9, 0), (FAR, 0.8, 1)], [(BOX, 0, 0), (FAR, 1, 0)]),
            2: picture([(BOX, 0.7, 0)], [(BOX, 0, 0)]),
        }
    )
    assert result["samples"] == 2
    for name in ("map", "map_50", "voc_map", "voc07_map"):
        assert result[name] == pytest.approx(1.0)
    assert list(result["per_class"]) == list(CLASSES)
    assert result["per_class"]["cell"]["objects"] == 2
    never = result["per_class"]["never"]
    assert never == {"ap": None, "ap_50": None, "voc_ap": None, "voc07_ap": None, "objects": 0}


def test_half_found_by_hand():
    # One of two objects found: COCO's 101 recall points up to .5 are 51, so AP = 51 / 101.
    result = evaluate(
        {0: picture([(BOX, 0.9, 0)], [(BOX, 0, 0)]), 1: picture([], [(BOX, 0, 0)])}, ("cell",)
    )
    assert result["map"] == pytest.approx(51 / 101)
    assert result["map_50"] == pytest.approx(51 / 101)
    assert result["voc_map"] == pytest.approx(0.5)
    assert result["voc07_map"] == pytest.approx(6 / 11)


def test_map_takes_the_iou_thresholds_that_the_box_reaches():
    # IoU 0.72 reaches 0.50, 0.55, ... 0.70: five of ten thresholds.
    wide = [0.0, 0.0, 40.0, 40.0 * 0.72]
    result = evaluate({0: picture([(wide, 0.9, 0)], [(BOX, 0, 0)])}, ("cell",))
    assert result["map"] == pytest.approx(0.5)
    assert result["map_50"] == pytest.approx(1.0)


def test_difficult_objects_count_neither_way():
    truth = [(BOX, 0, False), (FAR, 0, True)]
    found = evaluate({0: picture([(BOX, 0.5, 0), (FAR, 0.9, 0)], truth)}, ("cell",))
    missed = evaluate({0: picture([(BOX, 0.5, 0)], truth)}, ("cell",))
    for result in (found, missed):
        assert result["map"] == pytest.approx(1.0)
        assert result["voc_map"] == pytest.approx(1.0)
        assert result["per_class"]["cell"]["objects"] == 1


def test_detections_on_pictures_without_objects_are_false():
    pictures = {
        0: picture([(BOX, 0.5, 0)], [(BOX, 0, 0)]),
        1: picture([(BOX, 0.9, 0)], []),
    }
    result = evaluate(pictures, ("cell",))
    assert result["map_50"] == pytest.approx(0.5)
    assert result["voc_map"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_order_and_sharding_change_nothing(seed):
    pictures = random_pictures(seed)
    expected = evaluate(pictures)
    rng = np.random.default_rng(seed)
    shuffled = dict(rng.permutation(np.array(list(pictures.items()), dtype=object)).tolist())
    assert evaluate(shuffled) == expected
    parts = [DetectionEvaluator(CLASSES) for _ in range(3)]
    for index, fields in pictures.items():
        parts[index % 3].add(index, **fields)
    whole = DetectionEvaluator(CLASSES)
    whole.merge(part.payload() for part in reversed(parts))
    assert whole.num_samples == len(pictures)
    assert whole.result() == expected


def test_result_is_json_and_nothing_is_printed(capfd, caplog):
    caplog.set_level("DEBUG")
    result = evaluate(random_pictures(0))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.text) == ("", "", "")


def test_no_pictures_and_no_detections():
    assert evaluate({})["samples"] == 0
    assert evaluate({})["map"] is None
    result = evaluate({0: picture([], [(BOX, 0, 0)])}, ("cell",))
    assert (result["map"], result["map_50"], result["voc_map"]) == (0.0, 0.0, 0.0)
    assert evaluate({0: picture()})["map"] is None


def test_a_picture_is_scored_once():
    evaluator = DetectionEvaluator(CLASSES)
    evaluator.add(3, **picture())
    evaluator.add(3, **picture())
    with pytest.raises(AssertionError, match="twice"):
        evaluator.result()


def test_does_not_alias_reused_buffers():
    evaluator = DetectionEvaluator(("cell",))
    buffer = np.array([BOX], dtype=np.float32)
    evaluator.add(
        0,
        **picture([(buffer[0], 0.9, 0)])
        | {"boxes": buffer, "truth_boxes": [BOX], "truth_labels": [0], "truth_difficult": [0]},
    )
    buffer[:] = 0
    assert evaluator.result()["map"] == pytest.approx(1.0)
