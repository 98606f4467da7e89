"""Exported ONNX files in the place of a model: `eval` and `predict` give the same answers."""

import json

import pytest
import torch
from lively import classifier, classifier_graph, detector, detector_graph, raw_graph, save_lively
from PIL import Image

from mbv3dist.cli import main
from mbv3dist.data.index import open_split
from mbv3dist.evaluation.run import evaluate
from mbv3dist.inference.check import drawn_canvases
from mbv3dist.inference.predict import classify, detect
from mbv3dist.models.onnx_model import load_any_model, to_canvas
from mbv3dist.models.preprocess import normalize


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: .onnx file}: detector, raw, classifier."""
    folder = tmp_path_factory.mktemp("exported")
    graphs = {
        "detector": detector_graph(),
        "raw": raw_graph(),
        "classifier": classifier_graph(),
    }
    for name, graph in graphs.items():
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())
    return {name: folder / f"{name}.onnx" for name in graphs}


@pytest.mark.parametrize("name", ["detector", "raw"])
def test_a_detector_scores_as_its_model(name, files, detection_data):
    split = open_split(detection_data, "val")
    expected = evaluate(detector().model, detector().spec, split, batch_size=4)
    loaded = load_any_model(files[name])
    found = evaluate(loaded.model, loaded.spec, split, batch_size=4, device="cpu")
    assert found["samples"] == expected["samples"] == 7
    for key in ("map", "map_50", "voc_map"):
        assert found[key] == pytest.approx(expected[key], abs=1e-4)
    for key in ("loss", "loss_regression", "loss_classification"):
        if name == "raw":
            assert found[key] == pytest.approx(expected[key], rel=1e-4)
        else:
            assert found[key] is None  # detections do not tell


def test_the_commands_take_a_file(files, detection_data, tmp_path, capsys):
    main(["eval", str(files["detector"]), str(detection_data), "--split", "val", "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == 7
    picture = tmp_path / "one.png"
    pixels = drawn_canvases(detector().spec, 1, seed=0)[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(picture)
    results = []
    for model in (files["detector"], save_lively(detector(), tmp_path / "model")):
        words = ["predict", str(model), str(picture), "--out", str(tmp_path / "out")]
        main([*words, "--score-threshold", "0.5", "--json"])
        results.append(json.loads(capsys.readouterr().out)["pictures"][0]["detections"])
    assert len(results[0]) == len(results[1]) > 5
    for found, expected in zip(*results, strict=True):
        assert found["label"] == expected["label"] and found["score"] > 0.5
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert found["box"] == pytest.approx(expected["box"], abs=1e-2)


def test_from_python_too(files):
    pictures = list(drawn_canvases(detector().spec, 2, seed=4))
    found = detect(load_any_model(files["detector"]), pictures, score_threshold=0.3)
    expected = detect(detector(), pictures, score_threshold=0.3)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        assert torch.allclose(ours["boxes"], theirs["boxes"], atol=1e-2)
    named = classify(load_any_model(files["classifier"]), pictures, top=2)
    for ours, theirs in zip(named, classify(classifier(), pictures, top=2), strict=True):
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], abs=1e-4)


def test_a_classifier_scores_as_its_model(files, classification_data):
    split = open_split(classification_data, "val")
    expected = evaluate(classifier().model, classifier().spec, split, batch_size=4)
    loaded = load_any_model(files["classifier"])
    found = evaluate(loaded.model, loaded.spec, split, batch_size=4, device="cpu")
    assert found["top1"] == expected["top1"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_canvas_comes_back_from_its_normalisation():
    preprocess = detector().spec.preprocess
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    assert torch.equal(to_canvas(normalize(levels, preprocess), preprocess), levels)
