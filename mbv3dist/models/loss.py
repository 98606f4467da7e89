"""Matching and the multibox loss of SSD, for a whole batch at once.

"SSD: Single Shot MultiBox Detector", https://arxiv.org/abs/1512.02325, section 2.2; values and
gradients are those of torchvision's `SSD.compute_loss`. There is no loop over pictures and no
synchronisation with the device, and shapes are static.

Shapes: B pictures, A anchors, M boxes (padded), C classes without background.
Use: `targets = match_batch(...)`, then the forward, then `multibox_loss(..., targets)`. Matching
needs no outputs, so that ranks can sum `targets.num_positives` while the forward runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mbv3dist.ops.boxes import anchors_to_pixels, box_iou, encode_boxes


@dataclass(frozen=True)
class Targets:
    """What each anchor is to predict.

    Attributes:
        labels: int64 [B, A], 0 for background, class + 1 for a positive anchor.
        deltas: float32 [B, A, 4], deltas to the matched box; 0 where background.
        weight: float32 [B], weight of each picture in all sums.
        num_positives: float32 0-d, weighted number of positive anchors of this batch.
    """

    labels: Tensor
    deltas: Tensor
    weight: Tensor
    num_positives: Tensor


@dataclass(frozen=True)
class MultiboxLoss:
    """Sums over a batch, not normalised: divide by max(1, positives of all ranks).

    Attributes:
        regression_sum: 0-d, smooth-L1 of the positive anchors' deltas.
        classification_sum: 0-d, cross-entropy of positive and hard negative anchors.
        num_positives: 0-d, `Targets.num_positives` of the batch.
    """

    regression_sum: Tensor
    classification_sum: Tensor
    num_positives: Tensor


@torch.no_grad()
def match_batch(
    anchors: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    size: tuple[int, int],
    weight: Tensor | None = None,
    iou_threshold: float = 0.5,
) -> Targets:
    """Assign boxes to anchors.

    An anchor takes the box it overlaps most, if the IoU reaches the threshold; besides, each box
    takes the anchor that overlaps it most, whatever the IoU (of several boxes the last one wins).
    Padding, boxes without area and boxes that meet no anchor match nothing.

    Args:
        anchors: float32 [A, 4], cxcywh in [0, 1].
        boxes: float32 [B, M, 4], xyxy canvas pixels.
        labels: int64 [B, M], 0-based class; -1 is padding.
        size: canvas (height, width) in pixels.
        weight: float32 [B], weight of each picture; None: 1.
        iou_threshold: IoU from which an anchor is positive.

    Returns:
        `Targets` of the batch.
    """
    batch, num_anchors = boxes.shape[0], anchors.shape[0]
    if boxes.shape[1] == 0:  # a maximum over nothing is an error: one box of padding instead
        boxes, labels = boxes.new_zeros(batch, 1, 4), labels.new_full((batch, 1), -1)
    if weight is None:
        weight = boxes.new_ones(batch)
    boxes = boxes.float()
    pixels = anchors_to_pixels(anchors, size)

    valid = (labels >= 0) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    overlap = torch.where(valid[..., None], box_iou(boxes, pixels), -1.0)  # [B, M, A]
    best_iou, best_box = overlap.max(dim=1)  # [B, A]
    box_iou_max, best_anchor = overlap.max(dim=2)  # [B, M]

    # An integer maximum gives "the last box wins" whatever order the device works in.
    number = torch.arange(boxes.shape[1], device=boxes.device)
    forced = best_box.new_full((batch, num_anchors), -1).scatter_reduce(
        1, best_anchor, torch.where(box_iou_max > 0, number, -1), reduce="amax"
    )
    positive = (best_iou >= iou_threshold) | (forced >= 0)
    matched = torch.where(forced >= 0, forced, best_box)

    targets = torch.where(positive, labels.gather(1, matched) + 1, 0)
    matched_boxes = boxes.gather(1, matched[..., None].expand(-1, -1, 4))
    deltas = torch.where(positive[..., None], encode_boxes(matched_boxes, pixels), 0.0)
    num_positives = (positive.sum(1) * weight).sum()
    return Targets(labels=targets, deltas=deltas, weight=weight, num_positives=num_positives)


def multibox_loss(
    class_logits: Tensor,
    box_deltas: Tensor,
    targets: Targets,
    *,
    negative_ratio: float = 3.0,
    min_negatives: int = 0,
) -> MultiboxLoss:
    """Loss of a batch: smooth-L1 on deltas, cross-entropy on positives and hard negatives.

    Args:
        class_logits: float [B, A, C + 1], column 0 is the background.
        box_deltas: float [B, A, 4].
        targets: from `match_batch`.
        negative_ratio: hard negatives per positive in each picture.
        min_negatives: least number of hard negatives of each picture. With 0, as in torchvision, a
            picture without boxes teaches nothing.

    Returns:
        Sums, weighted per picture; see `MultiboxLoss`.
    """
    positive = targets.labels > 0
    predicted = torch.where(positive[..., None], box_deltas.float(), 0.0)
    regression = F.smooth_l1_loss(predicted, targets.deltas, reduction="none").sum((1, 2))
    cross_entropy = F.cross_entropy(
        class_logits.float().flatten(0, 1), targets.labels.flatten(), reduction="none"
    ).view_as(targets.labels)
    negative = _hard_negatives(
        cross_entropy.detach(), positive, ratio=negative_ratio, minimum=min_negatives
    )
    classification = torch.where(positive | negative, cross_entropy, 0.0).sum(1)
    return MultiboxLoss(
        regression_sum=(regression * targets.weight).sum(),
        classification_sum=(classification * targets.weight).sum(),
        num_positives=targets.num_positives,
    )


@torch.no_grad()
def _hard_negatives(loss: Tensor, positive: Tensor, *, ratio: float, minimum: int) -> Tensor:
    """Pick the negatives with the largest loss in each picture; of equal ones the first anchors.

    Args:
        loss: float32 [B, A].
        positive: bool [B, A].
        ratio: negatives per positive.
        minimum: least number of negatives.

    Returns:
        bool [B, A].
    """
    number = (ratio * positive.sum(1, keepdim=True)).clamp(min=minimum)  # [B, 1]
    order = (
        torch.where(positive, -torch.inf, loss).sort(dim=1, descending=True, stable=True).indices
    )
    chosen = torch.arange(loss.shape[1], device=loss.device) < number  # by rank
    # torchvision counts positives twice where a picture has fewer negatives than asked for.
    return torch.zeros_like(positive).scatter(1, order, chosen) & ~positive
