"""Prediction: pictures, folders or globs in; drawn pictures and predictions.json out.

Pictures go through the views and the decoder that evaluation uses, so that a picture gets the
same detections in both. From Python, `detect` and `classify` take pictures that are in memory.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mbv3dist.config import ViewConfig
from mbv3dist.data.decode import Picture
from mbv3dist.data.draws import Draws
from mbv3dist.data.files import MAX_PICTURE_BYTES, read_bounded
from mbv3dist.data.views import View, make_view
from mbv3dist.inference.in_memory import ImageLike, encoded, is_float_picture
from mbv3dist.inference.results import Answer, answer_entry, draw_answer
from mbv3dist.inference.sources import (
    drawing_names,
    find_pictures,
    header_problems,
    unreadable_error,
    why,
)
from mbv3dist.models.directory import LoadedModel, ModelSpec
from mbv3dist.models.onnx_model import load_any_model
from mbv3dist.models.preprocess import (
    PictureDetections,
    detections_on_source,
    evaluation_mode,
    evaluation_view,
    normalize,
    place_detections,
)
from mbv3dist.models.preprocess_whole import whole_input
from mbv3dist.ops.nms import Detections
from mbv3dist.writing import check_folder, write_whole, writing

DISPLAY_THRESHOLD = 0.3  # below this, most detections are noise to a person
PREDICTIONS_FILE = "predictions.json"
_NO_BOXES = np.zeros((0, 4), dtype=np.float32)

Model = LoadedModel | tuple[nn.Module, ModelSpec]


def predict(
    model: str | Path | LoadedModel,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    score_threshold: float | None = None,
    batch_size: int = 8,
    device: str = "auto",
    top: int = 5,
    draw: bool = True,
    on_error: str = "fail",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Find or name what is in pictures, draw it, and write predictions.json.

    Args:
        model: Model directory, exported .onnx file, or a loaded model.
        sources: Pictures, folders (searched with all below them) or globs (`**` allowed).
        out: Folder for the drawn pictures and predictions.json; made if missing. Drawn pictures
            keep the stem of their file; equal stems get "-2", "-3", ...
        score_threshold: Detections below are left out; None: the model's own, at least 0.3.
        batch_size: Pictures at a time.
        device: auto, cpu, cuda or cuda:N.
        top: Classifiers: answers per picture.
        draw: Whether to draw pictures.
        on_error: Pictures that cannot be read: `fail` names all whose header shows it before the
            model is loaded or anything written, and stops at one found while decoding; `skip`
            leaves them out.
        progress: Called with (pictures done, pictures).

    Returns:
        The content of predictions.json, {pictures: [...], skipped: [{file, reason}]}. Each picture
        has {file, width, height, drawing, detections: [{label, score, box: [x1, y1, x2, y2]}]},
        boxes in pixels of the upright picture, 0-based, half-open; a classifier gives top:
        [{label, score}] instead of detections, best first. `drawing` is a file
        name in `out`, or None.

    Raises:
        ValueError: No picture was found, one cannot be read, or `out` would overwrite one.
    """
    assert on_error in ("fail", "skip")
    if score_threshold is not None and not 0.0 <= score_threshold < 1.0:
        raise ValueError(f"--score-threshold {score_threshold}: give a number from 0 to below 1")
    if batch_size < 1 or top < 1:
        raise ValueError(f"batch size {batch_size} and top {top} must be at least 1")
    out = Path(out)
    check_folder(out, PREDICTIONS_FILE)
    found = find_pictures(sources, out=out)
    bad = header_problems(found)
    if bad and on_error == "fail":
        raise unreadable_error(bad)
    loaded = model if isinstance(model, LoadedModel) else load_any_model(model)
    runner = _Runner(loaded.model, loaded.spec, device=choose_device(device))
    if score_threshold is None and loaded.spec.thresholds is not None:
        score_threshold = max(DISPLAY_THRESHOLD, loaded.spec.thresholds.score)
    files = [path for path in found if path not in bad]
    names: Sequence[str | None] = drawing_names(files) if draw else [None] * len(files)
    entries: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=min(batch_size, os.cpu_count() or 1)) as pool:
        for first in range(0, len(files), batch_size):
            group = files[first : first + batch_size]
            prepared = list(pool.map(lambda path: runner.prepare_file(path, keep=draw), group))
            damaged = {p: x for p, x in zip(group, prepared, strict=True) if isinstance(x, str)}
            if damaged and on_error == "fail":
                raise unreadable_error(damaged)
            bad |= damaged
            whole = [item for item in prepared if isinstance(item, _Prepared)]
            if whole:
                with writing(out):
                    out.mkdir(parents=True, exist_ok=True)
                answers = runner.run(whole, score_threshold=score_threshold, top=top)
                kept = [job for job in zip(group, names[first:], strict=False) if job[0] not in bad]
                jobs = list(zip(kept, whole, answers, strict=True))
                entries += pool.map(lambda job: _finish(*job, spec=loaded.spec, out=out), jobs)
            if progress is not None:
                progress(first + len(group), len(files))
    skipped = [{"file": path.as_posix(), "reason": bad[path]} for path in found if path in bad]
    result = {"pictures": entries, "skipped": skipped}
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(out / PREDICTIONS_FILE, (text + "\n").encode())
    return result


