"""Post-process: equal to torchvision's, in fixed shapes, and one op for compile and export."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nms_cases import difference, has_ties, mismatches, random_case, torchvision_detections
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD

from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops import nms, nms_cpu
from mbv3dist.ops.boxes import (
    anchors_to_pixels,
    cxcywh_to_xyxy,
    decode_boxes,
    encode_boxes,
    xyxy_to_cxcywh,
)
from mbv3dist.ops.nms import Detections, postprocess, postprocess_reference

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


def plain_detections(logits: torch.Tensor, deltas: torch.Tensor, **options: float) -> list:
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
    theirs = plain_detections(logits, deltas, **OPTIONS)
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
    assert_same(ours, plain_detections(logits, deltas, **options), options["max_detections"])


def test_nothing_above_the_threshold() -> None:
    logits, deltas = random_outputs(3, spread=1.0, seed=0)
    logits[1, :, 0] = 100.0  # only background in the second picture
    ours = postprocess(logits, deltas, ANCHORS, size=SIZE, **OPTIONS)
    assert_same(ours, plain_detections(logits, deltas, **OPTIONS), OPTIONS["max_detections"])
    assert ours.count[1] == 0


def test_boxes_stay_on_the_canvas() -> None:
    logits, deltas = random_outputs(3, spread=1.0, seed=3)
    ours = postprocess(logits, deltas * 50, ANCHORS, size=(100, 160), **OPTIONS)
    assert ours.boxes.isfinite().all()
    assert ours.boxes.min() >= 0
    assert ours.boxes[..., 0::2].max() <= 160
    assert ours.boxes[..., 1::2].max() <= 100


@given(
    seed=st.integers(0, 2**32 - 1),
    num_anchors=st.integers(0, 80),
    num_classes=st.integers(1, 6),
    first_try=st.integers(1, 20),
)
@settings(deadline=None, max_examples=60)
def test_candidates_come_in_parts(seed, num_anchors, num_classes, first_try):
    """However few candidates are tried first, the result is the same."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, batch=3, num_anchors=num_anchors, num_classes=num_classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms_cpu, "FIRST_TRY", first_try)
        ours = case.run(postprocess)
        patch.setattr(nms_cpu, "MOVED_APART", 10)
        apart = case.run(postprocess)
    assert mismatches(ours, torchvision_detections(case, stable=has_ties(case))) == 0
    assert torch.equal(apart.count > 0, ours.count > 0)


def test_equal_scores_are_in_the_order_of_classes_and_anchors():
    logits = torch.zeros(1, 4, 3)
    logits[..., 0] = -9
    anchors = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.6, 0.6, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]])
    anchors = torch.cat((anchors, torch.tensor([[0.9, 0.1, 0.1, 0.1]])))
    options = {**OPTIONS, "topk_candidates": 3}  # the fourth anchor is not among them
    for function in (postprocess, postprocess_reference):
        found = function(logits, torch.zeros(1, 4, 4), anchors, size=SIZE, **options)
        assert found.count.tolist() == [4]  # the third box is a copy of the first
        assert found.labels[0, :4].tolist() == [0, 0, 1, 1]
        expected = anchors_to_pixels(anchors[:2], SIZE)
        torch.testing.assert_close(found.boxes[0, :4], torch.cat((expected, expected)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nms_threshold": -0.1}, "nms_threshold must be at least 0, got -0.1"),
        ({"nms_threshold": float("nan")}, "nms_threshold must be at least 0"),
        ({"topk_candidates": 0}, "must be at least 1, got 0 and 80"),
        ({"max_detections": 0}, "must be at least 1, got 100 and 0"),
    ],
)
def test_options_without_a_meaning_are_refused(change, message):
    logits, deltas = random_outputs(2, spread=1.0, seed=0)
    for function in (postprocess, postprocess_reference):
        with pytest.raises(ValueError, match=message):
            function(logits, deltas, ANCHORS, size=SIZE, **{**OPTIONS, **change})


