"""Pixels as other libraries make them, to the last bit, in evaluation and prediction alike."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional as TF

from mbv3dist.data.index import open_split
from mbv3dist.evaluation.detection import DetectionEvaluator
from mbv3dist.evaluation.run import evaluate
from mbv3dist.inference.predict import classify, detect, predict
from mbv3dist.models.directory import LoadedModel, ModelSpec, Preprocess, model_from_spec, new_spec
from mbv3dist.models.preprocess_whole import whole_input
from tests.rewritten import rewrite_members

CLASSES = ("blue", "green", "red")
SIDES = st.integers(1, 90)
PIXELS = settings(max_examples=40, deadline=None)
MIXES = [
    {"dtype": dtype, "interpolation": interpolation, "antialias": antialias}
    for dtype in ("uint8", "float32")
    for interpolation in ("bilinear", "bicubic")
    for antialias in (True, False)
]


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def spec_of(architecture: str, size: int, **preprocess: object) -> ModelSpec:
    spec = new_spec(architecture, CLASSES, input_size=size, width=0.5)
    return replace(spec, preprocess=replace(spec.preprocess, whole=True, **preprocess))


@PIXELS
@given(width=SIDES, height=SIDES, size=st.integers(32, 60))
def test_torchvisions_detectors(width: int, height: int, size: int) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    spec = spec_of(
        "ssdlite_mobilenetv3_small", size, dtype="float32", antialias=False, mean=mean, std=std
    )
    theirs = GeneralizedRCNNTransform(
        size, size, mean, std, size_divisible=1, fixed_size=(size, size)
    ).eval()
    picture = noise(width, height)
    preset = torchvision.models.detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.transforms()
    expected = theirs([preset(picture)])[0].tensors[0]
    assert torch.equal(whole_input(picture, spec), expected)
    # A float tensor is taken as it is, in its own memory order, as torchvision takes it.
    tensor = torch.rand(3, height, width, generator=torch.Generator().manual_seed(width))
    assert torch.equal(whole_input(tensor, spec), theirs([tensor])[0].tensors[0])


@PIXELS
@given(width=SIDES, height=SIDES, size=st.integers(8, 40), resize=st.integers(8, 60))
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_torchvisions_classifiers(
    interpolation: str, width: int, height: int, size: int, resize: int
) -> None:
    spec = spec_of("mobilenetv3_small", size, resize=max(resize, 8), interpolation=interpolation)
    preset = torchvision.transforms._presets.ImageClassification(
        crop_size=size, resize_size=resize, interpolation=TF.InterpolationMode(interpolation)
    )
    picture = noise(width, height)
    assert torch.equal(whole_input(picture, spec), preset(picture))


@PIXELS
@given(width=SIDES, height=SIDES)
def test_without_antialiasing_as_torchvision_does_tensors(width: int, height: int) -> None:
    for interpolation in ("bilinear", "bicubic"):
        spec = spec_of(
            "mobilenetv3_small", 32, resize=37, antialias=False, interpolation=interpolation
        )
        preset = torchvision.transforms._presets.ImageClassification(
            crop_size=32,
            resize_size=37,
            interpolation=TF.InterpolationMode(interpolation),
            antialias=False,
        )
        picture = noise(width, height)
        assert torch.equal(whole_input(picture, spec), preset(TF.pil_to_tensor(picture)))


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_100.lamb_in1k", "mobilenetv3_large_100.ra4_e3600_r224_in1k"]
)
def test_timms_classifiers(name: str) -> None:
    from mbv3dist.inference.libraries import find_source

    source = find_source(name, file_name="")
    spec = new_spec(source.architecture, CLASSES, input_size=source.input_size)
    spec = replace(spec, preprocess=source.preprocess)
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config, is_training=False)
    for width, height in ((500, 333), (41, 37), (97, 211), (226, 225)):
        picture = noise(width, height)
        assert torch.equal(whole_input(picture, spec), transform(picture))


def test_float_pixels_are_normalised_before_they_are_resized() -> None:
    spec = spec_of("mobilenetv3_small", 20, resize=20, dtype="float32", antialias=True)
    picture = noise(53, 31)
    values = TF.pil_to_tensor(picture).float() / 255
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (spec.preprocess.mean, spec.preprocess.std)
    )
    resized = F.interpolate(
        ((values - mean) / std)[None], size=(20, 34), mode="bilinear", antialias=True
    )
    assert torch.equal(whole_input(picture, spec), resized[0][:, :, 7:27])


def test_crops_of_small_pictures_are_padded_with_black() -> None:
    for dtype in ("uint8", "float32"):
        spec = spec_of(
            "mobilenetv3_small", 40, resize=11, dtype=dtype, mean=(0.25,) * 3, std=(0.5,) * 3
        )
        result = whole_input(noise(30, 22), spec)
        assert result.shape == (3, 40, 40)
        inside = torch.zeros(40, 40, dtype=torch.bool)
        inside[14:25, 12:27] = True  # 15 x 11 pixels: 12 and 14 before, 13 and 15 after
        assert (result[:, ~inside] == -0.5).all()
        assert result[:, inside].std() > 0.1


def test_pictures_that_would_fill_the_memory_are_refused() -> None:
    spec = spec_of("mobilenetv3_small", 224, resize=256, interpolation="bicubic")
    with pytest.raises(ValueError, match=r"20000 x 1 pixels becomes 5120000 x 256"):
        whole_input(Image.new("RGB", (20000, 1)), spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "nearest"}, "'nearest' is not offered; there are bilinear, bicubic"),
        ({"dtype": "float64"}, "'float64' is not offered"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"resize": 0}, "at least 1 pixel"),
    ],
)
def test_preprocessing_that_cannot_be_done(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"resize": 64, **change})


def test_which_mixes_the_decoder_draws() -> None:
    drawn = [mix for mix in MIXES if Preprocess(64, **mix).is_drawn]
    assert drawn == [{"dtype": "uint8", "interpolation": "bilinear", "antialias": True}]
    assert not Preprocess(64, **drawn[0], whole=True).is_drawn


def loaded(spec: ModelSpec) -> LoadedModel:
    torch.manual_seed(0)
    model = model_from_spec(spec)
    with torch.no_grad():  # outputs that follow the pixels
        for _ in range(3):
            model(torch.randn(4, 3, spec.input_size, spec.input_size))
    return LoadedModel(model.eval(), spec)


@pytest.mark.parametrize("mix", [MIXES[2], MIXES[5]], ids=["timm", "detector"])
def test_evaluation_and_prediction_see_the_same_pixels(
    mix: dict, detection_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(spec_of("ssdlite_mobilenetv3_small", 64, **mix))
    split = open_split(detection_data, "val")
    seen = {}
    add = DetectionEvaluator.add

    def spy(self: DetectionEvaluator, index: int, **values: np.ndarray) -> None:
        seen[index] = values
        add(self, index, **values)

    monkeypatch.setattr(DetectionEvaluator, "add", spy)
    result = evaluate(model.model, model.spec, split, batch_size=3, num_threads=3)
    assert result["samples"] == len(split) == len(seen)
    files = [split.sample(index)["jpg"] for index in range(len(split))]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, data in enumerate(files):
        (folder / f"{index}.jpg").write_bytes(data)
    pictures = [Image.open(io.BytesIO(data)) for data in files]
    inputs = torch.stack([whole_input(picture, model.spec) for picture in pictures])
    with torch.no_grad():
        scores = model.model(inputs)[0].softmax(-1)[..., 1:].amax((1, 2))
    found = detect(model, pictures, batch_size=3)
    answers = predict(
        model, [folder], tmp_path / "out", batch_size=3, draw=False, score_threshold=0.001
    )
    assert len({float(score) for score in scores}) == len(files)
    for index, (one, entry) in enumerate(zip(found, answers["pictures"], strict=True)):
        assert float(one["scores"].max()) == pytest.approx(float(scores[index]), abs=1e-6)
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(one[name].numpy(), seen[index][name])
        boxes = [row["box"] for row in entry["detections"]]
        np.testing.assert_allclose(boxes, one["boxes"].numpy(), atol=1e-3)
        np.testing.assert_array_equal(seen[index]["truth_boxes"][:, 2:] > 0, True)


def test_classifiers_are_evaluated_with_their_pixels(classification_data: Path) -> None:
    spec = spec_of("mobilenetv3_small", 32, resize=36, interpolation="bicubic")
    model = loaded(spec)
    split = open_split(classification_data, "val")
    pictures = [Image.open(io.BytesIO(split.sample(i)["jpg"])) for i in range(len(split))]
    labels = torch.tensor([int(split.sample(i)["cls"]) for i in range(len(split))])
    inputs = torch.stack([whole_input(picture, spec) for picture in pictures])
    with torch.no_grad():
        logits = model.model(inputs)
    result = evaluate(model.model, spec, split, batch_size=4)
    assert result["samples"] == len(split)
    assert result["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    drawn = evaluate(model.model, replace(spec, preprocess=Preprocess(36)), split, batch_size=4)
    assert drawn["loss"] != result["loss"]  # the mix matters
    names = [top[0][0] for top in classify(model, pictures, batch_size=4)]
    assert names == [CLASSES[label] for label in logits.argmax(1).tolist()]


def test_a_damaged_sample_is_named(detection_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(index: int, picture: bytes, target: bytes) -> tuple[bytes, bytes]:
        return (picture[: len(picture) // 2] if index == 5 else picture), target

    rewrite_members(monkeypatch, change)
    model = loaded(spec_of("ssdlite_mobilenetv3_small", 64, dtype="float32"))
    with pytest.raises(ValueError, match="000000005") as caught:
        evaluate(model.model, model.spec, open_split(detection_data, "val"), batch_size=3)
    assert "\n" not in str(caught.value)


def test_threads_do_not_matter(detection_data: Path) -> None:
    model = loaded(spec_of("ssdlite_mobilenetv3_small", 64, dtype="float32", antialias=False))
    split = open_split(detection_data, "val")
    results = [
        evaluate(model.model, model.spec, split, batch_size=3, num_threads=n) for n in (1, 4)
    ]
    assert results[0] == results[1]


def test_float_tensors_keep_their_values() -> None:
    model = loaded(spec_of("ssdlite_mobilenetv3_small", 64, dtype="float32", antialias=False))
    picture = noise(90, 60)
    levels = TF.pil_to_tensor(picture)
    forms = [picture, np.array(picture), levels, TF.convert_image_dtype(levels, torch.float32)]
    results = detect(model, forms, batch_size=4)
    for other in results[1:]:
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(other[name], results[0][name])
    between = (forms[3] + 0.3 / 255).clamp(max=1.0)  # no whole levels
    with torch.no_grad():
        logits = model.model(whole_input(between, model.spec)[None])[0]
    expected = logits.softmax(-1)[0, :, 1:].max()
    (found,) = detect(model, [between])
    assert float(found["scores"].max()) == pytest.approx(float(expected), abs=1e-6)
    assert not torch.equal(found["scores"], results[0]["scores"])
    for bad in (levels.float(), levels[None].float(), torch.zeros(3, 0, 5)):
        with pytest.raises(ValueError, match=r"give \[3, H, W\]|divide"):
            detect(model, [bad])
