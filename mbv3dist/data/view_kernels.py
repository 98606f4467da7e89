"""The views of views.py for many samples at once, compiled by Numba, without the GIL.

views.py says what a view is; this says the same to the last bit (a test compares them), because a
sample's view costs 40 to 120 us of Python, during which no other thread of the process runs, and
here half a microsecond. Keep the two in step.

Shapes: n samples with T boxes in all; sizes int32 [n, 2] width, height; boxes float32 [T, 4].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mbv3dist.data import draws
from mbv3dist.data.compiled import compiled
from mbv3dist.data.view_geometry import (
    center_offset,
    crop_axis,
    move_boxes,
    place_axis,
    resized,
)
from mbv3dist.data.view_random import fill, integer, uniform
from mbv3dist.data.views import (
    CROP_TRIES,
    IOU_CROP_RATIO,
    IOU_CROP_ROUNDS,
    IOU_CROP_TRIALS,
    resize_side,
)

if TYPE_CHECKING:
    from mbv3dist.config import ViewConfig

NAMES = ("resize", "center_crop", "random_crop", "random_resized_crop", "ssd")
_RESIZE, _CENTER_CROP, _RANDOM_CROP, _RANDOM_RESIZED_CROP, _SSD = range(5)
(
    _FLIP,
    _RESIZE_SIDE,
    _PADDING,
    _SCALE_MIN,
    _SCALE_MAX,
    _RATIO_MIN,
    _RATIO_MAX,
    _ZOOM_PROBABILITY,
    _ZOOM_MAX,
    _CROP_PROBABILITY,
    _CROP_SCALE_MIN,
    _COLOR_PROBABILITY,
    _BRIGHTNESS,
    _CONTRAST,
    _SATURATION,
    _HUE,
    _CHANNEL_SWAP,
) = range(17)
_PER_REFILL = draws.FLOATS_PER_REFILL
_VIEW, _COLOR = draws.VIEW, draws.COLOR
_F32 = np.float32


@dataclass
class Views:
    """The views of n samples.

    Attributes:
        src: float64 [n, 4], xyxy picture pixels.
        dst: int32 [n, 4], xyxy canvas pixels.
        flip: bool [n].
        boxes: float32 [T, 4], the samples' boxes on the canvas, not clipped.
        keep: bool [T], boxes that survive.
        color: float32 [n, 6], as `views.draw_color`.
    """

    src: np.ndarray
    dst: np.ndarray
    flip: np.ndarray
    boxes: np.ndarray
    keep: np.ndarray
    color: np.ndarray

    def vectors(self) -> np.ndarray:
        """Return float32 [n, 8], each as `View.vector`."""
        out = np.empty((len(self.src), 8), np.float32)
        out[:, :4], out[:, 4:] = self.src, self.dst
        out[self.flip, 4], out[self.flip, 6] = self.dst[self.flip, 2], self.dst[self.flip, 0]
        return out


class ViewMaker:
    """Draws views as `views.make_view` does with the same configuration."""

    def __init__(self, config: ViewConfig, *, size: int, seed: int):
        """Take over the configuration.

        Args:
            config: The recipe.
            size: Side of the canvas in pixels.
            seed: Of views and colours.

        Raises:
            ValueError: No view has this name.
        """
        if config.name not in NAMES:
            raise ValueError(f"no view is called {config.name!r}; set --data.view.name")
        self._kind = NAMES.index(config.name)
        self._size = size
        self._seed = np.uint64(seed)
        self._numbers = np.array(
            (
                config.flip,
                resize_side(config, size),
                config.padding,
                config.scale_min,
                config.scale_max,
                config.ratio_min,
                config.ratio_max,
                config.zoom_out_probability,
                config.zoom_out_max,
                config.crop_probability,
                config.crop_scale_min,
                config.color_probability,
                config.brightness,
                config.contrast,
                config.saturation,
                config.hue,
                config.channel_swap,
            ),
            np.float64,
        )
        self._min_ious = np.array(config.min_ious, np.float64)

    def make(
        self,
        epochs: np.ndarray,
        samples: np.ndarray,
        sizes: np.ndarray,
        boxes: np.ndarray,
        box_starts: np.ndarray,
    ) -> Views:
        """Draw the views of n samples.

        Args:
            epochs: int64 [n].
            samples: int64 [n], their numbers (`Draws`).
            sizes: int32 [n, 2], width and height of the upright pictures.
            boxes: float32 [T, 4], xyxy picture pixels, of all samples after each other.
            box_starts: int64 [n + 1], where each sample's boxes start.

        Raises:
            ValueError: For a random_crop that does not fit a picture, as `make_view`.
        """
        count = len(samples)
        views = Views(
            np.empty((count, 4), np.float64),
            np.empty((count, 4), np.int32),
            np.zeros(count, np.bool_),
            np.empty((len(boxes), 4), np.float32),
            np.ones(len(boxes), np.bool_),
            np.empty((count, 6), np.float32),
        )
        misfit = _make_views(
            self._kind,
            self._numbers,
            self._min_ious,
            self._size,
            self._seed,
            epochs,
            samples,
            sizes,
            boxes,
            box_starts,
            views.src,
            views.dst,
            views.flip,
            views.boxes,
            views.keep,
            views.color,
        )
        if misfit >= 0:
            width, height = resized(
                int(sizes[misfit, 0]), int(sizes[misfit, 1]), int(self._numbers[_RESIZE_SIDE])
            )
            raise ValueError(
                f"random_crop: a canvas of {self._size} cannot be cut from {width} x {height} "
                f"pixels and padding {int(self._numbers[_PADDING])}; set --data.view.resize to "
                f"{self._size} or more, and --data.view.padding from 0 to {self._size - 1}"
            )
        return views


@compiled
def _random_resized_crop(
    numbers: np.ndarray,
    width: int,
    height: int,
    stream: np.ndarray,
    ready: np.ndarray,
    used: np.ndarray,
    src: np.ndarray,
) -> None:
    area = height * width
    ratio_min, ratio_max = numbers[_RATIO_MIN], numbers[_RATIO_MAX]
    log_low, log_high = math.log(ratio_min), math.log(ratio_max)
    scale_min, scale_max = numbers[_SCALE_MIN], numbers[_SCALE_MAX]
    for _ in range(CROP_TRIES):
        target = area * (scale_min + (scale_max - scale_min) * uniform(stream, ready, used))
        aspect = math.exp(log_low + (log_high - log_low) * uniform(stream, ready, used))
        w = int(np.rint(math.sqrt(target * aspect)))
        h = int(np.rint(math.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            y = integer(stream, ready, used, height - h + 1)
            x = integer(stream, ready, used, width - w + 1)
            src[0], src[1], src[2], src[3] = x, y, x + w, y + h
            return
    w, h = width, height
    if width / height < ratio_min:
        h = int(np.rint(width / ratio_min))
    elif width / height > ratio_max:
        w = int(np.rint(height * ratio_max))
    y, x = (height - h) // 2, (width - w) // 2
    src[0], src[1], src[2], src[3] = x, y, x + w, y + h


@compiled
def _try_crops(
    low: float,
    min_iou: float,
    region: np.ndarray,
    boxes: np.ndarray,
    keep: np.ndarray,
    stream: np.ndarray,
    random: np.ndarray,
) -> bool:
    """Make `region` the first good one of 40 random crops of it, if there is one."""
    trials = IOU_CROP_TRIALS
    width, height = region[2] - region[0], region[3] - region[1]
    fill(stream, random)
    for trial in range(trials):
        crop_width = (low + (1.0 - low) * random[trial]) * width
        crop_height = (low + (1.0 - low) * random[trials + trial]) * height
        if crop_width > IOU_CROP_RATIO * crop_height or crop_height > IOU_CROP_RATIO * crop_width:
            continue
        x0 = region[0] + random[2 * trials + trial] * (width - crop_width)
        y0 = region[1] + random[3 * trials + trial] * (height - crop_height)
        x1, y1 = x0 + crop_width, y0 + crop_height
        good = False
        for number in range(len(boxes)):
            left, top, right, bottom = boxes[number]
            center_x, center_y = (left + right) * _F32(0.5), (top + bottom) * _F32(0.5)
            inside = x0 < center_x and center_x < x1 and y0 < center_y and center_y < y1
            keep[number] = inside
            if inside and not good:
                overlap = (min(x1, right) - max(x0, left)) * (min(y1, bottom) - max(y0, top))
                union = crop_width * crop_height + (right - left) * (bottom - top) - overlap
                good = overlap >= min_iou * union
        if good:
            region[0], region[1], region[2], region[3] = x0, y0, x1, y1
            return True
    return False


@compiled
def _iou_crop(
    numbers: np.ndarray,
    min_ious: np.ndarray,
    region: np.ndarray,
    boxes: np.ndarray,
    keep: np.ndarray,
    stream: np.ndarray,
    ready: np.ndarray,
    used: np.ndarray,
    random: np.ndarray,
) -> None:
    low = numbers[_CROP_SCALE_MIN]
    smallest_x, smallest_y = (region[2] - region[0]) * low, (region[3] - region[1]) * low
    best_iou = 0.0
    for number in range(len(boxes)):
        left, top, right, bottom = boxes[number]
        side_x, side_y = np.float64(right - left), np.float64(bottom - top)
        iou = (side_x / max(side_x, smallest_x)) * (side_y / max(side_y, smallest_y))
        best_iou = max(best_iou, iou)
    for _ in range(IOU_CROP_ROUNDS):
        if len(min_ious) == 0:
            break
        if uniform(stream, ready, used) >= numbers[_CROP_PROBABILITY]:
            break
        min_iou = min_ious[integer(stream, ready, used, len(min_ious))]
        if min_iou <= best_iou + 1e-6 and _try_crops(
            low, min_iou, region, boxes, keep, stream, random
        ):
            return
    keep[:] = True


@compiled
def _draw_color(
    numbers: np.ndarray, stream: np.ndarray, random: np.ndarray, color: np.ndarray
) -> None:
    strengths = numbers[_BRIGHTNESS : _HUE + 1]
    color[:3], color[3:] = 1.0, 0.0
    swap = numbers[_CHANNEL_SWAP]
    if strengths.max() == 0 and swap == 0:
        return
    fill(stream, random[:11])
    for place in range(4):
        change = 0.0
        if random[place] < numbers[_COLOR_PROBABILITY]:
            change = (2.0 * random[4 + place] - 1.0) * strengths[place]
        color[place] = change if place == 3 else max(0.0, 1.0 + change)
    color[4] = 1.0 if random[8] < 0.5 else 0.0
    color[5] = np.floor(random[10] * 6) if random[9] < swap else 0.0


@compiled
def _make_views(
    kind: int,
    numbers: np.ndarray,
    min_ious: np.ndarray,
    size: int,
    seed: np.uint64,
    epochs: np.ndarray,
    samples: np.ndarray,
    sizes: np.ndarray,
    all_boxes: np.ndarray,
    box_starts: np.ndarray,
    all_src: np.ndarray,
    all_dst: np.ndarray,
    flips: np.ndarray,
    all_moved: np.ndarray,
    all_keep: np.ndarray,
    colors: np.ndarray,
) -> int:
    """Fill in the views; returns -1, or the first sample from which no canvas can be cut."""
    stream, ready = np.empty(5, np.uint64), np.empty(_PER_REFILL, np.float64)
    random = np.empty(4 * IOU_CROP_TRIALS, np.float64)
    used, region = np.empty(1, np.int64), np.empty(4, np.float64)
    for n in range(len(samples)):
        stream[0], stream[1] = seed, np.uint64(_VIEW)
        stream[2], stream[3], stream[4] = np.uint64(epochs[n]), np.uint64(samples[n]), np.uint64(0)
        used[0] = _PER_REFILL
        width, height = np.int64(sizes[n, 0]), np.int64(sizes[n, 1])
        src, dst = all_src[n], all_dst[n]
        first, last = box_starts[n], box_starts[n + 1]
        boxes, keep = all_boxes[first:last], all_keep[first:last]
        src[0], src[1], src[2], src[3] = 0.0, 0.0, width, height
        dst[0], dst[1], dst[2], dst[3] = 0, 0, size, size
        if kind in (_CENTER_CROP, _RANDOM_CROP):
            new_width, new_height = resized(width, height, int(numbers[_RESIZE_SIDE]))
            if kind == _CENTER_CROP:
                left, top = center_offset(new_width, size), center_offset(new_height, size)
            else:
                padding = int(numbers[_PADDING])
                room_x, room_y = new_width + 2 * padding - size, new_height + 2 * padding - size
                if min(room_x, room_y) < 0 or padding < 0 or padding >= size:
                    return n
                top = integer(stream, ready, used, room_y + 1) - padding
                left = integer(stream, ready, used, room_x + 1) - padding
            crop_axis(0, width, new_width, left, size, src, dst)
            crop_axis(1, height, new_height, top, size, src, dst)
        elif kind == _RANDOM_RESIZED_CROP:
            _random_resized_crop(numbers, width, height, stream, ready, used, src)
        elif kind == _SSD:
            region[0], region[1], region[2], region[3] = 0.0, 0.0, width, height
            if uniform(stream, ready, used) < numbers[_ZOOM_PROBABILITY]:
                side = 1.0 + (numbers[_ZOOM_MAX] - 1.0) * uniform(stream, ready, used)
                region[0] = -uniform(stream, ready, used) * (side - 1.0) * width
                region[1] = -uniform(stream, ready, used) * (side - 1.0) * height
                region[2], region[3] = region[0] + side * width, region[1] + side * height
                length_x, length_y = side * width, side * height
            else:
                length_x, length_y = float(width), float(height)
            before = region[0], region[1], region[2], region[3]
            if len(boxes) > 0:
                _iou_crop(numbers, min_ious, region, boxes, keep, stream, ready, used, random)
                if before != (region[0], region[1], region[2], region[3]):
                    length_x, length_y = region[2] - region[0], region[3] - region[1]
            place_axis(0, region[0], length_x, width, size, src, dst)
            place_axis(1, region[1], length_y, height, size, src, dst)
        if kind > _CENTER_CROP and uniform(stream, ready, used) < numbers[_FLIP]:
            flips[n] = True
            dst[0], dst[2] = size - dst[2], size - dst[0]
        move_boxes(src, dst, flips[n], size, boxes, all_moved[first:last], keep)
        stream[1], stream[4] = np.uint64(_COLOR), np.uint64(0)
        _draw_color(numbers, stream, random, colors[n])
    return -1
