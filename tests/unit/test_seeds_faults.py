"""Faults that older PyTorch SSDs and MobileNetV3s had: each has a test that it is absent here.

A fault is named at the head of its test, then what is true instead is checked.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidual as TorchvisionBlock
from torchvision.ops import SqueezeExcitation

from mbv3dist.config import OptimConfig, ViewConfig
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.draws import Draws
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import eval_batches
from mbv3dist.data.view_kernels import ViewMaker
from mbv3dist.data.views import make_view
from mbv3dist.evaluation.run import evaluate
from mbv3dist.inference.sources import drawing_names
from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.directory import load_model, new_spec, save_model
from mbv3dist.models.loss import match_batch, multibox_loss
from mbv3dist.models.mobilenetv3 import Backbone, create_classifier
from mbv3dist.models.preprocess import evaluation_view
from mbv3dist.models.ssdlite import SSDLite, feature_sizes
from mbv3dist.models.weights import load_state
from mbv3dist.recipe import load_config
from mbv3dist.training.build import build_model
from mbv3dist.training.optim import lr_factor
from mbv3dist.training.run import train
from mbv3dist.viz.plots import plot_class_scores

NUM_VIEWS = 3000


def crops_of(config, boxes, *, compiled):
    """The views of one picture of 400 x 300 in many epochs: crops [n, 4] and kept boxes [n, M]."""
    epochs = np.arange(NUM_VIEWS)
    if compiled:
        maker = ViewMaker(config, size=160, seed=3)
        views = maker.make(
            epochs,
            np.zeros(NUM_VIEWS, np.int64),
            np.full((NUM_VIEWS, 2), (400, 300), np.int32),
            np.tile(boxes, (NUM_VIEWS, 1)),
            np.arange(NUM_VIEWS + 1) * len(boxes),
        )
        return views.src, views.keep.reshape(NUM_VIEWS, -1)
    drawn = [
        make_view(
            config, width=400, height=300, size=160, boxes=boxes, draws=Draws(3, epoch=n, sample=0)
        )
        for n in epochs[:400].tolist()
    ]
    return np.array([view.src for view, _ in drawn]), np.array([keep for _, keep in drawn])


def overlaps(crops, boxes):
    """IoU of crops [n, 4] with boxes [M, 4]: [n, M]."""
    low = np.maximum(crops[:, None, :2], boxes[None, :, :2])
    high = np.minimum(crops[:, None, 2:], boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [(item[:, 2:] - item[:, :2]).prod(-1) for item in (crops, boxes)]
    return common / (areas[0][:, None] + areas[1][None] - common)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("min_iou", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_random_crops_reach_their_minimum_iou(min_iou, compiled):
    """Fault: the crop's minimum IoU was never enforced (`and` for `or`)."""
    boxes = np.array([[30, 20, 330, 280], [200, 40, 390, 140], [5, 5, 60, 70]], np.float32)
    config = ViewConfig(
        name="ssd", min_ious=(min_iou,), crop_probability=1.0, zoom_out_probability=0.0, flip=0.0
    )
    crops, keep = crops_of(config, boxes, compiled=compiled)
    is_crop = ((crops[:, 2] - crops[:, 0]) < 400) | ((crops[:, 3] - crops[:, 1]) < 300)
    assert is_crop.mean() > 0.9
    iou = np.where(keep, overlaps(crops, boxes), 0).max(1)[is_crop]
    assert iou.min() >= min_iou - 1e-4  # boxes are float32
    # Without a minimum such crops are common, so that the line above says something.
    loose = replace(config, min_ious=(0.0,))
    crops, keep = crops_of(loose, boxes, compiled=compiled)
    below = np.where(keep, overlaps(crops, boxes), 0).max(1) < min_iou
    assert below.mean() > (0.003 if min_iou == 0.1 else 0.04)


