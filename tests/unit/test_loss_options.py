"""Optional losses: torchvision's values and gradients, batched, without waiting for a device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import (
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from mbv3dist.data.batch import Batch
from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.loss import match_batch, multibox_loss
from mbv3dist.models.loss_options import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    IOU_LOSS_WEIGHT,
    OBJECT_PRIOR,
    focal_loss,
    start_from_prior,
)
from mbv3dist.models.ssdlite import SSDLite, feature_sizes
from mbv3dist.ops.boxes import anchors_to_pixels, decode_boxes
from mbv3dist.recipe import load_config
from mbv3dist.training.detection import DetectionTask

SIZE = (128, 128)
ANCHORS = make_anchors(AnchorConfig(), feature_sizes(SIZE))
PIXELS = anchors_to_pixels(ANCHORS, SIZE)
THEIRS = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss}


def make_case(*, num_classes: int = 4, seed: int = 0) -> tuple:
    """Three pictures, one without boxes: targets, logits and deltas that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(3, 5, 2, generator=generator) * 90
    extent = torch.rand(3, 5, 2, generator=generator) * 60 + 4
    boxes = torch.cat((start, (start + extent).clamp(max=128)), -1)
    labels = torch.randint(0, num_classes, (3, 5), generator=generator)
    labels[1] = -1
    targets = match_batch(ANCHORS, boxes, labels, size=SIZE)
    logits = torch.randn(3, len(ANCHORS), num_classes + 1, generator=generator)
    deltas = torch.randn(3, len(ANCHORS), 4, generator=generator)
    return targets, logits.requires_grad_(), deltas.requires_grad_()


