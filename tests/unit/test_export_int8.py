"""Quantised ONNX files: smaller, close to the model, boxes and scores computed in float."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from lively import (
    classifier,
    classifier_graph,
    detector,
    detector_graph,
    lively_model,
    raw_graph,
    save_lively,
)

from mbv3dist.cli import main
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import eval_batches
from mbv3dist.inference import export, onnx_file
from mbv3dist.inference.quantize import calibration_canvases, quantize, quantize_onnx
from mbv3dist.models.onnx_model import load_onnx
from mbv3dist.models.preprocess import evaluation_view


@pytest.fixture(scope="module")
def quantized(detection_data):
    return quantize(detector_graph(), detector().spec, str(detection_data), num_pictures=6)


def test_a_detector_keeps_its_answers_and_loses_its_size(quantized):
    model, facts = quantized
    before = detector_graph()
    assert facts["split"] == "train" and facts["pictures"] == 6
    assert facts["signal_to_noise_db"].keys() == {"class_logits", "box_deltas"}
    assert min(facts["signal_to_noise_db"].values()) > 10
    assert model.ByteSize() < 0.6 * before.ByteSize()  # names and scales weigh much in a small one
    assert [o.name for o in model.graph.output] == [o.name for o in before.graph.output]
    metadata = {item.key: item.value for item in model.metadata_props}
    assert metadata.pop("int8") == "calibrated on 6 pictures"
    assert metadata == {item.key: item.value for item in before.metadata_props}


def test_weights_have_a_scale_per_channel_and_the_ends_stay_in_float(quantized):
    model, _ = quantized
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    kinds = Counter()
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        weight = producers.get(node.input[1])
        kinds["float" if weight is None else "int8"] += 1
        if weight is None:
            assert node.name.startswith(("model.backbone.conv_stem", "model.backbone.blocks.0."))
            continue
        assert weight.op_type == "DequantizeLinear"
        values, scales = (tensors[name] for name in weight.input[:2])
        assert values.dtype == np.int8
        assert np.abs(values.astype(int)).max() <= 64  # 7 bits: x86 without VNNI would overflow
        assert scales.shape == (values.shape[0],)
    assert kinds["int8"] > 50 and 1 <= kinds["float"] <= 5
    post = {n.name: n for n in model.graph.node if n.op_type in ("Softmax", "NonMaxSuppression")}
    assert len(post) == 2
    decode = [n for n in model.graph.node if n.name.startswith("decode.")]
    assert decode and not any("Quantize" in node.op_type for node in decode)


def test_calibration_sees_what_evaluation_sees(detection_data):
    spec = detector().spec
    found = calibration_canvases(spec, str(detection_data), split="train", num_pictures=10)
    assert [len(canvas) for canvas in found] == [8, 2]
    split = open_split(detection_data, "train")
    batches = eval_batches(split, view=evaluation_view(spec), size=spec.input_size, batch_size=10)
    assert np.array_equal(np.concatenate(found), next(batches).image.numpy())
    batches.close()
    every = calibration_canvases(spec, str(detection_data), split="val", num_pictures=1000)
    assert sum(map(len, every)) == len(open_split(detection_data, "val"))


def test_pictures_resized_in_another_way_are_calibrated_with_too(detection_data):
    loaded = lively_model(
        "ssdlite_mobilenetv3_small", preprocess={"dtype": "float32", "antialias": False}
    )
    (canvas,) = calibration_canvases(
        loaded.spec, str(detection_data), split="train", num_pictures=3
    )
    assert canvas.dtype == np.float32 and canvas.shape == (3, 3, 96, 96)
    assert canvas.min() >= -1e-6 and canvas.max() <= 1 + 1e-6
    plain = calibration_canvases(
        detector().spec, str(detection_data), split="train", num_pictures=3
    )[0]
    assert np.abs(canvas * 255 - plain).mean() < 20  # the same pictures, resized otherwise


def test_a_classifier_is_quantised_by_the_command(
    classification_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(onnx_file, "make_onnx", lambda loaded, raw: classifier_graph())
    folder = save_lively(classifier(), tmp_path / "classifier")
    out = tmp_path / "small.onnx"
    words = ["--int8", str(classification_data), "--num-pictures", "10"]
    main(["export", str(folder), str(out), *words])
    text = capsys.readouterr().out
    assert "quantised on 10 pictures" in text and "mbv3dist eval" in text
    canvases = calibration_canvases(
        classifier().spec, str(classification_data), split="train", num_pictures=10
    )
    again = quantize_onnx(classifier_graph(), canvases)  # the same bytes every time
    assert again.SerializeToString() == out.read_bytes()
    model = load_onnx(out).model
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = classifier().model(images)
    assert out.stat().st_size < 0.5 * classifier_graph().ByteSize()
    signal = expected.square().mean()
    assert float((model(images) - expected).square().mean()) < 0.1 * float(signal)


def test_splits_that_are_not_usual_have_to_be_named(detection_data, tmp_path):
    for path in detection_data.glob("val*"):
        for name in ("val", "test"):
            (tmp_path / path.name.replace("val", name, 1)).symlink_to(path)
    with pytest.raises(ValueError, match="name one with --split"):
        quantize(detector_graph(), detector().spec, str(tmp_path), num_pictures=2)


def test_raw_outputs_are_quantised_and_noise_is_told(detection_data, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "make_onnx", lambda loaded, raw: raw_graph())
    monkeypatch.setattr(export, "LOW_SIGNAL_DB", 1000.0)
    result = export.export_onnx(
        detector(), tmp_path / "raw.onnx", raw=True, int8=str(detection_data), num_pictures=2
    )
    assert result["outputs"] == ["class_logits", "box_deltas", "anchors"]
    assert result["int8"]["signal_to_noise_db"].keys() == {"class_logits", "box_deltas"}
    assert any("a low figure" in line for line in result["lines"])
