"""Views: which part of a picture lands where on the canvas, drawn before any pixel is decoded.

A view is one rectangle mapping, source -> destination, and an optional mirror. All of torchvision's
geometric recipes that training here needs (its functions are followed) are of that form, and so is
their composition: SSD's zoom-out, IoU crop, flip and resize are one view, and boxes move with it.

Shapes: boxes float32 [M, 4], xyxy pixels, half-open; canvas `size` x `size` pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mbv3dist.data.draws import Draws

if TYPE_CHECKING:
    from mbv3dist.config import ViewConfig

CROP_TRIES = 10  # torchvision's RandomResizedCrop
IOU_CROP_TRIALS = 40  # torchvision's RandomIoUCrop
IOU_CROP_RATIO = 2.0  # a crop's width and height differ by this factor at most
IOU_CROP_ROUNDS = 50  # after this many options without a crop, the picture stays whole
NO_COLOR = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
MIN_BOX_SIDE = 1.0  # canvas pixels; a thinner box is no object any more

Span = tuple[float, float]
PixelSpan = tuple[int, int]
Rectangle = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class View:
    """A rectangle of the upright picture and its place on the canvas.

    Attributes:
        src: x0, y0, x1, y1 in picture pixels (floats), inside the picture.
        dst: x0, y0, x1, y1 in canvas pixels (integers), inside the canvas; the rest is fill.
        flip: The pixels inside `dst` are mirrored from left to right. `dst` is where they finally
            are, so a mirrored canvas has its `dst` mirrored already (see `mirrored`).
    """

    src: Rectangle
    dst: tuple[int, int, int, int]
    flip: bool = False

    def vector(self) -> np.ndarray:
        """Return float32 [8]: src and dst, a flip written as dst x0 > x1."""
        x0, y0, x1, y1 = self.dst
        if self.flip:
            x0, x1 = x1, x0
        return np.array((*self.src, x0, y0, x1, y1), dtype=np.float32)

    def to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """Return boxes [M, 4] (picture pixels) as float32 [M, 4] in canvas pixels, not clipped."""
        (sx0, sy0, sx1, sy1), (dx0, dy0, dx1, dy1) = self.src, self.dst
        scale_x, scale_y = (dx1 - dx0) / (sx1 - sx0), (dy1 - dy0) / (sy1 - sy0)
        shift_x = dx0 - sx0 * scale_x
        if self.flip:
            scale_x, shift_x = -scale_x, dx1 + sx0 * scale_x
        shift_y = dy0 - sy0 * scale_y
        scale = np.array((scale_x, scale_y, scale_x, scale_y), dtype=np.float32)
        shift = np.array((shift_x, shift_y, shift_x, shift_y), dtype=np.float32)
        moved: np.ndarray = boxes * scale + shift
        return moved[:, (2, 1, 0, 3)] if self.flip else moved


def vector_to_source(view: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Map canvas boxes back to picture pixels: the inverse of `View.to_canvas`.

    Args:
        view: float32 [..., 8] from `View.vector`.
        boxes: [..., M, 4], xyxy canvas pixels.

    Returns:
        float32 [..., M, 4], xyxy picture pixels, not clipped to the picture.
    """
    view = np.asarray(view, dtype=np.float64)[..., None, :]
    boxes = np.asarray(boxes, dtype=np.float64)
    scale_x = (view[..., 2] - view[..., 0]) / (view[..., 6] - view[..., 4])
    scale_y = (view[..., 3] - view[..., 1]) / (view[..., 7] - view[..., 5])
    # In a mirrored view dst x0 > x1, so the scale is negative and left and right change places.
    x = view[..., 0, None] + (boxes[..., 0::2] - view[..., 4, None]) * scale_x[..., None]
    y = view[..., 1, None] + (boxes[..., 1::2] - view[..., 5, None]) * scale_y[..., None]
    return np.stack((x.min(-1), y.min(-1), x.max(-1), y.max(-1)), axis=-1).astype(np.float32)


def mirrored(view: View, *, size: int) -> View:
    """Return the view of the whole canvas mirrored from left to right."""
    x0, y0, x1, y1 = view.dst
    return View(view.src, (size - x1, y0, size - x0, y1), not view.flip)


def resize_view(*, width: int, height: int, size: int) -> View:
    """Stretch the whole picture over the canvas, whatever its aspect ratio (SSD's way)."""
    return View((0.0, 0.0, float(width), float(height)), (0, 0, size, size))


