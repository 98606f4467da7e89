"""How well anchors cover boxes, and scales and ratios that cover them better.

An SSD learns a box from the anchors that overlap it by half. Boxes that none overlaps so far have
one anchor each, the forced match, and are learned slowly or never. Coverage is measured by the
training's own matching; the fit changes scales and ratios one after the other, within SSD's scheme,
as long as that makes the boxes' best overlaps larger.

Shapes: T boxes of n pictures, A anchors, K maps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from mbv3dist.models.anchors import AnchorConfig, cell_centres, cell_shapes, make_anchors
from mbv3dist.models.loss import match_batch
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops.boxes import anchors_to_pixels, box_iou

POSITIVE_IOU = 0.5  # from which an anchor is positive, as in the loss
_CHUNK = 16  # pictures matched at once
_STEPS = (1.25, 1.12, 1.06, 1.03, 1.015)  # factors that the search tries, large ones first
_LEAST_GAIN = 1e-6
_SMALLEST_RATIO, _LARGEST_RATIO = 1.05, 6.0
_SMALLEST_SCALE = 0.01


@dataclass(frozen=True)
class SeenBoxes:
    """Boxes as they lie on the canvas in n views of pictures.

    Attributes:
        boxes: float32 [T, 4], xyxy canvas pixels, inside the canvas.
        labels: int64 [T], class numbers.
        starts: int64 [n + 1], where each picture's boxes start.
        size: side of the canvas in pixels.
    """

    boxes: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    size: int


@dataclass(frozen=True)
class Coverage:
    """What anchors are to each of T boxes.

    Attributes:
        best_iou: float32 [T], IoU with the anchor that overlaps it most.
        best_map: int64 [T], number of the map that has this anchor.
        positives: int64 [T], anchors that learn this box; of an anchor that several boxes want,
            one has it, so this can be 0.
        map_positives: int64 [K], positive anchors of each map.
        map_anchors: int64 [K], anchors of each map.
    """

    best_iou: np.ndarray
    best_map: np.ndarray
    positives: np.ndarray
    map_positives: np.ndarray
    map_anchors: np.ndarray


def cover(config: AnchorConfig, seen: SeenBoxes) -> Coverage:
    """Match anchors with boxes as in training, and say what each box got.

    Args:
        config: The anchors.
        seen: The boxes.
    """
    size = (seen.size, seen.size)
    sizes = feature_sizes(size)
    anchors = make_anchors(config, sizes, size=size)
    pixels = anchors_to_pixels(anchors, size)
    map_anchors = np.array([r * c * config.num_per_cell for r, c in sizes], np.int64)
    map_ends = np.cumsum(map_anchors)
    best_iou = np.zeros(len(seen.boxes), np.float32)
    best_anchor = np.zeros(len(seen.boxes), np.int64)
    positives = np.zeros(len(seen.boxes), np.int64)
    map_positives = np.zeros(len(sizes), np.int64)
    for first in range(0, len(seen.starts) - 1, _CHUNK):
        starts = seen.starts[first : first + _CHUNK + 1]
        counts = np.diff(starts)
        if not counts.sum():
            continue
        valid = np.arange(counts.max()) < counts[:, None]  # [B, M]
        boxes = np.zeros((*valid.shape, 4), np.float32)
        own = slice(starts[0], starts[-1])
        boxes[valid] = seen.boxes[own]
        # Boxes are numbered in place of their classes: the labels say which box an anchor took.
        numbers = np.where(valid, np.arange(valid.shape[1]), -1)
        targets = match_batch(
            anchors,
            torch.from_numpy(boxes),
            torch.from_numpy(numbers),
            size=size,
            iou_threshold=POSITIVE_IOU,
        )
        taken = targets.labels.numpy() - 1  # [B, A]
        picture, anchor = np.nonzero(taken >= 0)
        positives += np.bincount(
            starts[picture] + taken[picture, anchor], minlength=len(seen.boxes)
        )
        map_positives += np.bincount(
            np.searchsorted(map_ends, anchor, side="right"), minlength=len(sizes)
        )
        overlap = box_iou(torch.from_numpy(seen.boxes[own]), pixels)
        best = overlap.max(dim=1)
        best_iou[own], best_anchor[own] = best.values.numpy(), best.indices.numpy()
    best_map = np.searchsorted(map_ends, best_anchor, side="right")
    return Coverage(best_iou, best_map, positives, map_positives, map_anchors)


def map_best_iou(config: AnchorConfig, k: int, boxes: np.ndarray, *, size: int) -> np.ndarray:
    """Return float32 [T]: the largest IoU of each box with an anchor of map k.

    Of all anchors of one shape the one whose centre is nearest overlaps a box most, so only that
    one is looked at: a thousandth of the work of comparing with all.

    Args:
        config: The anchors.
        k: Number of the map.
        boxes: float32 [T, 4], xyxy canvas pixels.
        size: Side of the canvas in pixels.
    """
    canvas = (size, size)
    cells = feature_sizes(canvas)[k]
    fractions = boxes / np.float32(size)
    sides = fractions[:, 2:] - fractions[:, :2]  # [T, 2]
    area = sides.prod(axis=1)
    away = np.empty((2, len(boxes)), np.float32)
    centres = cell_centres(config, k, cells, size=canvas)[::-1]  # x, y
    for axis, places in enumerate(centres):
        row = (places.clamp(0, 1) if config.clip else places).numpy()
        middle = (fractions[:, axis] + fractions[:, axis + 2]) / 2
        right = np.searchsorted(row, middle).clip(1, len(row) - 1) if len(row) > 1 else 0
        left = np.maximum(right - 1, 0)
        away[axis] = np.minimum(np.abs(middle - row[left]), np.abs(middle - row[right]))
    result = np.zeros(len(boxes), np.float32)
    for shape in cell_shapes(config, k):
        common = np.ones(len(boxes), np.float32)
        anchor_area = 1.0
        for axis, side in enumerate(shape):
            length = min(side, 1.0) if config.clip else side
            anchor_area *= length
            # Two intervals whose middles are `away` from each other.
            reach = (length + sides[:, axis]) / 2 - away[axis]
            common *= np.clip(np.minimum(reach, np.minimum(length, sides[:, axis])), 0, None)
        np.maximum(result, common / (area + anchor_area - common), out=result)
    return result


@dataclass(frozen=True)
class Fit:
    """What the search found.

    Attributes:
        config: The anchors.
        score: What it reached; see `fit_anchors`.
    """

    config: AnchorConfig
    score: float


def fit_anchors(
    seen: Sequence[SeenBoxes],
    start: AnchorConfig,
    *,
    num_ratios: int | None = None,
    max_boxes: int = 12_000,
    seed: int = 0,
) -> Fit:
    """Search scales and ratios that cover boxes better than those it starts from.

    What is made larger is the mean over the views and classes, each counting the same however many
    boxes it has, of (mean best IoU + share of boxes with a best IoU of 0.5 or more) / 2.

    Args:
        seen: Boxes as different views show them, on canvases of the same size.
        start: Anchors to start from; steps and clipping stay. The search also starts from
            torchvision's and from the sizes that the boxes have, and the best result counts.
        num_ratios: Aspect ratios beside 1; None: as many as `start` has.
        max_boxes: About so many are looked at, as many of each view and class, drawn by `seed`.
        seed: Of that draw.

    Returns:
        The best anchors, scales rounded to three digits and ratios to two.

    Raises:
        ValueError: There is no box to fit to.
    """
    size = seen[0].size
    boxes, weights = _sample(seen, max_boxes, seed)
    if not len(boxes):
        raise ValueError("there is no box to fit anchors to; choose another split")
    count = len(start.ratios) if num_ratios is None else num_ratios
    search = _Search(boxes, weights, size)
    best: Fit | None = None
    for first in _starts(start, count, boxes, weights, size):
        found = _rounded(search.climb(first))
        score = search.score(found)
        if best is None or score > best.score + _LEAST_GAIN:
            best = Fit(found, score)
    assert best is not None
    return best


def coverage_score(config: AnchorConfig, seen: Sequence[SeenBoxes]) -> float:
    """Return what `fit_anchors` makes larger, over all boxes."""
    boxes, weights = _sample(seen, sys.maxsize, 0)
    return _Search(boxes, weights, seen[0].size).score(config)


def _sample(seen: Sequence[SeenBoxes], max_boxes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes float32 [T, 4], xyxy canvas pixels, and their weights, float64 [T]; sum 1."""
    rng = np.random.default_rng(seed)
    share = max(100, max_boxes // max(1, sum(len(np.unique(part.labels)) for part in seen)))
    chosen, weights = [np.zeros((0, 4), np.float32)], [np.zeros(0)]
    for part in seen:
        for label in np.unique(part.labels):
            places = np.flatnonzero(part.labels == label)
            if len(places) > share:
                places = np.sort(rng.choice(places, share, replace=False))
            chosen.append(part.boxes[places])
            weights.append(np.full(len(places), 1 / len(places)))
    every = np.concatenate(weights)
    return np.concatenate(chosen), every / max(every.sum(), 1e-12)


def _starts(
    start: AnchorConfig, count: int, boxes: np.ndarray, weights: np.ndarray, size: int
) -> list[AnchorConfig]:
    """Return anchors to begin the search at, all with `count` ratios."""
    usual = (1.5, 2.0, 3.0, 4.0, 5.0)
    ratios = (*start.ratios[:count], *usual)[:count]
    lengths = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) / size
    order = np.argsort(lengths)
    cumulative = np.cumsum(weights[order])
    quantiles = (np.arange(len(start.scales)) + 0.5) / len(start.scales)
    places = np.searchsorted(cumulative, quantiles).clip(0, len(order) - 1)
    own = np.maximum.accumulate(lengths[order[places]].clip(_SMALLEST_SCALE, 1.0))
    scales = [start.scales, tuple(float(scale) for scale in own)]
    if len(start.scales) == len(AnchorConfig().scales):
        scales.append(AnchorConfig().scales)
        scales.append((0.08, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0))
    return [replace(start, scales=values, ratios=ratios) for values in scales]


