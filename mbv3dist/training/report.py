"""What a finished run leaves to look at: metrics.png, samples/ and report.html."""

import html
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from mbv3dist.config import TrainConfig
from mbv3dist.data.decode import Picture
from mbv3dist.data.index import Split
from mbv3dist.inference.predict import DISPLAY_THRESHOLD, classify, detect
from mbv3dist.models.directory import ModelSpec
from mbv3dist.recipe import config_to_dict
from mbv3dist.viz.draw import draw_boxes, draw_classes
from mbv3dist.viz.plots import plot_training, read_metrics

_NUM_SAMPLES = 8
_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;"
    "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    ".samples img{height:15em;margin:.2em}pre{background:#f4f4f4;padding:1em;overflow:auto}"
)


def write_report(config: TrainConfig, model: nn.Module, spec: ModelSpec, split: Split) -> Path:
    """Writes the run's plot, a few pictures with the model's answers, and a page that shows both.

    Args:
        config: the run's recipe.
        model: the bare model, where it computes.
        spec: its description.
        split: where the pictures are taken from, evenly spread.

    Returns:
        The page's path.
    """
    run = config.run_dir
    records = read_metrics(run / "metrics.jsonl")
    if records:
        plot_training(records, run / "metrics.png", title=config.name)
    samples = _write_samples(run / "samples", model, spec, split)
    page = run / "report.html"
    page.write_text(_page(config, records, samples), encoding="utf-8")
    return page


def _write_samples(folder: Path, model: nn.Module, spec: ModelSpec, split: Split) -> list[str]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    count = min(_NUM_SAMPLES, len(split))
    indices = [i * len(split) // count for i in range(count)]
    samples = [split.sample(index) for index in indices]
    pictures = [Picture(sample.get("jpg") or sample["npy"]).image() for sample in samples]
    was_training = model.training
    model.eval()
    if spec.task == "detection":
        drawn = [
            draw_boxes(
                picture,
                found["boxes"].numpy(),
                found["labels"].tolist(),
                classes=spec.classes,
                scores=found["scores"].tolist(),
            )
            for picture, found in zip(
                pictures,
                detect((model, spec), pictures, score_threshold=DISPLAY_THRESHOLD),
                strict=True,
            )
        ]
    else:
        answers = classify((model, spec), pictures, top=3)
        drawn = [draw_classes(p, top) for p, top in zip(pictures, answers, strict=True)]
    model.train(was_training)
    names = [f"{split.key(index)}.jpg".replace(":", "-") for index in indices]
    for name, picture in zip(names, drawn, strict=True):
        picture.save(folder / name, quality=92)
    return names


def _page(config: TrainConfig, records: list[dict[str, Any]], samples: list[str]) -> str:
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(config.name)}</title>"]
    parts.append(f"<style>{_STYLE}</style><h1>{html.escape(config.name)}</h1>")
    validations = [record for record in records if record["kind"] == "val"]
    if validations:
        parts.append(_score_table(validations))
        if validations[-1].get("per_class"):
            parts.append("<h2>Classes, at the last validation</h2>")
            parts.append(_class_table(validations[-1]["per_class"]))
    if records:
        parts.append("<h2>Curves</h2><img src='metrics.png' alt='losses, scores, rates'>")
    pictures = "".join(f"<img src='samples/{name}' alt='{name}'>" for name in samples)
    parts.append(f"<h2>Samples</h2><div class='samples'>{pictures}</div>")
    recipe = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    parts.append(f"<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>\n")
    return "\n".join(parts)


def _score_table(validations: list[dict[str, Any]]) -> str:
    names = [n for n in ("epoch", "loss", "map", "map_50", "top1", "top5") if n in validations[-1]]
    rows = [[_show(record.get(name)) for name in names] for record in validations]
    return "<h2>Validation</h2>" + _table(names, rows)


def _class_table(per_class: dict[str, dict[str, Any]]) -> str:
    keys = list(next(iter(per_class.values())))
    rows = [[name, *(_show(row.get(key)) for key in keys)] for name, row in per_class.items()]
    return _table(["class", *keys], rows)


def _table(heads: Sequence[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