def detect(
    model: Model,
    images: Iterable[ImageLike],
    *,
    score_threshold: float | None = None,
    batch_size: int = 8,
) -> list[dict[str, Tensor]]:
    """Detect objects on pictures in memory; the answer has the form of torchvision's detectors.

    Args:
        model: A loaded detector, or (module, spec); it computes where it is.
        images: PIL pictures, numpy uint8 [H, W, 3] or [H, W], or tensors [3, H, W], uint8 or
            float in [0, 1] (rounded to levels, unless the model resizes floats).
        score_threshold: Detections below are left out; None: the model's own.
        batch_size: Pictures at a time.

    Returns:
        One dictionary per picture, best score first, on the CPU: boxes float32 [D, 4], xyxy pixels
        of the upright picture; scores float32 [D]; labels int64 [D], numbers into `spec.classes`
        from 0 (unlike torchvision, whose 0 is the background).

    Raises:
        ValueError: The model is a classifier, or a picture has another form.
    """
    runner = _Runner.of(model, task="detection")
    results = []
    for group in _groups(images, batch_size):
        prepared = [runner.prepare_image(image) for image in group]
        for found in runner.run(prepared, score_threshold=score_threshold):
            assert isinstance(found, PictureDetections)
            results.append(
                {
                    "boxes": torch.from_numpy(found.boxes.copy()),
                    "scores": torch.from_numpy(found.scores.copy()),
                    "labels": torch.from_numpy(found.labels.copy()),
                }
            )
    return results


def classify(
    model: Model, images: Iterable[ImageLike], *, top: int = 5, batch_size: int = 8
) -> list[list[tuple[str, float]]]:
    """Name what is on pictures in memory.

    Args:
        model: A loaded classifier, or (module, spec); it computes where it is.
        images: As for `detect`.
        top: Answers per picture; not more than there are classes.
        batch_size: Pictures at a time.

    Returns:
        (class name, probability) for each picture, best first.

    Raises:
        ValueError: The model is a detector, or a picture has another form.
    """
    runner = _Runner.of(model, task="classification")
    results: list[list[tuple[str, float]]] = []
    for group in _groups(images, batch_size):
        prepared = [runner.prepare_image(image) for image in group]
        for best in runner.run(prepared, top=top):
            assert isinstance(best, list)
            results.append(best)
    return results


