"""From a picture's canvas to a model's input, and from its outputs back to the picture.

Evaluation and prediction share these steps, so that both see the same pixels and give the same
detections. `preprocess_whole.py` has the inputs of models that want other pixels than the
decoder's (`Preprocess.is_drawn` tells). Shapes: B pictures, S side of the canvas in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mbv3dist.config import ViewConfig
from mbv3dist.data.views import vector_to_source
from mbv3dist.models.directory import ModelSpec, Preprocess
from mbv3dist.ops.nms import Detections, postprocess


@dataclass(frozen=True)
class PictureDetections:
    """Detections of one picture, best score first.

    Attributes:
        boxes: float32 [D, 4], xyxy pixels of the upright original picture, clipped to it.
        scores: float32 [D], in [0, 1].
        labels: int64 [D], from 0 without background.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def evaluation_view(spec: ModelSpec) -> ViewConfig:
    """How pictures are placed on the canvas for a model that is not in training.

    Raises:
        ValueError: The description contradicts itself.
    """
    wanted = spec.preprocess
    if spec.task == "classification":
        return ViewConfig(name="center_crop", resize=wanted.resize)
    if wanted.resize != spec.input_size:
        raise ValueError(
            f"model.json: preprocess.resize {wanted.resize} differs from input_size "
            f"{spec.input_size}; a detector's pictures are resized to its input size"
        )
    return ViewConfig(name="resize")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode again after; frozen parts stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def normalize(image: Tensor, preprocess: Preprocess) -> Tensor:
    """A model's input, (x / 255 - mean) / std per channel, as in training.

    Args:
        image: uint8 [B, 3, S, S], on the model's device.
        preprocess: Of the model.

    Returns:
        float32 [B, 3, S, S] in the same memory format.
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=image.device).view(1, 3, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    return (image.float().div_(255) - mean) / std


def detections_on_source(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    *,
    spec: ModelSpec,
    view: np.ndarray,
    size: np.ndarray,
    score_threshold: float | None = None,
) -> list[PictureDetections]:
    """Post-process a detector's outputs and move the boxes back to the original pictures.

    Args:
        class_logits: float [B, A, C + 1], column 0 is the background.
        box_deltas: float [B, A, 4].
        anchors: float32 [A, 4], cxcywh in [0, 1].
        spec: Of the model, with its thresholds.
        view: float32 [B, 8], where each picture lies on the canvas (`Batch.view`).
        size: int [B, 2], height and width of each original picture.
        score_threshold: Least score; None: the model's own.

    Returns:
        One entry per picture.
    """
    thresholds = spec.thresholds
    assert thresholds is not None, "a detector has thresholds"
    found = postprocess(
        class_logits,
        box_deltas,
        anchors,
        size=(spec.input_size, spec.input_size),
        score_threshold=thresholds.score if score_threshold is None else score_threshold,
        nms_threshold=thresholds.nms,
        topk_candidates=thresholds.topk_candidates,
        max_detections=thresholds.max_detections,
    )
    return place_detections(found, view=view, size=size)


def place_detections(
    found: Detections,
    *,
    view: np.ndarray,
    size: np.ndarray,
    score_threshold: float | None = None,
) -> list[PictureDetections]:
    """Move detections from the canvas back to the original pictures.

    Args:
        found: With boxes in canvas pixels, best score first.
        view: float32 [B, 8], where each picture lies on the canvas (`Batch.view`).
        size: int [B, 2], height and width of each original picture.
        score_threshold: Only detections above it; None: all.

    Returns:
        One entry per picture.
    """
    boxes, scores, labels, count = (
        part.cpu().numpy() for part in (found.boxes, found.scores, found.labels, found.count)
    )
    result = []
    for place, kept in enumerate(count.tolist()):
        if score_threshold is not None:
            kept = int((scores[place, :kept] > score_threshold).sum())
        height, width = size[place].tolist()
        moved = vector_to_source(view[place], boxes[place, :kept])
        limits = np.array((width, height, width, height), dtype=np.float32)
        result.append(
            PictureDetections(
                boxes=np.clip(moved, 0.0, limits),
                scores=scores[place, :kept],
                labels=labels[place, :kept],
            )
        )
    return result
