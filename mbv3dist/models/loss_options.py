"""Alternatives to SSD's loss parts: IoU losses for boxes, focal loss for classes.

GIoU: "Generalized Intersection over Union", https://arxiv.org/abs/1902.09630; DIoU: "Distance-IoU
Loss", https://arxiv.org/abs/1911.08287; focal: "Focal Loss for Dense Object Detection",
https://arxiv.org/abs/1708.02002, here over a softmax, so that post-processing stays as it is.
Like loss.py: no loop over pictures, no synchronisation, static shapes. This file can go in one
piece, with the keys `model.box_loss` and `model.classification_loss`.

Shapes: B pictures, A anchors, C classes without background.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.ops.boxes import decode_boxes

IOU_LOSS_WEIGHT = 5.0  # brings 1 - IoU to the size of smooth-L1 over four weighted deltas
FOCAL_GAMMA, FOCAL_ALPHA = 2.0, 0.25
OBJECT_PRIOR = 0.01  # probability of any object at an anchor before training, with focal loss
_EPS = 1e-7  # as torchvision's box losses


def iou_loss(
    predicted: Tensor, target: Tensor, anchors: Tensor, *, kind: Literal["giou", "diou"]
) -> Tensor:
    """1 - GIoU, or 1 - DIoU, of boxes given as deltas; torchvision's values, weighted.

    Args:
        predicted: float32 [B, A, 4], deltas.
        target: float32 [B, A, 4], deltas; equal to `predicted` where an anchor is not positive,
            so that it costs nothing.
        anchors: float32 [A, 4], xyxy canvas pixels.
        kind: What is taken off 1.

    Returns:
        float32 [B], sums over anchors.
    """
    ax1, ay1, ax2, ay2 = decode_boxes(predicted, anchors).unbind(-1)
    bx1, by1, bx2, by2 = decode_boxes(target, anchors).unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    common = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common
    iou = common / (union + _EPS)
    hull_width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    if kind == "giou":
        hull = hull_width * hull_height
        loss = 1 - iou + (hull - union) / (hull + _EPS)
    else:
        diagonal = hull_width**2 + hull_height**2 + _EPS
        away = ((ax1 + ax2 - bx1 - bx2) / 2) ** 2 + ((ay1 + ay2 - by1 - by2) / 2) ** 2
        loss = 1 - iou + away / diagonal
    return IOU_LOSS_WEIGHT * loss.sum(1)


def focal_loss(class_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of all anchors, those that are easily right counting little.

    alpha (1 - p)^gamma CE with p the probability of the true class; alpha is 0.25 for positives
    and 0.75 for background. With one class this is torchvision's `sigmoid_focal_loss` of the
    difference of the two logits.

    Args:
        class_logits: float [B, A, C + 1], column 0 is the background.
        labels: int64 [B, A], 0 for background.
        label_smoothing: of the cross-entropy.

    Returns:
        float32 [B], sums over anchors; divide by the positives, as the other losses.
    """
    logits = class_logits.float().flatten(0, 1)
    flat = labels.flatten()
    cross_entropy = F.cross_entropy(logits, flat, reduction="none", label_smoothing=label_smoothing)
    true = logits.log_softmax(-1).gather(1, flat[:, None])[:, 0].exp()
    alpha = torch.where(flat > 0, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return (alpha * (1 - true) ** FOCAL_GAMMA * cross_entropy).view_as(labels).sum(1)


@torch.no_grad()
def start_from_prior(model: SSDLite) -> None:
    """Set a new detector's class biases so that background has 0.99 at every anchor.

    Without that the thousands of background anchors, which focal loss does not sample, drown the
    objects in the first steps.
    """
    bias = math.log(model.num_classes * (1 - OBJECT_PRIOR) / OBJECT_PRIOR)
    for head in model.class_heads:
        assert isinstance(head, torch.nn.Sequential)
        last = head[-1].bias
        assert isinstance(last, Tensor)
        last.view(-1, model.num_classes + 1)[:, 0] = bias
