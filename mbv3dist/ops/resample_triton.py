"""Packed crops to batches on a GPU in one launch: what resample.py's reference does.

A program makes a tile of one canvas. It goes through the crop's rows in blocks: a block is filtered
along its rows into registers, rounded to levels, and then a small matrix product with the vertical
weights adds it to the tile. So a source row is filtered once for a whole tile (a direct sum over
both axes would do that once for each of the target rows it belongs to: two of them where pictures
shrink, 1 / scale of them where they grow), nothing between the two passes leaves the chip, and the
filter can have any width: large pictures only mean more blocks and more turns of the inner loop.

Levels are whole numbers up to 255, exact in float16. A weight is the sum of two float16 numbers,
its rounding and the rest, so that the two products on the matrix units are as good as float32.
"""

# Kernels are Triton's language: their parameters have no Python types, constants are in capitals.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_Y = 32
TILE_X = 32
ROWS = 16  # of a block: the smallest inner side of a matrix product
NUM_WARPS = 4


def resample(
    pixels: Tensor,
    layout: Tensor,
    places: Tensor,
    *,
    size: tuple[int, int],
    fill: tuple[int, int, int],
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Do what `resample.resample` does."""
    height, width = size
    batch = len(layout)
    out = torch.empty((batch, height, width, 3), dtype=dtype, device=pixels.device)
    scale, shift = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    if mean is not None and std is not None:
        scale = tuple(1 / (255 * s) for s in std)  # type: ignore[assignment]
        shift = tuple(-m / s for m, s in zip(mean, std, strict=True))  # type: ignore[assignment]
    if batch:
        tiles_x = triton.cdiv(width, TILE_X)
        grid = (tiles_x * triton.cdiv(height, TILE_Y), batch)
        draw_tile[grid](
            pixels,
            layout.contiguous(),
            places.contiguous(),
            out,
            height,
            width,
            tiles_x,
            *(float(level) for level in fill),
            *scale,
            *shift,
            IS_LEVELS=mean is None,
            TILE_Y=TILE_Y,
            TILE_X=TILE_X,
            ROWS=ROWS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _triangle(place, center, slope):
    """Weight of a source pixel, not normalised."""
    return tl.maximum(1.0 - tl.abs(place.to(tl.float32) + 0.5 - center) * slope, 0.0)


@triton.jit
def _axis(low, high, span, target, length):
    """Centres [T] of target pixels in the source, the first source pixel and 1 / weights of each.

    Also, as scalars: 1 / the filter's half width, and how many source pixels it can meet.
    """
    step = (high - low) / tl.maximum(span, 1.0)
    reach = tl.maximum(step, 1.0)
    slope = 1.0 / reach
    center = low + (target + 0.5) * step
    first = tl.maximum(tl.floor(center - reach + 0.5), 0.0).to(tl.int32)
    taps = tl.ceil(2.0 * reach).to(tl.int32)
    total = tl.zeros_like(center)
    for tap in range(0, taps):
        weight = _triangle(first + tap, center, slope)
        total += tl.where(first + tap < length, weight, 0.0)
    return center, first, 1.0 / tl.where(total > 0, total, 1.0), slope, taps


@triton.jit
def _filter_rows(lines, is_row, width, center, first, share, slope, taps):
    """Filter rows [R, 1] of a crop along themselves: levels of each channel, float16 [R, T]."""
    red = tl.zeros((lines.shape[0], center.shape[0]), tl.float32)
    green = tl.zeros_like(red)
    blue = tl.zeros_like(red)
    for tap in range(0, taps):
        column = first + tap
        weight = (_triangle(column, center, slope) * share)[None, :]
        source = lines + column[None, :] * 3
        mask = is_row & ((column < width) & (share > 0))[None, :]
        red += weight * tl.load(source, mask=mask, other=0).to(tl.float32)
        green += weight * tl.load(source + 1, mask=mask, other=0).to(tl.float32)
        blue += weight * tl.load(source + 2, mask=mask, other=0).to(tl.float32)
    red = tl.floor(red + 0.5).to(tl.float16)
    green = tl.floor(green + 0.5).to(tl.float16)
    blue = tl.floor(blue + 0.5).to(tl.float16)
    return red, green, blue


@triton.jit
def _store(out, total, is_picture, is_canvas, fill, scale, shift, IS_LEVELS: tl.constexpr):
    level = tl.minimum(tl.maximum(tl.floor(total + 0.5), 0.0), 255.0)
    level = tl.where(is_picture, level, fill)
    if IS_LEVELS:
        tl.store(out, level.to(tl.uint8), mask=is_canvas)
    else:
        tl.store(out, (level * scale + shift).to(out.dtype.element_ty), mask=is_canvas)


@triton.jit(do_not_specialize=["canvas_height", "canvas_width", "tiles_x"])
def draw_tile(
    pixels,  # uint8 [any]
    layout,  # int64 [B, 4]: first byte, pitch, height, width
    places,  # float32 [B, 8]: source xyxy, canvas xyxy
    out,  # [B, H, W, 3]
    canvas_height,
    canvas_width,
    tiles_x,
    red_fill,
    green_fill,
    blue_fill,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    IS_LEVELS: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Draw one tile of one canvas."""
    sample = tl.program_id(1).to(tl.int64)
    layout += sample * 4
    pixels += tl.load(layout)
    pitch = tl.load(layout + 1).to(tl.int32)  # a picture's bytes fit in 31 bits
    height = tl.load(layout + 2).to(tl.int32)
    width = tl.load(layout + 3).to(tl.int32)
    places += sample * 8
    x_from = tl.load(places + 4)
    x_to = tl.load(places + 6)
    left = tl.minimum(x_from, x_to)
    right = tl.maximum(x_from, x_to)
    top = tl.load(places + 5)
    bottom = tl.load(places + 7)

    y_first = tl.program_id(0) // tiles_x * TILE_Y
    x_first = tl.program_id(0) % tiles_x * TILE_X
    y = y_first + tl.arange(0, TILE_Y)
    x = x_first + tl.arange(0, TILE_X)
    is_in_y = (y >= top) & (y < bottom)
    is_in_x = (x >= left) & (x < right)
    target_x = tl.where(x_from > x_to, right - 1.0 - x, x - left)
    center_x, first_x, share_x, slope_x, taps_x = _axis(
        tl.load(places), tl.load(places + 2), right - left, target_x, width
    )
    center_y, first_y, share_y, slope_y, taps_y = _axis(
        tl.load(places + 1), tl.load(places + 3), bottom - top, y - top, height
    )
    # Source rows of this tile: of its target rows inside the picture, if there are any.
    is_any = (tl.max(is_in_x.to(tl.int32), 0) & tl.max(is_in_y.to(tl.int32), 0)) != 0
    row_from = tl.min(tl.where(is_in_y, first_y, height), 0)
    row_to = tl.minimum(tl.max(tl.where(is_in_y, first_y + taps_y, 0), 0), height)
    row_to = tl.where(is_any, row_to, row_from)

    red = tl.zeros((TILE_Y, TILE_X), tl.float32)
    green = tl.zeros((TILE_Y, TILE_X), tl.float32)
    blue = tl.zeros((TILE_Y, TILE_X), tl.float32)
    for row_start in range(row_from, row_to, ROWS):
        row = row_start + tl.arange(0, ROWS)
        red_levels, green_levels, blue_levels = _filter_rows(
            pixels + row[:, None] * pitch,
            (row < row_to)[:, None],
            width,
            center_x,
            first_x,
            tl.where(is_in_x, share_x, 0.0),
            slope_x,
            taps_x,
        )
        weight = _triangle(row[None, :], center_y[:, None], slope_y) * share_y[:, None]
        coarse = weight.to(tl.float16)
        rest = (weight - coarse.to(tl.float32)).to(tl.float16)
        red = tl.dot(rest, red_levels, tl.dot(coarse, red_levels, red))
        green = tl.dot(rest, green_levels, tl.dot(coarse, green_levels, green))
        blue = tl.dot(rest, blue_levels, tl.dot(coarse, blue_levels, blue))

    is_picture = is_in_y[:, None] & is_in_x[None, :]
    is_canvas = (y < canvas_height)[:, None] & (x < canvas_width)[None, :]
    out += sample * canvas_height * canvas_width * 3
    out += (y[:, None] * canvas_width + x[None, :]) * 3
    _store(out, red, is_picture, is_canvas, red_fill, red_scale, red_shift, IS_LEVELS)
    _store(out + 1, green, is_picture, is_canvas, green_fill, green_scale, green_shift, IS_LEVELS)
    _store(out + 2, blue, is_picture, is_canvas, blue_fill, blue_scale, blue_shift, IS_LEVELS)