def test_pictures_without_boxes_train_and_are_scored(tmp_path):
    """Faults: pictures without boxes crashed; without positives the loss was NaN."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(root / "JPEGImages" / f"empty{number}.jpg")
        (root / "Annotations" / f"empty{number}.xml").write_text(
            f"<annotation><filename>empty{number}.jpg</filename><size><width>50</width>"
            "<height>40</height><depth>3</depth></size></annotation>"
        )
    for split in ("train", "val"):
        convert_voc([root], tmp_path / "data", split=split, classes=["cat", "dog"], workers=1)
    recipe = tmp_path / "empty.yaml"
    recipe.write_text(
        f"epochs: 2\nout: {tmp_path / 'runs'}\n"
        f"data: {{path: {tmp_path / 'data'}, val_split: val, global_batch_size: 3,"
        " num_threads: 1, view: {name: ssd}}\n"
        "model: {architecture: ssdlite_mobilenetv3_small, input_size: 64, width: 0.5}\n"
        "optim: {lr: 0.01}\n"
    )
    result = train(load_config(recipe), quiet=True)
    assert result["steps"] == 4
    assert result["val"]["samples"] == 6
    assert (result["val"]["loss"], result["val"]["map"]) == (0.0, None)
    # Nothing is taught by default; with `min_negatives` that there is nothing.
    model = load_model(tmp_path / "runs" / "empty" / "last")
    split = open_split(tmp_path / "data", "val")
    scored = evaluate(model.model, model.spec, split, min_negatives=5, num_threads=1)
    assert math.isfinite(scored["loss"]) and scored["loss"] > 0


def test_a_batch_with_and_without_boxes_has_finite_gradients():
    """Fault: NaN without positives, here of a whole model; one picture or all of them empty."""
    model = SSDLite("small", num_classes=2, input_size=64, width=0.5)
    boxes = torch.tensor([[[5.0, 5, 40, 40]], [[0, 0, 0, 0]]])
    for labels in ([[1], [-1]], [[-1], [-1]]):
        model.zero_grad()
        targets = match_batch(model.anchors, boxes, torch.tensor(labels), size=(64, 64))
        loss = multibox_loss(*model(torch.randn(2, 3, 64, 64)), targets)
        total = loss.regression_sum + loss.classification_sum
        (total / targets.num_positives.clamp(min=1)).backward()
        assert total.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


STEMS = ("drag", "jpg", "pig.jpg", "ppp", "g", "a.b.gpj", "img.jpeg", "JPG")


@pytest.mark.parametrize("line_suffix", ["", ".jpg"])
def test_names_that_end_in_letters_of_jpg_stay_whole(tmp_path, line_suffix):
    """Fault: `rstrip('.jpg')` took letters off names, 'drag.jpg' became 'dra'."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number, stem in enumerate(STEMS):
        Image.new("RGB", (30, 20), (number, 90, 9)).save(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><size><width>30</width><height>20</height>"
            f"<depth>3</depth></size><object><name>cat</name><bndbox><xmin>{number + 1}</xmin>"
            "<ymin>1</ymin><xmax>20</xmax><ymax>9</ymax></bndbox></object></annotation>"
        )
    lines = "".join(f"{stem}{line_suffix}\n" for stem in STEMS)
    (root / "ImageSets/Main/train.txt").write_text(lines)
    convert_voc([root], tmp_path / "data", split="train", workers=1)
    split = open_split(tmp_path / "data", "train")
    found = {split.source(n): split.sample(n)["json"]["boxes"] for n in range(len(split))}
    assert found == {
        f"JPEGImages/{stem}.jpg": [[number, 0, 20, 9]] for number, stem in enumerate(STEMS)
    }
    files = [root / "JPEGImages" / f"{stem}.jpg" for stem in STEMS]
    assert drawing_names(files[:-1]) == [f"{stem}.jpg" for stem in STEMS[:-1]]


class Oracle(nn.Module):
    """Finds every object of a split, and calls those of one class by another's name."""

    def __init__(self, split, spec, *, calls):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        size = (spec.input_size, spec.input_size)
        anchors = make_anchors(spec.anchors, feature_sizes(size))
        self.register_buffer("anchors", anchors)
        self.answers = []
        for batch in eval_batches(
            split, view=evaluation_view(spec), size=spec.input_size, batch_size=4
        ):
            targets = match_batch(anchors, batch.boxes, batch.labels, size=size)
            labels = targets.labels.clone()
            for true, called in calls.items():
                labels[targets.labels == true + 1] = called + 1
            logits = 20.0 * nn.functional.one_hot(labels, len(spec.classes) + 1)
            self.answers.append((logits, targets.deltas))

    def forward(self, images):
        """Answer as prepared, whatever the pictures show."""
        return self.answers.pop(0)


