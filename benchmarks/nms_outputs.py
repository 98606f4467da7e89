"""Raw outputs that nms.py measures with, and the post-process with one call of NMS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops.boxes import (
    anchors_to_pixels,
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    decode_boxes,
    encode_boxes,
)
from mbv3dist.ops.nms import Detections

SIZE = (320, 320)
OPTIONS = {
    "score_threshold": 0.001,
    "nms_threshold": 0.55,
    "topk_candidates": 300,
    "max_detections": 300,
}


@dataclass
class Outputs:
    """Raw outputs of a batch.

    Attributes:
        logits: float32 [B, A, C + 1].
        deltas: float32 [B, A, 4].
        anchors: float32 [A, 4], cxcywh.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor

    def scores_and_boxes(self) -> tuple[Tensor, Tensor]:
        """Return float32 [B, A, C + 1] and [B, A, 4]."""
        pixels = anchors_to_pixels(self.anchors, SIZE)
        boxes = clip_boxes(decode_boxes(self.deltas, pixels), SIZE)
        return self.logits.softmax(-1), boxes


def make_outputs(kind: str, batch: int, columns: int, device: torch.device) -> Outputs:
    """Draw raw outputs, see above."""
    generator = torch.Generator().manual_seed(columns)
    anchors = make_anchors(AnchorConfig(), feature_sizes(SIZE))
    logits = torch.randn(batch, len(anchors), columns, generator=generator)
    deltas = torch.randn(batch, len(anchors), 4, generator=generator)
    if kind == "sparse":
        logits[..., 0] += 10.5
        for picture in range(batch):
            _draw_objects(generator, anchors, logits[picture], deltas[picture])
    return Outputs(logits.to(device), deltas.to(device), anchors.to(device))


def _draw_objects(
    generator: torch.Generator, anchors: Tensor, logits: Tensor, deltas: Tensor
) -> None:
    """Let the anchors of a picture see some objects."""
    corners = cxcywh_to_xyxy(anchors)
    for _ in range(int(torch.randint(1, 9, (1,), generator=generator))):
        side = 0.1 + 0.5 * torch.rand(2, generator=generator)
        center = side / 2 + (1 - side) * torch.rand(2, generator=generator)
        box = cxcywh_to_xyxy(torch.cat((center, side)))[None]
        label = int(torch.randint(1, logits.shape[1], (1,), generator=generator))
        overlap = box_iou(corners, box)[:, 0]
        logits[overlap > 0.3, label] += 8
        logits[overlap > 0.5, label] += 5
        seen = overlap > 0.3
        noise = 0.3 * deltas[seen]
        deltas[seen] = encode_boxes(box.expand(int(seen.sum()), 4), corners[seen]) + noise


def one_call(outputs: Outputs) -> Detections:
    """Post-process with one batched_nms over the whole batch."""
    scores, boxes = outputs.scores_and_boxes()
    scores = scores[..., 1:].transpose(1, 2)
    batch, num_classes, num_anchors = scores.shape
    limit, most = OPTIONS["topk_candidates"], int(OPTIONS["max_detections"])
    scores, anchors = scores.topk(min(int(limit), num_anchors), dim=-1)
    picture, label, rank = (scores > OPTIONS["score_threshold"]).nonzero(as_tuple=True)
    scores = scores[picture, label, rank]
    boxes = boxes[picture, anchors[picture, label, rank]]
    keep = batched_nms(boxes, scores, picture * num_classes + label, OPTIONS["nms_threshold"])
    owner, order = picture[keep].sort(stable=True)
    keep = keep[order]
    count = torch.bincount(owner, minlength=batch)
    place = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    keep, owner, place = (x[place < most] for x in (keep, owner, place))
    result = Detections(
        boxes.new_zeros(batch, most, 4),
        scores.new_zeros(batch, most),
        label.new_full((batch, most), -1),
        count.clamp(max=most),
    )
    result.boxes[owner, place] = boxes[keep]
    result.scores[owner, place] = scores[keep]
    result.labels[owner, place] = label[keep]
    return result
