"""A prediction's results: an entry of predictions.json, a drawn picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mbv3dist.models.preprocess import PictureDetections
from mbv3dist.viz.draw import draw_boxes, draw_classes

Answer = PictureDetections | list[tuple[str, float]]


def answer_entry(answer: Answer, classes: Sequence[str]) -> dict[str, Any]:
    """The part of a picture's entry that holds what was found: `detections` or `top`."""
    if not isinstance(answer, PictureDetections):
        return {"top": [{"label": label, "score": round(score, 6)} for label, score in answer]}
    rows = zip(
        answer.labels.tolist(),
        answer.scores.tolist(),
        answer.boxes.astype(np.float64).round(3).tolist(),
        strict=True,
    )
    return {
        "detections": [
            {"label": classes[label], "score": round(score, 6), "box": box}
            for label, score, box in rows
        ]
    }


def draw_answer(picture: Image.Image, answer: Answer, classes: Sequence[str]) -> Image.Image:
    """A copy of a picture with its boxes, or a classifier's best names, drawn."""
    if not isinstance(answer, PictureDetections):
        return draw_classes(picture, answer)
    return draw_boxes(
        picture,
        answer.boxes,
        answer.labels.tolist(),
        classes=classes,
        scores=answer.scores.tolist(),
    )