def test_scores_stand_beside_the_right_class(detection_data, tmp_path, monkeypatch):
    """Fault: the table of rates per class was shifted by one (background counted as a class)."""
    split = open_split(detection_data, "train")
    assert split.classes == ("blue", "green", "red")
    # Fine anchors, so that every box has one of its own.
    anchors = AnchorConfig(scales=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))
    spec = new_spec("ssdlite_mobilenetv3_small", split.classes, input_size=128, anchors=anchors)

    def scores(calls):
        result = evaluate(Oracle(split, spec, calls=calls), spec, split, batch_size=4)
        return result, {name: row["ap_50"] for name, row in result["per_class"].items()}

    _, right = scores({})
    assert min(right.values()) > 0.9, right
    for wrong in range(3):
        called = (wrong + 1) % 3
        result, found = scores({wrong: called})
        names = split.classes
        assert found[names[wrong]] == 0.0
        assert found[names[called]] < 0.9 * right[names[called]]
        untouched = names[3 - wrong - called]
        assert found[untouched] == pytest.approx(right[untouched])

    # The last result's plot: each bar is as long as the score of the name beside it.
    drawn = {}
    monkeypatch.setattr("mbv3dist.viz.plots._save", lambda figure, out: drawn.update(it=figure))
    plot_class_scores(result, tmp_path / "bars.png")
    axes = drawn["it"].axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    lengths = [bar.get_width() for bar in axes.containers[0]]
    assert dict(zip(labels, lengths, strict=True)) == pytest.approx(found)


@pytest.mark.parametrize("variant", ["small", "large"])
def test_squeeze_excitation_pools_whatever_size_there_is(variant):
    """Fault: the pools of squeeze-and-excitation had the sizes of one input written into them."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"mobilenet_v3_{variant}")().eval()
    ours = create_classifier(variant, num_classes=1000)
    load_state(ours, theirs.state_dict(), source="torchvision")
    pools = [m for m in ours.modules() if isinstance(m, nn.AvgPool2d | nn.MaxPool2d)]
    assert not pools
    with torch.no_grad():
        for height, width in ((224, 224), (300, 300), (96, 160), (65, 33)):
            images = torch.randn(2, 3, height, width)
            torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_cut_splits_are_seeded_disjoint_and_whole(tmp_path, classification_data):
    """Fault: unseeded splits, so that a second stage validated on the first one's pictures."""
    root = tmp_path / "pictures"
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number in range(15):
            Image.new("RGB", (9, 9), (number, 9, 9)).save(root / label / f"{number}.jpg")
    cuts = []
    for seed in (5, 5, 6):
        out = tmp_path / f"out{len(cuts)}"
        convert_imagefolder(root, out, split="train", val_fraction=0.2, seed=seed, workers=1)
        parts = {}
        for name in ("train", "val"):
            split = open_split(out, name)
            parts[name] = {split.source(n) for n in range(len(split))}
        assert not parts["train"] & parts["val"]
        assert len(parts["train"] | parts["val"]) == 30
        assert len(parts["val"]) == 6
        cuts.append(parts["val"])
    assert cuts[0] == cuts[1] != cuts[2]


def activations_of_ours(block):
    """Activations after expansion, depthwise and projection, and whether it squeezes."""
    names = [type(norm.act).__name__ for norm in (block.bn1, block.bn2, block.bn3)]
    return (*names, isinstance(block.se, SqueezeExcite))


def activations_of_torchvisions(block):
    layers = [part for part in block.block if not isinstance(part, SqueezeExcitation)]
    names = [type(part[2]).__name__ if len(part) > 2 else "Identity" for part in layers]
    return (*names, len(layers) < len(block.block))


