"""Post-process of a detector's raw outputs: decode, threshold, top-k, NMS, best detections.

The rule is that of torchvision's `SSD.postprocess_detections`, whose own ops do the work here. This
is the reference that faster implementations are tested against.

Shapes: B pictures, A anchors, C classes (without background), D = `max_detections`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mbv3dist.ops.boxes import anchors_to_pixels, clip_boxes, decode_boxes


@dataclass(frozen=True)
class Detections:
    """Detections of a batch, best score first, padded to a fixed number per picture.

    Attributes:
        boxes: float32 [B, D, 4], xyxy canvas pixels, clipped to the canvas; 0 where padded.
        scores: float32 [B, D], probabilities; 0 where padded.
        labels: int64 [B, D], 0-based without background; -1 where padded.
        count: int64 [B], detections of each picture.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor


@torch.no_grad()
def postprocess(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    *,
    size: tuple[int, int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Detections:
    """Turn raw outputs into detections.

    Args:
        class_logits: float [B, A, C + 1], column 0 is the background.
        box_deltas: float [B, A, 4].
        anchors: float32 [A, 4], cxcywh in [0, 1].
        size: canvas (height, width) in pixels.
        score_threshold: a class is considered where its probability is above this.
        nms_threshold: of two boxes of one class with a larger IoU the weaker is dropped.
        topk_candidates: boxes per class and picture that enter NMS.
        max_detections: D, detections kept per picture.

    Returns:
        `Detections` of static shape [B, D].
    """
    scores = class_logits.float().softmax(-1)[..., 1:].transpose(1, 2)  # [B, C, A]
    pixels = anchors_to_pixels(anchors.float(), size)
    boxes = clip_boxes(decode_boxes(box_deltas.float(), pixels), size)

    batch, num_classes, num_anchors = scores.shape
    candidates = min(topk_candidates, num_anchors)
    top_scores, top_anchors = scores.topk(candidates, dim=-1)  # [B, C, K], class-major as in SSD
    labels = torch.arange(num_classes, device=scores.device)[:, None].expand(-1, candidates)

    result = Detections(
        boxes=boxes.new_zeros(batch, max_detections, 4),
        scores=boxes.new_zeros(batch, max_detections),
        labels=torch.full((batch, max_detections), -1, dtype=torch.int64, device=boxes.device),
        count=torch.zeros(batch, dtype=torch.int64, device=boxes.device),
    )
    for picture in range(batch):
        chosen = top_scores[picture] > score_threshold  # [C, K]
        picture_scores = top_scores[picture][chosen]
        picture_labels = labels[chosen]
        picture_boxes = boxes[picture][top_anchors[picture][chosen]]
        # batched_nms shifts boxes by their label: with torchvision's (from 1) rounding agrees too.
        keep = batched_nms(picture_boxes, picture_scores, picture_labels + 1, nms_threshold)
        keep = keep[:max_detections]
        kept = len(keep)
        result.boxes[picture, :kept] = picture_boxes[keep]
        result.scores[picture, :kept] = picture_scores[keep]
        result.labels[picture, :kept] = picture_labels[keep]
        result.count[picture] = kept
    return result