def test_shapes_that_do_not_belong_together_are_refused():
    logits, deltas = random_outputs(2, spread=1.0, seed=0)
    with pytest.raises(ValueError, match=r"need box_deltas \[3, \d+, 4\] and anchors"):
        postprocess(logits, deltas[:, :-1], ANCHORS, size=SIZE, **OPTIONS)
    with pytest.raises(ValueError, match="need box_deltas"):
        postprocess(logits, deltas, ANCHORS[1:], size=SIZE, **OPTIONS)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("num_anchors", [0, 5])
def test_empty_batches_and_no_anchors(batch, num_anchors):
    logits, deltas = torch.zeros(batch, num_anchors, 3), torch.zeros(batch, num_anchors, 4)
    found = postprocess(logits, deltas, ANCHORS[:num_anchors], size=SIZE, **OPTIONS)
    there = postprocess_reference(logits, deltas, ANCHORS[:num_anchors], size=SIZE, **OPTIONS)
    assert found.boxes.shape == (batch, OPTIONS["max_detections"], 4)
    assert difference(found, there) == 0


def test_other_devices_take_the_reference():
    """The op's implementation where there is no other, called directly."""
    logits, deltas = random_outputs(4, spread=1.5, seed=5)
    found = nms._by_reference(logits, deltas, ANCHORS, SIZE, *OPTIONS.values())
    ours = postprocess(logits, deltas, ANCHORS, size=SIZE, **OPTIONS)
    assert difference(Detections(*found), ours) == 0


def test_compiled_code_without_a_place_to_be_kept(monkeypatch):
    njit = nms_cpu.numba.njit

    def unwritable(**options):
        if options.get("cache"):
            raise RuntimeError("no locator available")
        return njit(**options)

    monkeypatch.setattr(nms_cpu.numba, "njit", unwritable)
    assert nms_cpu._compiled(lambda value: value + 1)(2) == 3


def test_no_gradient_is_kept():
    logits, deltas = (x.requires_grad_() for x in random_outputs(2, spread=1.0, seed=0))
    found = postprocess(logits, deltas, ANCHORS, size=SIZE, **OPTIONS)
    assert not found.boxes.requires_grad and not found.scores.requires_grad


def test_half_precision_is_widened_first():
    logits, deltas = random_outputs(4, spread=2.0, seed=1)
    for dtype in (torch.float16, torch.bfloat16):
        half = (logits.to(dtype), deltas.to(dtype))
        found = postprocess(*half, ANCHORS, size=SIZE, **OPTIONS)
        there = postprocess(*(x.float() for x in half), ANCHORS, size=SIZE, **OPTIONS)
        assert difference(found, there) == 0


# The op.


class Detector(nn.Module):
    """Raw outputs as a model has them, and post-process."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(6, num_classes + 1), nn.Linear(6, 4)
        self.register_buffer("anchors", ANCHORS)

    def forward(self, features: torch.Tensor) -> Detections:
        """Features are float32 [B, A, 6]."""
        raw = self.classes(features), self.boxes(features)
        return postprocess(*raw, self.anchors, size=SIZE, **OPTIONS)


def test_the_op_keeps_the_rules_of_ops():
    logits, deltas = random_outputs(3, spread=1.0, seed=2)
    torch.library.opcheck(
        torch.ops.mbv3dist.postprocess.default,
        (logits, deltas, ANCHORS, list(SIZE), 0.05, 0.55, 100, 80),
    )


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_post_processes(strict):
    model = Detector(3).eval()
    features = torch.randn(2, len(ANCHORS), 6) * 3
    dynamic = {"features": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (features,), dynamic_shapes=dynamic, strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("mbv3dist.postprocess" in name for name in names) == 1
    for batch in (2, 5):
        features = torch.randn(batch, len(ANCHORS), 6) * 3
        with torch.no_grad():
            found, there = program.module()(features), model(features)
        assert isinstance(found, Detections)
        assert there.count.min() > 0
        assert difference(found, there) == 0


def test_a_compiled_model_post_processes():
    """As one graph. What a compiler makes of the op's surroundings is tested on a GPU."""
    model = Detector(3).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 5, 3):
        features = torch.randn(batch, len(ANCHORS), 6) * 3
        with torch.no_grad():
            found, there = compiled(features), model(features)
        assert there.count.min() > 0
        assert difference(found, there) == 0


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
