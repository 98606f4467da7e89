"""Plots of a run's metrics with matplotlib, which is imported only when something is plotted.

The figures are made without pyplot: no window, no global state, safe in threads.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#666666"
_GRID = "#dddddd"
_MAX_DOTS = 4000  # of a scatter plot
_MAX_PANELS = 12
_FEW = 12  # points up to which a line marks each: a single one would draw nothing
_ENOUGH = 50  # records from which on a training loss may have its highest left off
_USUAL = 0.95  # share of them that is shown in any case
_METRICS = {
    "map": "mAP (IoU 0.50:0.95)",
    "map_50": "mAP@50",
    "voc_map": "VOC mAP",
    "top1": "top-1",
    "top5": "top-5",
}
_LOSSES = {
    "loss": "total",
    "loss_regression": "regression",
    "loss_classification": "classification",
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a last line cut short by a kill is left out.

    Raises:
        ValueError: The file is missing or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the metrics.jsonl of a run")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["kind"], record["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is no record of a run") from None
        records.append(record)
    return records


def plot_training(
    metrics: str | Path | Records, out: str | Path, *, title: str | None = None
) -> Path:
    """Draw a run: losses, scores on the validation split, learning rate and speed over epochs.

    Args:
        metrics: A metrics.jsonl, or its records: {kind: train | val, step, epoch, loss, lr, ...}.
        out: Picture to write; the extension says the format (png, svg, pdf).
        title: Heading; None: none.

    Returns:
        The path written.

    Raises:
        ValueError: There is no record.
    """
    records = read_metrics(metrics) if isinstance(metrics, str | Path) else metrics
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    if not train and not val:
        raise ValueError(f"{out}: there is nothing to plot yet; no metrics were recorded")
    panels: list[Callable[[Axes], None]] = [lambda axes: _plot_losses(axes, train, val)]
    if any(_series(val, name)[0] for name in _METRICS):
        panels.append(lambda axes: _plot_scores(axes, val))
    if _series(train, "lr")[0]:
        panels.append(lambda axes: _plot_lr(axes, train))
    if _series(train, "images_per_s")[0]:
        panels.append(lambda axes: _plot_speed(axes, train))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(width=5.6 * columns, height=3.5 * rows + (0.4 if title else 0.0))
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        panel(axes)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.grid(color=_GRID, linewidth=0.7)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    return _save(figure, out)


def plot_class_scores(
    result: Mapping[str, Any], out: str | Path, *, title: str | None = None
) -> Path:
    """Draw the scores of every class as bars, best first.

    Args:
        result: As `evaluate` returns it, with `per_class`.
        out: Picture to write; the extension says the format.
        title: Heading; None: none.

    Returns:
        The path written.

    Raises:
        ValueError: No class has a score.
    """
    keys = {"ap_50": "AP@50", "ap": "AP (IoU 0.50:0.95)"} if "map" in result else {"top1": "top-1"}
    main = next(iter(keys))
    rows = [(name, row) for name, row in result["per_class"].items() if row[main] is not None]
    if not rows:
        raise ValueError(f"{out}: no class has a score to plot")
    rows.sort(key=lambda item: (item[1][main], item[0]))
    figure = _figure(width=7.0, height=1.3 + 0.34 * len(rows) * (1 + 0.3 * (len(keys) - 1)))
    axes = figure.add_subplot()
    thickness = 0.8 / len(keys)
    for number, (key, name) in enumerate(keys.items()):
        offset = (len(keys) - 1) * thickness / 2 - number * thickness
        places = [place + offset for place in range(len(rows))]
        values = [row[key] for _, row in rows]
        bars = axes.barh(places, values, thickness, color=_COLORS[number], label=name)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8, color=_GREY)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("score (0 to 1)")
    axes.grid(axis="x", color=_GRID, linewidth=0.7)
    if len(keys) > 1:
        _legend(axes)
    if title:
        axes.set_title(title, fontsize=11, fontweight="bold")
    return _save(figure, out)


def plot_anchor_shapes(
    sides: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    shapes: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    out: str | Path,
    *,
    title: str | None = None,
) -> Path:
    """Draw the boxes' widths and heights as dots, the anchors' over them, a panel for each set.

    Args:
        sides: float [T, 2], width and height of boxes in canvas pixels.
        labels: int [T], class numbers.
        classes: Names of the classes.
        shapes: Name of a set of anchors -> for each map the (width, height) of a cell's anchors.
        out: Picture to write; the extension says the format.
        title: Heading; None: none.

    Returns:
        The path written.
    """
    figure = _figure(width=5.4 * len(shapes), height=5.4 + (0.3 if title else 0.0))
    shown = np.sort(np.random.default_rng(0).permutation(len(sides))[:_MAX_DOTS])
    first = None
    for number, (name, maps) in enumerate(shapes.items(), start=1):
        axes = first = figure.add_subplot(1, len(shapes), number, sharex=first, sharey=first)
        for label in np.unique(labels[shown]).tolist():
            dots = sides[shown][labels[shown] == label]
            color = _COLORS[label % len(_COLORS)]
            text = classes[label] if label < len(_COLORS) else None
            x, y = dots.T
            axes.scatter(x, y, s=5, alpha=0.35, color=color, linewidths=0, label=text)
        for cell in maps:
            wide, high = zip(*cell, strict=True)
            axes.scatter(
                wide, high, s=34, marker="s", facecolors="none", edgecolors="black", linewidths=1.0
            )
        _number_maps(axes, maps)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_aspect("equal")
        axes.set_xlabel("width in pixels")
        axes.set_ylabel("height in pixels")
        axes.set_title(name, fontsize=11)
        axes.grid(color=_GRID, linewidth=0.7)
        legend = axes.legend(fontsize=8, framealpha=0.9, edgecolor="none", markerscale=2.5)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
    if title:
        figure.suptitle(f"{title}\n(squares: anchors, with the number of their map)", fontsize=11)
    return _save(figure, out)


def plot_coverage(
    best_iou: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: Sequence[str],
    out: str | Path,
    *,
    threshold: float,
    title: str | None = None,
) -> Path:
    """Draw how the boxes' best IoU with an anchor is distributed, a panel for each class.

    Args:
        best_iou: Name of a set of anchors -> float [T].
        labels: int [T], class numbers.
        classes: Names of the classes; the 12 with most boxes are drawn.
        out: Picture to write; the extension says the format.
        threshold: IoU from which an anchor is positive.
        title: Heading; None: none.

    Returns:
        The path written.
    """
    counts = np.bincount(labels, minlength=len(classes))
    shown = sorted(np.flatnonzero(counts).tolist(), key=lambda label: -counts[label])[:_MAX_PANELS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(width=4.2 * columns, height=2.6 * rows + (0.4 if title else 0.0))
    edges = np.linspace(0, 1, 26)
    for number, label in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for color, (name, values) in zip(_COLORS, best_iou.items(), strict=False):
            own = values[labels == label]
            share = (own >= threshold).mean()
            heights = np.histogram(own, edges)[0] / len(own)
            text = f"{name}: {share:.0%} >= {threshold}"
            axes.stairs(heights, edges, color=color, fill=True, alpha=0.25)
            axes.stairs(heights, edges, color=color, linewidth=1.5, label=text)
        axes.axvline(threshold, color=_GREY, linewidth=1.0, linestyle="--")
        axes.set_xlim(0, 1)
        axes.set_xlabel("IoU with the best anchor")
        axes.set_ylabel("share of boxes")
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
        axes.set_title(f"{classes[label]}, {counts[label]} boxes", fontsize=10)
        axes.grid(color=_GRID, linewidth=0.7)
        _legend(axes)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    return _save(figure, out)


def _number_maps(axes: "Axes", maps: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Write maps' numbers right of their widest anchors, those that would meet as one text."""
    texts: list[tuple[tuple[float, float], str]] = []
    for k, cell in enumerate(maps):
        place, text = max(cell), str(k + 1)
        near = [
            n for n, (other, _) in enumerate(texts) if math.dist(*np.log2((place, other))) < 0.3
        ]
        if near:
            place, text = texts[near[0]][0], f"{texts.pop(near[0])[1]}, {text}"
        texts.append((place, text))
    for place, text in texts:
        axes.annotate(text, place, fontsize=7.5, xytext=(6, -2.5), textcoords="offset points")


