"""Matching and multibox loss: torchvision's values and gradients, without loops or waiting."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.loss import Targets, match_batch, multibox_loss
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops.boxes import anchors_to_pixels

SIZE = (320, 320)
ANCHORS = make_anchors(AnchorConfig(), feature_sizes(SIZE))
NUM_CLASSES = 5


def random_boxes(counts: list[int], *, seed: int = 0, padding: int = 0) -> tuple:
    """Boxes and labels padded to one length, with rubbish where padded."""
    generator = torch.Generator().manual_seed(seed)
    length = max(counts, default=0) + padding
    start = torch.rand(len(counts), length, 2, generator=generator) * 250
    extent = torch.rand(len(counts), length, 2, generator=generator) ** 2 * 150 + 2
    boxes = torch.cat((start, (start + extent).clamp(max=320)), dim=-1)
    labels = torch.randint(0, NUM_CLASSES, (len(counts), length), generator=generator)
    for picture, count in enumerate(counts):
        labels[picture, count:] = -1
    return boxes, labels


def random_outputs(batch: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, len(ANCHORS), NUM_CLASSES + 1, generator=generator)
    deltas = torch.randn(batch, len(ANCHORS), 4, generator=generator)
    return logits.requires_grad_(), deltas.requires_grad_()


def torchvision_loss(
    logits: torch.Tensor, deltas: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    pixels = anchors_to_pixels(ANCHORS, SIZE)
    matcher = SSDMatcher(0.5)
    targets, matched = [], []
    for its_boxes, its_labels in zip(boxes, labels, strict=True):
        real = its_labels >= 0
        targets.append({"boxes": its_boxes[real], "labels": its_labels[real] + 1})
        if real.any():
            matched.append(matcher(box_iou(its_boxes[real], pixels)))
        else:
            matched.append(torch.full((len(pixels),), -1))
    owner = SimpleNamespace(box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0)), neg_to_pos_ratio=3.0)
    outputs = {"bbox_regression": deltas, "cls_logits": logits}
    return SSD.compute_loss(owner, targets, outputs, [pixels] * len(boxes), matched)


def match(boxes: torch.Tensor, labels: torch.Tensor, **options: object) -> Targets:
    return match_batch(ANCHORS, boxes, labels, size=SIZE, **options)


@pytest.mark.parametrize("counts", [[0, 1, 2, 30], [30, 17, 0, 5, 9], [0, 0], [3]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_equal_torchvisions(counts: list[int], seed: int) -> None:
    boxes, labels = random_boxes(counts, seed=seed, padding=2)
    logits, deltas = random_outputs(len(counts), seed=seed)
    theirs = torchvision_loss(logits, deltas, boxes, labels)
    expected = torch.autograd.grad(sum(theirs.values()), (logits, deltas), allow_unused=True)

    loss = multibox_loss(logits, deltas, match(boxes, labels))
    normaliser = loss.num_positives.clamp(min=1)
    regression = loss.regression_sum / normaliser
    classification = loss.classification_sum / normaliser
    gradient = torch.autograd.grad(regression + classification, (logits, deltas))

    close = {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(regression, theirs["bbox_regression"], **close)
    torch.testing.assert_close(classification, theirs["classification"], **close)
    for mine, its in zip(gradient, expected, strict=True):
        its = torch.zeros_like(mine) if its is None else its
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-9)


def test_positives_are_counted_before_any_output_is_known() -> None:
    boxes, labels = random_boxes([4, 0, 11])
    weight = torch.tensor([1.0, 1.0, 0.0])
    targets = match(boxes, labels, weight=weight)
    counts = (targets.labels > 0).sum(1)
    assert counts[1] == 0
    assert targets.num_positives == counts[0] > 0


def test_sums_add_up_over_parts_and_padding_does_not_matter() -> None:
    boxes, labels = random_boxes([4, 0, 11, 2])
    logits, deltas = random_outputs(4)
    whole = multibox_loss(logits, deltas, match(boxes, labels))
    parts = [
        multibox_loss(
            logits[i : i + 1], deltas[i : i + 1], match(boxes[i, None, :n], labels[i, None, :n])
        )
        for i, n in enumerate([4, 0, 11, 2])
    ]
    for name in ("regression_sum", "classification_sum", "num_positives"):
        together = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(getattr(whole, name), together)


def test_pictures_of_weight_zero_add_nothing() -> None:
    boxes, labels = random_boxes([4, 7])
    logits, deltas = random_outputs(2)
    weight = torch.tensor([1.0, 0.0])
    loss = multibox_loss(logits, deltas, match(boxes, labels, weight=weight))
    alone = multibox_loss(logits[:1], deltas[:1], match(boxes[:1], labels[:1]))
    torch.testing.assert_close(loss.regression_sum, alone.regression_sum)
    torch.testing.assert_close(loss.classification_sum, alone.classification_sum)
    (loss.regression_sum + loss.classification_sum).backward()
    assert logits.grad[1].abs().max() == 0
    assert deltas.grad[1].abs().max() == 0


def test_each_box_has_an_anchor_and_the_last_of_equal_boxes_wins() -> None:
    boxes = torch.tensor([[[10.0, 10, 40, 40], [200, 200, 201, 201], [200, 200, 201, 201]]])
    targets = match(boxes, torch.tensor([[0, 1, 2]]))
    found = targets.labels.unique().tolist()
    assert found == [0, 1, 3]
    assert (targets.labels == 3).sum() == 1


def test_padding_and_boxes_without_area_match_nothing() -> None:
    boxes = torch.tensor(
        [
            [[0.0, 0, 0, 0], [50, 50, 50, 90], [60, 60, 20, 90], [0, 0, 320, 320]],
            [[float("nan")] * 4, [1000, 1000, 1100, 1100], [-900, 5, -800, 60], [0, 0, 320, 320]],
        ]
    )
    labels = torch.tensor([[1, 2, 3, -1], [1, 2, 3, -1]])
    targets = match(boxes, labels)
    assert targets.num_positives == 0
    assert targets.deltas.abs().max() == 0


@pytest.mark.parametrize("min_negatives", [0, 10])
@pytest.mark.parametrize("length", [0, 3])
def test_without_boxes_nothing_is_nan(min_negatives: int, length: int) -> None:
    boxes, labels = torch.zeros(2, length, 4), torch.full((2, length), -1)
    logits, deltas = random_outputs(2)
    loss = multibox_loss(logits, deltas, match(boxes, labels), min_negatives=min_negatives)
    (loss.regression_sum + loss.classification_sum).backward()
    assert loss.num_positives == 0
    assert loss.regression_sum == 0
    assert loss.classification_sum.isfinite()
    assert logits.grad.isfinite().all()
    taught = (logits.grad.abs().sum(-1) > 0).sum(1)
    assert taught.tolist() == [min_negatives] * 2
    # The hardest ones: no anchor left out has a larger loss.
    hardest = -logits.log_softmax(-1)[..., 0].detach()
    if min_negatives:
        expected = hardest.sort(descending=True).values[:, :min_negatives].sum()
        torch.testing.assert_close(loss.classification_sum, expected)


def test_more_negatives_asked_than_there_are() -> None:
    boxes, labels = random_boxes([4])
    logits, deltas = random_outputs(1)
    targets = match(boxes, labels)
    loss = multibox_loss(logits, deltas, targets, negative_ratio=1e6)
    everything = torch.nn.functional.cross_entropy(logits[0], targets.labels[0], reduction="sum")
    torch.testing.assert_close(loss.classification_sum, everything)


def test_half_precision_outputs_are_summed_in_float32() -> None:
    boxes, labels = random_boxes([4, 9])
    logits, deltas = random_outputs(2)
    loss = multibox_loss(logits.bfloat16(), deltas.bfloat16(), match(boxes, labels))
    assert loss.regression_sum.dtype == loss.classification_sum.dtype == torch.float32


class CountOps(TorchDispatchMode):
    """Counts operations, and those that make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "index.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_number_of_operations_does_not_depend_on_the_batch() -> None:
    counts = []
    for batch in (1, 2, 16):
        boxes, labels = random_boxes([5] * batch)
        logits, deltas = random_outputs(batch)
        with CountOps() as mode:
            loss = multibox_loss(logits, deltas, match(boxes, labels))
            (loss.regression_sum + loss.classification_sum).backward()
        assert not [op for op in mode.ops if any(name in op for name in CountOps.WAITING)]
        counts.append(len(mode.ops))
    assert len(set(counts)) == 1
    assert counts[0] <= 220, counts


def test_compiles_without_graph_breaks() -> None:
    boxes, labels = random_boxes([4, 0, 11])
    logits, deltas = random_outputs(3)

    def step(logits, deltas, boxes, labels):
        return multibox_loss(logits, deltas, match(boxes, labels)).classification_sum

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(logits, deltas, boxes, labels), step(logits, deltas, boxes, labels)
    )
