"""evaluate(): figures beside independent computations, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mbv3dist.data.index import open_split
from mbv3dist.data.loader import eval_batches
from mbv3dist.evaluation.run import evaluate
from mbv3dist.models.directory import model_from_spec, new_spec
from mbv3dist.models.loss import match_batch, multibox_loss
from mbv3dist.models.preprocess import evaluation_view, normalize

CLASSES = ("blue", "green", "red")


def small(architecture, *, size, classes=CLASSES):
    spec = new_spec(architecture, classes, input_size=size, width=0.5)
    torch.manual_seed(0)
    return model_from_spec(spec), spec


@pytest.fixture(scope="module")
def detector():
    return small("ssdlite_mobilenetv3_small", size=64)


@pytest.fixture(scope="module")
def classifier():
    return small("mobilenetv3_small", size=32)


def whole_split(model, spec, split):
    """Outputs and batch of the whole split at once."""
    view = evaluation_view(spec)
    batches = eval_batches(split, view=view, size=spec.input_size, batch_size=len(split))
    batch = next(iter(batches))
    with torch.no_grad():
        return model.eval()(normalize(batch.image, spec.preprocess)), batch


def test_classification_figures(classifier, classification_data):
    model, spec = classifier
    split = open_split(classification_data, "val")
    logits, batch = whole_split(model, spec, split)
    result = evaluate(model, spec, split, batch_size=4, num_threads=1)
    assert result["samples"] == len(split) == 9
    assert result["top1"] == (logits.argmax(dim=1) == batch.label).sum().item() / 9
    assert result["top5"] == 1.0
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, batch.label).item(), rel=1e-5)
    assert [row["samples"] for row in result["per_class"].values()] == [3, 3, 3]
    json.dumps(result, allow_nan=False)


def test_detection_losses(detector, detection_data):
    model, spec = detector
    split = open_split(detection_data, "val")
    (class_logits, box_deltas), batch = whole_split(model, spec, split)
    targets = match_batch(model.anchors, batch.boxes, batch.labels, size=(64, 64))
    for min_negatives in (0, 7):
        loss = multibox_loss(class_logits, box_deltas, targets, min_negatives=min_negatives)
        result = evaluate(model, spec, split, batch_size=3, min_negatives=min_negatives)
        parts = (loss.regression_sum, loss.classification_sum)
        regression, classification = (part.item() / loss.num_positives.item() for part in parts)
        assert result["loss_regression"] == pytest.approx(regression, rel=1e-4)
        assert result["loss_classification"] == pytest.approx(classification, rel=1e-4)
        assert result["loss"] == pytest.approx(regression + classification, rel=1e-4)
    assert result["samples"] == len(split)
    assert list(result["per_class"]) == list(CLASSES)
    json.dumps(result, allow_nan=False)


class Oracle(torch.nn.Module):
    """A detector that answers with the truth: logits and deltas of the matched anchors."""

    def __init__(self, model, spec, split):
        super().__init__()
        self.register_buffer("anchors", model.anchors)
        self.scale = torch.nn.Parameter(torch.tensor(20.0))
        batch = whole_split(model, spec, split)[1]
        size = (spec.input_size, spec.input_size)
        targets = match_batch(self.anchors, batch.boxes, batch.labels, size=size)
        self.logits = F.one_hot(targets.labels, len(CLASSES) + 1).float()
        self.deltas = targets.deltas
        self.done = 0

    def forward(self, images):
        """The next pictures' answers, in the order of the split."""
        part = slice(self.done, self.done + len(images))
        self.done += len(images)
        return self.scale * self.logits[part], self.deltas[part]


def test_the_truth_scores_one(detector, detection_data):
    """Through views, post-process and the way back to source pixels, on 96 x 64 pictures."""
    model, spec = detector
    split = open_split(detection_data, "val")
    result = evaluate(Oracle(model, spec, split), spec, split, batch_size=2)
    assert result["map_50"] > 0.99
    assert result["voc_map"] > 0.99
    assert result["map"] > 0.95
    assert result["loss"] < 0.01


def test_diverged_models_give_json(classifier, classification_data):
    _, spec = classifier
    model = model_from_spec(spec)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    result = evaluate(model, spec, open_split(classification_data, "val"))
    assert result["loss"] is None
    assert result["top1"] == 0.0
    json.dumps(result, allow_nan=False)


def test_modes_and_weights_are_left_alone(classifier, classification_data):
    _, spec = classifier
    model = model_from_spec(spec).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    evaluate(
        model,
        spec,
        open_split(classification_data, "val"),
        batch_size=4,
        progress=lambda *counts: calls.append(counts),
    )
    assert calls == [(4, 9), (8, 9), (9, 9)]
    assert model.training
    assert not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_misfits_name_both_and_the_cure(classifier, detector, classification_data, detection_data):
    model, spec = classifier
    with pytest.raises(ValueError, match=r"detection data set.*mobilenetv3_small.*--task") as error:
        evaluate(model, spec, open_split(detection_data, "val"))
    assert "\n" not in str(error.value)
    split = open_split(classification_data, "val")
    for classes in (("red", "green", "blue"), ("blue", "green"), tuple(f"c{i}" for i in range(99))):
        model, spec = small("mobilenetv3_small", size=32, classes=classes)
        with pytest.raises(ValueError, match="--classes FILE") as error:
            evaluate(model, spec, split)
        assert "[blue, green, red]" in str(error.value)
        assert ", ".join(classes[:3]) in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


def test_a_detector_whose_description_contradicts_itself_is_refused(detector, detection_data):
    model, spec = detector
    other = replace(spec, preprocess=replace(spec.preprocess, resize=80))
    with pytest.raises(ValueError, match=r"preprocess\.resize 80 differs from input_size 64"):
        evaluate(model, other, open_split(detection_data, "val"))
