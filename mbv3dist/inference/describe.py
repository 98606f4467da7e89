"""What an exported file takes and gives, in words: for its metadata and for who exports it.

Shapes: S side of the canvas, A anchors, C classes without background, D detections.
"""

from __future__ import annotations

from mbv3dist.models.directory import LoadedModel, ModelSpec
from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.ops.boxes import BOX_WEIGHTS, MAX_LOG_SCALE

Shape = list[str | int]
Description = tuple[str, Shape, str]  # element type, shape, text


def describe_input(spec: ModelSpec) -> str:
    """Say in words how a picture becomes the input."""
    wanted, size = spec.preprocess, spec.input_size
    way = f"{wanted.interpolation}{', antialiased' if wanted.antialias else ', not antialiased'}"
    if spec.task == "detection":
        place = f"the whole picture resized to {size} x {size} ({way}), its sides not kept in ratio"
    else:
        place = (
            f"the picture with its shorter side resized to {wanted.resize} ({way}), then the "
            f"central {size} x {size}"
        )
    values = "0 to 255" if wanted.dtype == "uint8" else "0 to 1, resized as floats"
    return f"RGB, {values}: {place}. Not normalised: the graph does that."


def describe_outputs(loaded: LoadedModel, *, raw: bool) -> dict[str, Description]:
    """Type, shape and meaning of each output."""
    spec = loaded.spec
    if spec.task == "classification":
        text = "one per class before softmax; the largest is the answer"
        return {"logits": ("float32", ["batch", len(spec.classes)], text)}
    assert isinstance(loaded.model, SSDLite) and spec.thresholds is not None
    number, size = len(loaded.model.anchors), spec.input_size
    if raw:
        wx, wy, ww, wh = BOX_WEIGHTS
        columns = len(spec.classes) + 1
        return {
            "class_logits": (
                "float32",
                ["batch", number, columns],
                "before softmax over the last axis; column 0 is the background, class i column "
                "i + 1",
            ),
            "box_deltas": (
                "float32",
                ["batch", number, 4],
                "(dx, dy, dw, dh) of each anchor (x, y, w, h): centre x + w * dx / "
                f"{wx:g}, y + h * dy / {wy:g}; width w * exp(min(dw / {ww:g}, "
                f"{MAX_LOG_SCALE:.6f})), height h * exp(min(dh / {wh:g}, {MAX_LOG_SCALE:.6f}))",
            ),
            "anchors": (
                "float32",
                [number, 4],
                f"centre x, centre y, width, height as fractions of the canvas of {size} px",
            ),
        }
    kept = spec.thresholds.max_detections
    texts = {
        "boxes": f"x1, y1, x2, y2 in pixels of the {size} x {size} canvas; divided by {size} and "
        "multiplied by a picture's width and height they are its pixels; 0 after `count`",
        "scores": "probabilities, best first; 0 after `count`",
        "labels": "numbers of classes, from 0, without background; -1 after `count`",
        "count": "detections of each picture",
    }
    shapes: dict[str, Shape] = {
        "boxes": ["batch", kept, 4],
        "scores": ["batch", kept],
        "labels": ["batch", kept],
        "count": ["batch"],
    }
    types = {"boxes": "float32", "scores": "float32", "labels": "int64", "count": "int64"}
    return {name: (types[name], shapes[name], texts[name]) for name in texts}
