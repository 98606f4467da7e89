"""Random raw outputs of a detector, and what torchvision's own post-process makes of them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD

from mbv3dist.ops.boxes import anchors_to_pixels
from mbv3dist.ops.nms import Detections

CANVAS = (160, 200)  # height, width
LAYOUTS = ("scattered", "chain", "grid", "degenerate", "copies")
SCORES = ("distinct", "tied", "rare", "none", "sure", "broken")


@dataclass
class Case:
    """Inputs of `postprocess`.

    Attributes:
        logits: float32 [B, A, C + 1].
        deltas: float32 [B, A, 4].
        anchors: float32 [A, 4].
        options: the keyword arguments.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, postprocess: Callable[..., Detections]) -> Detections:
        """Post-process by one of the functions."""
        return postprocess(self.logits, self.deltas, self.anchors, **self.options)

    def to(self, device: str) -> "Case":
        """Copy it to a device."""
        tensors = (self.logits.to(device), self.deltas.to(device), self.anchors.to(device))
        return Case(*tensors, self.options)


def random_case(
    rng: np.random.Generator,
    *,
    batch: int,
    num_anchors: int,
    num_classes: int,
    layout: str = "",
    scores: str = "",
) -> Case:
    """Boxes of a layout with scores of a kind, any one if none is given."""
    options = {
        "size": CANVAS,
        "score_threshold": float(rng.choice([0.0, 0.001, 0.05, 0.3])),
        # Such as a float32 holds: the CPU compares with a float64, a GPU with a float32.
        "nms_threshold": float(np.float32(rng.choice([0.0, 1 / 3, 0.5, 0.55, 0.9, 1.0]))),
        "topk_candidates": int(rng.choice([1, 7, 50, 300, 10_000])),
        "max_detections": int(rng.choice([1, 10, 100, 300])),
    }
    layout, scores = layout or rng.choice(LAYOUTS), scores or rng.choice(SCORES)
    anchors, deltas = _boxes(rng, layout, batch, num_anchors, options["nms_threshold"])
    logits = _logits(rng, scores, (batch, num_anchors, num_classes + 1))
    if scores == "broken" and num_anchors:
        _break(rng, logits, deltas)
    tensors = (torch.from_numpy(x.astype(np.float32)) for x in (logits, deltas, anchors))
    return Case(*tensors, options)


