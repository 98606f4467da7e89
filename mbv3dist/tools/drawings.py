"""The five drawn things of the quickstart's data set, and the clutter behind them.

A drawing is a list of parts; a part is a polygon (float64 [N, 2], x to the right, y down, about -1
to 1) with its colour. Everything is drawn enlarged and reduced afterwards: that smooths the edges.
Colours are free: a red thing may be a car, a fish or a blot of the background, so that colour alone
never tells the class.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

CLASSES = ("car", "fish", "house", "star", "tree")
SUPERSAMPLING = 4
BACKGROUND_SUPERSAMPLING = 2

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """One polygon of a drawing: points float64 [N, 2] and its colour."""

    points: np.ndarray
    color: Color


def random_color(draws: Generator, *, low: float = 0.35, high: float = 1.0) -> Color:
    """Any hue, with a value (brightness) between `low` and `high`."""
    hue, saturation, value = draws.random(), draws.uniform(0.25, 1.0), draws.uniform(low, high)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(red * 255), int(green * 255), int(blue * 255)


def _shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, int(channel * factor)) for channel in color)
    return red, green, blue


def _ellipse(
    x: float, y: float, radius_x: float, radius_y: float, *, turn: float = 0.0, num: int = 28
) -> np.ndarray:
    angle = np.linspace(0.0, 2 * math.pi, num, endpoint=False)
    points = np.stack([radius_x * np.cos(angle), radius_y * np.sin(angle)], axis=1)
    cos, sin = math.cos(turn), math.sin(turn)
    turned: np.ndarray = points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
    return turned


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


def _car(draws: Generator) -> list[Part]:
    body, glass = random_color(draws), random_color(draws, low=0.7)
    roof = draws.uniform(-0.62, -0.48)
    left, right = draws.uniform(-0.62, -0.45), draws.uniform(0.2, 0.4)
    tyre: Color = (25, 25, 30)
    cabin = _polygon((left - 0.2, -0.08), (left, roof), (right, roof), (right + 0.3, -0.08))
    hull = _polygon(
        (-1.0, 0.0),
        (-0.9, -0.1),
        (0.65, -0.12),
        (0.93, 0.0),
        (1.0, 0.14),
        (1.0, 0.34),
        (-1.0, 0.34),
    )
    middle = (left + right) / 2
    parts = [
        Part(cabin, _shade(body, 0.85)),
        Part(hull, body),
        Part(
            _polygon(
                (left - 0.08, -0.1),
                (left + 0.04, roof + 0.1),
                (middle - 0.04, roof + 0.1),
                (middle - 0.04, -0.1),
            ),
            glass,
        ),
        Part(
            _polygon(
                (middle + 0.04, -0.1),
                (middle + 0.04, roof + 0.1),
                (right - 0.03, roof + 0.1),
                (right + 0.16, -0.1),
            ),
            glass,
        ),
        Part(_rectangle(-0.98, 0.14, 0.98, 0.2), _shade(body, 0.6)),
        Part(_ellipse(0.9, 0.08, 0.07, 0.06), (255, 245, 190)),
    ]
    radius = draws.uniform(0.2, 0.25)
    for x in (-0.55, 0.55):
        parts.append(Part(_ellipse(x, 0.34, radius, radius), tyre))
        parts.append(Part(_ellipse(x, 0.34, radius * 0.5, radius * 0.5), (205, 205, 210)))
    return parts


def _fish(draws: Generator) -> list[Part]:
    body, fin = random_color(draws), random_color(draws)
    height = draws.uniform(0.36, 0.5)
    parts = [
        Part(_polygon((-0.42, 0.0), (-1.0, -0.48), (-0.86, 0.0), (-1.0, 0.48)), fin),
        Part(_polygon((-0.2, -height * 0.8), (0.1, -height - 0.26), (0.4, -height * 0.7)), fin),
        Part(_polygon((-0.1, height * 0.8), (0.0, height + 0.2), (0.3, height * 0.8)), fin),
        Part(_ellipse(0.22, 0.0, 0.78, height), body),
    ]
    for x in (-0.22, 0.02, 0.26)[: int(draws.integers(1, 4))]:
        parts.append(Part(_ellipse(x, 0.0, 0.06, height * 0.72), _shade(body, 0.6)))
    parts.append(Part(_ellipse(0.66, -0.1, 0.13, 0.13), (250, 250, 250)))
    parts.append(Part(_ellipse(0.69, -0.1, 0.06, 0.06), (15, 15, 20)))
    parts.append(Part(_polygon((0.8, 0.16), (0.98, 0.1), (0.8, 0.22)), _shade(body, 0.4)))
    return parts


def _house(draws: Generator) -> list[Part]:
    wall, roof, door = (
        random_color(draws, low=0.55),
        random_color(draws),
        random_color(draws, high=0.7),
    )
    pane: Color = (250, 235, 150) if draws.random() < 0.5 else (170, 215, 250)
    ridge, eaves = draws.uniform(-0.15, 0.15), draws.uniform(-0.2, 0.0)
    chimney = draws.uniform(0.3, 0.5) * (1 if draws.random() < 0.5 else -1)
    parts = [
        Part(_rectangle(chimney - 0.11, -0.85, chimney + 0.11, eaves), _shade(roof, 0.7)),
        Part(_rectangle(-0.75, eaves, 0.75, 0.95), wall),
        Part(_polygon((-0.98, eaves + 0.05), (ridge, -0.98), (0.98, eaves + 0.05)), roof),
    ]
    side = 1 if draws.random() < 0.5 else -1
    parts.append(Part(_rectangle(side * 0.3 - 0.18, 0.35, side * 0.3 + 0.18, 0.95), door))
    parts.append(Part(_ellipse(side * 0.3 + 0.1, 0.66, 0.035, 0.035), (250, 220, 120)))
    window = -side * 0.34
    parts.append(Part(_rectangle(window - 0.22, 0.2, window + 0.22, 0.6), _shade(wall, 0.5)))
    for x0, x1 in ((window - 0.18, window - 0.02), (window + 0.02, window + 0.18)):
        parts.append(Part(_rectangle(x0, 0.24, x1, 0.56), pane))
    parts.append(Part(_ellipse(ridge * 0.6, eaves - 0.38, 0.13, 0.13), pane))
    return parts


def _star_points(outer: float, inner: float) -> np.ndarray:
    angle = -math.pi / 2 + np.arange(10) * math.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _star(draws: Generator) -> list[Part]:
    body = random_color(draws, low=0.5)
    inner = draws.uniform(0.36, 0.48)
    parts = [Part(_star_points(1.0, inner), body)]
    parts.append(Part(_star_points(0.66, inner * 0.66), _shade(body, draws.choice([0.7, 1.35]))))
    for x in (-0.13, 0.13):
        parts.append(Part(_ellipse(x, -0.08, 0.06, 0.09), (20, 20, 25)))
    parts.append(
        Part(_polygon((-0.16, 0.1), (0.16, 0.1), (0.08, 0.22), (-0.08, 0.22)), (20, 20, 25))
    )
    return parts


def _tree(draws: Generator) -> list[Part]:
    trunk, crown = random_color(draws, high=0.7), random_color(draws)
    half = draws.uniform(0.1, 0.16)
    parts = [
        Part(_polygon((-half, 0.1), (half, 0.1), (half * 1.4, 1.0), (-half * 1.4, 1.0)), trunk)
    ]
    if draws.random() < 0.5:  # a fir: three tiers
        for row, (top, bottom, width) in enumerate(
            ((-0.3, 0.62, 0.8), (-0.66, 0.22, 0.62), (-1.0, -0.22, 0.44))
        ):
            tier = _polygon((0.0, top), (width, bottom), (-width, bottom))
            parts.append(Part(tier, _shade(crown, 0.75 + 0.2 * row)))
        return parts
    for x, y, radius in (
        (-0.42, -0.08, 0.4),
        (0.42, -0.08, 0.4),
        (0.0, -0.5, 0.48),
        (0.0, -0.1, 0.42),
    ):
        wobble = draws.uniform(-0.05, 0.05, size=2)
        blob = _ellipse(x + wobble[0], y + wobble[1], radius, radius)
        parts.append(Part(blob, _shade(crown, draws.uniform(0.8, 1.1))))
    for _ in range(int(draws.integers(2, 6))):  # fruit
        x, y = draws.uniform(-0.55, 0.55), draws.uniform(-0.6, 0.1)
        parts.append(Part(_ellipse(x, y, 0.07, 0.07), random_color(draws)))
    return parts


_DRAW: dict[str, Callable[[Generator], list[Part]]] = {
    "car": _car,
    "fish": _fish,
    "house": _house,
    "star": _star,
    "tree": _tree,
}
# How far each thing may lean, in degrees: houses and trees stand, fish and stars turn.
_LEAN = {"car": 14.0, "fish": 32.0, "house": 9.0, "star": 36.0, "tree": 12.0}


def draw_thing(name: str, draws: Generator, *, size: float) -> Image.Image:
    """Draws one thing, turned, mirrored and stretched at random.

    Args:
        name: one of CLASSES.
        draws: where the random numbers come from.
        size: longer side of its bounding box, in pixels of the picture.

    Returns:
        An RGBA picture with a clear margin around the thing.
    """
    parts = _DRAW[name](draws)
    stretch = math.exp(draws.uniform(-0.22, 0.22))
    mirror = -1.0 if draws.random() < 0.5 else 1.0
    angle = math.radians(draws.uniform(-_LEAN[name], _LEAN[name]))
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.diag([stretch * mirror, 1.0]) @ np.array([[cos, sin], [-sin, cos]])
    turned = [Part(part.points @ matrix, part.color) for part in parts]
    points = np.concatenate([part.points for part in turned])
    low, high = points.min(axis=0), points.max(axis=0)

    outline: Color = (20, 18, 24) if draws.random() < 0.75 else (245, 245, 240)
    width = max(1.0, size * draws.uniform(0.02, 0.045)) * SUPERSAMPLING
    scale = (size * SUPERSAMPLING - width) / float((high - low).max())
    margin = 3 * SUPERSAMPLING
    extent = np.ceil((high - low) * scale / SUPERSAMPLING).astype(int) * SUPERSAMPLING + 2 * margin
    layer = Image.new("RGBA", (int(extent[0]), int(extent[1])), (*outline, 0))
    pen = ImageDraw.Draw(layer)
    placed = [
        [(float(x), float(y)) for x, y in (part.points - low) * scale + margin] for part in turned
    ]
    # The line goes first, so that it shows around the whole figure and not around each part.
    for polygon in placed:
        joint = "curve" if len(polygon) < 12 else None  # an ellipse has no corners to round
        closed = [*polygon, polygon[0], polygon[1]]
        pen.line(closed, fill=outline, width=max(1, round(width)), joint=joint)
    for polygon, part in zip(placed, turned, strict=True):
        pen.polygon(polygon, fill=part.color)
    return layer.reduce(SUPERSAMPLING)


def _texture(draws: Generator, size: int) -> Image.Image:
    """A colour gradient with noise of several grains; RGB, size x size."""
    first, second = (np.array(random_color(draws, low=0.15), dtype=np.float32) for _ in range(2))
    angle = draws.uniform(0, 2 * math.pi)
    grid = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope = math.cos(angle) * grid[None, :] + math.sin(angle) * grid[:, None] + 0.5
    canvas = first + (second - first) * np.clip(slope, 0, 1)[:, :, None]
    for cells, strength in ((3, 0.7), (9, 0.45), (40, 0.3), (110, 0.2)):
        mode = "L" if draws.random() < 0.5 else "RGB"  # grey grains change the light, not the hue
        grains = draws.integers(
            0, 256, size=(cells, cells, 3)[: 2 if mode == "L" else 3], dtype=np.uint8
        )
        noise = Image.fromarray(grains).resize((size, size), Image.Resampling.BILINEAR)
        layer = np.asarray(noise, dtype=np.float32).reshape(size, size, -1)
        canvas += (layer - 128) * np.float32(strength * draws.random())
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _scribble(draws: Generator, kind: int, reach: float) -> np.ndarray:
    """Points of a track (kind 0), blot (1), bar (2) or triangle (3) around 0; float64 [N, 2]."""
    if kind == 0:
        return np.cumsum(draws.normal(0, reach, size=(int(draws.integers(2, 6)), 2)), axis=0)
    if kind == 1:
        blot = _ellipse(0, 0, 1, draws.uniform(0.4, 1.0), turn=draws.uniform(0, math.pi), num=14)
        return blot * draws.uniform(0.7, 1.2, size=(14, 1)) * reach
    if kind == 2:
        angle = draws.uniform(0, math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        bar = _rectangle(-1, -1, 1, 1) * (reach, reach * draws.uniform(0.1, 1.0))
        turned: np.ndarray = bar @ np.array([[cos, sin], [-sin, cos]])
        return turned
    return draws.normal(0, reach, size=(3, 2))


def _clutter(pen: ImageDraw.ImageDraw, draws: Generator, side: int) -> None:
    """One random line, blot, bar, triangle, ring or row of dots, in any colour."""
    ink = (*random_color(draws, low=0.1), int(draws.integers(90, 256)))
    x, y = draws.uniform(0, side, size=2).tolist()
    reach = side * math.exp(draws.uniform(math.log(0.02), math.log(0.22)))
    kind = int(draws.integers(6))
    if kind < 4:
        points = [(a + x, b + y) for a, b in _scribble(draws, kind, reach).tolist()]
        if kind == 0:
            pen.line(points, fill=ink, width=int(draws.integers(1, 9)), joint="curve")
        else:
            pen.polygon(points, fill=ink)
    elif kind == 4:
        ring = (x - reach, y - reach, x + reach, y + reach)
        pen.ellipse(ring, outline=ink, width=int(draws.integers(2, 9)))
    else:
        step, radius = draws.normal(0, reach * 0.4, size=2).tolist(), draws.uniform(2, 7)
        for row in range(int(draws.integers(3, 10))):
            a, b = x + row * step[0], y + row * step[1]
            pen.ellipse((a - radius, b - radius, a + radius, b + radius), fill=ink)


def draw_background(draws: Generator, *, size: int) -> Image.Image:
    """A busy RGB picture of size x size without any of the CLASSES on it."""
    side = size * BACKGROUND_SUPERSAMPLING
    canvas = _texture(draws, size).resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(int(draws.integers(6, 28))):
        _clutter(pen, draws, side)
    canvas = canvas.reduce(BACKGROUND_SUPERSAMPLING)
    if draws.random() < 0.35:  # now and then out of focus, as behind a real subject
        canvas = canvas.filter(ImageFilter.BoxBlur(draws.uniform(0.5, 2.0)))
    # A little paler than the things in front, as a painter would have it.
    canvas = ImageEnhance.Color(canvas).enhance(draws.uniform(0.3, 0.7))
    return ImageEnhance.Contrast(canvas).enhance(draws.uniform(0.4, 0.7))
