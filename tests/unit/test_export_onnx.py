"""ONNX files: the graph's detections are ours, for any batch, thresholds, ties and none at all."""

import json
import re
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import CLASSES, classifier, classifier_graph, detector, detector_graph, raw_graph
from onnx import helper

from mbv3dist.inference.check import (
    compare_detections,
    drawn_canvases,
    reference_detections,
    reference_outputs,
)
from mbv3dist.inference.describe import describe_outputs
from mbv3dist.inference.onnx_builder import GraphBuilder
from mbv3dist.inference.onnx_postprocess import OUTPUTS, add_postprocess
from mbv3dist.models.directory import Thresholds, spec_from_json
from mbv3dist.models.onnx_model import open_session
from mbv3dist.ops.boxes import anchors_to_pixels, decode_boxes
from mbv3dist.ops.nms import Detections, postprocess_reference

SIZE = 64


def session_of(model):
    return open_session(model.SerializeToString(), source="test", num_threads=1)


def detections(session, **inputs):
    return Detections(*map(torch.from_numpy, session.run(list(OUTPUTS), inputs)))


def postprocess_session(anchors, num_classes, thresholds):
    """The post-process alone, as a graph of its own."""
    builder = GraphBuilder()
    for name in ("logits", "deltas"):
        builder.unique(name)
    add_postprocess(
        builder,
        "logits",
        "deltas",
        anchors=anchors,
        num_classes=num_classes,
        size=SIZE,
        thresholds=thresholds,
    )
    value = helper.make_tensor_value_info
    number = len(anchors)
    model = builder.model(
        [
            value("logits", 1, ["batch", number, num_classes + 1]),
            value("deltas", 1, ["batch", number, 4]),
        ],
        [
            value("boxes", 1, ["batch", thresholds.max_detections, 4]),
            value("scores", 1, ["batch", thresholds.max_detections]),
            value("labels", 7, ["batch", thresholds.max_detections]),
            value("count", 7, ["batch"]),
        ],
        name="postprocess",
        description="",
        metadata={},
        version="0",
    )
    return session_of(model)


def expected_detections(logits, deltas, anchors, thresholds):
    return postprocess_reference(
        torch.from_numpy(logits),
        torch.from_numpy(deltas),
        anchors,
        size=(SIZE, SIZE),
        score_threshold=thresholds.score,
        nms_threshold=thresholds.nms,
        topk_candidates=thresholds.topk_candidates,
        max_detections=thresholds.max_detections,
    )


THRESHOLDS = st.builds(
    Thresholds,
    score=st.sampled_from([0.0, 0.001, 0.2, 0.6, 0.999]),
    nms=st.sampled_from([0.0, 0.25, 0.5, 0.55, 1.0]),
    topk_candidates=st.integers(1, 40),
    max_detections=st.integers(1, 60),
)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    num_anchors=st.integers(1, 40),
    num_classes=st.integers(1, 4),
    thresholds=THRESHOLDS,
    ties=st.booleans(),
)
def test_postprocess_is_equal_to_ours(seed, batch, num_anchors, num_classes, thresholds, ties):
    # Boxes on a grid and no deltas: every overlap is exact, so that even those equal to the
    # threshold have to be decided alike. Some boxes lie outside the canvas or have no area.
    rng = np.random.default_rng(seed)
    corner = rng.integers(-2, 15, (num_anchors, 2)) * 4
    extent = rng.integers(0, 7, (num_anchors, 2)) * 8
    anchors = torch.from_numpy(np.concatenate((corner + extent / 2, extent), 1) / SIZE).float()
    logits = rng.normal(0, 3, (batch, num_anchors, num_classes + 1)).astype(np.float32)
    if ties:
        logits[:, :] = logits[:, rng.integers(0, min(3, num_anchors), num_anchors)]
    deltas = np.zeros((batch, num_anchors, 4), dtype=np.float32)

    session = postprocess_session(anchors, num_classes, thresholds)
    found = detections(session, logits=logits, deltas=deltas)
    wanted = expected_detections(logits, deltas, anchors, thresholds)
    assert torch.equal(found.count, wanted.count)
    assert torch.equal(found.labels, wanted.labels)
    assert torch.equal(found.boxes, wanted.boxes)
    assert torch.allclose(found.scores, wanted.scores, rtol=0, atol=1e-6)


def test_deltas_are_decoded_as_ours_the_large_ones_clamped():
    rng = np.random.default_rng(0)
    anchors = torch.from_numpy(rng.uniform(0.05, 0.95, (500, 4))).float()
    deltas = rng.normal(0, 4, (3, 500, 4)).astype(np.float32)
    deltas[0, :20] = 1000.0
    logits = rng.normal(0, 3, (3, 500, 6)).astype(np.float32)
    thresholds = Thresholds(score=0.01, nms=0.9, topk_candidates=200, max_detections=300)
    found = detections(postprocess_session(anchors, 5, thresholds), logits=logits, deltas=deltas)
    agreement = compare_detections(found, expected_detections(logits, deltas, anchors, thresholds))
    assert agreement.detections > 1500
    assert agreement.unmatched <= 2  # an overlap of 0.9 to the last digit may fall either way
    assert agreement.boxes_px < 1e-4
    assert agreement.scores < 1e-6