@pytest.mark.parametrize("kind", ["giou", "diou"])
@pytest.mark.parametrize("seed", range(4))
def test_box_losses_are_torchvisions(kind, seed):
    targets, logits, deltas = make_case(seed=seed)
    loss = multibox_loss(logits, deltas, targets, box_loss=kind, anchors=PIXELS).regression_sum
    positive = targets.labels > 0
    assert positive.sum() > 10
    pixels = PIXELS.expand(3, -1, -1)[positive]
    expected = IOU_LOSS_WEIGHT * THEIRS[kind](
        decode_boxes(deltas[positive], pixels),
        decode_boxes(targets.deltas[positive], pixels),
        reduction="sum",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    mine, its = (torch.autograd.grad(value, deltas)[0] for value in (loss, expected))
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    assert (mine[~positive] == 0).all()


@pytest.mark.parametrize("kind", ["giou", "diou"])
def test_the_right_boxes_cost_nothing(kind):
    targets, logits, _ = make_case()
    loss = multibox_loss(logits, targets.deltas, targets, box_loss=kind, anchors=PIXELS)
    assert loss.regression_sum.abs() < 1e-3


def test_focal_of_one_class_is_torchvisions_sigmoid_focal():
    targets, logits, _ = make_case(num_classes=1)
    loss = focal_loss(logits, targets.labels)
    expected = sigmoid_focal_loss(
        logits[..., 1] - logits[..., 0],
        (targets.labels > 0).float(),
        alpha=FOCAL_ALPHA,
        gamma=FOCAL_GAMMA,
    ).sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    mine, its = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_focal_follows_its_formula_for_many_classes():
    targets, logits, _ = make_case(num_classes=6)
    expected = torch.zeros(3)
    for picture in range(3):
        for anchor, label in enumerate(targets.labels[picture].tolist()):
            p = logits[picture, anchor].softmax(-1)[label]
            alpha = FOCAL_ALPHA if label else 1 - FOCAL_ALPHA
            expected[picture] -= (alpha * (1 - p) ** FOCAL_GAMMA * p.log()).detach()
    torch.testing.assert_close(focal_loss(logits, targets.labels), expected, rtol=1e-4, atol=1e-3)


def test_label_smoothing_is_torchs():
    targets, logits, deltas = make_case()
    loss = multibox_loss(
        logits, deltas, targets, label_smoothing=0.1, negative_ratio=1e6
    ).classification_sum
    taught = (targets.labels > 0).any(1)
    expected = torch.nn.functional.cross_entropy(
        logits[taught].flatten(0, 1),
        targets.labels[taught].flatten(),
        label_smoothing=0.1,
        reduction="sum",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("box_loss", ["giou", "diou"])
@pytest.mark.parametrize("length", [0, 2])
def test_without_boxes_nothing_is_nan(box_loss, length):
    boxes, labels = torch.zeros(2, length, 4), torch.full((2, length), -1)
    targets = match_batch(ANCHORS, boxes, labels, size=SIZE)
    logits = torch.randn(2, len(ANCHORS), 3, requires_grad=True)
    deltas = (100 * torch.randn(2, len(ANCHORS), 4)).requires_grad_()
    loss = multibox_loss(
        logits, deltas, targets, box_loss=box_loss, classification_loss="focal", anchors=PIXELS
    )
    (loss.regression_sum + loss.classification_sum).backward()
    assert loss.regression_sum.abs() < 1e-3
    assert logits.grad.isfinite().all()
    assert (deltas.grad == 0).all()


class Waiting(TorchDispatchMode):
    """Notes operations that make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor", "index_put")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.NAMES):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou"])
@pytest.mark.parametrize("classification_loss", ["hard_negative", "focal"])
def test_options_never_wait_and_compile_whole(box_loss, classification_loss):
    targets, logits, deltas = make_case()

    def step(logits, deltas):
        loss = multibox_loss(
            logits,
            deltas,
            targets,
            box_loss=box_loss,
            classification_loss=classification_loss,
            label_smoothing=0.1,
            anchors=PIXELS,
        )
        return loss.regression_sum + loss.classification_sum

    with Waiting() as mode:
        step(logits, deltas).backward()
    assert not mode.found
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, deltas), step(logits, deltas))


def test_a_new_focal_detector_sees_background():
    model = SSDLite("small", num_classes=3, input_size=64, width=0.5)
    start_from_prior(model)
    model.eval()
    with torch.no_grad():
        for head in model.class_heads:
            head[-1].weight.zero_()
        logits, _ = model(torch.rand(2, 3, 64, 64))
    background = logits.softmax(-1)[..., 0]
    torch.testing.assert_close(background, torch.full_like(background, 1 - OBJECT_PRIOR))


@pytest.mark.parametrize("asked", [True, False])
def test_recipe_keys_reach_the_loss(tmp_path, asked):
    keys = {"box_loss": "giou", "classification_loss": "focal", "label_smoothing": 0.1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {path: x, view: {name: ssd}}\nmodel: "
        + str({"input_size": 128, **(keys if asked else {})})
    )
    batch = Batch(
        image=torch.zeros(1, 3, 128, 128, dtype=torch.uint8),
        boxes=torch.tensor([[[10.0, 10, 60, 60]]]),
        labels=torch.tensor([[1]]),
        weight=torch.ones(1),
        index=torch.zeros(1, dtype=torch.int64),
        epoch=torch.zeros(1, dtype=torch.int64),
        size=torch.zeros(1, 2, dtype=torch.int32),
        view=torch.zeros(1, 8),
        color=torch.zeros(1, 6),
    )
    outputs = torch.randn(1, len(ANCHORS), 4), torch.randn(1, len(ANCHORS), 4)
    task = DetectionTask.from_config(load_config(recipe), ANCHORS)
    targets = task.targets(batch)
    found = task.losses(outputs, batch, targets)
    expected = multibox_loss(*outputs, targets, anchors=PIXELS, **(keys if asked else {}))
    other = multibox_loss(*outputs, targets, anchors=PIXELS, **({} if asked else keys))
    assert found["loss_regression"] == expected.regression_sum != other.regression_sum
    assert found["loss_classification"] == expected.classification_sum
    assert expected.classification_sum != other.classification_sum