def center_crop_view(*, width: int, height: int, size: int, resize: int) -> View:
    """Resize the shorter side to `resize` pixels, then crop `size` x `size` at the centre.

    torchvision's Resize + CenterCrop, its rounding included; a smaller picture is padded.
    """
    new_width, new_height = _resized(width, height, resize)
    src_x, dst_x = _crop_axis(width, new_width, _center_offset(new_width, size), size)
    src_y, dst_y = _crop_axis(height, new_height, _center_offset(new_height, size), size)
    return _from_axes(src_x, src_y, dst_x, dst_y)


def random_crop_padding_view(
    draws: Draws, *, width: int, height: int, size: int, resize: int, padding: int
) -> View:
    """Resize the shorter side to `resize`, pad by `padding`, crop `size` x `size` anywhere.

    torchvision's Resize + RandomCrop(size, padding).
    """
    new_width, new_height = _resized(width, height, resize)
    room_y, room_x = new_height + 2 * padding - size, new_width + 2 * padding - size
    if min(room_x, room_y) < 0 or not 0 <= padding < size:
        raise ValueError(
            f"random_crop: a canvas of {size} cannot be cut from {new_width} x {new_height} pixels "
            f"and padding {padding}; set --data.view.resize to {size} or more, and "
            f"--data.view.padding from 0 to {size - 1}"
        )
    top, left = draws.integer(room_y + 1) - padding, draws.integer(room_x + 1) - padding
    src_x, dst_x = _crop_axis(width, new_width, left, size)
    src_y, dst_y = _crop_axis(height, new_height, top, size)
    return _from_axes(src_x, src_y, dst_x, dst_y)


