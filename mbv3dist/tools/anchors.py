"""`mbv3dist anchors`: how well anchors cover a data set's boxes, and which would do better.

Boxes are looked at as the model meets them: moved by the views that training draws, with the
recipe's seed, and by the plain resize of evaluation. No picture is decoded. With --out:

    OUT/anchors.json   every figure      OUT/shapes.png   widths and heights beside the anchors'
    OUT/coverage.png   best IoU of every class, before and after
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbv3dist.config import ModelConfig, TrainConfig, ViewConfig
from mbv3dist.data.index import Split, training_split
from mbv3dist.data.joined import open_splits
from mbv3dist.data.reader import Reader
from mbv3dist.data.target import Target
from mbv3dist.data.view_kernels import ViewMaker
from mbv3dist.models.anchor_fit import POSITIVE_IOU, Coverage, SeenBoxes, cover, fit_anchors
from mbv3dist.models.anchors import AnchorConfig, cell_shapes, recipe_anchors
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.recipe import load_config
from mbv3dist.viz.plots import plot_anchor_shapes, plot_coverage
from mbv3dist.writing import check_folder, write_whole, writing

MAX_PICTURES = 4000  # of a split, drawn by the seed: boxes of more say the same
WANTED_BOXES = 20_000  # epochs are drawn until so many were seen
MAX_EPOCHS = 20
_WHOLE = ViewConfig(name="resize")


def judge_anchors(
    data: str | Path,
    *,
    split: str | None = None,
    recipe: str | Path | None = None,
    input_size: int | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Judge a recipe's anchors, or torchvision's, on a data set's boxes, and propose better ones.

    Args:
        data: Data set made by `mbv3dist convert`, folder or URL.
        split: Split to look at; None: the recipe's, else train, trainval or the only one.
        recipe: YAML file: its anchors, canvas and training view. None: torchvision's anchors at 320
            pixels, without augmentation.
        input_size: Side of the canvas in pixels; None: the recipe's.
        out: Folder for plots and anchors.json; None: nothing is written.

    Returns:
        {data, split, pictures, input_size, view, epochs, classes, anchors: {NAME: {anchor_scales,
        anchor_ratios, anchors, views: {VIEW: {boxes, best_iou, covered, ..., classes, maps}}}},
        proposal: {anchor_scales, anchor_ratios}, files, lines}: `lines` is the text for people.

    Raises:
        ValueError: No detection data set, a split without boxes, a recipe of a classifier, or `out`
            is a file.
        OSError: A file cannot be read or written.
    """
    if out is not None:
        check_folder(Path(out), "anchors.json")  # now, not after all was computed
    config = None if recipe is None else load_config(recipe, ["--data.path", str(data)])
    if config is not None and config.task != "detection":
        raise ValueError(f"{recipe}: is a classifier's recipe; only detectors have anchors")
    if split is None:
        split = training_split(str(data)) if config is None else config.data.train_split
    cache_dir = config.data.cache_dir if config is not None else ""
    opened = open_splits([str(data)], split, cache_dir=cache_dir or None)
    if opened.task != "detection":
        raise ValueError(f"{opened.where}: is a classification data set; only boxes need anchors")
    model = config.model if config is not None else ModelConfig()
    size = model.input_size if input_size is None else input_size
    if size < 32:
        raise ValueError(f"--input-size {size}: must be at least 32 pixels")
    given = recipe_anchors(model)
    if given.steps and size != model.input_size:
        raise ValueError(
            f"--input-size {size}: the recipe's anchor_steps are pixels of {model.input_size}; "
            "leave it out, or give a recipe without them"
        )
    seen = _see(opened, config, size=size)
    sets = {"torchvision": AnchorConfig()}
    if given != AnchorConfig():
        sets["recipe"] = given
    covers = {name: _cover(anchors, seen) for name, anchors in sets.items()}
    sets["proposal"] = fit_anchors(list(seen.views.values()), given).config
    covers["proposal"] = _cover(sets["proposal"], seen)
    result: dict[str, Any] = {
        "data": str(data),
        "split": opened.name,
        "pictures": seen.pictures,
        "input_size": size,
        "view": seen.name,
        "epochs": seen.epochs,
        "classes": list(opened.classes),
        "anchors": {
            name: {
                **_numbers(anchors),
                "anchors": int(covers[name]["evaluation"].map_anchors.sum()),
                "views": {
                    view: _figures(boxes, covers[name][view], opened.classes)
                    for view, boxes in seen.views.items()
                },
            }
            for name, anchors in sets.items()
        },
        "proposal": _numbers(sets["proposal"]),
    }
    result["files"] = (
        [] if out is None else _write(Path(out), result, sets, covers, seen, opened.classes)
    )
    return {**result, "lines": _report(result)}


