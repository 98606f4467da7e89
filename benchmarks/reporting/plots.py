"""The plots, as SVG whose bytes depend on the figures alone.

Blue is ours (or where ours is ahead), grey a peer (or what cannot be told apart), vermilion where
ours is behind: colours that the colour-blind can tell, and shapes say the same. Text stays text, in
matplotlib's own font or one of its measures (Verdana): small files, that can be searched.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reporting.questions import Answer
from reporting.results import times

OURS, PEER, BEHIND, INK, FAINT = "#0072B2", "#8A9299", "#D55E00", "#22272B", "#D9DEE2"
BAR = "#AEB5BB"  # a peer's: lighter than its dot, so that intervals are seen on it
LINES = (OURS, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", BEHIND)
WIDTH = 9.0  # inches, of 96 px: what a README has room for
ROW = 0.215
QUIET = "#5A6268"  # words that stand back
GAP = 0.09  # between questions
LEFT = 5.0  # for questions and peers
RIGHT = 1.4  # for what stands beside a bar
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "mbv3dist",
}


@dataclass(frozen=True)
class Row:
    """One bar or dot: a value with its interval, and what is written beside it."""

    label: str
    value: float
    low: float
    high: float
    text: str
    color: str = PEER
    marker: str = "o"


@dataclass(frozen=True)
class Panel:
    """Bars under each other, or dots on a log scale, with a line at 1."""

    title: str
    rows: Sequence[Row]
    what: str  # the axis
    log: bool = False
    height: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "height", len(self.rows) * ROW * 1.15 + 0.95)


@contextmanager
def style() -> Iterator[None]:
    """Draw with these settings, whatever the user's own are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def svg(figure: Canvas) -> str:
    """Return a figure as SVG, without a date; the version of matplotlib stands in it."""
    figure.set_canvas(FigureCanvasSVG(figure))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return re.sub(r"[ \t]+\n", "\n", text)


def standing(low: float, high: float) -> tuple[str, str]:
    """Return colour and marker of a ratio: ahead, not to be told apart, behind."""
    if low > 1:
        return OURS, "o"
    return (BEHIND, "D") if high < 1 else (PEER, "s")


def place_axes(figure: Canvas, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches from the left and the top."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (
            left / total_width,
            1 - (top + height) / total_height,
            width / total_width,
            height / total_height,
        )
    )


