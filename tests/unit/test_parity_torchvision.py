"""Imported detectors: torchvision's detections, loss and gradients, from pictures to the end."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights as Weights
from torchvision.transforms import functional as TF

from mbv3dist.cli_models import add_import, run_import
from mbv3dist.inference.importing import import_model
from mbv3dist.inference.predict import _Runner, classify, detect, predict
from mbv3dist.models.directory import LoadedModel, load_model
from mbv3dist.models.loss import match_batch, multibox_loss
from tests.foreign import (
    drawn_pictures,
    timm_classifier,
    torchvision_classifier,
    torchvision_detector,
)

DETECTOR = "ssdlite320_mobilenet_v3_large"


def imported(theirs: nn.Module, folder: Path, arch: str) -> LoadedModel:
    """What `mbv3dist import` makes of a model's state dict."""
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    parser = argparse.ArgumentParser()
    add_import(parser)
    words = [str(folder / "theirs.pth"), str(folder / "model"), "--arch", arch]
    run_import(parser.parse_args(words))
    return load_model(folder / "model")


@pytest.fixture(scope="module", params=[True, False], ids=["reduced", "full"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A detector of torchvision, and what `mbv3dist import` makes of it."""
    theirs = torchvision_detector(91, reduced_tail=request.param)
    return theirs, imported(theirs, tmp_path_factory.mktemp("import"), DETECTOR)


@torch.no_grad()
def torchvisions_answers(theirs: nn.Module, pictures: list) -> list[dict[str, torch.Tensor]]:
    preset = Weights.COCO_V1.transforms()
    answers = [theirs([preset(picture)])[0] for picture in pictures]
    for answer in answers:  # or else their order is nobody's promise
        assert len(answer["scores"].unique()) >= 0.98 * len(answer["scores"])
        assert len(answer["scores"]) == 300
        assert float(answer["scores"][0]) > 0.1
        assert len(answer["labels"].unique()) > 20
    assert not torch.equal(answers[0]["scores"], answers[1]["scores"])
    return answers


def test_detections_equal_torchvisions(pair: tuple) -> None:
    theirs, ours = pair
    pictures = drawn_pictures(5)
    expected = torchvisions_answers(theirs, pictures)
    for batch_size in (3, len(pictures)):
        found = detect(ours, pictures, batch_size=batch_size)
        for mine, its in zip(found, expected, strict=True):
            assert torch.equal(mine["labels"] + 1, its["labels"])
            torch.testing.assert_close(mine["scores"], its["scores"], rtol=0, atol=1e-5)
            torch.testing.assert_close(mine["boxes"], its["boxes"], rtol=0, atol=1e-3)


def test_the_command_gives_torchvisions_detections(pair: tuple, tmp_path: Path) -> None:
    theirs, ours = pair
    pictures = drawn_pictures(2)
    expected = torchvisions_answers(theirs, pictures)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    predict(ours, [folder], tmp_path / "out", score_threshold=0.001, draw=False)
    answers = json.loads((tmp_path / "out" / "predictions.json").read_text())["pictures"]
    names = Weights.COCO_V1.meta["categories"]
    for entry, its in zip(answers, expected, strict=True):
        rows = entry["detections"]
        labels = [names[label] for label in its["labels"].tolist()]
        assert [
            row["label"].partition(" ")[0] if "N/A" in row["label"] else row["label"]
            for row in rows
        ] == labels
        boxes = torch.tensor([row["box"] for row in rows])
        torch.testing.assert_close(boxes, its["boxes"], rtol=0, atol=1e-3)
        scores = torch.tensor([row["score"] for row in rows])
        torch.testing.assert_close(scores, its["scores"], rtol=0, atol=1e-5)


def test_loss_and_gradients_equal_torchvisions(pair: tuple) -> None:
    """From the same pictures and boxes, in training mode, through batch norms and all."""
    theirs, ours = pair
    generator = torch.Generator().manual_seed(3)
    pictures = [TF.pil_to_tensor(p.resize((320, 320))).float() / 255 for p in drawn_pictures(3)]
    counts = (3, 0, 11)
    starts = [torch.rand(count, 2, generator=generator) * 250 for count in counts]
    boxes = [
        torch.cat((start, start + 4 + torch.rand(len(start), 2, generator=generator) * 60), 1)
        for start in starts
    ]
    labels = [torch.randint(90, (count,), generator=generator) for count in counts]
    targets = [{"boxes": b, "labels": n + 1} for b, n in zip(boxes, labels, strict=True)]
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    model = load_copy(ours)
    try:
        expected = theirs.train()(list(pictures), targets)
        theirs.zero_grad()
        sum(expected.values()).backward()
        statistics = {k: v.clone() for k, v in theirs.state_dict().items() if "running" in k}
    finally:
        theirs.load_state_dict(before)
        theirs.eval()

    images = (torch.stack(pictures) - 0.5) / 0.5
    class_logits, box_deltas = model.train()(images)
    longest = max(counts)
    padded = torch.stack([torch.cat((b, torch.zeros(longest - len(b), 4))) for b in boxes])
    numbers = torch.stack([torch.cat((n, torch.full((longest - len(n),), -1))) for n in labels])
    targets = match_batch(model.anchors, padded, numbers, size=(320, 320))
    loss = multibox_loss(class_logits, box_deltas, targets)
    parts = {
        "bbox_regression": loss.regression_sum / loss.num_positives,
        "classification": loss.classification_sum / loss.num_positives,
    }
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=0.0)
    sum(parts.values()).backward()

    from mbv3dist.models.weights import torchvision_keys

    keys = torchvision_keys(model)
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        its = wanted[keys[name]].grad
        difference = (parameter.grad - its).norm()
        assert difference <= 1e-6 * its.norm() + 1e-9, (name, float(difference), float(its.norm()))
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(value, statistics[keys[name]])


def load_copy(loaded: LoadedModel) -> nn.Module:
    from mbv3dist.models.directory import model_from_spec

    model = model_from_spec(loaded.spec)
    model.load_state_dict(loaded.model.state_dict())
    return model


@pytest.mark.parametrize("variant", ["small", "large"])
def test_torchvisions_classifiers_from_pictures(variant: str, tmp_path: Path) -> None:
    theirs = torchvision_classifier(variant)
    ours = imported(theirs, tmp_path, f"mobilenet_v3_{variant}")
    preset = torchvision.models.get_model_weights(
        f"mobilenet_v3_{variant}"
    ).IMAGENET1K_V1.transforms()
    compare_classifiers(ours, theirs, preset, tolerance=1e-6)


def test_timms_classifiers_from_pictures(tmp_path: Path) -> None:
    import timm

    theirs = timm_classifier("mobilenetv3_small_100")
    ours = imported(theirs, tmp_path, "mobilenetv3_small_100")
    config = timm.data.resolve_model_data_config(theirs)
    transform = timm.data.create_transform(**config, is_training=False)
    compare_classifiers(ours, theirs, transform, tolerance=0.0)


@torch.no_grad()
def compare_classifiers(
    ours: LoadedModel, theirs: nn.Module, transform: object, *, tolerance: float
) -> None:
    pictures = drawn_pictures(5)
    expected = theirs(torch.stack([transform(picture) for picture in pictures]))
    assert expected.std() > 0.1
    # Relative to the largest logit: float32 itself errs ten times as much.
    tolerance *= float(expected.abs().max())
    runner = _Runner(ours.model, ours.spec)
    inputs = torch.stack([runner.prepare_image(picture).pixels for picture in pictures])
    torch.testing.assert_close(ours.model(inputs), expected, rtol=0, atol=tolerance)
    scores, labels = expected.softmax(1).topk(5)
    for row, names, values in zip(classify(ours, pictures), labels, scores, strict=True):
        assert [name for name, _ in row] == [ours.spec.classes[label] for label in names.tolist()]
        assert [score for _, score in row] == pytest.approx(values.tolist(), abs=1e-5)
    assert len(set(labels[:, 0].tolist())) > 1


def test_fine_tuning_starts_from_an_imported_model(
    detection_data: Path, detection_recipe: Path, tmp_path: Path
) -> None:
    """Another class list: heads re-made; what is saved says how it was trained."""
    from mbv3dist.recipe import load_config
    from mbv3dist.training.build import build_model

    theirs = torchvision_detector(5, reduced_tail=True)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    import_model(
        tmp_path / "theirs.pth", tmp_path / "model", arch=DETECTOR, classes=tmp_path / "names.txt"
    )
    config = load_config(
        str(detection_recipe),
        [
            *("--model.architecture", "ssdlite_mobilenetv3_large", "--model.width", "1"),
            *("--model.reduced_tail", "true", "--model.input_size", "64"),
            *("--model.init_from", str(tmp_path / "model")),
        ],
    )
    spec, model = build_model(config, ("blue", "green", "red"))
    assert (spec.preprocess.dtype, spec.preprocess.antialias) == ("uint8", True)
    assert spec.preprocess.is_drawn
    assert spec.preprocess.mean == (0.5, 0.5, 0.5)
    assert spec.bn_eps == 1e-3
    start = load_model(tmp_path / "model").model.state_dict()
    for name, value in model.state_dict().items():
        remade = name.startswith("class_heads") and name.split(".")[2] == "1"
        assert remade == (value.shape != start[name].shape)
        assert remade or torch.equal(value, start[name])

    changes = spec.preprocess.changes_from(load_model(tmp_path / "model").spec.preprocess)
    for change in ("dtype float32 -> uint8", "antialias False -> True", "resize 320 -> 64"):
        assert change in changes
    assert "mean" not in changes
    assert "class_heads" in spec.provenance["init_from"]
    assert changes in spec.provenance["init_from"]  # which the log shows
    assert spec.preprocess.changes_from(spec.preprocess) == ""