@dataclass(frozen=True)
class _Seen:
    """The boxes that were looked at.

    Attributes:
        views: "training" (if there is augmentation) and "evaluation": the boxes in each.
        pictures: Pictures looked at.
        epochs: Epochs of drawn views; 0 without augmentation.
        name: Kind of the training view.
    """

    views: dict[str, SeenBoxes]
    pictures: int
    epochs: int
    name: str


def _see(split: Split, config: TrainConfig | None, *, size: int) -> _Seen:
    """Read a split's boxes and move them by the views that training and evaluation draw."""
    seed = 0 if config is None else config.seed
    indices = np.arange(len(split))
    if len(indices) > MAX_PICTURES:
        indices = np.sort(np.random.default_rng(seed).choice(indices, MAX_PICTURES, replace=False))
    with Reader(split) as reader:
        targets = [reader.target(index) for index in indices.tolist()]
    if not sum(len(target.boxes) for target in targets):
        raise ValueError(
            f"{split.where}: split {split.name!r} has no boxes; choose another --split"
        )
    views = {}
    epochs, name = 0, _WHOLE.name
    if config is not None and config.data.view != _WHOLE:
        view = config.data.view
        name = view.name
        parts: list[SeenBoxes] = []
        while epochs < MAX_EPOCHS and sum(len(part.boxes) for part in parts) < WANTED_BOXES:
            parts.append(_moved(view, targets, indices, size=size, seed=seed, epoch=epochs))
            epochs += 1
        views["training"] = _joined(parts)
    views["evaluation"] = _moved(_WHOLE, targets, indices, size=size, seed=seed, epoch=0)
    empty = [view for view, seen in views.items() if not len(seen.boxes)]
    if empty:
        raise ValueError(
            f"{split.where}: no box of split {split.name!r} is left on the canvas in the "
            f"{empty[0]} view of {size} pixels; set a larger --input-size"
        )
    return _Seen(views, len(targets), epochs, name)


def _moved(
    view: ViewConfig,
    targets: list[Target],
    indices: np.ndarray,
    *,
    size: int,
    seed: int,
    epoch: int,
) -> SeenBoxes:
    """Return the boxes as an epoch's views show them, those that do not survive left out."""
    starts = np.cumsum([0, *(len(target.boxes) for target in targets)])
    drawn = ViewMaker(view, size=size, seed=seed).make(
        np.full(len(indices), epoch),
        indices,
        np.array([(target.width, target.height) for target in targets], np.int32),
        np.concatenate([target.boxes for target in targets]),
        starts,
    )
    # A sum that starts with 0: differences at the pictures' starts count what each keeps.
    kept = np.concatenate(([0], np.cumsum(drawn.keep)))
    return SeenBoxes(
        boxes=np.clip(drawn.boxes[drawn.keep], 0, np.float32(size)),
        labels=np.concatenate([target.labels for target in targets])[drawn.keep],
        starts=kept[starts],
        size=size,
    )


def _joined(parts: list[SeenBoxes]) -> SeenBoxes:
    lengths = np.concatenate([np.diff(part.starts) for part in parts])
    return SeenBoxes(
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        starts=np.concatenate(([0], np.cumsum(lengths))),
        size=parts[0].size,
    )


