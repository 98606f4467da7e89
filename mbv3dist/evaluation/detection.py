"""Detection scores: COCO mAP through faster-coco-eval, and VOC AP, over all pictures of a split.

Detections and objects are kept as flat arrays, sorted by picture index before scoring, so that
the result depends neither on the order in which pictures were added nor on which process saw
which. Nothing is written to disk and nothing is printed.

Objects marked `difficult` are COCO's `iscrowd`: never missed, and a detection that lies on one
(COCO's rule for crowds: intersection over the detection's own area) counts neither way. The VOC
figures follow VOC's rule, plain IoU (voc.py).
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import ArrayLike, NDArray

from mbv3dist.evaluation.voc import VocClassResult, score_classes

_FIELDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    # name: (dtype, shape of one row). `pictures` are indices in the split.
    "pictures": (np.int64, ()),
    "boxes": (np.float32, (4,)),
    "scores": (np.float32, ()),
    "labels": (np.int64, ()),
    "truth_pictures": (np.int64, ()),
    "truth_boxes": (np.float32, (4,)),
    "truth_labels": (np.int64, ()),
    "truth_difficult": (np.bool_, ()),
    "indices": (np.int64, ()),
}
Payload = dict[str, NDArray[Any]]

# faster-coco-eval logs its progress at info level; a score should not print anything.
_silent = logging.getLogger(f"{__name__}.silent")
_silent.disabled = True


class DetectionEvaluator:
    """Collects detections and objects picture by picture, then scores them.

    Several processes each fill one for their own pictures, exchange `payload()` and `merge()`.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        """Start empty.

        Args:
            classes: Class names in label order, without background.
        """
        self.classes = tuple(classes)
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in _FIELDS}

    def add(
        self,
        index: int,
        *,
        boxes: ArrayLike,
        scores: ArrayLike,
        labels: ArrayLike,
        truth_boxes: ArrayLike,
        truth_labels: ArrayLike,
        truth_difficult: ArrayLike,
    ) -> None:
        """Add one picture; boxes are xyxy pixels of the original picture.

        Args:
            index: The picture's index in the split; each may be added once.
            boxes: [D, 4], detections.
            scores: [D], in [0, 1].
            labels: [D], from 0 without background.
            truth_boxes: [M, 4], objects.
            truth_labels: [M], from 0 without background.
            truth_difficult: [M], true where the object is marked difficult.
        """
        values = {
            "boxes": boxes,
            "scores": scores,
            "labels": labels,
            "truth_boxes": truth_boxes,
            "truth_labels": truth_labels,
            "truth_difficult": truth_difficult,
        }
        rows = {name: _rows(name, value) for name, value in values.items()}
        num_detections, num_objects = len(rows["boxes"]), len(rows["truth_boxes"])
        assert len(rows["scores"]) == len(rows["labels"]) == num_detections
        assert len(rows["truth_labels"]) == len(rows["truth_difficult"]) == num_objects
        rows["pictures"] = np.full(num_detections, index, dtype=np.int64)
        rows["truth_pictures"] = np.full(num_objects, index, dtype=np.int64)
        rows["indices"] = np.array([index], dtype=np.int64)
        for name, value in rows.items():
            self._parts[name].append(value)

    def payload(self) -> Payload:
        """Everything added so far as a dictionary of arrays, to send to another process."""
        return {name: _joined(name, parts) for name, parts in self._parts.items()}

    def merge(self, payloads: Iterable[Payload]) -> None:
        """Add what other evaluators collected.

        Args:
            payloads: Each one the `payload()` of another evaluator.
        """
        for payload in payloads:
            for name, value in payload.items():
                self._parts[name].append(value)

    @property
    def num_samples(self) -> int:
        """Pictures added so far."""
        return sum(len(part) for part in self._parts["indices"])

    def result(self) -> dict[str, Any]:
        """The scores of everything added, ready for JSON.

        Returns:
            {samples, map, map_50, voc_map, voc07_map, per_class: {NAME: {ap, ap_50, voc_ap,
            voc07_ap, objects}}}. `map` is COCO's mean over IoU 0.50:0.95, `map_50` at 0.50, 100
            detections per picture and class. A class without any object that counts has None
            everywhere and is left out of the means; means over no class are None.
        """
        data = _sorted_by_picture(self.payload())
        indices = data["indices"]
        assert len(np.unique(indices)) == len(indices), "a picture was scored twice"
        coco = _coco_ap(data, len(self.classes))
        voc = score_classes(
            num_classes=len(self.classes),
            pictures=data["pictures"],
            boxes=data["boxes"],
            scores=data["scores"],
            labels=data["labels"],
            truth_pictures=data["truth_pictures"],
            truth_boxes=data["truth_boxes"],
            truth_labels=data["truth_labels"],
            truth_difficult=data["truth_difficult"],
        )
        per_class = {
            name: _class_entry(coco_row, voc_row)
            for name, coco_row, voc_row in zip(self.classes, coco, voc, strict=True)
        }
        rows = per_class.values()
        return {
            "samples": len(indices),
            "map": _mean(row["ap"] for row in rows),
            "map_50": _mean(row["ap_50"] for row in rows),
            "voc_map": _mean(row["voc_ap"] for row in rows),
            "voc07_map": _mean(row["voc07_ap"] for row in rows),
            "per_class": per_class,
        }