def random_resized_crop_view(
    draws: Draws,
    *,
    width: int,
    height: int,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> View:
    """Crop a random share of the area at a random aspect ratio and stretch it over the canvas.

    torchvision's RandomResizedCrop: ten tries, then the largest central crop of a valid ratio.
    """
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_TRIES):
        target = area * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(log_low, log_high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = draws.integer(height - h + 1), draws.integer(width - w + 1)
            break
    else:
        w, h = width, height
        if width / height < ratio[0]:
            h = round(width / ratio[0])
        elif width / height > ratio[1]:
            w = round(height * ratio[1])
        y, x = (height - h) // 2, (width - w) // 2
    return View((float(x), float(y), float(x + w), float(y + h)), (0, 0, size, size))


def ssd_view(
    config: ViewConfig, draws: Draws, *, width: int, height: int, size: int, boxes: np.ndarray
) -> tuple[View, np.ndarray]:
    """Zoom out, crop by IoU, resize: SSD's augmentation as one view, without the flip.

    Zoom-out places the picture at random on a canvas of 1 to `zoom_out_max` times its sides. The
    crop is torchvision's RandomIoUCrop (see `iou_crop`). Without boxes there is only the zoom-out.

    Returns:
        The view, and bool [M]: boxes whose centre lies in the crop.
    """
    # The region that will fill the canvas, in picture coordinates; zoomed out, it is larger than
    # the picture.
    x0, y0, region_width, region_height = 0.0, 0.0, float(width), float(height)
    if draws.uniform() < config.zoom_out_probability:
        side = draws.uniform(1.0, config.zoom_out_max)
        x0 = -draws.uniform() * (side - 1.0) * width
        y0 = -draws.uniform() * (side - 1.0) * height
        region_width, region_height = side * width, side * height

    keep = np.ones(len(boxes), dtype=bool)
    if len(boxes):
        region = (x0, y0, x0 + region_width, y0 + region_height)
        crop = iou_crop(config, draws, boxes=boxes, region=region)
        if crop is not None:
            (x0, y0, x1, y1), keep = crop
            region_width, region_height = x1 - x0, y1 - y0
    src_x, dst_x = _place_axis(x0, region_width, width, size)
    src_y, dst_y = _place_axis(y0, region_height, height, size)
    return _from_axes(src_x, src_y, dst_x, dst_y), keep


def iou_crop(
    config: ViewConfig,
    draws: Draws,
    *,
    boxes: np.ndarray,
    region: Rectangle,
) -> tuple[Rectangle, np.ndarray] | None:
    """Draw a crop of the region (xyxy) by torchvision's RandomIoUCrop rule; None means all of it.

    An option is drawn: no crop, or one of `min_ious`. A crop (sides of `crop_scale_min` to 1 times
    the region's, aspect ratio 1/2 to 2) is good when at least one box has its centre inside, and
    the LARGEST IoU of the crop with those boxes reaches the option's minimum; boxes with their
    centre outside are dropped. After 40 bad crops another option is drawn. As in torchvision, one
    box that fits is enough: a crop need not reach the minimum with every box. Unlike there, crops
    have no integer corners, since what counts is the final canvas.

    Returns:
        None, or the crop (xyxy) and bool [M]: boxes whose centre is inside.
    """
    x0, y0, x1, y1 = region
    sides = boxes[:, 2:] - boxes[:, :2]
    # The best that any crop can reach: as small as allowed and around the box. Small objects rule
    # most options out, and 40 trials that must fail need not be drawn.
    smallest = ((x1 - x0) * config.crop_scale_min, (y1 - y0) * config.crop_scale_min)
    best_iou = float((sides / np.maximum(sides, smallest)).prod(axis=1).max())
    for _ in range(IOU_CROP_ROUNDS):
        if not config.min_ious or draws.uniform() >= config.crop_probability:
            return None
        min_iou = config.min_ious[draws.integer(len(config.min_ious))]
        if min_iou <= best_iou + 1e-6:
            crop = _try_crops(config, draws, boxes=boxes, region=region, min_iou=min_iou)
            if crop is not None:
                return crop
    return None


def _try_crops(
    config: ViewConfig,
    draws: Draws,
    *,
    boxes: np.ndarray,
    region: Rectangle,
    min_iou: float,
) -> tuple[Rectangle, np.ndarray] | None:
    """Return the first good one of 40 random crops of the region, as `iou_crop` does."""
    width, height = region[2] - region[0], region[3] - region[1]
    low = config.crop_scale_min
    # All trials at once: columns [trials, 1] against boxes [M].
    random = draws.uniforms(4 * IOU_CROP_TRIALS).reshape(4, IOU_CROP_TRIALS, 1)
    crop_width = (low + (1.0 - low) * random[0]) * width
    crop_height = (low + (1.0 - low) * random[1]) * height
    x0 = region[0] + random[2] * (width - crop_width)
    y0 = region[1] + random[3] * (height - crop_height)
    x1, y1 = x0 + crop_width, y0 + crop_height
    left, top, right, bottom = boxes.T
    center_x, center_y = (left + right) * 0.5, (top + bottom) * 0.5
    inside = (x0 < center_x) & (center_x < x1) & (y0 < center_y) & (center_y < y1)
    overlap_x = np.minimum(x1, right) - np.maximum(x0, left)
    overlap_y = np.minimum(y1, bottom) - np.maximum(y0, top)
    overlap = overlap_x * overlap_y  # meaningful where `inside`: then both are positive
    union = crop_width * crop_height + (right - left) * (bottom - top) - overlap
    good = (inside & (overlap >= min_iou * union)).any(axis=1, keepdims=True)
    good &= crop_width <= IOU_CROP_RATIO * crop_height
    good &= crop_height <= IOU_CROP_RATIO * crop_width
    first = int(good.argmax())
    if not good[first, 0]:
        return None
    crop = (float(x0[first, 0]), float(y0[first, 0]), float(x1[first, 0]), float(y1[first, 0]))
    return crop, inside[first]


def make_view(
    config: ViewConfig, *, width: int, height: int, size: int, boxes: np.ndarray, draws: Draws
) -> tuple[View, np.ndarray]:
    """Draw the view that `config.name` describes.

    Args:
        config: The recipe.
        width: Of the upright picture in pixels.
        height: Of the upright picture in pixels.
        size: Side of the canvas in pixels.
        boxes: float32 [M, 4], xyxy picture pixels; M = 0 for classification.
        draws: The sample's random numbers.

    Returns:
        The view, and bool [M]: boxes that survive. A box goes when its centre is outside the crop
        or when less than a pixel of a side is left on the canvas.
    """
    keep = None
    if config.name == "resize":
        view = resize_view(width=width, height=height, size=size)
    elif config.name == "center_crop":
        resize = resize_side(config, size)
        view = center_crop_view(width=width, height=height, size=size, resize=resize)
    elif config.name == "random_crop":
        view = random_crop_padding_view(
            draws,
            width=width,
            height=height,
            size=size,
            resize=resize_side(config, size),
            padding=config.padding,
        )
    elif config.name == "random_resized_crop":
        view = random_resized_crop_view(
            draws,
            width=width,
            height=height,
            size=size,
            scale=(config.scale_min, config.scale_max),
            ratio=(config.ratio_min, config.ratio_max),
        )
    elif config.name == "ssd":
        view, keep = ssd_view(config, draws, width=width, height=height, size=size, boxes=boxes)
    else:
        raise ValueError(f"no view is called {config.name!r}; set --data.view.name")
    if config.name not in ("resize", "center_crop") and draws.uniform() < config.flip:
        view = mirrored(view, size=size)
    survives = _visible(view, boxes, size)
    return view, survives if keep is None else survives & keep


def canvas_boxes(view: View, boxes: np.ndarray, *, size: int) -> np.ndarray:
    """Return boxes [M, 4] (picture pixels) as float32 [M, 4] on the canvas, clipped to it."""
    moved = view.to_canvas(boxes)
    return np.clip(moved, 0.0, float(size), out=moved)


def draw_color(config: ViewConfig, draws: Draws) -> tuple[float, ...]:
    """Draw one sample's colour changes, as torchvision's RandomPhotometricDistort does.

    Brightness, contrast and saturation factors and a hue shift in turns, each drawn with
    `color_probability`, a factor from [1 - strength, 1 + strength] (never below 0), the shift from
    [-hue, hue]; otherwise 1, 1, 1, 0: no change. Then 1 where contrast comes last, else 0, for
    every second sample; and the number of the channels' order, 0 (unchanged) to 5.
    """
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    if not any(strengths) and not config.channel_swap:
        return NO_COLOR
    # Every number is drawn, used or not, so that one strength never changes another's draw.
    numbers = draws.uniforms(11).tolist()
    changes = [
        (2.0 * number - 1.0) * strength if chance < config.color_probability else 0.0
        for chance, number, strength in zip(numbers[:4], numbers[4:8], strengths, strict=True)
    ]
    brightness, contrast, saturation = (max(0.0, 1.0 + change) for change in changes[:3])
    is_late = float(numbers[8] < 0.5)
    order = float(int(numbers[10] * 6)) if numbers[9] < config.channel_swap else 0.0
    return brightness, contrast, saturation, changes[3], is_late, order


def _visible(view: View, boxes: np.ndarray, size: int) -> np.ndarray:
    """Bool [M]: the centre is inside the picture's part of the canvas, and enough is left."""
    if not len(boxes):
        return np.zeros(0, dtype=bool)
    moved = view.to_canvas(boxes)
    low, high = moved[:, :2], moved[:, 2:]
    center = (low + high) * 0.5
    visible = (center >= view.dst[:2]) & (center <= view.dst[2:])
    visible &= np.minimum(high, size) - np.maximum(low, 0) >= MIN_BOX_SIDE
    both: np.ndarray = visible.all(axis=1)
    return both


def resize_side(config: ViewConfig, size: int) -> int:
    """Shorter side before a crop: as set, or ImageNet's customary 256 for 224."""
    return config.resize or round(size * 256 / 224)


def _resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return the width and height that torchvision's Resize(shorter) makes."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _center_offset(length: int, size: int) -> int:
    """Where torchvision's CenterCrop starts; negative where it pads."""
    return -((size - length) // 2) if length < size else round((length - size) / 2.0)


def _crop_axis(side: int, resized: int, offset: int, size: int) -> tuple[Span, PixelSpan]:
    """Return source and destination of a crop [offset, offset + size) of a resized axis."""
    low, high = max(offset, 0), min(offset + size, resized)
    return (low * side / resized, high * side / resized), (low - offset, high - offset)


def _place_axis(start: float, length: float, side: int, size: int) -> tuple[Span, PixelSpan]:
    """Return source and destination for a region [start, start + length) that fills the canvas.

    The region can reach beyond the picture [0, side). At least one source and one canvas pixel
    remain; rounding the destination to whole pixels stretches the picture by half a pixel at most.
    """
    low = min(max(start, 0.0), side - 1.0)
    high = max(min(start + length, float(side)), low + 1.0)
    scale = size / length
    first = min(max(round((low - start) * scale), 0), size - 1)
    last = max(min(round((high - start) * scale), size), first + 1)
    return (low, high), (first, last)


def _from_axes(src_x: Span, src_y: Span, dst_x: PixelSpan, dst_y: PixelSpan) -> View:
    return View((src_x[0], src_y[0], src_x[1], src_y[1]), (dst_x[0], dst_y[0], dst_x[1], dst_y[1]))
