"""Evaluation of a model on a split, exact on any number of processes.

The split is cut into the same batches for any number of ranks. Each rank scores its own contiguous
part of them, every sample once, without padding and without any communication in the loop (the
unwrapped model is called, since DDP's forward synchronises buffers). At the end counts are summed
in int64, loss sums in float64, and detections are brought together on rank 0, which scores them;
every rank gets the result.

Since kernels may round differently for batches of another size, batches that are always the same
make counts, detections and mAP independent of the number of ranks to the last bit.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mbv3dist.data.batch import Batch
from mbv3dist.data.division import evaluation_range
from mbv3dist.data.index import Split
from mbv3dist.data.loader import CacheOptions, eval_batches
from mbv3dist.evaluation.classification import TopK
from mbv3dist.evaluation.detection import DetectionEvaluator
from mbv3dist.models.directory import ModelSpec
from mbv3dist.models.loss import match_batch, multibox_loss
from mbv3dist.models.preprocess import (
    detections_on_source,
    evaluation_mode,
    evaluation_view,
    normalize,
    place_detections,
)
from mbv3dist.models.preprocess_whole import whole_inputs
from mbv3dist.ops.nms import Detections

_MAX_CLASSES_SHOWN = 8


def evaluate(
    model: nn.Module,
    spec: ModelSpec,
    split: Split,
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    num_threads: int = 2,
    min_negatives: int = 0,
    cache: CacheOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a model on a split.

    Where torch.distributed is initialised, every rank has to call this; they share the work.

    Args:
        model: The model of `spec`; its training mode is left as it was.
        spec: Its description; pictures are prepared as its `preprocess` says.
        split: What to score it on.
        batch_size: Pictures per rank and step.
        device: Where to compute; None: where the model is.
        num_threads: Decoding threads per rank.
        min_negatives: As in training, for the validation loss of a detector.
        cache: How shards of a remote data set are kept.
        progress: Called with (pictures done, pictures of this rank).

    Returns:
        Classification: {samples, top1, top5, loss, per_class: {NAME: {samples, top1}}}.
        Detection: {samples, map, map_50, voc_map, voc07_map, loss, loss_regression,
        loss_classification, per_class: {NAME: {ap, ap_50, voc_ap, voc07_ap, objects}}}, losses
        divided by the number of positive anchors in the whole split. A figure that is not defined
        (no object of a class, a loss that is not finite) is None.

    Raises:
        ValueError: Model and data set do not fit, or a sample is damaged.
    """
    check_fit(spec, split)
    while isinstance(model, DistributedDataParallel):
        model = model.module
    device = next(model.parameters()).device if device is None else torch.device(device)
    failure = None
    with evaluation_mode(model.to(device)):
        scorer: _Classification | _Detection
        if spec.task == "detection":
            scorer = _Detection(model, spec, min_negatives=min_negatives)
        else:
            scorer = _Classification(split.classes)
        try:
            _score_part(
                model,
                spec,
                split,
                scorer,
                batch_size=batch_size,
                device=device,
                num_threads=num_threads,
                cache=cache,
                progress=progress,
            )
        except (ValueError, OSError) as error:
            if not _is_distributed():
                raise
            failure = str(error)  # the other ranks must hear of it, or they would wait for ever
    return _combine(scorer, failure, num_samples=len(split))


def check_fit(spec: ModelSpec, split: Split) -> None:
    """Refuse a model and a data set of different tasks or classes.

    Raises:
        ValueError: With both and the cure.
    """
    where = f"split {split.name!r} of {split.where}"
    if spec.task != split.task:
        raise ValueError(
            f"{where} is a {split.task} data set, the model ({spec.architecture}) is for "
            f"{spec.task}; convert the data with --task {spec.task}, or take a {split.task} model"
        )
    if spec.classes != split.classes:
        raise ValueError(
            f"{where} has the classes {_shown(split.classes)}, the model ({spec.architecture}) "
            f"{_shown(spec.classes)}; convert the data with --classes FILE that lists the model's "
            "classes in this order, or take a model trained on these classes"
        )


def _shown(classes: tuple[str, ...]) -> str:
    names = ", ".join(classes[:_MAX_CLASSES_SHOWN])
    more = len(classes) - _MAX_CLASSES_SHOWN
    return f"[{names}, and {more} more]" if more > 0 else f"[{names}]"


