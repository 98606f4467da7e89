"""Antialiased bilinear resizing of a part of a picture onto a canvas, compiled by Numba.

The pixels are those of Pillow's `Image.resize(size, BILINEAR, box=...)` to the last bit: a triangle
filter whose support grows with the scale, weights in 22-bit fixed point, columns first, rounded to
a byte between the passes, the box in float32, the filter reaching beyond the box where the picture
goes on. (Pillow 13 does rows first where the height shrinks much more than the width, which changes
some pixels by a level.) With the weights known it is all integers, the same on every CPU.

It is faster than Pillow because one call places, mirrors and fills, because each canvas byte is
written once, straight into the batch, because a row of the first pass is used while it is in the
first cache, and because columns are blended four bytes at a time. The calls release the GIL.

Shapes: pixels uint8 [h, 3 * w], a region of the picture; canvas uint8 [H, W, 3].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mbv3dist.data.compiled import compiled

_BITS = 22  # of a weight's fraction: 8 for the pixel and 2 to spare in 32
_HALF = 1 << (_BITS - 1)
_BLOCK = 16  # bytes of a row that are blended at once
_UNROLLED = range(2, 9)  # numbers of taps that have code of their own


@compiled
def _scale(low: float, high: float, count: int) -> float:
    """Picture pixels per canvas pixel, from a box in float32, as Pillow holds it."""
    return np.float64(np.float32(high) - np.float32(low)) / count


@compiled
def _most_taps(low: float, high: float, count: int) -> int:
    """Return the room for the weights of one canvas pixel."""
    return int(np.ceil(max(_scale(low, high, count), 1.0))) * 2 + 1


@compiled
def reach(low: float, high: float, count: int, side: int) -> tuple[int, int]:
    """Return the first and one past the last picture pixel that [low, high) is made of."""
    scale = _scale(low, high, count)
    support = max(scale, 1.0)
    start = np.float64(np.float32(low))
    first = max(int(start + 0.5 * scale - support + 0.5), 0)
    last = min(int(start + (count - 0.5) * scale + support + 0.5), side)
    return first, last


@compiled
def _weigh(
    low: float,
    high: float,
    side: int,
    origin: int,
    flip: bool,
    starts: np.ndarray,
    weights: np.ndarray,
) -> int:
    """Fill in, for each canvas pixel, its first picture pixel and the weights from there on.

    Args:
        low: Start of the box on this axis, in picture pixels.
        high: Its end.
        side: Pixels of the whole picture on this axis.
        origin: Where the decoded region starts; `starts` count from there.
        flip: Whether the canvas runs against the picture.
        starts: int32 [n], written.
        weights: int32 [n, taps], written; 1 << 22 is one.

    Returns:
        The largest number of taps used.
    """
    count, width = len(starts), weights.shape[1]
    scale = _scale(low, high, count)
    support = max(scale, 1.0)
    sharpness = 1.0 / support
    box_start = np.float64(np.float32(low))
    exact = np.empty(width, np.float64)
    most = 1
    for number in range(count):
        center = box_start + (number + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        used = min(int(center + support + 0.5), side) - first
        total = 0.0
        for tap in range(used):
            exact[tap] = max(1.0 - abs((tap + first - center + 0.5) * sharpness), 0.0)
            total += exact[tap]
        place = count - 1 - number if flip else number
        last = 0
        for tap in range(used):
            weight = np.int32(0.5 + exact[tap] / total * (1 << _BITS))
            weights[place, tap] = weight
            if weight != 0:
                last = tap
        for tap in range(used, width):
            weights[place, tap] = 0
        starts[place] = first - origin
        most = max(most, last + 1)
    return most


@intrinsic
def _blend_columns(
    _context: Any, line: Any, out: Any, starts: Any, weights: Any, count: Any, taps: Any
) -> Any:
    """Write `count` pixels: for each, the weighted sum of `taps` neighbouring ones of the line.

    LLVM does not find this form by itself: three channels that lie side by side do not fill a
    vector. Four are loaded, and the fourth is overwritten by the next pixel's store; so `out` needs
    one byte more than 3 * count, and `line` is read 3 * taps + 1 bytes from each start on.
    """
    signature = types.void(line, out, starts, weights, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:4], arguments[:4], strict=True)
        ]
        line_p, out_p, starts_p, weights_p = (array.data for array in arrays)
        stride = builder.extract_value(arrays[3].shape, 1)
        count, taps = arguments[4:]
        word, index = context.get_value_type(types.intp), ir.IntType(32)
        ints, chars = ir.VectorType(index, 4), ir.VectorType(ir.IntType(8), 4)
        half = ir.Constant(ints, [_HALF] * 4)
        undefined = ir.Constant(ints, ir.Undefined)

        def number(value: int) -> Any:
            return ir.Constant(word, value)

        def weighted(source: Any, weight: Any, tap: Any) -> Any:
            factor = builder.load(builder.gep(weight, [tap]))
            factor = builder.insert_element(undefined, factor, ir.Constant(index, 0))
            factor = builder.shuffle_vector(factor, undefined, ir.Constant(ints, [0] * 4))
            place = builder.gep(source, [builder.mul(tap, number(3))])
            loaded = builder.load(builder.bitcast(place, chars.as_pointer()))
            loaded.align = 1
            return builder.mul(factor, builder.zext(loaded, ints))

        def pixels(fixed: int) -> None:
            with cgutils.for_range(builder, count, intp=word) as loop:
                start = builder.sext(builder.load(builder.gep(starts_p, [loop.index])), word)
                source = builder.gep(line_p, [builder.mul(start, number(3))])
                weight = builder.gep(weights_p, [builder.mul(loop.index, stride)])
                if fixed:
                    total = half
                    for tap in range(fixed):
                        total = builder.add(total, weighted(source, weight, number(tap)))
                else:
                    cell = cgutils.alloca_once_value(builder, half)
                    builder.store(half, cell)
                    with cgutils.for_range(builder, taps, intp=word) as inner:
                        value = weighted(source, weight, inner.index)
                        builder.store(builder.add(builder.load(cell), value), cell)
                    total = builder.load(cell)
                total = builder.lshr(total, ir.Constant(ints, [_BITS] * 4))
                place = builder.gep(out_p, [builder.mul(loop.index, number(3))])
                rounded = builder.trunc(total, chars)
                builder.store(rounded, builder.bitcast(place, chars.as_pointer())).align = 1

        end = builder.append_basic_block("end")
        other = builder.append_basic_block("any_taps")
        switch = builder.switch(taps, other)
        for fixed in _UNROLLED:
            block = builder.append_basic_block(f"taps_{fixed}")
            switch.add_case(number(fixed), block)
            builder.position_at_end(block)
            pixels(fixed)
            builder.branch(end)
        builder.position_at_end(other)
        pixels(0)
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _blend_blocks(
    _context: Any, ring: Any, rows: Any, weights: Any, taps: Any, out: Any, width: Any
) -> Any:
    """Write `width` >= 16 bytes: the weighted sum of `taps` rows of the ring, 16 at a time.

    The last block ends with the last byte and may overlap the one before.
    """
    signature = types.void(ring, rows, weights, types.intp, out, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        ring_a, rows_a, weights_a, out_a = (
            context.make_array(kinds[place])(context, builder, arguments[place])
            for place in (0, 1, 2, 4)
        )
        stride = builder.extract_value(ring_a.strides, 0)
        taps, width = arguments[3], arguments[5]
        word, index = context.get_value_type(types.intp), ir.IntType(32)
        ints, chars = ir.VectorType(index, _BLOCK), ir.VectorType(ir.IntType(8), _BLOCK)
        undefined = ir.Constant(ints, ir.Undefined)
        ring_p = builder.bitcast(ring_a.data, ir.IntType(8).as_pointer())
        last = builder.sub(width, ir.Constant(word, _BLOCK))
        steps = builder.udiv(
            builder.add(width, ir.Constant(word, _BLOCK - 1)), ir.Constant(word, _BLOCK)
        )
        cell = cgutils.alloca_once(builder, ints)
        with cgutils.for_range(builder, steps, intp=word) as loop:
            start = builder.mul(loop.index, ir.Constant(word, _BLOCK))
            start = builder.select(builder.icmp_signed("<", start, last), start, last)
            builder.store(ir.Constant(ints, [_HALF] * _BLOCK), cell)
            with cgutils.for_range(builder, taps, intp=word) as inner:
                row = builder.load(builder.gep(rows_a.data, [inner.index]))
                place = builder.gep(ring_p, [builder.add(builder.mul(row, stride), start)])
                loaded = builder.load(builder.bitcast(place, chars.as_pointer()))
                loaded.align = 1
                factor = builder.load(builder.gep(weights_a.data, [inner.index]))
                factor = builder.insert_element(undefined, factor, ir.Constant(index, 0))
                factor = builder.shuffle_vector(factor, undefined, ir.Constant(ints, [0] * _BLOCK))
                product = builder.mul(factor, builder.zext(loaded, ints))
                builder.store(builder.add(builder.load(cell), product), cell)
            total = builder.lshr(builder.load(cell), ir.Constant(ints, [_BITS] * _BLOCK))
            place = builder.gep(out_a.data, [start])
            rounded = builder.trunc(total, chars)
            builder.store(rounded, builder.bitcast(place, chars.as_pointer())).align = 1
        return context.get_dummy_value()

    return signature, generate


@compiled
def _blend_rows(
    ring: np.ndarray,
    first: int,
    weights: np.ndarray,
    taps: int,
    rows: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write the weighted sum of rows `first` to `first + taps`; row n is ring[n % len(ring)].

    `rows` is int64 [taps], room to count in.
    """
    width, size = len(out), len(ring)
    while taps > 1 and weights[taps - 1] == 0:
        taps -= 1
    for tap in range(taps):
        rows[tap] = (first + tap) % size
    if width >= _BLOCK:
        _blend_blocks(ring, rows, weights, taps, out, width)
        return
    for x in range(width):
        total = np.int64(_HALF)
        for tap in range(taps):
            total += np.int64(weights[tap]) * ring[rows[tap], x]
        out[x] = np.uint8(total >> _BITS)


