"""Post-process on a GPU: a whole batch in six launches of four kernels, nothing waited for.

The kernels (`nms_kernels.py`), in the order of their launches:

1. `score_and_decode`: probabilities, class-major, -1 where not above the threshold; boxes.
2. `select_top`: the best `topk_candidates` of each class of each picture, in no order.
3. `sort_top`: in order, with their boxes; and what a picture needs to move its classes apart.
4. `suppress`: NMS, a program for each class of each picture; what is kept lies together.
5. and 6. `select_top` and `sort_top` again: the best detections of each picture.

All shapes are known beforehand, so the launches can be captured in a CUDA graph; how much there is
to do is read on the device. Probabilities are kept as the bits of their floats, integers whose
order is that of the values: the k-th largest is found by halving an interval of them.

Shapes: B pictures, A anchors, C classes (without background), K candidates of a class, D detections
of a picture.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from mbv3dist.ops.boxes import BOX_WEIGHTS
from mbv3dist.ops.nms_kernels import LANES, score_and_decode, select_top, sort_top, suppress

TILE = 32  # anchors of a program of score_and_decode
BLOCK, SELECT_WARPS = 1024, 4  # scores that select_top takes at once, and its warps
LONG_BLOCK, LONG_SELECT_WARPS = 4096, 16  # of rows longer than this: they are few
STEP = 8  # boxes that suppress compares 32 with at once
SCORE_WARPS = 4
MOVED_APART = 25_000  # up to this many candidates torchvision moves the classes apart on CUDA


def postprocess(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    size: Sequence[int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
    *,
    moved_apart: int = MOVED_APART,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `nms.postprocess` does, and return the fields of `nms.Detections`.

    Args:
        class_logits: float [B, A, C + 1], see `nms.postprocess`, like the others.
        box_deltas: float [B, A, 4].
        anchors: float [A, 4].
        size: canvas (height, width) in pixels.
        score_threshold: see there.
        nms_threshold: see there.
        topk_candidates: see there.
        max_detections: see there.
        moved_apart: candidates of a picture up to which its classes are moved apart.
        fused: whether the sum of two areas is rounded as torchvision's kernel does on CUDA.
    """
    batch, num_anchors, num_columns = class_logits.shape
    num_classes = num_columns - 1
    new = class_logits.new_empty
    found = (
        new((batch, max_detections, 4), dtype=torch.float32),
        new((batch, max_detections), dtype=torch.float32),
        new((batch, max_detections), dtype=torch.int64),
        new((batch,), dtype=torch.int64),
    )
    if not batch * num_anchors * num_classes:
        for field, empty in zip(found, (0, 0, -1, 0), strict=True):
            field.fill_(empty)
        return found
    boxes, keys, facts = _score_and_decode(class_logits, box_deltas, anchors, size, score_threshold)
    rows, limit = batch * num_classes, min(topk_candidates, num_anchors)
    top_boxes = new((rows, limit, 4), dtype=torch.float32)
    top_keys = new((rows, limit), dtype=torch.int32)
    kept_boxes, kept_keys = torch.empty_like(top_boxes), torch.empty_like(top_keys)
    top = _select_top(keys, rows, num_anchors, limit)
    sort_top[(rows, triton.cdiv(limit, LANES.value))](
        *top,
        boxes,
        top_boxes,
        top_keys,
        facts,
        facts,
        num_anchors,
        limit,
        num_classes,
        1,
        IS_LAST=False,
        num_warps=1,
    )
    threshold, half_step = split_threshold(nms_threshold)
    suppress[(rows,)](
        top_boxes,
        top_keys,
        top[-1],
        facts,
        kept_boxes,
        kept_keys,
        num_classes,
        limit,
        max_detections,
        moved_apart,
        threshold,
        half_step,
        FUSED=fused,
        STEP=STEP,
        num_warps=1,
        enable_fp_fusion=False,
    )
    best = _select_top(kept_keys, batch, num_classes * limit, max_detections)
    sort_top[(batch, triton.cdiv(max_detections, LANES.value))](
        *best,
        kept_boxes,
        *found,
        num_classes * limit,
        max_detections,
        1,
        limit,
        IS_LAST=True,
        num_warps=1,
    )
    return found


def _score_and_decode(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    size: Sequence[int],
    score_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `score_and_decode`; return boxes, keys and facts."""
    batch, num_anchors, num_columns = class_logits.shape
    boxes = class_logits.new_empty((batch, num_anchors, 4), dtype=torch.float32)
    keys = class_logits.new_empty((batch, num_columns - 1, num_anchors), dtype=torch.int32)
    facts = class_logits.new_empty((batch, 2), dtype=torch.int32)
    height, width = size
    score_and_decode[(triton.cdiv(num_anchors, TILE), batch)](
        class_logits.contiguous(),
        box_deltas.contiguous(),
        anchors.contiguous(),
        keys,
        boxes,
        facts,
        num_anchors,
        num_columns,
        float(score_threshold),
        float(height),
        float(width),
        *(float(np.float32(1) / np.float32(weight)) for weight in BOX_WEIGHTS),
        IS_DEVICE=class_logits.is_cuda,
        TILE=TILE,
        num_warps=SCORE_WARPS,
        enable_fp_fusion=False,
    )
    return boxes, keys, facts


def _select_top(keys: Tensor, rows: int, length: int, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `select_top` on keys of `rows` rows of `length`; return what it writes."""
    list_keys, list_places = keys.new_empty((2, rows, limit)).unbind()
    count = keys.new_empty((rows,))
    is_long = length > LONG_BLOCK
    select_top[(rows,)](
        keys,
        list_keys,
        list_places,
        count,
        length,
        limit,
        BLOCK=LONG_BLOCK if is_long else BLOCK,
        num_warps=LONG_SELECT_WARPS if is_long else SELECT_WARPS,
    )
    return list_keys, list_places, count


def split_threshold(nms_threshold: float) -> tuple[float, float]:
    """Return the threshold in float32 and half of the step from it to the next float32."""
    threshold = np.float32(nms_threshold)
    half_step = (np.nextafter(threshold, np.float32(np.inf)) - threshold) / np.float32(2)
    return float(threshold), float(half_step) if threshold > 0 else 0.0
