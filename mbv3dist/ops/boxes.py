"""Box arithmetic: formats, overlap, and the coder between boxes and a detector's deltas.

Shapes: boxes [..., 4]. "xyxy" is (x1, y1, x2, y2), "cxcywh" is (centre x, centre y, width, height).
The order of operations follows torchvision's `box_iou` and `BoxCoder`, so that results agree to
the last bit. Sizes enter as Python numbers, so nothing here copies to or waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOX_WEIGHTS: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_SCALE = math.log(1000.0 / 16)  # larger width and height deltas would overflow exp()


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert corner boxes [..., 4] to centre boxes [..., 4], same units."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return torch.stack((x1 + 0.5 * width, y1 + 0.5 * height, width, height), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert centre boxes [..., 4] to corner boxes [..., 4], same units."""
    cx, cy, width, height = boxes.unbind(-1)
    half_width, half_height = 0.5 * width, 0.5 * height
    return torch.stack(
        (cx - half_width, cy - half_height, cx + half_width, cy + half_height), dim=-1
    )


def anchors_to_pixels(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Place relative anchors on a canvas.

    Args:
        anchors: float32 [A, 4], cxcywh as fractions of the canvas.
        size: canvas (height, width) in pixels.

    Returns:
        float32 [A, 4], xyxy canvas pixels (not clipped).
    """
    height, width = size
    x1, y1, x2, y2 = cxcywh_to_xyxy(anchors).unbind(-1)
    return torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), dim=-1)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip xyxy pixel boxes [..., 4] to a canvas of `size` = (height, width)."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=-1
    )


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Overlap of every box of one set with every box of another.

    Args:
        boxes1: float [..., N, 4], xyxy.
        boxes2: float [..., M, 4], xyxy, same units; leading dimensions broadcast.

    Returns:
        float [..., N, M]: intersection over union (NaN for a pair of empty boxes).
    """
    # Coordinates apart and contiguous: twice as fast on a CPU as strided ones.
    ax1, ay1, ax2, ay2 = boxes1.unsqueeze(-2).unbind(-1)
    bx1, by1, bx2, by2 = boxes2.transpose(-1, -2).contiguous().unsqueeze(-2).unbind(-3)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width.mul_(height)
    areas1, areas2 = (ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)
    return intersection / (areas1 + areas2).sub_(intersection)


def encode_boxes(
    boxes: Tensor, anchors: Tensor, *, weights: tuple[float, float, float, float] = BOX_WEIGHTS
) -> Tensor:
    """Express boxes as deltas from anchors: what the regression head is to predict.

    Args:
        boxes: float [..., 4], xyxy.
        anchors: float [..., 4], xyxy, same units; broadcast against `boxes`.
        weights: factors of (dx, dy, dw, dh).

    Returns:
        float [..., 4]. Boxes without area give infinite deltas; mask them.
    """
    x, y, width, height = xyxy_to_cxcywh(boxes).unbind(-1)
    anchor_x, anchor_y, anchor_width, anchor_height = xyxy_to_cxcywh(anchors).unbind(-1)
    wx, wy, ww, wh = weights
    return torch.stack(
        (
            wx * (x - anchor_x) / anchor_width,
            wy * (y - anchor_y) / anchor_height,
            ww * torch.log(width / anchor_width),
            wh * torch.log(height / anchor_height),
        ),
        dim=-1,
    )


def decode_boxes(
    deltas: Tensor, anchors: Tensor, *, weights: tuple[float, float, float, float] = BOX_WEIGHTS
) -> Tensor:
    """Apply predicted deltas to anchors; the inverse of `encode_boxes`.

    Args:
        deltas: float [..., 4] as the regression head gives them.
        anchors: float [..., 4], xyxy; broadcast against `deltas`.
        weights: factors of (dx, dy, dw, dh).

    Returns:
        float [..., 4], xyxy, in the units of the anchors (not clipped).
    """
    anchor_x, anchor_y, anchor_width, anchor_height = xyxy_to_cxcywh(anchors).unbind(-1)
    dx, dy, dw, dh = deltas.unbind(-1)
    wx, wy, ww, wh = weights
    x = dx / wx * anchor_width + anchor_x
    y = dy / wy * anchor_height + anchor_y
    half_width = 0.5 * (torch.exp((dw / ww).clamp(max=MAX_LOG_SCALE)) * anchor_width)
    half_height = 0.5 * (torch.exp((dh / wh).clamp(max=MAX_LOG_SCALE)) * anchor_height)
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)