def _scale(axes: Axes, lowest: float, highest: float) -> None:
    """Make the horizontal axis a log scale with plain numbers."""
    axes.set_xscale("log")
    axes.set_xlim(lowest, highest)
    axes.xaxis.set_major_locator(FixedLocator([t for t in TICKS if lowest <= t <= highest]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}\u00d7"))


def _plain(axes: Axes) -> None:
    """Leave only the grid of the values."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _dot(axes: Axes, row: Row, height: float) -> None:
    axes.plot([row.low, row.high], [height] * 2, color=row.color, linewidth=1.8, alpha=0.55)
    filled = "white" if row.marker == "s" else row.color
    axes.plot(
        [row.value], [height], row.marker, color=row.color, markersize=5.2, markerfacecolor=filled
    )


def headline(answers: Sequence[Answer]) -> str:
    """Draw every ratio of the README's first table.

    Raises:
        ValueError: When there is none.
    """
    blocks = [(item, _wrapped(item.question)) for item in answers if item.figures]
    if not blocks:
        raise ValueError("results/ has nothing beside a peer; measure with peers and --json")
    sizes = [max(len(item.figures), len(lines)) for item, lines in blocks]
    height = sum(sizes) * ROW + len(blocks) * GAP
    with style():
        figure = Canvas(figsize=(WIDTH, height + 1.25))
        top = 1 - 0.2 / (height + 1.25)
        title = "Ours is \u2026 times as fast as"
        figure.text(0.02, top, title, weight="bold", fontsize=11, va="center")
        axes = place_axes(figure, LEFT, 0.4, WIDTH - LEFT - 0.62, height)
        _plain(axes)
        every = [found for item, _ in blocks for found in item.figures]
        lowest, highest = min(x.low for x in every), max(x.high for x in every)
        _scale(axes, min(0.6, 0.9 * lowest), 1.15 * highest)
        axes.set_ylim(-height, 0)
        axes.axvline(1, color=INK, linewidth=1.1)
        at = 0.0
        for (item, lines), size in zip(blocks, sizes, strict=True):
            at += GAP + size * ROW
            _block(axes, item, lines, size=size, top=size * ROW - at)
        _key(figure, height + 0.87)
        return svg(figure)


def _wrapped(question: str) -> list[str]:
    """Return a question in lines, a number and its unit together."""
    return textwrap.wrap(question.replace(" px", "\u00a0px"), 40)


def _block(axes: Axes, item: Answer, lines: list[str], *, size: int, top: float) -> None:
    """Draw one question: its words, its peers, their dots and their ratios."""
    inch = 1 / (WIDTH - LEFT - 0.62)
    side = axes.get_yaxis_transform()
    middle: dict[str, Any] = {"transform": side, "va": "center"}
    words = "\n".join(lines)
    start = 0.1 - LEFT
    axes.text(
        start * inch, top - 0.03, words, transform=side, va="top", linespacing=1.25, fontsize=8.3
    )
    for number, found in enumerate(item.figures):
        y = top - (number + 0.5) * ROW - (size - len(item.figures)) * ROW / 2
        color, marker = standing(found.low, found.high)
        _dot(axes, Row("", found.ratio, found.low, found.high, "", color, marker), y)
        ink = {OURS: INK, PEER: QUIET, BEHIND: BEHIND}[color]
        axes.text(-0.1 * inch, y, found.peer, ha="right", fontsize=7.6, color=ink, **middle)
        axes.text(
            1 + 0.08 * inch,
            y,
            f"{times(found.ratio)}\u00d7",
            color=QUIET if color == PEER else color,
            weight="bold" if color == OURS else "normal",
            fontsize=8.3,
            **middle,
        )
    below = top - size * ROW - GAP / 2
    axes.axhline(below, xmin=start * inch, color=FAINT, linewidth=0.5, clip_on=False)


def _key(figure: Canvas, top: float) -> None:
    """Say what colours and shapes mean."""
    axes = place_axes(figure, 0.2, top, WIDTH - 0.4, 0.25)
    axes.axis("off")
    axes.set_xlim(0, WIDTH - 0.4)
    axes.set_ylim(0, 1)
    words = ("ours is faster", "not to be told apart", "the peer is faster")
    places = (0.05, 1.35, 3.0)
    for word, at, (low, high) in zip(words, places, ((2, 3), (0.9, 1.1), (0.5, 0.6)), strict=True):
        color, marker = standing(low, high)
        _dot(axes, Row("", at, at - 0.1, at + 0.1, "", color, marker), 0.5)
        axes.text(at + 0.18, 0.5, word, va="center", fontsize=8)
    said = "Lines: 95 % interval of the run (planning: least to most of three points)"
    axes.text(WIDTH - 0.45, 0.5, said, va="center", ha="right", fontsize=7.6, color=QUIET)


def stacked(panels: Sequence[Panel], *, label_width: float = 2.7) -> str:
    """Draw panels under each other."""
    total = sum(panel.height for panel in panels)
    with style():
        figure = Canvas(figsize=(WIDTH, total))
        at = 0.0
        for panel in panels:
            axes = place_axes(
                figure, label_width, at + 0.38, WIDTH - label_width - RIGHT, panel.height - 0.95
            )
            draw_panel(axes, panel, label_width)
            at += panel.height
        return svg(figure)


def draw_panel(axes: Axes, panel: Panel, label_width: float) -> None:
    """Draw a panel into axes that have `label_width` inches on their left."""
    _plain(axes)
    inch = 1 / (WIDTH - label_width - RIGHT)
    side = axes.get_yaxis_transform()
    axes.set_ylim(len(panel.rows) - 0.45, -0.55)
    lowest, highest = min(r.low for r in panel.rows), max(r.high for r in panel.rows)
    if panel.log:
        _scale(axes, min(0.8, 0.9 * lowest), highest * 1.15)
    else:
        axes.set_xlim(0, max(1.05, highest * 1.03))
    axes.axvline(1, color=INK, linewidth=1.0, zorder=3 if panel.log else 1.5)
    for number, row in enumerate(panel.rows):
        if panel.log:
            _dot(axes, row, number)
        else:
            color = BAR if row.color == PEER else row.color
            axes.barh([number], [row.value], height=0.66, color=color)
            if row.high > row.low:
                axes.plot([row.low, row.high], [number] * 2, color=INK, linewidth=1.1)
        bold = "bold" if row.color == OURS and not panel.log else "normal"
        axes.text(
            -0.08 * inch,
            number,
            row.label,
            transform=side,
            va="center",
            ha="right",
            fontsize=8,
            weight=bold,
        )
        axes.text(
            1 + 0.06 * inch, number, row.text, transform=side, va="center", fontsize=8, weight=bold
        )
    axes.set_xlabel(panel.what, fontsize=8)
    axes.text(
        -(label_width - 0.15) * inch,
        -0.95,
        panel.title,
        transform=side,
        weight="bold",
        fontsize=9.5,
        va="bottom",
    )