def _cover(anchors: AnchorConfig, seen: _Seen) -> dict[str, Coverage]:
    threads = torch.get_num_threads()
    # Many small operations: on a busy machine threads would mostly wait for each other.
    torch.set_num_threads(1)
    try:
        return {view: cover(anchors, boxes) for view, boxes in seen.views.items()}
    finally:
        torch.set_num_threads(threads)


def _numbers(anchors: AnchorConfig) -> dict[str, list[float]]:
    """The keys of a recipe that make these anchors."""
    numbers = {"anchor_scales": list(anchors.scales), "anchor_ratios": list(anchors.ratios)}
    return {**numbers, "anchor_steps": list(anchors.steps)} if anchors.steps else numbers


def _figures(seen: SeenBoxes, found: Coverage, classes: tuple[str, ...]) -> dict[str, Any]:
    """What anchors are to the boxes of one view, over all, per class and per map."""
    sides = seen.boxes[:, 2:] - seen.boxes[:, :2]
    per_class = {}
    for number, name in enumerate(classes):
        own = seen.labels == number
        if own.any():
            per_class[name] = {
                "boxes": int(own.sum()),
                "median_width": round(float(np.median(sides[own, 0])), 1),
                "median_height": round(float(np.median(sides[own, 1])), 1),
                **_shares(found, own),
            }
    best = np.bincount(found.best_map, minlength=len(found.map_anchors))
    maps = [
        {
            "cells": f"{rows}x{columns}",
            "anchors": int(found.map_anchors[k]),
            "best_of": round(float(best[k] / len(seen.boxes)), 4),
            "positives": int(found.map_positives[k]),
        }
        for k, (rows, columns) in enumerate(feature_sizes((seen.size, seen.size)))
    ]
    every = _shares(found, np.ones(len(seen.boxes), np.bool_))
    return {"boxes": len(seen.boxes), **every, "classes": per_class, "maps": maps}


def _shares(found: Coverage, own: np.ndarray) -> dict[str, float]:
    """Of some boxes (bool [T]): how well they are covered.

    `covered` is the share with an anchor of IoU 0.5 or more, `positives` the anchors that learn a
    box, `forced` the share that has only what the forced match gives it, `unmatched` the share
    that no anchor learns, because other boxes took it.
    """
    covered = found.best_iou[own] >= POSITIVE_IOU
    matched = found.positives[own] > 0
    return {
        "best_iou": round(float(found.best_iou[own].mean()), 4),
        "covered": round(float(covered.mean()), 4),
        "positives": round(float(found.positives[own].mean()), 2),
        "forced": round(float((matched & ~covered).mean()), 4),
        "unmatched": round(float((~matched).mean()), 4),
    }


