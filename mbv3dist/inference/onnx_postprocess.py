"""The detector's post-process as ONNX nodes: the same rule as `ops.nms.postprocess`.

NonMaxSuppression wants one set of boxes for all classes, but each class has candidates of its own.
So every (picture, class) is a picture of one class to it. What survives is marked among the
candidates, and the best marked ones are the detections: shapes stay fixed but for the batch's size.

Shapes: B pictures, A anchors, C classes without background, K candidates of a class, D detections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mbv3dist.inference.onnx_builder import GraphBuilder
from mbv3dist.models.directory import Thresholds
from mbv3dist.ops.boxes import BOX_WEIGHTS, MAX_LOG_SCALE, anchors_to_pixels, xyxy_to_cxcywh

OUTPUTS = ("boxes", "scores", "labels", "count")
_DROPPED = -1.0  # in place of a score; real ones are probabilities


@dataclass(frozen=True)
class _Sizes:
    """Fixed sizes of a post-process (see above)."""

    classes: int
    candidates: int
    detections: int
    canvas: int

    @property
    def per_picture(self) -> int:
        return self.classes * self.candidates


def add_postprocess(
    builder: GraphBuilder,
    class_logits: str,
    box_deltas: str,
    *,
    anchors: Tensor,
    num_classes: int,
    size: int,
    thresholds: Thresholds,
) -> tuple[str, ...]:
    """Append the post-process to a graph.

    Args:
        builder: The graph.
        class_logits: Value of shape [B, A, C + 1], float32; column 0 is the background.
        box_deltas: Value of shape [B, A, 4], float32.
        anchors: float32 [A, 4], cxcywh in [0, 1].
        num_classes: C.
        size: Side of the canvas in pixels.
        thresholds: Of the model.

    Returns:
        The names of its outputs: boxes float32 [B, D, 4], xyxy canvas pixels; scores float32
        [B, D]; labels int64 [B, D]; count int64 [B]. Best score first; after `count` detections
        boxes and scores are 0 and labels -1.

    Raises:
        ValueError: On thresholds that ONNX cannot express.
    """
    if not 0 <= thresholds.nms <= 1:
        raise ValueError(
            f"model.json: thresholds.nms is {thresholds.nms}; ONNX takes an IoU from 0 to 1"
        )
    for name in ("topk_candidates", "max_detections"):
        if getattr(thresholds, name) < 1:
            raise ValueError(f"model.json: thresholds.{name} is {getattr(thresholds, name)}, not 1")
    sizes = _Sizes(
        classes=num_classes,
        candidates=min(thresholds.topk_candidates, len(anchors)),
        detections=thresholds.max_detections,
        canvas=size,
    )
    boxes = _decode(builder, box_deltas, anchors, sizes)
    scores, candidates = _candidates(builder, class_logits, boxes, sizes)
    kept = _suppress(builder, scores, candidates, sizes, thresholds)
    return _best(builder, kept, candidates, sizes)


def _decode(builder: GraphBuilder, box_deltas: str, anchors: Tensor, sizes: _Sizes) -> str:
    """Boxes of all anchors [B, A, 4], xyxy canvas pixels, as `decode_boxes` and `clip_boxes`."""
    canvas = (sizes.canvas, sizes.canvas)
    placed = xyxy_to_cxcywh(anchors_to_pixels(anchors.float(), canvas)).numpy()
    centres = builder.constant(placed[:, :2], "float32", "anchors.centre")
    extents = builder.constant(placed[:, 2:], "float32", "anchors.extent")
    # In the reference's order of operations, so that rounding agrees. Scalars, because runtimes
    # are slow at stretching a pair of numbers over all anchors (0.7 ms more).
    x_weight, y_weight, width_weight, height_weight = BOX_WEIGHTS
    assert x_weight == y_weight and width_weight == height_weight
    shift, scale = builder.add_many("Split", box_deltas, outputs=2, axis=-1, name="decode.split")
    shift = builder.add("Div", shift, builder.constant(x_weight, "float32"))
    shift = builder.add("Mul", shift, extents)
    middle = builder.add("Add", shift, centres, name="decode.centre")
    scale = builder.add("Div", scale, builder.constant(width_weight, "float32"))
    scale = builder.add("Min", scale, builder.constant(MAX_LOG_SCALE, "float32"))
    half = builder.add("Mul", builder.add("Exp", scale), extents)
    half = builder.add("Mul", half, builder.constant(0.5, "float32"), name="decode.half")
    low, high = builder.add("Sub", middle, half), builder.add("Add", middle, half)
    boxes = builder.add("Concat", low, high, axis=-1, name="decode.boxes")
    limits = builder.constant(0.0, "float32"), builder.constant(float(sizes.canvas), "float32")
    return builder.add("Clip", boxes, *limits, name="decode.clipped")


def _candidates(
    builder: GraphBuilder, class_logits: str, boxes: str, sizes: _Sizes
) -> tuple[str, str]:
    """Best anchors of each class: scores [B, C, K] and boxes [B, C * K, 4]."""
    scores = builder.add("Softmax", class_logits, axis=-1, name="candidates.softmax")
    first, end, last_axis = (builder.constant([v], "int64") for v in (1, sizes.classes + 1, -1))
    scores = builder.add("Slice", scores, first, end, last_axis, name="candidates.foreground")
    scores = builder.add("Transpose", scores, perm=[0, 2, 1], name="candidates.by_class")
    top_scores, top_anchors = builder.add_many(
        "TopK",
        scores,
        builder.constant([sizes.candidates], "int64"),
        outputs=2,
        axis=-1,
        name="candidates.topk",
    )
    places = builder.add(
        "Reshape", top_anchors, builder.constant([0, sizes.per_picture, 1], "int64")
    )
    return top_scores, builder.add("GatherND", boxes, places, batch_dims=1, name="candidates.boxes")


def _suppress(
    builder: GraphBuilder, scores: str, candidates: str, sizes: _Sizes, thresholds: Thresholds
) -> str:
    """Scores of all candidates [B, C * K], those that are not kept replaced by `_DROPPED`."""
    k = sizes.candidates
    selected = builder.add(  # [kept, 3]: picture and class, 0, candidate
        "NonMaxSuppression",
        builder.add("Reshape", candidates, builder.constant([-1, k, 4], "int64")),
        builder.add("Reshape", scores, builder.constant([-1, 1, k], "int64")),
        builder.constant([min(k, sizes.detections)], "int64"),
        builder.constant([thresholds.nms], "float32"),
        builder.constant([thresholds.score], "float32"),
        name="nms",
    )
    flat = builder.add("Reshape", scores, builder.constant([-1], "int64"), name="nms.scores")
    # Not a ReduceSum of a product: of no rows at all, onnxruntime 1.20 to 1.23 keeps both axes.
    picture_and_class, candidate = (
        builder.add("Gather", selected, builder.constant(column, "int64"), axis=1)
        for column in (0, 2)
    )
    starts = builder.add("Mul", picture_and_class, builder.constant(k, "int64"))
    places = builder.add("Add", starts, candidate, name="nms.places")
    nothing = builder.add(
        "Expand", builder.constant([_DROPPED], "float32"), builder.add("Shape", flat)
    )
    kept = builder.add(
        "ScatterElements", nothing, places, builder.add("Gather", flat, places), name="nms.kept"
    )
    return builder.add("Reshape", kept, builder.constant([-1, sizes.per_picture], "int64"))


def _best(builder: GraphBuilder, kept: str, candidates: str, sizes: _Sizes) -> tuple[str, ...]:
    """The best detections of each picture, over all classes."""
    number = min(sizes.detections, sizes.per_picture)
    found, places = builder.add_many(
        "TopK", kept, builder.constant([number], "int64"), outputs=2, name="best.topk"
    )
    last_axis = builder.constant([-1], "int64")
    places_column = builder.add("Unsqueeze", places, last_axis)
    boxes = builder.add("GatherND", candidates, places_column, batch_dims=1, name="best.boxes")
    labels = builder.add("Div", places, builder.constant(sizes.candidates, "int64"))

    valid = builder.add("Greater", found, builder.constant(_DROPPED / 2, "float32"), name="valid")
    zero, none = builder.constant(0.0, "float32"), builder.constant(-1, "int64")
    valid_column = builder.add("Unsqueeze", valid, last_axis)
    padding = sizes.detections - number
    padded = [
        _padded(builder, builder.add("Where", valid_column, boxes, zero), 2, padding, zero),
        _padded(builder, builder.add("Where", valid, found, zero), 1, padding, zero),
        _padded(builder, builder.add("Where", valid, labels, none), 1, padding, none),
        builder.add("ReduceSum", builder.add("Cast", valid, to=7), last_axis, keepdims=0),
    ]
    for value, name in zip(padded, OUTPUTS, strict=True):
        builder.add("Identity", value, name=name)
    return OUTPUTS


def _padded(builder: GraphBuilder, value: str, axes: int, padding: int, filler: str) -> str:
    """Append `padding` entries to each picture: fewer candidates than detections are possible."""
    if padding == 0:
        return value
    ends = np.zeros(1 + axes, dtype=np.int64)
    ends[1] = padding
    pads = np.concatenate((np.zeros_like(ends), ends))
    return builder.add("Pad", value, builder.constant(pads, "int64"), filler)