def _rounded(config: AnchorConfig) -> AnchorConfig:
    return replace(
        config,
        scales=tuple(round(scale, 3) for scale in config.scales),
        ratios=tuple(sorted(round(ratio, 2) for ratio in config.ratios)),
    )


class _Search:
    """Coordinate search over the logarithms of scales and ratios."""

    def __init__(self, boxes: np.ndarray, weights: np.ndarray, size: int) -> None:
        self._boxes = boxes
        self._weights = weights
        self._size = size
        self._known: dict[tuple[object, ...], np.ndarray] = {}

    def score(self, config: AnchorConfig) -> float:
        """Return the weighted mean of best IoU and of reaching 0.5, halved."""
        best = self._map_iou(config, 0)
        for k in range(1, config.num_maps):
            best = np.maximum(best, self._map_iou(config, k))
        # No `@`: BLAS would start threads for it, thousands of times.
        return float(((best + (best >= POSITIVE_IOU)) / 2 * self._weights).sum())

    def _map_iou(self, config: AnchorConfig, k: int) -> np.ndarray:
        """Return `map_best_iou`; a map whose numbers have not changed is not computed again."""
        key = (k, config.scales[k], config.scales[k + 1], config.ratios)
        if key not in self._known:
            if len(self._known) > 64:
                self._known.pop(next(iter(self._known)))
            self._known[key] = map_best_iou(config, k, self._boxes, size=self._size)
        return self._known[key]

    def climb(self, config: AnchorConfig) -> AnchorConfig:
        """Change single numbers, and all scales from one on, while that makes the score larger."""
        score = self.score(config)
        num_scales, num_ratios = len(config.scales), len(config.ratios)
        spans = {(first, last) for first in range(num_scales) for last in (first + 1, num_scales)}
        for factor in _STEPS:
            improved = True
            while improved:
                improved = False
                moved = [
                    partial(_scaled, first=first, last=last, factor=step)
                    for first, last in sorted(spans)
                    for step in (factor, 1 / factor)
                ] + [
                    partial(_stretched, place=place, factor=step)
                    for place in range(num_ratios)
                    for step in (factor, 1 / factor)
                ]
                for move in moved:
                    changed = move(config)
                    found = self.score(changed)
                    if found > score + _LEAST_GAIN:
                        config, score, improved = changed, found, True
        return config


def _scaled(config: AnchorConfig, *, first: int, last: int, factor: float) -> AnchorConfig:
    """Return the anchors with some scales changed; as they are if that breaks their order."""
    largest = max(1.0, *config.scales)
    scales = [
        min(max(scale * factor, _SMALLEST_SCALE), largest) if first <= place < last else scale
        for place, scale in enumerate(config.scales)
    ]
    return replace(config, scales=tuple(scales)) if scales == sorted(scales) else config


def _stretched(config: AnchorConfig, *, place: int, factor: float) -> AnchorConfig:
    ratios = list(config.ratios)
    ratios[place] = min(max(ratios[place] * factor, _SMALLEST_RATIO), _LARGEST_RATIO)
    return replace(config, ratios=tuple(ratios))