def _plot_losses(axes: "Axes", train: Records, val: Records) -> None:
    """Training losses as thin lines, validation as lines with dots; parts have their colours."""
    parts = [name for name in _LOSSES if any(name in r for r in [*train, *val])]
    for number, name in enumerate(parts):
        color = _COLORS[number]
        x, y = _series(train, name)
        if x:
            axes.plot(x, y, color=color, alpha=0.55, linewidth=1.2, **_marker(x))
        x, y = _series(val, name)
        if x:
            axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3.5)
        if len(parts) > 1:
            axes.plot([], [], color=color, linewidth=2.5, label=_LOSSES[name])
    if train:
        style = _marker(_series(train, "loss")[0])
        axes.plot([], [], color=_GREY, alpha=0.7, linewidth=1.2, label="training", **style)
    if val:
        axes.plot([], [], color=_GREY, marker="o", markersize=3.5, label="validation")
    peak = _focus(
        axes, [_series(train, name)[1] for name in parts], [_series(val, name)[1] for name in parts]
    )
    axes.set_ylabel("loss (per positive anchor)" if len(parts) > 1 else "loss (cross-entropy)")
    title = "Losses" if peak is None else f"Losses (training's peak, {peak:.3g}, is cut off)"
    axes.set_title(title, fontsize=11)
    _legend(axes)


