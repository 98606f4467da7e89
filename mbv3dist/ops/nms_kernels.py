"""The kernels of nms_triton.py.

Results are to equal those of torchvision on the same device, so arithmetic follows it to the last
bit. torch's softmax adds up in 32 lanes and then halves them; its division by a number on the host
is a multiplication by its reciprocal; its exponential is CUDA's, not the faster one of Triton. In
torchvision's kernel the compiler has fused the sum of two areas with the second one's product; all
else is rounded one by one, which `enable_fp_fusion=False` keeps the compiler to. With more than
1024 columns torch adds up differently: then a probability may differ in its last bit.

Shapes: B pictures, A anchors, C classes (without background). A row is what is selected from: the
anchors of a class of a picture, or the candidates of a picture that were kept.
"""

# Kernels are Triton's language: their parameters have no Python types, constants are in capitals.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from mbv3dist.ops.boxes import MAX_LOG_SCALE

LANES: tl.constexpr = tl.constexpr(32)
_MAX_LOG_SCALE: tl.constexpr = tl.constexpr(MAX_LOG_SCALE)


@triton.jit
def _exp(value, IS_DEVICE: tl.constexpr):
    if IS_DEVICE:
        return libdevice.exp(value)
    else:
        return tl.exp(value)  # the interpreter has no libdevice


@triton.jit
def _clip(value, most):
    """NaN stays."""
    return tl.where(value < 0.0, 0.0, tl.where(value > most, most, value))


@triton.jit
def _decode(center, length, delta, log_scale, canvas, to_center, to_scale, IS_DEVICE: tl.constexpr):
    """Both ends of boxes along one axis; anchors in fractions of the canvas."""
    half = 0.5 * length
    first = (center - half) * canvas
    length = (center + half) * canvas - first
    center = delta * to_center * length + (first + 0.5 * length)
    log_scale = log_scale * to_scale
    log_scale = tl.where(log_scale > _MAX_LOG_SCALE, _MAX_LOG_SCALE, log_scale)
    half = 0.5 * (_exp(log_scale, IS_DEVICE) * length)
    return _clip(center - half, canvas), _clip(center + half, canvas)