def _write(
    out: Path,
    result: dict[str, Any],
    sets: dict[str, AnchorConfig],
    covers: dict[str, dict[str, Coverage]],
    seen: _Seen,
    classes: tuple[str, ...],
) -> list[str]:
    """Write anchors.json and the plots; return their paths."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    view, boxes = next(iter(seen.views.items()))  # the training view, if there is one
    judged = "recipe" if "recipe" in sets else "torchvision"
    shapes = {
        name: [
            [
                (min(w, 1.0) * boxes.size, min(h, 1.0) * boxes.size)
                for w, h in cell_shapes(anchors, k)
            ]
            for k in range(anchors.num_maps)
        ]
        for name, anchors in sets.items()
        if name in (judged, "proposal")
    }
    plot_anchor_shapes(
        boxes.boxes[:, 2:] - boxes.boxes[:, :2],
        boxes.labels,
        classes,
        shapes,
        out / "shapes.png",
        title=f"Boxes of the {view} view and anchors, canvas {boxes.size} px",
    )
    plot_coverage(
        {name: covers[name][view].best_iou for name in (judged, "proposal")},
        boxes.labels,
        classes,
        out / "coverage.png",
        threshold=POSITIVE_IOU,
        title=f"IoU with the best anchor, {view} view, canvas {boxes.size} px",
    )
    path = out / "anchors.json"
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    return [str(path), str(out / "shapes.png"), str(out / "coverage.png")]


def _report(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    epochs = f", {result['epochs']} epoch(s) of drawn views" if result["epochs"] else ""
    lines = [
        f"{result['data']}, split {result['split']}: {result['pictures']} pictures on a canvas of "
        f"{result['input_size']} px, view {result['view']}{epochs}",
    ]
    width = max(10, *(len(name) for name in result["classes"]))
    for name, anchors in result["anchors"].items():
        lines += ["", f"{_TITLES[name]}: {anchors['anchors']} anchors, {_yaml(anchors)}"]
        for view, figures in anchors["views"].items():
            head = "".join(f"{word:>11}" for word in _COLUMNS)
            lines.append(f"  {view + ' view':<{width + 6}}{head}")
            rows = {**figures["classes"], "all": figures} if len(figures["classes"]) > 1 else None
            for label, row in (rows or figures["classes"]).items():
                lines.append(f"    {label:<{width + 4}}" + "".join(_cells(row)))
    lines += ["", *_map_lines(result["anchors"])]
    lines += ["", "proposal, for the section `model` of a recipe:"]
    lines += [f"  {key}: {value}" for key, value in result["proposal"].items()]
    lines.append(_gain(result["anchors"]))
    files = ", ".join(result["files"])
    lines.append(
        f"plots and figures: {files}"
        if files
        else "nothing was written; --out DIR draws plots and saves every figure"
    )
    return lines


_COLUMNS = ("boxes", "median px", "best IoU", "IoU>=0.5", "positives", "forced", "unmatched")
_TITLES = {
    "torchvision": "torchvision's anchors",
    "recipe": "the recipe's anchors",
    "proposal": "proposal",
}


def _yaml(anchors: dict[str, Any]) -> str:
    return ", ".join(f"{key[7:]} {anchors[key]}" for key in ("anchor_scales", "anchor_ratios"))


def _cells(row: dict[str, Any]) -> list[str]:
    """A class's figures, or those of all boxes, in columns."""
    side = "median_width"
    median = f"{row[side]:.0f} x {row['median_height']:.0f}" if side in row else ""
    shares = [f"{row[key]:.3f}" for key in ("best_iou", "covered")]
    rest = [f"{row[key]:.3f}" for key in ("forced", "unmatched")]
    cells = [str(row["boxes"]), median, *shares, f"{row['positives']:.2f}", *rest]
    return [f"{cell:>11}" for cell in cells]


def _map_lines(anchors: dict[str, Any]) -> list[str]:
    """Which maps the boxes' best anchors are on: of the judged anchors and of the proposal."""
    judged = "recipe" if "recipe" in anchors else "torchvision"
    lines = [
        f"share of boxes whose best anchor is on a map, and positives: {_TITLES[judged]}, proposal",
    ]
    rows = [next(iter(anchors[name]["views"].values()))["maps"] for name in (judged, "proposal")]
    for old, new in zip(*rows, strict=True):
        lines.append(
            f"  {old['cells']:<8}{old['best_of']:>10.3f}{new['best_of']:>10.3f}"
            f"{old['positives']:>10}{new['positives']:>10}"
        )
    return lines


def _gain(anchors: dict[str, Any]) -> str:
    """What the proposal wins, the classes counted alike, in the training view if there is one."""
    judged = "recipe" if "recipe" in anchors else "torchvision"

    def mean(name: str, key: str) -> float:
        rows = next(iter(anchors[name]["views"].values()))["classes"].values()
        return sum(float(row[key]) for row in rows) / len(rows)

    parts = [
        f"{text} {mean(judged, key):.3f} -> {mean('proposal', key):.3f}"
        for key, text in (("covered", "share with IoU >= 0.5"), ("best_iou", "mean best IoU"))
    ]
    return f"against {_TITLES[judged]}, mean over classes: {', '.join(parts)}"
