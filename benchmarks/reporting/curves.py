"""The plots with curves: what more ranks bring, and how near a GPU's limits a step comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from reporting.plots import (
    FAINT,
    INK,
    LINES,
    OURS,
    PEER,
    RIGHT,
    WIDTH,
    Panel,
    Row,
    draw_panel,
    place_axes,
    style,
    svg,
)
from reporting.results import Section, times

GOAL = 0.5  # of the byte floor
ROOF = 3.5  # inches
MARKERS = ("o", "s", "^", "D", "v", "P")


def scaling(measured: Sequence[Section], curves: Sequence[Section]) -> str:
    """Draw efficiency over ranks: measured with intervals, predicted as lines.

    Args:
        measured: The sections "weak" and "strong", of any device.
        curves: The sections "curve".
    """
    with style():
        curved = sum(len(m["curves"]) for s in curves for m in s.data["models"].values())
        marked = sum(len(s.data["models"]) for s in measured) // 2 + 1
        figure = Canvas(figsize=(WIDTH, 3.75 + 0.19 * (curved + marked)))
        for number, kind in enumerate(("weak", "strong")):
            axes = place_axes(figure, 0.6 + number * 4.3, 0.5, 3.8, 2.55)
            said = "a batch per rank" if kind == "weak" else "one batch for all ranks"
            axes.set_title(f"{kind} scaling: {said}", fontsize=9, weight="bold", loc="left")
            handles = [*_lines(axes, kind, curves), *_points(axes, kind, measured)]
            _rank_axis(axes)
            if number == 0:
                axes.set_ylabel("efficiency (1: no time lost)")
                lines, words = [item for item, _ in handles], [word for _, word in handles]
                figure.legend(lines, words, loc="lower left", frameon=False, fontsize=7.5)
        return svg(figure)


def _rank_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.85), max(high, 2.4))
    axes.xaxis.set_major_locator(FixedLocator([2**n for n in range(0, 13, 1 if high < 20 else 2)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("ranks")
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    axes.axhline(1, color=INK, linewidth=0.9)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _lines(axes: Axes, kind: str, sections: Sequence[Section]) -> Iterator[tuple[Any, str]]:
    """Draw the predicted curves; yield what the legend says of them."""
    number = 0
    for section in sections:
        for model, found in section.data["models"].items():
            for curve in found["curves"]:
                points = curve["points"].get(kind) or []
                color, dashes = LINES[number % len(LINES)], ("-", "--", ":")[number // len(LINES)]
                number += 1
                if points:
                    (line,) = axes.plot(
                        [point["ranks"] for point in points],
                        [point["efficiency"] for point in points],
                        dashes,
                        color=color,
                        linewidth=1.8,
                    )
                    yield line, f"predicted, {model}: {curve['title']}"


def _points(axes: Axes, kind: str, sections: Sequence[Section]) -> Iterator[tuple[Any, str]]:
    """Draw what was measured; yield what the legend says of it."""
    number = 0
    for section in sections:
        if section.name != kind:
            continue
        for model, found in section.data["models"].items():
            rows = sorted((int(ranks), row["efficiency"]) for ranks, row in found["ranks"].items())
            marker = MARKERS[number % len(MARKERS)]
            number += 1
            for ranks, row in rows:
                axes.plot([ranks] * 2, [row["low"], row["high"]], color=INK, linewidth=1.1)
            (dots,) = axes.plot(
                [ranks for ranks, _ in rows],
                [row["ratio"] for _, row in rows],
                marker,
                color=INK,
                markersize=5,
                markerfacecolor="white",
            )
            yield dots, f"measured, {model}, {section.data.get('backend', section.device)}"


def roofline(sections: Sequence[Section]) -> str:
    """Draw each device's roof with every library's best, and shares of the byte floor below.

    A CPU's caches make its floor another matter: it is drawn where there is no GPU's.
    """
    sections = [section for section in sections if section.is_gpu] or sections
    found = [(section, _best(section)) for section in sections]
    panels = [_shares(section, points) for section, points in found]
    with style():
        figure = Canvas(figsize=(WIDTH, sum(ROOF + panel.height for panel in panels)))
        at = 0.0
        for (section, points), panel in zip(found, panels, strict=True):
            _roof(place_axes(figure, 0.8, at + 0.4, 6.2, ROOF - 1.0), section, points)
            at += ROOF
            axes = place_axes(figure, 3.6, at + 0.4, WIDTH - 3.6 - RIGHT, panel.height - 0.95)
            draw_panel(axes, panel, 3.6)
            if section.is_gpu:
                axes.axvline(GOAL, color=INK, linewidth=1.1, linestyle="--")
            at += panel.height
        return svg(figure)


def _best(section: Section) -> list[dict[str, Any]]:
    """Return each library's best point of each model, training first."""
    best: dict[tuple[bool, str, str], dict[str, Any]] = {}
    for point in section.data["points"]:
        key = (point["what"] != "training", point["model"], point["library"])
        if key not in best or point["fraction"] > best[key]["fraction"]:
            best[key] = point
    order = sorted(best, key=lambda key: (*key[:2], -best[key]["fraction"], key[2]))
    return [best[key] for key in order]