@compiled
def _fill_around(canvas: np.ndarray, dst: np.ndarray, fill: np.ndarray) -> None:
    """Colour the canvas, uint8 [H, 3 * W], outside of dst."""
    side = canvas.shape[1]
    left, right = 3 * dst[0], 3 * dst[2]
    blank = np.empty(side, np.uint8)
    for x in range(0, side, 3):
        blank[x], blank[x + 1], blank[x + 2] = fill[0], fill[1], fill[2]
    for y in range(canvas.shape[0]):
        line = canvas[y]
        first = side if y < dst[1] or y >= dst[3] else left
        for x in range(first):
            line[x] = blank[x]
        if first == left:
            for x in range(right, side):
                line[x] = blank[x]


@compiled
def draw_region(
    pixels: np.ndarray,
    origin: tuple[int, int],
    picture: tuple[int, int],
    src: np.ndarray,
    dst: np.ndarray,
    flip: bool,
    fill: np.ndarray,
    canvas: np.ndarray,
) -> None:
    """Resize a box of a picture onto its place on a canvas, and fill the rest.

    Args:
        pixels: uint8 [h, 3 * w], the decoded region; it holds all that `reach` says.
        origin: Where the region starts in the picture: x, y.
        picture: Width and height of the whole picture.
        src: float64 [4], the box: x0, y0, x1, y1 in picture pixels.
        dst: int32 [4], its place: x0, y0, x1, y1 in canvas pixels.
        flip: Whether the place is mirrored from left to right.
        fill: uint8 [3], colour of the canvas elsewhere.
        canvas: uint8 [H, W, 3], written.
    """
    width, height = dst[2] - dst[0], dst[3] - dst[1]
    starts_x, starts_y = np.empty(width, np.int32), np.empty(height, np.int32)
    weights_x = np.empty((width, _most_taps(src[0], src[2], width)), np.int32)
    weights_y = np.empty((height, _most_taps(src[1], src[3], height)), np.int32)
    taps_x = max(_weigh(src[0], src[2], picture[0], origin[0], flip, starts_x, weights_x), 2)
    taps_y = _weigh(src[1], src[3], picture[1], origin[1], False, starts_y, weights_y)
    lines = canvas.reshape(canvas.shape[0], 3 * canvas.shape[1])
    if height < canvas.shape[0] or width < canvas.shape[1]:
        _fill_around(lines, dst, fill)

    # The last taps of a row may reach beyond it, with weight 0; at the picture's end there must be
    # something to read.
    beyond = 3 * taps_x + 4
    num_rows, row_bytes = pixels.shape
    padded = np.zeros(row_bytes + beyond, np.uint8)
    ring = np.empty((max(taps_y, 2), 3 * width + 4), np.uint8)
    rows = np.empty(taps_y, np.int64)
    ready = starts_y[0]  # rows before this one have been through the first pass
    for y in range(height):
        for row in range(ready, min(starts_y[y] + taps_y, num_rows)):
            line = pixels[row]
            if (num_rows - 1 - row) * row_bytes < beyond:
                padded[:row_bytes] = line
                line = padded
            _blend_columns(line, ring[row % len(ring)], starts_x, weights_x, width, taps_x)
        ready = max(ready, min(starts_y[y] + taps_y, num_rows))
        line = lines[dst[1] + y, 3 * dst[0] : 3 * dst[2]]
        _blend_rows(ring, starts_y[y], weights_y[y], taps_y, rows, line)