@triton.jit(do_not_specialize=["num_anchors", "num_columns"])
def score_and_decode(
    logits,  # float [B, A, C + 1]
    deltas,  # float [B, A, 4]
    anchors,  # float [A, 4], cxcywh
    keys,  # int32 [B, C, A]
    boxes,  # float32 [B, A, 4]
    facts,  # int32 [B, 2], set to 0: largest coordinate, its bits; candidates
    num_anchors,
    num_columns,
    score_threshold,
    height,
    width,
    to_x,
    to_y,
    to_width,
    to_height,
    IS_DEVICE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Probabilities above the threshold and boxes of some anchors of a picture."""
    picture = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) == 0:
        tl.store(facts + picture * 2 + tl.arange(0, 2), tl.zeros([2], tl.int32))
    anchor = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_anchor = anchor < num_anchors
    x = tl.load(anchors + anchor * 4, mask=is_anchor, other=0).to(tl.float32)
    y = tl.load(anchors + anchor * 4 + 1, mask=is_anchor, other=0).to(tl.float32)
    w = tl.load(anchors + anchor * 4 + 2, mask=is_anchor, other=0).to(tl.float32)
    h = tl.load(anchors + anchor * 4 + 3, mask=is_anchor, other=0).to(tl.float32)
    deltas += picture * num_anchors * 4
    dx = tl.load(deltas + anchor * 4, mask=is_anchor, other=0).to(tl.float32)
    dy = tl.load(deltas + anchor * 4 + 1, mask=is_anchor, other=0).to(tl.float32)
    dw = tl.load(deltas + anchor * 4 + 2, mask=is_anchor, other=0).to(tl.float32)
    dh = tl.load(deltas + anchor * 4 + 3, mask=is_anchor, other=0).to(tl.float32)
    x1, x2 = _decode(x, w, dx, dw, width, to_x, to_width, IS_DEVICE)
    y1, y2 = _decode(y, h, dy, dh, height, to_y, to_height, IS_DEVICE)
    boxes += picture * num_anchors * 4
    tl.store(boxes + anchor * 4, x1, mask=is_anchor)
    tl.store(boxes + anchor * 4 + 1, y1, mask=is_anchor)
    tl.store(boxes + anchor * 4 + 2, x2, mask=is_anchor)
    tl.store(boxes + anchor * 4 + 3, y2, mask=is_anchor)

    # Columns in portions of 32: the largest, the sum, the quotients.
    lane = tl.arange(0, LANES)
    places = logits + (picture * num_anchors + anchor[:, None]) * num_columns + lane[None, :]
    peak = tl.full([TILE, LANES], float("-inf"), tl.float32)
    for first in range(0, num_columns, LANES):
        mask = is_anchor[:, None] & (first + lane < num_columns)[None, :]
        value = tl.load(places + first, mask=mask, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, value)
    peak = tl.max(peak, 1)[:, None]
    total = tl.zeros([TILE, LANES], tl.float32)
    for first in range(0, num_columns, LANES):
        mask = is_anchor[:, None] & (first + lane < num_columns)[None, :]
        value = tl.load(places + first, mask=mask, other=float("-inf")).to(tl.float32)
        total += _exp(value - peak, IS_DEVICE)
    total = tl.sum(tl.reshape(total, [TILE, 2, 16]), 1)
    total = tl.sum(tl.reshape(total, [TILE, 2, 8]), 1)
    total = tl.sum(tl.reshape(total, [TILE, 2, 4]), 1)
    total = tl.sum(tl.reshape(total, [TILE, 2, 2]), 1)
    total = tl.sum(total, 1)[:, None]
    keys += picture * num_anchors * (num_columns - 1)
    for first in range(0, num_columns, LANES):
        column = first + lane
        mask = is_anchor[:, None] & (column < num_columns)[None, :]
        value = tl.load(places + first, mask=mask, other=float("-inf")).to(tl.float32)
        score = tl.div_rn(_exp(value - peak, IS_DEVICE), total)
        key = tl.where(score > score_threshold, score.to(tl.int32, bitcast=True), -1)
        target = keys + (column - 1)[None, :].to(tl.int64) * num_anchors + anchor[:, None]
        tl.store(target, key, mask=mask & (column > 0)[None, :])


@triton.jit
def _count_above(keys, low, length, BLOCK: tl.constexpr):
    """How many of a row are above a bound."""
    number = tl.zeros([BLOCK], tl.int32)
    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        key = tl.load(keys + place, mask=place < length, other=-1)
        number += (key > low).to(tl.int32)
    return tl.sum(number, 0)


@triton.jit(do_not_specialize=["length", "limit"])
def select_top(
    keys,  # int32 [rows, length], at least 0 or -1
    list_keys,  # int32 [rows, limit]: the largest, in no order, but equal ones as in the row
    list_places,  # int32 [rows, limit]: where they are in the row
    count,  # int32 [rows]: how many
    length,
    limit,
    BLOCK: tl.constexpr,
):
    """Select the largest keys of a row; of equal ones at the end the first ones."""
    row = tl.program_id(0).to(tl.int64)
    keys += row * length
    list_keys += row * limit
    list_places += row * limit
    offset = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -1, tl.int32)
    least = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    number = tl.zeros([BLOCK], tl.int32)
    for first in range(0, length, BLOCK):
        key = tl.load(keys + first + offset, mask=first + offset < length, other=-1)
        largest = tl.maximum(largest, key)
        least = tl.minimum(least, tl.where(key >= 0, key, 0x7FFFFFFF))
        number += (key >= 0).to(tl.int32)
    available = tl.sum(number, 0)
    wanted = tl.minimum(available, limit)
    tl.store(count + row, wanted)

    # Halve: more than `wanted` keys, or as many, are above `low`; not as many above `high`.
    low = tl.minimum(tl.min(least, 0) - 1, 0x7FFFFFFD)
    high = tl.max(largest, 0)
    high = tl.where(available <= limit, low + 1, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        found = _count_above(keys, middle, length, BLOCK)
        low = tl.where(found >= wanted, middle, low)
        high = tl.where(found > wanted, high, middle)
        high = tl.where(found == wanted, middle + 1, high)
    # All above `low + 1` are taken, and of those equal to it as many as are missing.
    above = _count_above(keys, low + 1, length, BLOCK)
    equal = above
    taken = tl.zeros([], tl.int32)
    for first in range(0, length, BLOCK):
        key = tl.load(keys + first + offset, mask=first + offset < length, other=-1)
        is_above = key > low + 1
        is_equal = key == low + 1
        both = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)
        before = tl.cumsum(both, 0) - both
        place = tl.where(is_above, taken + (before & 0xFFFF), equal + (before >> 16))
        mask = is_above | (is_equal & (place < wanted))
        tl.store(list_keys + place, key, mask=mask)
        tl.store(list_places + place, first + offset, mask=mask)
        total = tl.sum(both, 0)
        taken += total & 0xFFFF
        equal += total >> 16


@triton.jit(do_not_specialize=["length", "limit", "rows_per_picture", "per_class"])
def sort_top(
    list_keys,  # int32 [rows, limit], like the next two from select_top
    list_places,
    count,
    boxes,  # float32 [B, length, 4]
    out_boxes,  # float32 [rows, limit, 4]
    out_scores,  # int32 [rows, limit], or of the last launch float32
    labels,  # int64 [rows, limit]; of the first launch facts, like the next
    out_count,  # int64 [rows]
    length,
    limit,
    rows_per_picture,
    per_class,
    IS_LAST: tl.constexpr,
):
    """Put a part of a row where it belongs in falling order, with boxes, and pad the last result.

    A key's place is the number of those that come before it.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    list_keys += row * limit
    list_places += row * limit
    number = tl.load(count + row)
    lane = tl.arange(0, LANES)
    own = part * LANES + lane
    is_own = own < number
    key = tl.load(list_keys + own, mask=is_own, other=-1)
    before = tl.zeros([LANES], tl.int32)
    for first in range(0, number, LANES):
        other = first + lane
        rival = tl.load(list_keys + other, mask=other < number, other=-1)
        is_before = (rival[:, None] > key[None, :]) | (
            (rival[:, None] == key[None, :]) & (other[:, None] < own[None, :])
        )
        before += tl.sum(is_before.to(tl.int32), 0)
    target = row * limit + tl.where(is_own, before, own)
    place = tl.load(list_places + own, mask=is_own, other=0)
    picture = row // rows_per_picture
    boxes += (picture * length + place) * 4
    is_target = own < limit
    x1 = tl.load(boxes, mask=is_own, other=0)
    y1 = tl.load(boxes + 1, mask=is_own, other=0)
    x2 = tl.load(boxes + 2, mask=is_own, other=0)
    y2 = tl.load(boxes + 3, mask=is_own, other=0)
    tl.store(out_boxes + target * 4, x1, mask=is_target)
    tl.store(out_boxes + target * 4 + 1, y1, mask=is_target)
    tl.store(out_boxes + target * 4 + 2, x2, mask=is_target)
    tl.store(out_boxes + target * 4 + 3, y2, mask=is_target)
    if IS_LAST:
        score = tl.where(is_own, key.to(tl.float32, bitcast=True), 0.0)
        tl.store(out_scores + target, score, mask=is_target)
        tl.store(labels + target, tl.where(is_own, place // per_class, -1), mask=is_target)
        if part == 0:
            tl.store(out_count + row, number)
    else:
        tl.store(out_scores + target, key, mask=is_target)
        # Bits of NaN are larger than those of any coordinate: it stays the largest.
        widest = tl.maximum(tl.maximum(_bits(x1), _bits(y1)), tl.maximum(_bits(x2), _bits(y2)))
        tl.atomic_max(labels + picture * 2, tl.max(widest, 0))
        if part == 0:
            tl.atomic_add(labels + picture * 2 + 1, number)


@triton.jit
def _bits(value):
    """Of a coordinate, which is at least 0, or NaN."""
    return tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _load_boxes(boxes, place, mask, shift):
    """Boxes, moved apart from those of other classes."""
    x1 = tl.load(boxes + place * 4, mask=mask, other=0) + shift
    y1 = tl.load(boxes + place * 4 + 1, mask=mask, other=0) + shift
    x2 = tl.load(boxes + place * 4 + 2, mask=mask, other=0) + shift
    y2 = tl.load(boxes + place * 4 + 3, mask=mask, other=0) + shift
    return x1, y1, x2, y2


@triton.jit
def _overlap(
    x1_i, y1_i, x2_i, y2_i, x1_j, y1_j, x2_j, y2_j, threshold, half_step, FUSED: tl.constexpr
):
    """Whether boxes i overlap boxes j, which come after them, by more than the threshold.

    For floats t, i and u the quotient i / u, rounded, is above t just when i / u itself is above
    t + h, where h is half the step from t to the next float: no quotient of two floats lies
    half-way between two floats. Near to that, i - t u needs no rounding, and elsewhere rounding
    leaves the sign of i - t u - h u alone: so two fused operations decide without a division. (Of
    areas under 1e-30 of a pixel even the fused ones lose digits.)
    """
    area = (x2_i - x1_i) * (y2_i - y1_i)
    width = tl.maximum(tl.minimum(x2_i, x2_j) - tl.maximum(x1_i, x1_j), 0.0)
    height = tl.maximum(tl.minimum(y2_i, y2_j) - tl.maximum(y1_i, y1_j), 0.0)
    both = width * height
    if FUSED:
        total = tl.fma(x2_j - x1_j, y2_j - y1_j, area)
    else:
        total = area + (x2_j - x1_j) * (y2_j - y1_j)
    union = total - both
    return tl.fma(union, -half_step, tl.fma(union, -threshold, both)) > 0


@triton.jit(do_not_specialize=["num_classes", "limit", "max_detections", "moved_apart"])
def suppress(
    boxes,  # float32 [B * C, limit, 4], best first
    keys,  # int32 [B * C, limit]
    count,  # int32 [B * C]
    facts,  # int32 [B, 2]
    kept_boxes,  # float32 [B * C, limit, 4]
    kept_keys,  # int32 [B * C, limit]
    num_classes,
    limit,
    max_detections,
    moved_apart,
    threshold,
    half_step,
    FUSED: tl.constexpr,
    STEP: tl.constexpr,
):
    """NMS of one class of one picture, in blocks of 32 candidates.

    A block is compared with what was kept before, then with itself. There, who drops whom is a
    word of bits for each candidate; starting from all, those that no kept one drops are kept, again
    and again until nothing changes. Since only better ones drop a candidate, one more candidate is
    settled in each round: it ends, and there is only one end.
    """
    row = tl.program_id(0).to(tl.int64)
    picture = row // num_classes
    number = tl.load(count + row)
    boxes += row * limit * 4
    keys += row * limit
    kept_boxes += row * limit * 4
    kept_keys += row * limit
    shift = tl.load(facts + picture * 2).to(tl.float32, bitcast=True) + 1.0
    shift *= (row % num_classes + 1).to(tl.float32)
    shift = tl.where(tl.load(facts + picture * 2 + 1) <= moved_apart, shift, 0.0)

    lane = tl.arange(0, LANES)
    step = tl.arange(0, STEP)[:, None]
    bit = tl.full([LANES], 1, tl.uint32) << lane.to(tl.uint32)
    num_kept = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while (first < number) & (num_kept < max_detections):
        own = first + lane
        is_own = own < number
        x1, y1, x2, y2 = _load_boxes(boxes, own[None, :], is_own[None, :], shift)
        is_left = is_own
        for start in range(0, num_kept, STEP):
            other = start + step
            a1, b1, a2, b2 = _load_boxes(kept_boxes, other, other < num_kept, shift)
            is_hit = _overlap(a1, b1, a2, b2, x1, y1, x2, y2, threshold, half_step, FUSED)
            hits = tl.sum((is_hit & (other < num_kept)).to(tl.int32), 0)
            is_left = is_left & (hits == 0)
        droppers = tl.zeros([LANES], tl.uint32)
        for start in range(0, LANES, STEP):
            other = first + start + step
            a1, b1, a2, b2 = _load_boxes(boxes, other, other < number, shift)
            is_hit = _overlap(a1, b1, a2, b2, x1, y1, x2, y2, threshold, half_step, FUSED)
            is_hit = is_hit & (other < own[None, :])
            other_bit = tl.full([STEP, 1], 1, tl.uint32) << (start + step).to(tl.uint32)
            droppers += tl.sum(tl.where(is_hit, other_bit, 0), 0)
        kept = tl.sum(tl.where(is_left, bit, 0), 0)
        last = ~kept
        while kept != last:
            last = kept
            kept = tl.sum(tl.where(is_left & ((droppers & kept) == 0), bit, 0), 0)
        is_kept = (bit & kept) != 0
        after = num_kept + tl.cumsum(is_kept.to(tl.int32), 0)
        x1, y1, x2, y2 = _load_boxes(boxes, own, is_own, 0.0)
        tl.store(kept_boxes + (after - 1) * 4, x1, mask=is_kept)
        tl.store(kept_boxes + (after - 1) * 4 + 1, y1, mask=is_kept)
        tl.store(kept_boxes + (after - 1) * 4 + 2, x2, mask=is_kept)
        tl.store(kept_boxes + (after - 1) * 4 + 3, y2, mask=is_kept)
        key = tl.load(keys + own, mask=is_own, other=-1)
        tl.store(kept_keys + after - 1, key, mask=is_kept)
        num_kept += tl.sum(is_kept.to(tl.int32), 0)
        first += LANES
        tl.debug_barrier()  # the next block reads what this one wrote
    for start in range(0, limit, LANES):
        place = start + lane
        tl.store(kept_keys + place, -1, mask=(place >= num_kept) & (place < limit))