def _rows(name: str, value: ArrayLike) -> NDArray[Any]:
    dtype, shape = _FIELDS[name]
    return np.array(value, dtype=dtype).reshape(-1, *shape)


def _joined(name: str, parts: list[NDArray[Any]]) -> NDArray[Any]:
    dtype, shape = _FIELDS[name]
    return np.concatenate([np.zeros((0, *shape), dtype=dtype), *parts])


def _sorted_by_picture(data: Payload) -> Payload:
    """The same rows in order of picture; a picture's own rows keep their order."""
    order = np.argsort(data["pictures"], kind="stable")
    truth_order = np.argsort(data["truth_pictures"], kind="stable")
    result = {}
    for name, rows in data.items():
        if name == "indices":
            result[name] = np.sort(rows)
        else:
            result[name] = rows[truth_order if name.startswith("truth_") else order]
    return result


def _coco_ap(data: Payload, num_classes: int) -> list[tuple[float | None, float | None]]:
    """COCO's (AP at IoU 0.50:0.95, AP at 0.50) of every class; None without countable objects."""
    frame = {
        "images": [{"id": int(index)} for index in data["indices"]],
        "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
    }
    if not frame["images"]:
        return [(None, None)] * num_classes
    crowd = data["truth_difficult"].astype(np.int64)
    truth = _annotations(
        data["truth_pictures"], data["truth_boxes"], data["truth_labels"], iscrowd=crowd
    )
    scores = data["scores"].astype(np.float64)
    found = _annotations(data["pictures"], data["boxes"], data["labels"], score=scores)
    evaluator = COCOeval_faster(
        COCO({**frame, "annotations": truth}, print_function=_silent.info),
        COCO({**frame, "annotations": found}, print_function=_silent.info),
        iouType="bbox",
        print_function=_silent.info,
    )
    evaluator.evaluate()
    evaluator.accumulate()
    # [IoU thresholds, recalls, classes, area ranges, detection limits]; -1 where undefined. The
    # first area range is all sizes, the last limit 100 detections per picture and class.
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    result: list[tuple[float | None, float | None]] = []
    for label in range(num_classes):
        of_class = precision[:, :, label]
        if (of_class < 0).any():
            result.append((None, None))
        else:
            result.append((float(of_class.mean()), float(of_class[0].mean())))
    return result


def _annotations(
    pictures: NDArray[Any], boxes: NDArray[Any], labels: NDArray[Any], **extra: NDArray[Any]
) -> list[dict[str, Any]]:
    """COCO's annotation list (xywh boxes); ids start at 1, since 0 means "unmatched" to COCO."""
    corners = boxes.astype(np.float64)
    sides = np.maximum(corners[:, 2:] - corners[:, :2], 0.0)
    columns = {
        "image_id": pictures.tolist(),
        "category_id": labels.tolist(),
        "bbox": np.concatenate([corners[:, :2], sides], axis=1).tolist(),
        "area": np.prod(sides, axis=1).tolist(),
        "id": range(1, len(boxes) + 1),
        "iscrowd": [0] * len(boxes),
        **{name: column.tolist() for name, column in extra.items()},
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _class_entry(
    coco: tuple[float | None, float | None], voc: VocClassResult
) -> dict[str, float | int | None]:
    return {
        "ap": coco[0],
        "ap_50": coco[1],
        "voc_ap": voc.area_ap,
        "voc07_ap": voc.eleven_point_ap,
        "objects": voc.num_objects,
    }


def _mean(values: Iterable[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
