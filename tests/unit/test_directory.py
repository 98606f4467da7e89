"""Model directories: round trips, atomic replacement, and messages for what is wrong."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from mbv3dist.models.anchors import AnchorConfig
from mbv3dist.models.directory import (
    ModelSpec,
    Preprocess,
    Thresholds,
    load_model,
    model_from_spec,
    new_spec,
    save_model,
    spec_from_json,
    spec_to_json,
)

CLASSIFIER = new_spec("mobilenetv3_small", ["cat", "dög"], input_size=64, width=0.5)
DETECTOR = new_spec(
    "ssdlite_mobilenetv3_small",
    ["cat", "dog", "owl"],
    input_size=64,
    width=0.5,
    anchors=AnchorConfig(ratios=(1.5,)),
    thresholds=Thresholds(score=0.01),
    provenance={"z": 1, "a": [1, 2]},
)


@pytest.mark.parametrize("spec", [CLASSIFIER, DETECTOR], ids=["classifier", "detector"])
def test_round_trip(spec: ModelSpec, tmp_path: Path) -> None:
    model = model_from_spec(spec)
    images = torch.randn(2, 3, 64, 64)
    model(images)  # moves the running statistics
    save_model(model.to(memory_format=torch.channels_last), spec, tmp_path / "a" / "model")
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "a" / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.spec == spec
    assert not loaded.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    mine, theirs = (
        loaded.model(images),
        model.to(memory_format=torch.contiguous_format).eval()(images),
    )
    assert torch.equal(torch.cat([*mine], -1), torch.cat([*theirs], -1))


def test_files_are_deterministic_and_free_of_leftovers(tmp_path: Path) -> None:
    model = model_from_spec(DETECTOR)
    for name in ("one", "two", "two"):  # the second time "two" is replaced
        save_model(model, DETECTOR, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    content = json.loads((tmp_path / "one" / "model.json").read_text())
    assert content["architecture"] == "ssdlite_mobilenetv3_small"
    assert content["classes"] == ["cat", "dog", "owl"]
    assert content["preprocess"] == {
        "resize": 64,
        "interpolation": "bilinear",
        "antialias": True,
        "dtype": "uint8",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "whole": False,
    }
    assert content["anchors"]["ratios"] == [1.5]
    assert content["thresholds"]["score"] == 0.01
    assert list(content["provenance"]) == ["a", "z"]


def test_a_failed_save_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_from_spec(CLASSIFIER)
    save_model(model, CLASSIFIER, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.conv_stem.weight.add_(1)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, CLASSIFIER, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"free some \(it takes .* MB\)") as caught:
        save_model(model_from_spec(CLASSIFIER), CLASSIFIER, tmp_path / "model")
    assert caught.value.filename == str(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_no_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match="is no model"):
        save_model(model_from_spec(CLASSIFIER), CLASSIFIER, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (Path("/proc/x"), tmp_path / "file" / "model"):
        with pytest.raises(OSError, match="choose another place") as caught:
            save_model(model_from_spec(CLASSIFIER), CLASSIFIER, path)
        assert caught.value.filename == str(path)


def test_defaults_follow_the_task_and_the_weights() -> None:
    detector = new_spec("ssdlite_mobilenetv3_large", ["a"])
    assert (detector.input_size, detector.reduced_tail, detector.bn_eps) == (320, True, 1e-3)
    assert detector.anchors == AnchorConfig()
    assert detector.preprocess == Preprocess(320, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pretrained = new_spec("ssdlite_mobilenetv3_large", ["a"], pretrained=True)
    assert (pretrained.reduced_tail, pretrained.bn_eps) == (False, 1e-5)
    assert pretrained.preprocess.mean == (0.485, 0.456, 0.406)
    classifier = new_spec("mobilenetv3_large", ["a"])
    assert (classifier.input_size, classifier.preprocess.resize) == (224, 256)
    assert classifier.reduced_tail is False
    assert classifier.anchors is classifier.thresholds is None


def test_unknown_keys_of_later_versions_are_ignored() -> None:
    content = json.loads(spec_to_json(DETECTOR))
    content["added_later"] = 1
    assert spec_from_json(json.dumps(content)) == DETECTOR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "ssdlite_mobilnetv3_small"}, "did you mean 'ssdlite_mobilenetv3_small'"),
        ({"task": "classification"}, "is for detection, not 'classification'"),
        ({"classes": []}, "at least one class"),
        ({"anchors": None}, "anchors"),
        ({"preprocess": 3}, "Preprocess"),
        ({"preprocess": {}}, "resize"),
    ],
)
def test_wrong_descriptions(change: dict, message: str) -> None:
    content = {**json.loads(spec_to_json(DETECTOR)), **change}
    with pytest.raises(ValueError, match=message) as caught:
        spec_from_json(json.dumps(content))
    assert "\n" not in str(caught.value)


def test_wrong_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; give a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model\.json is missing"):
        load_model(tmp_path)
    path = tmp_path / "model"
    save_model(model_from_spec(CLASSIFIER), CLASSIFIER, path)
    (path / "model.json").write_text(spec_to_json(DETECTOR))
    with pytest.raises(ValueError, match="weights do not fit"):
        load_model(path)
    (path / "model.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        load_model(path)
    (path / "model.json").write_text(spec_to_json(CLASSIFIER))
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_model(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.pth", r"`mbv3dist import .*w\.pth DIR --arch NAME`"),
        ("w.safetensors", r"`mbv3dist import .*w\.safetensors DIR"),
        ("m.pt2", "torch.export.load, which no command here takes"),
        ("m.onnx", "an export, which eval and predict take"),
        ("photo.JPG", "give a directory with model.json and model.safetensors"),
        ("model.safetensors", "give the directory it is in, "),
        ("model.json", "give the directory it is in, "),
    ],
)
def test_a_file_is_told_what_it_is_good_for(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=f"{name} is a file; .*{message}") as caught:
        load_model(tmp_path / name)
    assert "\n" not in str(caught.value)