@pytest.mark.parametrize("variant", ["small", "large"])
def test_every_block_has_its_activations(variant):
    """Faults: no activation after the depthwise convolution; blocks without SE computed x * x."""
    ours = [m for m in Backbone(variant).modules() if isinstance(m, InvertedResidual)]
    model = getattr(torchvision.models, f"mobilenet_v3_{variant}")()
    theirs = [m for m in model.modules() if isinstance(m, TorchvisionBlock)][
        1:
    ]  # 1st: no expansion
    assert [activations_of_ours(block) for block in ours] == [
        activations_of_torchvisions(block) for block in theirs
    ]
    for block in ours:
        assert "Identity" not in activations_of_ours(block)[:2]
        if not isinstance(block.se, SqueezeExcite):
            x = torch.randn(1, 8, 3, 3)
            assert torch.equal(block.se(x), x)


@pytest.mark.parametrize(("variant", "block", "channels"), [("small", 9, 288), ("large", 13, 672)])
def test_c4_is_the_expansion_of_the_right_bottleneck(variant, block, channels):
    """Fault: C4 was a linear output of 48 channels, not the 288 (672) of the expansion layer."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"mobilenet_v3_{variant}")().eval()
    classifier = create_classifier(variant, num_classes=1000).eval()
    load_state(classifier, theirs.state_dict(), source="torchvision")
    backbone = Backbone(variant)
    backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert backbone.out_channels[0] == channels
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        c4, c5 = backbone.eval()(images)
        before = theirs.features[:block](images)
        torch.testing.assert_close(c4, theirs.features[block].block[0](before))
        torch.testing.assert_close(c5, theirs.features(images), rtol=1e-4, atol=1e-5)
    assert c4.shape == (1, channels, 8, 8)
    assert (c4 < 0).any() and c4.min() > -0.4  # behind its hard-swish, whose least value is -3/8


def test_pretraining_and_detection_see_the_same_pixels(tmp_path):
    """Fault: ImageNet's mean and std in pre-training, (x - 127) / 128 in detection."""
    spec = new_spec("mobilenetv3_small", ("a", "b", "c"), width=0.5)
    classifier = create_classifier("small", num_classes=3, width=0.5)
    save_model(classifier, spec, tmp_path / "classifier")
    recipe = tmp_path / "detector.yaml"
    recipe.write_text(
        "data: {path: x, view: {name: ssd}}\n"
        "model: {architecture: ssdlite_mobilenetv3_small, input_size: 64, width: 0.5,"
        f" init_from: {tmp_path / 'classifier'}}}"
    )
    found, detector = build_model(load_config(recipe), ("cat",))
    assert (found.preprocess.mean, found.preprocess.std) == (
        spec.preprocess.mean,
        spec.preprocess.std,
    )
    assert found.bn_eps == spec.bn_eps
    for name, value in detector.backbone.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name]), name
    assert "made afresh: box_heads, class_heads, extras" in found.provenance["init_from"]
    # And with timm's ImageNet weights: what they were trained on.
    pretrained = new_spec("ssdlite_mobilenetv3_small", ("cat",), pretrained=True).preprocess
    assert (pretrained.mean, pretrained.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_validation_is_every_picture_once_without_augmentation(detection_data):
    """Fault: validation was one batch, with the augmentation of training."""
    split = open_split(detection_data, "train")
    spec = new_spec("ssdlite_mobilenetv3_small", split.classes, input_size=64)
    assert evaluation_view(spec) == ViewConfig(name="resize")
    assert evaluation_view(new_spec("mobilenetv3_small", ("a",))).name == "center_crop"
    batches = eval_batches(split, view=evaluation_view(spec), size=64, batch_size=4)
    indices = [n for batch in batches for n in batch.index.tolist()]
    assert indices == list(range(len(split)))


def test_a_rate_falls_when_the_recipe_says():
    """Fault: "0.08 every 6 epochs" was documented, every 5 was done, from epoch 5 on."""
    config = OptimConfig(schedule="step", step_epochs=6, gamma=0.92)
    factors = [lr_factor(epoch, config, epochs=200) for epoch in range(20)]
    assert factors == pytest.approx([0.92 ** (epoch // 6) for epoch in range(20)])
