"""Post-process: equal to torchvision's, in fixed shapes."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD

from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops.boxes import (
    anchors_to_pixels,
    cxcywh_to_xyxy,
    decode_boxes,
    encode_boxes,
    xyxy_to_cxcywh,
)
from mbv3dist.ops.nms import Detections, postprocess

SIZE = (160, 160)
ANCHORS = make_anchors(AnchorConfig(), feature_sizes(SIZE))
OPTIONS = {
    "score_threshold": 0.05,
    "nms_threshold": 0.55,
    "topk_candidates": 100,
    "max_detections": 80,
}


def random_outputs(num_classes: int, *, spread: float, seed: int, batch: int = 3) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, len(ANCHORS), num_classes + 1, generator=generator) * spread
    deltas = torch.randn(batch, len(ANCHORS), 4, generator=generator) * 2
    return logits, deltas


def torchvision_detections(logits: torch.Tensor, deltas: torch.Tensor, **options: float) -> list:
    owner = SimpleNamespace(
        box_coder=BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)),
        score_thresh=options["score_threshold"],
        nms_thresh=options["nms_threshold"],
        topk_candidates=options["topk_candidates"],
        detections_per_img=options["max_detections"],
    )
    outputs = {"bbox_regression": deltas, "cls_logits": logits}
    pixels = [anchors_to_pixels(ANCHORS, SIZE)] * len(logits)
    return SSD.postprocess_detections(owner, outputs, pixels, [SIZE] * len(logits))


def assert_same(ours: Detections, theirs: list, max_detections: int) -> None:
    assert ours.boxes.shape == (len(theirs), max_detections, 4)
    assert ours.count.tolist() == [len(t["boxes"]) for t in theirs]
    for picture, expected in enumerate(theirs):
        count = len(expected["boxes"])
        assert torch.equal(ours.boxes[picture, :count], expected["boxes"])
        assert torch.equal(ours.scores[picture, :count], expected["scores"])
        assert torch.equal(ours.labels[picture, :count], expected["labels"] - 1)
        assert (ours.labels[picture, count:] == -1).all()
        assert (ours.scores[picture, count:] == 0).all()
        assert (ours.boxes[picture, count:] == 0).all()


@pytest.mark.parametrize("num_classes", [1, 2, 20])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_torchvision(num_classes: int, spread: float, seed: int) -> None:
    logits, deltas = random_outputs(num_classes, spread=spread, seed=seed)
    ours = postprocess(logits, deltas, ANCHORS, size=SIZE, **OPTIONS)
    theirs = torchvision_detections(logits, deltas, **OPTIONS)
    assert_same(ours, theirs, OPTIONS["max_detections"])


@pytest.mark.parametrize(
    "change",
    [
        {"score_threshold": 0.0},
        {"topk_candidates": 100_000},
        {"topk_candidates": 1},
        {"max_detections": 1},
        {"max_detections": 10_000, "nms_threshold": 0.9},
        {"nms_threshold": 0.0},
    ],
)
def test_equals_torchvision_at_the_limits(change: dict) -> None:
    logits, deltas = random_outputs(4, spread=1.5, seed=7)
    options = {**OPTIONS, **change}
    ours = postprocess(logits, deltas, ANCHORS, size=SIZE, **options)
    assert_same(ours, torchvision_detections(logits, deltas, **options), options["max_detections"])


def test_nothing_above_the_threshold() -> None:
    logits, deltas = random_outputs(3, spread=1.0, seed=0)
    logits[1, :, 0] = 100.0  # only background in the second picture
    ours = postprocess(logits, deltas, ANCHORS, size=SIZE, **OPTIONS)
    assert_same(ours, torchvision_detections(logits, deltas, **OPTIONS), OPTIONS["max_detections"])
    assert ours.count[1] == 0


def test_boxes_stay_on_the_canvas() -> None:
    logits, deltas = random_outputs(3, spread=1.0, seed=3)
    ours = postprocess(logits, deltas * 50, ANCHORS, size=(100, 160), **OPTIONS)
    assert ours.boxes.isfinite().all()
    assert ours.boxes.min() >= 0
    assert ours.boxes[..., 0::2].max() <= 160
    assert ours.boxes[..., 1::2].max() <= 100


def test_encode_and_decode_are_inverse() -> None:
    # Sizes within a factor of 20 of each other: beyond 62.5 the decoder clamps.
    boxes = torch.rand(50, 4) * 80
    boxes[:, 2:] += boxes[:, :2] + 4
    anchors = torch.rand(50, 4) * 80
    anchors[:, 2:] += anchors[:, :2] + 4
    deltas = encode_boxes(boxes, anchors)
    torch.testing.assert_close(decode_boxes(deltas, anchors), boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    theirs = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    assert torch.equal(deltas, theirs.encode_single(boxes, anchors))
    assert torch.equal(decode_boxes(deltas, anchors), theirs.decode_single(deltas, anchors))
    wild = torch.randn(50, 4) * 100
    assert torch.equal(decode_boxes(wild, anchors), theirs.decode_single(wild, anchors))