def _shares(section: Section, points: Sequence[dict[str, Any]]) -> Panel:
    rows = [
        Row(
            f"{point['model']}, {point['what']}: {point['library']}",
            point["fraction"],
            point["fraction"],
            point["fraction"],
            f"{100 * point['fraction']:.0f} %",
            OURS if point["library"] == "ours" else PEER,
        )
        for point in points
    ]
    aim = "; dashed: the aim" if section.is_gpu else ""
    what = f"1: every byte of the floor once, at the speed of a copy{aim}"
    return Panel(f"Share of the byte floor, {_device(section)}", rows, what)


def _device(section: Section) -> str:
    return section.device if section.is_gpu else "CPU"


def _roof(axes: Axes, section: Section, points: Sequence[dict[str, Any]]) -> None:
    """Draw FLOP per byte against TFLOP/s, under bandwidth and matrix products."""
    data = section.data
    bandwidth = data["bandwidth"]["copy"]["best_gb_s"] / 1000  # TB/s
    reach = [point["flop_per_image"] / point["bytes_per_image"] for point in points]
    tops = data["matmul_tflop_s"]
    least, most = min(reach) / 2, max([2 * max(tops.values()) / bandwidth, *reach])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for number, (dtype, top) in enumerate(sorted(tops.items())):
        places = [least, top / bandwidth, most]
        heights = [min(top, place * bandwidth) for place in places]
        axes.plot(places, heights, "-" if number == 0 else "--", color=INK, linewidth=1.4)
        said = f"{dtype} products, {times(top)} TFLOP/s"
        axes.text(most, top, said, ha="right", va="bottom", fontsize=8)
    middle = (least * min(tops.values()) / bandwidth) ** 0.5
    said = f"copies, {bandwidth * 1000:.0f} GB/s   "
    axes.text(middle, middle * bandwidth, said, ha="right", va="bottom", fontsize=8)
    seen = _roof_points(axes, points, reach)
    axes.legend(
        list(seen.values()),
        list(seen),
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=8,
    )
    axes.set_ylim(top=1.8 * max(tops.values()))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(length=0)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("FLOP per byte of the floor")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Roofline, {_device(section)}", loc="left", fontsize=9.5, weight="bold")


def _roof_points(
    axes: Axes, points: Sequence[dict[str, Any]], reach: Sequence[float]
) -> dict[str, Any]:
    """Draw the libraries' points, a name below the lowest of a model; return the legend."""
    names = {point["library"] for point in points}
    libraries = sorted(names, key=lambda name: (name != "ours", name))
    seen: dict[str, Any] = {}
    lowest: dict[tuple[str, str], tuple[float, float]] = {}
    for point, at in zip(points, reach, strict=True):
        number = libraries.index(point["library"])
        height = point["images_per_s"] * point["flop_per_image"] / 1e12
        color = LINES[number % len(LINES)]
        (dot,) = axes.plot(
            [at],
            [height],
            MARKERS[number % len(MARKERS)],
            color=color,
            markersize=6,
            markerfacecolor=color if point["what"] == "training" else "white",
        )
        seen.setdefault(f"{point['library']}, {point['what']}", dot)
        model = (point["model"], point["what"])
        lowest[model] = min(lowest.get(model, (height, at)), (height, at))
    for (name, _), (height, at) in lowest.items():
        axes.text(at, height / 1.25, name, rotation=90, ha="center", va="top", fontsize=7)
    axes.set_ylim(bottom=min(height for height, _ in lowest.values()) / 8)
    return seen