@pytest.mark.parametrize("batch", [1, 7])
def test_detections_on_fifty_pictures_are_ours(batch):
    session, loaded = session_of(detector_graph()), detector()
    canvases = drawn_canvases(loaded.spec, 56, seed=5)
    pixels = scores = 0.0
    compared = 0
    for first in range(0, len(canvases), batch):
        canvas = canvases[first : first + batch]
        found = detections(session, images=canvas.numpy())
        outputs = reference_outputs(loaded, canvas)
        wanted = reference_detections(loaded, outputs["class_logits"], outputs["box_deltas"])
        agreement = compare_detections(found, wanted)
        assert agreement.unmatched <= 0.001 * agreement.detections
        pixels, scores = max(pixels, agreement.boxes_px), max(scores, agreement.scores)
        compared += agreement.detections // 2
        for picture in range(len(canvas)):  # in the same order, where no two scores are equal
            n = int(min(found.count[picture], wanted.count[picture]))
            gaps = -wanted.scores[picture, :n].diff()
            distinct = int((gaps < 1e-5).nonzero()[0]) if bool((gaps < 1e-5).any()) else n
            labels = found.labels[picture, :distinct], wanted.labels[picture, :distinct]
            assert torch.equal(*labels)
    assert compared > 56 * 50
    assert pixels <= 1e-4 * loaded.spec.input_size
    assert scores <= 1e-4


def test_the_graph_is_plain_onnx_for_old_runtimes():
    graph = detector_graph()
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["BatchNormalization"] == 0
    assert kinds["NonMaxSuppression"] == 1
    assert {item.domain for item in graph.opset_import} == {""}
    assert graph.opset_import[0].version == 13
    assert graph.ir_version == 7
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert "model.backbone.conv_stem" in names
    (image,) = graph.graph.input
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == [
        "batch",
        3,
        96,
        96,
    ]
    content = graph.SerializeToString()
    for private in (b"site-packages", b".py", b"/home", str(onnx.__file__).encode()):
        assert private not in content


def test_the_metadata_says_all_that_a_program_needs():
    metadata = session_of(detector_graph()).get_modelmeta().custom_metadata_map
    assert spec_from_json(metadata["model.json"]) == detector().spec
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert "0 to 255" in json.loads(metadata["input"])["images"]
    assert list(json.loads(metadata["outputs"])) == list(OUTPUTS)
    assert metadata["postprocess"] == "nms"


def test_raw_outputs_are_the_networks_with_its_anchors():
    loaded = detector()
    session = session_of(raw_graph())
    canvas = drawn_canvases(loaded.spec, 3, seed=1)
    logits, deltas, anchors = map(torch.from_numpy, session.run(None, {"images": canvas.numpy()}))
    assert [output.name for output in session.get_outputs()] == [
        "class_logits",
        "box_deltas",
        "anchors",
    ]
    expected = reference_outputs(loaded, canvas)
    assert torch.allclose(logits, expected["class_logits"], atol=1e-3)
    assert torch.allclose(deltas, expected["box_deltas"], atol=1e-3)
    assert torch.equal(anchors, loaded.model.anchors)


def test_raw_outputs_become_detections_as_their_description_says():
    """By the formulas in the file's own metadata, in NumPy."""
    loaded = detector()
    texts = describe_outputs(loaded, raw=True)
    assert "dx / 10" in texts["box_deltas"][2] and "dw / 5" in texts["box_deltas"][2]
    rng = np.random.default_rng(0)
    deltas = rng.normal(0, 3, (len(loaded.model.anchors), 4)).astype(np.float32)
    x, y, w, h = loaded.model.anchors.numpy().T * loaded.spec.input_size
    dx, dy, dw, dh = deltas.T
    limit = float(re.search(r"dw / 5, ([0-9.]+)", texts["box_deltas"][2])[1])
    width, height = w * np.exp(np.minimum(dw / 5, limit)), h * np.exp(np.minimum(dh / 5, limit))
    middle_x, middle_y = x + w * dx / 10, y + h * dy / 10
    corners = (
        middle_x - width / 2,
        middle_y - height / 2,
        middle_x + width / 2,
        middle_y + height / 2,
    )
    size = (loaded.spec.input_size, loaded.spec.input_size)
    expected = decode_boxes(torch.from_numpy(deltas), anchors_to_pixels(loaded.model.anchors, size))
    assert np.allclose(np.stack(corners, 1), expected.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_classifier_gives_its_logits(batch):
    session = session_of(classifier_graph())
    canvas = drawn_canvases(classifier().spec, batch, seed=batch)
    assert canvas.dtype == torch.float32  # as this one asks for
    (logits,) = session.run(None, {"images": canvas.numpy()})
    expected = reference_outputs(classifier(), canvas)["logits"]
    assert [output.name for output in session.get_outputs()] == ["logits"]
    assert float(expected.std()) > 0.05
    assert torch.allclose(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nms": 1.5}, "thresholds.nms is 1.5"),
        ({"topk_candidates": 0}, "topk_candidates is 0"),
        ({"max_detections": 0}, "max_detections is 0"),
    ],
)
def test_thresholds_that_onnx_cannot_express_are_refused(changes, words):
    anchors = torch.full((3, 4), 0.5)
    with pytest.raises(ValueError, match=words):
        postprocess_session(anchors, 2, Thresholds(**changes))
