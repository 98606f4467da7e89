"""Is an exported file the model? Its answers beside torch's, on drawn pictures.

Two comparisons, so that neither hides in the other's rounding: the network's outputs beside those
of the model, which was neither folded nor translated; and detections beside what `ops.nms` makes of
the very outputs that the file's network gave.

Shapes: B pictures, S side of the canvas in pixels, D detections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbv3dist.inference.fold import levels_of
from mbv3dist.models.directory import LoadedModel, ModelSpec
from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.ops.nms import Detections, postprocess

NETWORK_TOLERANCE = 1e-3  # of the largest output; rounding is a hundred times smaller
SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE_PX = 1e-2
# Where two boxes overlap by the threshold to the last digit, or two scores are equal to it,
# rounding decides which detection is kept: not an error, but rare.
UNMATCHED_TOLERANCE = 0.01
_BATCHES = (1, 3)  # sizes of which none is the example that was traced

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far two sets of detections of the same pictures are apart.

    Attributes:
        detections: In both sets together.
        unmatched: Those without a counterpart: same label, scores within 1e-4, boxes within
            1e-2 px.
        scores: Largest difference of a score between counterparts.
        boxes_px: Largest difference of a coordinate between counterparts.
    """

    detections: int
    unmatched: int
    scores: float
    boxes_px: float


def check_export(
    run: Callable[[Tensor], Values], loaded: LoadedModel, *, source: str, libraries: str
) -> dict[str, float]:
    """Run what is about to be written, and compare.

    Args:
        run: Canvases -> values by name: `logits`; or `class_logits` and `box_deltas`; where it
            gives `boxes`, `scores`, `labels` and `count`, those that they were made of as well.
        loaded: What it was made of.
        source: The file's name, for messages.
        libraries: Whose versions matter if it differs, for messages.

    Returns:
        Largest difference of each output of the network; for detections `boxes_px`, `scores`, how
        many `detections` both sides gave, and how many of them were `unmatched`.

    Raises:
        ValueError: The file does not compute what the model does.
    """
    found: dict[str, float] = {}
    report = f"please report this, with the versions of {libraries}"
    for number, batch_size in enumerate(_BATCHES):
        canvas = drawn_canvases(loaded.spec, batch_size, seed=number)
        values = run(canvas)
        expected = reference_outputs(loaded, canvas)
        for name, tensor in expected.items():
            difference = _network_difference(
                values[name], tensor, what=f"{source}: not written: its {name}", report=report
            )
            found[name] = max(found.get(name, 0.0), difference)
        if "boxes" in values:
            # Not of the model's outputs: peaky scores make much of their rounding.
            agreement = compare_detections(
                Detections(*(values[name] for name in ("boxes", "scores", "labels", "count"))),
                reference_detections(loaded, values["class_logits"], values["box_deltas"]),
            )
            _refuse_unmatched(agreement, source=source, report=report)
            for name in ("boxes_px", "scores"):
                found[name] = max(found.get(name, 0.0), getattr(agreement, name))
            for name in ("detections", "unmatched"):
                found[name] = found.get(name, 0) + getattr(agreement, name)
    return found


@torch.no_grad()
def reference_outputs(loaded: LoadedModel, canvas: Tensor) -> Values:
    """The model's own outputs on canvases as `export` defines them."""
    spec = loaded.spec
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
        for values in (spec.preprocess.mean, spec.preprocess.std)
    )
    outputs = loaded.model((canvas.float() / levels_of(spec.preprocess) - mean) / std)
    if isinstance(outputs, Tensor):
        return {"logits": outputs}
    return dict(zip(("class_logits", "box_deltas"), outputs, strict=True))


def reference_detections(loaded: LoadedModel, class_logits: Tensor, deltas: Tensor) -> Detections:
    """What `ops.nms.postprocess` makes of raw outputs, in canvas pixels."""
    spec = loaded.spec
    assert isinstance(loaded.model, SSDLite) and spec.thresholds is not None
    return postprocess(
        class_logits,
        deltas,
        loaded.model.anchors,
        size=(spec.input_size, spec.input_size),
        score_threshold=spec.thresholds.score,
        nms_threshold=spec.thresholds.nms,
        topk_candidates=spec.thresholds.topk_candidates,
        max_detections=spec.thresholds.max_detections,
    )


def compare_detections(first: Detections, second: Detections) -> Agreement:
    """Find each detection's counterpart in the other set of the same pictures."""
    detections = unmatched = 0
    scores = boxes_px = 0.0
    for picture in range(len(first.count)):
        n, m = int(first.count[picture]), int(second.count[picture])
        detections += n + m
        score = (first.scores[picture, :n, None] - second.scores[picture, None, :m]).abs()
        box = (first.boxes[picture, :n, None] - second.boxes[picture, None, :m]).abs().amax(-1)
        same = first.labels[picture, :n, None] == second.labels[picture, None, :m]
        same &= (score <= SCORE_TOLERANCE) & (box <= BOX_TOLERANCE_PX)
        unmatched += int((~same.any(1)).sum()) + int((~same.any(0)).sum())
        if not bool(same.any()):
            continue
        # Of several counterparts the nearest is meant.
        distance = torch.where(same, box, torch.inf)
        matched = same.any(1)
        nearest = distance.argmin(1, keepdim=True)
        boxes_px = max(boxes_px, float(box.gather(1, nearest)[matched].max()))
        scores = max(scores, float(score.gather(1, nearest)[matched].max()))
    return Agreement(detections, unmatched, scores, boxes_px)


def drawn_canvases(spec: ModelSpec, number: int, *, seed: int) -> Tensor:
    """Draw pictures with large and small structures, of the type that an export takes.

    Returns:
        uint8 [B, 3, S, S], or float32 in [0, 1].
    """
    rng = np.random.default_rng(seed)
    size = spec.input_size
    pixels = rng.normal(0, 12, (number, 3, size, size))
    for cells in (3, 9, 27):
        coarse = rng.normal(0, 55, (number, 3, cells, cells))
        places = np.arange(size) * cells // size
        pixels += coarse[:, :, places][:, :, :, places]
    levels = np.clip(np.rint(pixels + 120), 0, 255)
    if spec.preprocess.dtype == "uint8":
        return torch.from_numpy(levels.astype(np.uint8))
    return torch.from_numpy((levels / 255).astype(np.float32))


def _network_difference(found: Tensor, expected: Tensor, *, what: str, report: str) -> float:
    difference = float((found - expected).abs().max())
    limit = NETWORK_TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:  # NaN is no agreement
        if not bool(expected.isfinite().all()):
            report = "the model itself gives no finite numbers: train it again"
        raise ValueError(
            f"{what} differ from the model's by {difference:.3g}, more than {limit:.3g}; {report}"
        )
    return difference


def _refuse_unmatched(agreement: Agreement, *, source: str, report: str) -> None:
    if agreement.unmatched > UNMATCHED_TOLERANCE * agreement.detections:
        raise ValueError(
            f"{source}: not written: {agreement.unmatched} of {agreement.detections} detections "
            f"have no counterpart among those that its own outputs make; {report}"
        )