def _plot_scores(axes: "Axes", val: Records) -> None:
    shown = [name for name in _METRICS if _series(val, name)[0]]
    for number, name in enumerate(shown):
        x, y = _series(val, name)
        label = f"{_METRICS[name]}: {y[-1]:.3f}"
        axes.plot(
            x, y, color=_COLORS[number], linewidth=1.8, marker="o", markersize=3.5, label=label
        )
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("score (0 to 1)")
    axes.set_title("Validation", fontsize=11)
    _legend(axes)


def _plot_lr(axes: "Axes", train: Records) -> None:
    x, y = _series(train, "lr")
    axes.plot(x, y, color=_COLORS[2], linewidth=1.8, **_marker(x))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    axes.set_ylabel("learning rate")
    axes.set_title("Learning rate", fontsize=11)


def _plot_speed(axes: "Axes", train: Records) -> None:
    x, y = _series(train, "images_per_s")
    axes.plot(x, y, color=_COLORS[0], linewidth=1.2, **_marker(x))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("images / s, all processes")
    title = "Speed"
    waits = _series(train, "device_wait")[1] or _series(train, "data_wait")[1]
    if waits:
        share = 100 * sum(waits) / len(waits)
        title += f" (the device waited for data {share:.1f} % of the time)"
    axes.set_title(title, fontsize=11)


def _series(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the records that have this figure; inf and NaN are left out."""
    points = [
        (float(record.get("epoch", record["step"])), float(record[name]))
        for record in records
        if record.get(name) is not None
    ]
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def _marker(points: Sequence[float]) -> dict[str, Any]:
    """Style of a line that is made of few points: a ring at each."""
    if len(points) > _FEW:
        return {}
    return {"marker": "o", "markersize": 4.5, "markerfacecolor": "white"}


def _focus(
    axes: "Axes", train: Sequence[Sequence[float]], val: Sequence[Sequence[float]]
) -> float | None:
    """A loss's axis from 0, without a peak of training that would flatten all the rest.

    Of many records the few highest are left off if they are more than twice the rest; validation's
    are few, and each is shown.

    Returns:
        The peak that is not on the axis; None: everything is.
    """
    peak = max((max(values) for values in train if values), default=0.0)
    usual = 0.0
    for values in train:
        if values:
            share = _USUAL if len(values) >= _ENOUGH else 1.0
            usual = max(usual, sorted(values)[int(share * (len(values) - 1))])
    highest = max((max(values) for values in val if values), default=0.0)
    shown = max(usual if peak > 2 * usual else peak, highest)
    axes.set_ylim(0, 1.15 * shown if shown > 0 else 1.0)
    return peak if peak > 1.15 * shown else None


def _legend(axes: "Axes") -> None:
    axes.legend(fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")


def _figure(*, width: float, height: float) -> "Figure":
    """An empty figure (inches) with light grid lines and no box around its plots."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: "Figure", out: str | Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = Path(out)
    FigureCanvasAgg(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out