def choose_device(device: str) -> torch.device:
    """The device that a flag names; auto is a GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"--device {device}: torch cannot use it here; give auto, cpu, cuda or cuda:N"
        ) from None
    return chosen


@dataclass(frozen=True)
class _Prepared:
    """A decoded picture: its pixels, view and size, and the whole of it if it is drawn.

    The pixels are uint8 [S, S, 3], or the finished input, float32 [3, S, S].
    """

    pixels: Tensor
    view: np.ndarray
    height: int
    width: int
    whole: Image.Image | None


class _Runner:
    """A model with what is needed to prepare pictures for it."""

    def __init__(
        self, module: nn.Module, spec: ModelSpec, *, device: torch.device | None = None
    ) -> None:
        self._view: ViewConfig = evaluation_view(spec)
        self._spec = spec
        if device is None:  # an exported file has no parameters
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._device = device
        self._module = module.to(self._device)

    @classmethod
    def of(cls, model: Model, *, task: str) -> "_Runner":
        module, spec = (
            (model.model, model.spec) if isinstance(model, LoadedModel) else (model[0], model[1])
        )
        if spec.task != task:
            name = "classify" if spec.task == "classification" else "detect"
            raise ValueError(f"{spec.architecture} is a {spec.task} model; use {name}() with it")
        return cls(module, spec)

    def prepare_file(self, path: Path, *, keep: bool) -> _Prepared | str:
        """Decode a file; the reason, if it cannot be read."""
        try:
            return self.prepare(read_bounded(path, MAX_PICTURE_BYTES), keep=keep)
        except (ValueError, OSError) as error:
            return why(error)

    def prepare(self, data: bytes, *, keep: bool = False) -> _Prepared:
        """Decode a file's bytes as evaluation does."""
        picture = Picture(data)
        view = self._place(picture.width, picture.height)
        if self._spec.preprocess.is_drawn:
            size = self._spec.input_size
            canvas = np.empty((size, size, 3), dtype=np.uint8)
            picture.draw(view, canvas, fill=self._view.fill)
            pixels = torch.from_numpy(canvas)
        else:
            pixels = whole_input(picture.image(), self._spec)
        whole = picture.image() if keep else None
        return _Prepared(pixels, view.vector(), picture.height, picture.width, whole)

    def prepare_image(self, image: ImageLike) -> _Prepared:
        """Take a picture in memory; only a model that resizes floats gets them unrounded."""
        if not is_float_picture(image) or self._spec.preprocess.dtype != "float32":
            return self.prepare(encoded(image))
        assert isinstance(image, Tensor)
        height, width = image.shape[1:]
        pixels = whole_input(image.cpu(), self._spec)
        return _Prepared(pixels, self._place(width, height).vector(), height, width, None)

    def _place(self, width: int, height: int) -> View:
        view, _ = make_view(
            self._view,
            width=width,
            height=height,
            size=self._spec.input_size,
            boxes=_NO_BOXES,
            draws=Draws(0, epoch=0, sample=0),
        )
        return view

    @torch.no_grad()
    def run(
        self,
        prepared: Sequence[_Prepared],
        *,
        score_threshold: float | None = None,
        top: int = 1,
    ) -> list[PictureDetections] | list[list[tuple[str, float]]]:
        """Detections, or the best classes with their probabilities, of each picture."""
        images = torch.stack([item.pixels for item in prepared]).to(self._device)
        if self._spec.preprocess.is_drawn:
            images = normalize(images.permute(0, 3, 1, 2), self._spec.preprocess)
        with evaluation_mode(self._module):
            outputs = self._module(images)
        if self._spec.task == "detection":
            view = np.stack([item.view for item in prepared])
            size = np.array([(item.height, item.width) for item in prepared])
            if isinstance(outputs, Detections):  # an exported file with its own post-process
                return place_detections(
                    outputs, view=view, size=size, score_threshold=score_threshold
                )
            class_logits, box_deltas = outputs
            anchors = self._module.anchors
            assert isinstance(anchors, Tensor)
            return detections_on_source(
                class_logits,
                box_deltas,
                anchors,
                spec=self._spec,
                view=view,
                size=size,
                score_threshold=score_threshold,
            )
        names = self._spec.classes
        scores, labels = outputs.float().softmax(dim=1).topk(min(top, len(names)), dim=1)
        return [
            [(names[label], score) for label, score in zip(*row, strict=True)]
            for row in zip(labels.tolist(), scores.tolist(), strict=True)
        ]


def _finish(
    job: tuple[Path, str | None],
    item: _Prepared,
    answer: Answer,
    *,
    spec: ModelSpec,
    out: Path,
) -> dict[str, Any]:
    """Draw one picture's answer into `out` and return its entry of predictions.json."""
    path, name = job
    if name is not None:
        assert item.whole is not None
        with writing(out / name):
            drawn = draw_answer(item.whole, answer, spec.classes)
            drawn.save(out / name, quality=92, subsampling=0)
    return {
        "file": path.as_posix(),
        "width": item.width,
        "height": item.height,
        "drawing": name,
        **answer_entry(answer, spec.classes),
    }


def _groups(images: Iterable[ImageLike], batch_size: int) -> Iterator[list[ImageLike]]:
    assert batch_size >= 1
    group: list[ImageLike] = []
    for image in images:
        group.append(image)
        if len(group) == batch_size:
            yield group
            group = []
    if group:
        yield group
