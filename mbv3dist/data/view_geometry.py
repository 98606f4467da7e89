"""Compiled arithmetic of views: cuts, placements and what they do to boxes, as in views.py.

Shapes: src float64 [4] and dst int32 [4], xyxy pixels of picture and canvas; boxes float32 [n, 4].
"""

from __future__ import annotations

import numpy as np

from mbv3dist.data.compiled import compiled
from mbv3dist.data.views import MIN_BOX_SIDE

_F32 = np.float32


@compiled
def resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return the size at which the shorter side has this length."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


@compiled
def center_offset(length: int, size: int) -> int:
    """Return where a centred canvas starts on an axis of some length."""
    if length < size:
        return -((size - length) // 2)
    return int(np.rint((length - size) / 2.0))


@compiled
def crop_axis(
    axis: int, side: int, resized: int, offset: int, size: int, src: np.ndarray, dst: np.ndarray
) -> None:
    """Cut a canvas out of one axis of a resized picture."""
    low, high = max(offset, 0), min(offset + size, resized)
    src[axis], src[axis + 2] = low * side / resized, high * side / resized
    dst[axis], dst[axis + 2] = low - offset, high - offset


@compiled
def place_axis(
    axis: int,
    start: float,
    length: float,
    side: int,
    size: int,
    src: np.ndarray,
    dst: np.ndarray,
) -> None:
    """Place one axis of a picture, of which a stretch fills the canvas."""
    low = min(max(start, 0.0), side - 1.0)
    high = max(min(start + length, float(side)), low + 1.0)
    scale = size / length
    first = min(max(int(np.rint((low - start) * scale)), 0), size - 1)
    last = max(min(int(np.rint((high - start) * scale)), size), first + 1)
    src[axis], src[axis + 2] = low, high
    dst[axis], dst[axis + 2] = first, last


@compiled
def move_boxes(
    src: np.ndarray,
    dst: np.ndarray,
    flip: bool,
    size: int,
    boxes: np.ndarray,
    moved: np.ndarray,
    keep: np.ndarray,
) -> None:
    """As `View.to_canvas`; drops what `views` finds not visible."""
    scale_x, scale_y = (dst[2] - dst[0]) / (src[2] - src[0]), (dst[3] - dst[1]) / (src[3] - src[1])
    shift_x = dst[0] - src[0] * scale_x
    if flip:
        scale_x, shift_x = -scale_x, dst[2] + src[0] * scale_x
    shift_y = dst[1] - src[1] * scale_y
    sx, sy, tx, ty = _F32(scale_x), _F32(scale_y), _F32(shift_x), _F32(shift_y)
    zero, limit = _F32(0), _F32(size)
    for number in range(len(boxes)):
        left, right = boxes[number, 0] * sx + tx, boxes[number, 2] * sx + tx
        top, bottom = boxes[number, 1] * sy + ty, boxes[number, 3] * sy + ty
        if flip:
            left, right = right, left
        moved[number, 0], moved[number, 1] = left, top
        moved[number, 2], moved[number, 3] = right, bottom
        center_x, center_y = (left + right) * _F32(0.5), (top + bottom) * _F32(0.5)
        keep[number] &= (
            center_x >= dst[0]
            and center_y >= dst[1]
            and center_x <= dst[2]
            and center_y <= dst[3]
            and min(right, limit) - max(left, zero) >= MIN_BOX_SIDE
            and min(bottom, limit) - max(top, zero) >= MIN_BOX_SIDE
        )