@torch.no_grad()
def _score_part(
    model: nn.Module,
    spec: ModelSpec,
    split: Split,
    scorer: "_Classification | _Detection",
    *,
    batch_size: int,
    device: torch.device,
    num_threads: int,
    cache: CacheOptions | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Run the model over this rank's samples; no communication happens in here."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    mine = evaluation_range(len(split), rank=rank, world_size=world_size, batch_size=batch_size)
    done = 0
    batches = eval_batches(
        split,
        view=evaluation_view(spec),
        size=spec.input_size,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
        pin_memory=device.type == "cuda",
        cache=cache,
        # Files instead of pictures, for models that want other pixels than the decoder's.
        decode="cpu" if spec.preprocess.is_drawn else "gpu",
    )
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in batches:
            indices = batch.index.tolist()
            on_device = batch.to(device)
            if batch.compressed is None:
                images = normalize(on_device.image, spec.preprocess)
            else:
                images = whole_inputs(batch.compressed, spec, pool=pool).to(device)
            scorer.add(on_device, model(images), indices=indices)
            expected = range(mine.start + done, mine.start + done + len(indices))
            assert indices == list(expected), "every sample once, in order"
            done += len(indices)
            if progress is not None:
                progress(done, len(mine))
    assert done == len(mine)


class _Classification:
    """Counts and cross-entropy of one rank."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._counter = TopK(classes)
        self._losses: list[Tensor] = []  # float32 [B] each, on the device until the end
        self._others_loss = 0.0

    def add(self, batch: Batch, outputs: Tensor, *, indices: list[int]) -> None:
        assert batch.label is not None
        self._counter.update(outputs, batch.label)
        self._losses.append(F.cross_entropy(outputs.float(), batch.label, reduction="none"))

    def payload(self) -> tuple[NDArray[np.int64], float]:
        losses = [loss.cpu().numpy() for loss in self._losses]
        total = float(np.concatenate(losses).sum(dtype=np.float64)) if losses else 0.0
        return self._counter.payload(), total

    def merge(self, payloads: list[Any]) -> None:
        self._counter.merge([counts for counts, _ in payloads])
        self._others_loss = sum(loss for _, loss in payloads)

    def result(self) -> dict[str, Any]:
        loss = self.payload()[1] + self._others_loss
        result = self._counter.result()
        per_class = result.pop("per_class")
        result["loss"] = _finite(loss / max(1, result["samples"]))
        return {**result, "per_class": per_class}


class _Detection:
    """Detections, objects and multibox loss of one rank."""

    def __init__(self, model: nn.Module, spec: ModelSpec, *, min_negatives: int) -> None:
        self._model = model
        self._spec = spec
        self._min_negatives = min_negatives
        self._evaluator = DetectionEvaluator(spec.classes)
        self._sums: list[Tensor] = []  # [3]: regression, classification, positives
        self._others_sums = np.zeros(3)

    def add(
        self, batch: Batch, outputs: tuple[Tensor, Tensor] | Detections, *, indices: list[int]
    ) -> None:
        view, size = batch.view.cpu().numpy(), batch.size.cpu().numpy()
        if isinstance(outputs, Detections):  # an exported file with its own post-process
            found = place_detections(outputs, view=view, size=size)
            self._sums.append(torch.full((3,), torch.nan))  # without logits there is no loss
        else:
            class_logits, box_deltas = outputs
            anchors = self._model.anchors
            assert isinstance(anchors, Tensor)
            self._add_loss(batch, class_logits, box_deltas, anchors)
            found = detections_on_source(
                class_logits, box_deltas, anchors, spec=self._spec, view=view, size=size
            )
        # The truth is taken from the data set itself, not back from the canvas: no rounding.
        for index, truth, detections in zip(indices, batch.targets, found, strict=True):
            self._evaluator.add(
                index,
                boxes=detections.boxes,
                scores=detections.scores,
                labels=detections.labels,
                truth_boxes=truth.boxes,
                truth_labels=truth.labels,
                truth_difficult=truth.difficult,
            )

    def _add_loss(
        self, batch: Batch, class_logits: Tensor, box_deltas: Tensor, anchors: Tensor
    ) -> None:
        assert batch.boxes is not None and batch.labels is not None
        size = (self._spec.input_size, self._spec.input_size)
        targets = match_batch(anchors, batch.boxes, batch.labels, size=size, weight=batch.weight)
        loss = multibox_loss(class_logits, box_deltas, targets, min_negatives=self._min_negatives)
        sums = (loss.regression_sum, loss.classification_sum, loss.num_positives)
        self._sums.append(torch.stack(sums))

    def payload(self) -> tuple[dict[str, NDArray[Any]], NDArray[np.float64]]:
        sums = [part.cpu().numpy().astype(np.float64) for part in self._sums]
        return self._evaluator.payload(), np.sum(sums, axis=0) if sums else np.zeros(3)

    def merge(self, payloads: list[Any]) -> None:
        self._evaluator.merge(payload for payload, _ in payloads)
        self._others_sums = np.sum([sums for _, sums in payloads], axis=0)

    def result(self) -> dict[str, Any]:
        regression, classification, positives = self.payload()[1] + self._others_sums
        result = self._evaluator.result()
        per_class = result.pop("per_class")
        normalizer = max(1.0, positives)
        result["loss"] = _finite((regression + classification) / normalizer)
        result["loss_regression"] = _finite(regression / normalizer)
        result["loss_classification"] = _finite(classification / normalizer)
        return {**result, "per_class": per_class}


def _finite(value: float) -> float | None:
    """The value for JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _combine(
    scorer: _Classification | _Detection, failure: str | None, *, num_samples: int
) -> dict[str, Any]:
    """Bring all ranks' parts together on rank 0, score them, and give every rank the result.

    Raises:
        ValueError: A rank could not finish its part; the same message on every rank.
    """
    if not _is_distributed():
        return _checked(scorer.result(), num_samples)
    is_main = dist.get_rank() == 0
    parts: list[Any] | None = [None] * dist.get_world_size() if is_main else None
    dist.gather_object((None if failure else scorer.payload(), failure), parts)
    answer: list[Any] = [None, None]
    if parts is not None:
        failures = [text for _, text in parts if text is not None]
        if failures:
            answer[1] = failures[0]
        else:
            scorer.merge([payload for payload, _ in parts[1:]])
            answer[0] = _checked(scorer.result(), num_samples)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    result: dict[str, Any] = answer[0]
    return result


def _checked(result: dict[str, Any], num_samples: int) -> dict[str, Any]:
    assert result["samples"] == num_samples, "every sample is scored exactly once"
    return result
