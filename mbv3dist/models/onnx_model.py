"""Exported ONNX files in the place of a model: evaluation and prediction run them as they are.

Shapes: B pictures, S side of the canvas in pixels, D detections.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mbv3dist.messages import one_line
from mbv3dist.models.directory import LoadedModel, Preprocess, load_model, spec_from_json
from mbv3dist.ops.nms import Detections

SUFFIX = ".onnx"
SPEC_KEY = "model.json"
_DETECTIONS = ["boxes", "scores", "labels", "count"]
_RAW = ["class_logits", "box_deltas"]
_LOGITS = ["logits"]


class OnnxModel(nn.Module):
    """An exported file, called like the model it was made of; onnxruntime computes, on the CPU.

    Attributes:
        anchors: float32 [A, 4] of a detector without post-process, else empty.
    """

    anchors: Tensor

    def __init__(self, session: Any, preprocess: Preprocess) -> None:
        """Wrap an `onnxruntime.InferenceSession` of a file that `mbv3dist export` has written."""
        super().__init__()
        self._session = session
        self._preprocess = preprocess
        self._names = _known_outputs([output.name for output in session.get_outputs()])
        self.register_buffer("anchors", torch.zeros(0, 4), persistent=False)
        if self._names == _RAW:
            size = session.get_inputs()[0].shape[2]
            picture = np.zeros((1, 3, size, size), dtype=preprocess.dtype)
            self.anchors = torch.from_numpy(session.run(["anchors"], {"images": picture})[0])

    def forward(self, images: Tensor) -> Any:
        """Run the file.

        Args:
            images: float32 [B, 3, S, S], normalised, as any model here takes them; the file itself
                takes what they were before.

        Returns:
            Logits [B, C]; or (class logits, box deltas); or `Detections` with boxes in canvas
            pixels: what the file gives.
        """
        canvas = to_canvas(images.detach().cpu(), self._preprocess)
        results = [
            torch.from_numpy(value).to(images.device)
            for value in self._session.run(self._names, {"images": canvas.numpy()})
        ]
        if self._names == _DETECTIONS:
            return Detections(*results)
        return tuple(results) if self._names == _RAW else results[0]


def to_canvas(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Undo the normalisation of a model's input.

    Args:
        images: float32 [B, 3, S, S], normalised.
        preprocess: Of the model.

    Returns:
        uint8 [B, 3, S, S], to the last bit what was normalised; or float32 in [0, 1].
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    canvas = images * std + mean
    if preprocess.dtype == "uint8":
        canvas = (canvas * 255).round().clamp(0, 255).to(torch.uint8)
    return canvas.contiguous()


def load_any_model(path: str | Path, *, num_threads: int = 0) -> LoadedModel:
    """Read a model directory, or a file that `mbv3dist export` has written as ONNX.

    Args:
        path: The directory, or the file, which ends in .onnx.
        num_threads: Of onnxruntime; 0: as many as torch uses.

    Raises:
        ValueError: It is neither, or damaged, or onnxruntime is not installed.
    """
    if Path(path).suffix.lower() != SUFFIX or Path(path).is_dir():
        return load_model(path)
    return load_onnx(path, num_threads=num_threads)


def load_onnx(path: str | Path, *, num_threads: int = 0) -> LoadedModel:
    """Read a file that `mbv3dist export` has written as ONNX.

    Raises:
        ValueError: There is no such file, it is damaged or of others, or onnxruntime is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a model directory or an exported .onnx file")
    session = open_session(path, source=str(path), num_threads=num_threads)
    metadata = session.get_modelmeta().custom_metadata_map
    if SPEC_KEY not in metadata:
        raise ValueError(
            f"{path}: no {SPEC_KEY} in its metadata, so mbv3dist did not write it; export the "
            "model directory with `mbv3dist export`"
        )
    spec = spec_from_json(metadata[SPEC_KEY], source=f"{path}, {SPEC_KEY}")
    return LoadedModel(model=OnnxModel(session, spec.preprocess).eval(), spec=spec)


def open_session(model: Path | bytes, *, source: str, num_threads: int = 0) -> Any:
    """Open a model with onnxruntime, on the CPU.

    Args:
        model: File, or its content.
        source: Where it comes from, for messages.
        num_threads: 0: as many as torch uses.

    Raises:
        ValueError: onnxruntime is not installed or cannot read the model.
    """
    require(("onnxruntime",), what=f"{source}: running it")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors; its warnings are about graphs, not about users
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # a dozen classes of its own without a common one
        raise ValueError(
            f"{source}: onnxruntime cannot read it ({one_line(str(error))}); export it again"
        ) from None


def require(packages: tuple[str, ...], *, what: str) -> None:
    """Refuse what needs packages that are not installed.

    Raises:
        ValueError: Naming them and the extra of mbv3dist that has them.
    """
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ValueError(
            f"{what} needs {' and '.join(missing)}, not installed here; install mbv3dist with its "
            "extra: pip install 'mbv3dist[onnx]'"
        )


def _known_outputs(names: list[str]) -> list[str]:
    for known in (_DETECTIONS, _RAW, _LOGITS):
        if names[: len(known)] == known:
            return known
    raise ValueError(
        f"an ONNX file with the outputs {one_line(', '.join(names))}; mbv3dist writes "
        f"{', '.join(_DETECTIONS)}, or {', '.join(_RAW)} and anchors, or {', '.join(_LOGITS)}"
    )