def _logits(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    logits = rng.normal(size=shape)
    if kind == "tied":
        logits = rng.integers(0, 3, shape).astype(float)
    if kind == "rare":
        logits[..., 0] += 6
    if kind == "none":
        logits[..., 0] += 60
    if kind == "sure":
        logits *= 30
    return logits


def _boxes(
    rng: np.random.Generator, layout: str, batch: int, number: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Anchors [A, 4] and deltas [B, A, 4]."""
    anchors = rng.uniform(0.02, 1, (number, 4))
    anchors[:, 2:] *= rng.choice([0.05, 0.3, 1.0])
    deltas = rng.normal(size=(batch, number, 4)) * rng.choice([0, 1, 5])
    if layout == "chain":  # each box is a little too near to the next one, or hardly not
        side = 0.2
        step = side * (1 - threshold) / (1 + threshold) * rng.choice([0.98, 1.0, 1.02])
        anchors[:] = (0, 0.5, side, side)
        anchors[:, 0] = rng.permutation(number) * step % 1
        deltas *= 0
    if layout == "grid":  # overlaps that are fractions of small numbers, such as thresholds are
        corners = np.sort(rng.integers(0, 9, (number, 2, 2)), axis=1) / 8
        anchors[:, :2], anchors[:, 2:] = corners.mean(1), corners[:, 1] - corners[:, 0]
        deltas *= 0
    if layout == "degenerate":  # lines, points, boxes outside, deltas that overflow
        anchors[rng.random(number) < 0.3, 2] = 0
        anchors[rng.random(number) < 0.3, 3] = 0
        anchors[rng.random(number) < 0.2, :2] += 3
        deltas[rng.random((batch, number)) < 0.3] *= 200
    if layout == "copies" and number:
        pick = rng.integers(0, max(1, number // 4), number)
        anchors, deltas = anchors[pick], deltas[:, pick]
    return anchors, deltas


def _break(rng: np.random.Generator, logits: np.ndarray, deltas: np.ndarray) -> None:
    """A diverged model's outputs: NaN and infinities here and there."""
    wrong = np.array([np.nan, np.inf, -np.inf])
    for values, share in ((logits, 0.02), (deltas, rng.choice([0, 0.01]))):
        mask = rng.random(values.shape) < share
        values[mask] = rng.choice(wrong, mask.sum())


class _StableSorts(TorchFunctionMode):
    """Makes sorts stable, and top-k a part of a sort; counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.topk:
            self.number += 1
            values, places = args[0].sort(dim=0, descending=True, stable=True)
            return values[: args[1]], places[: args[1]]
        if func is Tensor.sort:
            self.number += 1
            kwargs = {**kwargs, "stable": True}
        return func(*args, **kwargs)


def _stable_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """NMS of torchvision, where equal scores keep their order: it sorts by their places."""
    places = torch.empty_like(scores)
    order = torch.sort(scores, descending=True, stable=True).indices
    places[order] = torch.arange(len(order), 0, -1, device=scores.device, dtype=scores.dtype)
    return torch.ops.torchvision.nms(boxes, places, iou_threshold)


def torchvision_detections(case: Case, *, stable: bool) -> list[dict[str, Tensor]]:
    """What torchvision's SSD makes of them, by its own method.

    Args:
        case: raw outputs and options.
        stable: whether its sorts are made stable, without which it leaves to chance what becomes
            of equal scores.
    """
    options = case.options
    owner = SimpleNamespace(
        box_coder=BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)),
        score_thresh=options["score_threshold"],
        nms_thresh=options["nms_threshold"],
        topk_candidates=options["topk_candidates"],
        detections_per_img=options["max_detections"],
    )
    outputs = {"bbox_regression": case.deltas, "cls_logits": case.logits}
    batch, size = len(case.logits), options["size"]
    pixels = [anchors_to_pixels(case.anchors, size)] * batch
    with ExitStack() as stack:
        if stable:
            sorts = stack.enter_context(_StableSorts())
            stack.enter_context(mock.patch.object(torchvision.ops.boxes, "nms", _stable_nms))
        found = SSD.postprocess_detections(owner, outputs, pixels, [size] * batch)
    assert not stable or sorts.number
    return found


def has_ties(case: Case) -> bool:
    """Whether a picture has equal scores above the threshold."""
    scores = case.logits.softmax(-1)[..., 1:].flatten(1)
    for picture in scores:
        found = picture[picture > case.options["score_threshold"]]
        if len(found.unique()) < len(found):
            return True
    return False


def mismatches(ours: Detections, theirs: list[dict[str, Tensor]]) -> int:
    """How many pictures differ in a box, score, label, their order or the padding."""
    return sum(not _is_same(ours, picture, found) for picture, found in enumerate(theirs))


def _is_same(ours: Detections, picture: int, theirs: dict[str, Tensor]) -> bool:
    count = len(theirs["scores"])
    boxes, scores, labels = (
        torch.zeros_like(ours.boxes[picture]),
        torch.zeros_like(ours.scores[picture]),
        torch.full_like(ours.labels[picture], -1),
    )
    boxes[:count], scores[:count] = theirs["boxes"], theirs["scores"]
    labels[:count] = theirs["labels"] - 1
    return (
        int(ours.count[picture]) == count
        and torch.equal(ours.boxes[picture].nan_to_num(-1), boxes.nan_to_num(-1))
        and torch.equal(ours.scores[picture], scores)
        and torch.equal(ours.labels[picture], labels)
    )


def difference(ours: Detections, theirs: Detections) -> int:
    """How many pictures of two results differ."""
    rows = []
    for picture, count in enumerate(theirs.count.tolist()):
        rows.append(
            {
                "boxes": theirs.boxes[picture, :count],
                "scores": theirs.scores[picture, :count],
                "labels": theirs.labels[picture, :count] + 1,
            }
        )
    return mismatches(ours, rows)
