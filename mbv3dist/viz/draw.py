"""Draws detections and class scores on pictures, and contact sheets, with Pillow alone.

Line width and type size follow the size of the picture. Labels stand on a background of their
class's colour, stay inside the picture and avoid each other where there is room.
"""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

# Distinct on photographs and from each other; further classes walk round the hue circle.
_PALETTE: tuple[Color, ...] = (
    (230, 40, 60),
    (30, 110, 230),
    (20, 160, 70),
    (255, 160, 0),
    (150, 50, 200),
    (0, 190, 200),
    (240, 80, 190),
    (150, 220, 30),
    (140, 80, 30),
    (255, 225, 40),
    (15, 60, 140),
    (250, 130, 110),
)
_GOLDEN_TURN = 0.61803398875
_MIN_TYPE = 9  # pixels; smaller is not readable


def class_color(label: int) -> Color:
    """The colour of a class; the same in every picture and run.

    Args:
        label: Class number from 0.

    Returns:
        (red, green, blue), 0 to 255.
    """
    if label < len(_PALETTE):
        return _PALETTE[label]
    hue = (label * _GOLDEN_TURN) % 1.0
    saturation = (0.95, 0.7, 0.85)[label % 3]
    value = (0.9, 0.75, 1.0)[label // 3 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    picture: Image.Image,
    boxes: ArrayLike,
    labels: Sequence[int],
    *,
    classes: Sequence[str],
    scores: Sequence[float] | None = None,
    min_side: int = 320,
) -> Image.Image:
    """Draw boxes with their class and score.

    Args:
        picture: Any mode; not changed.
        boxes: [M, 4], xyxy pixels of `picture`; parts outside are cut off.
        labels: [M], class numbers from 0.
        classes: Class names.
        scores: [M], in [0, 1]; shown in percent. None shows names alone, as for true boxes.
        min_side: A picture whose longer side is below this is enlarged by a whole factor first,
            since text would not be readable on it.

    Returns:
        A new RGB picture.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    assert len(corners) == len(labels), "one label per box"
    canvas, factor = _enlarged(picture, min_side)
    # The best scores are drawn last, on top, but their labels choose their places first.
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable") if scores else None
    ranked = order.tolist() if order is not None else list(range(len(corners)))
    brush = ImageDraw.Draw(canvas)
    width = max(1, round(min(canvas.size) / 180))
    rectangles = {i: _pixels(corners[i] * factor, canvas.size) for i in ranked}
    for i in reversed(ranked):
        _draw_frame(brush, rectangles[i], class_color(labels[i]), width)
    font = _font(_type_size(canvas.size, len(corners)))
    placed: list[tuple[int, str, Rectangle]] = []
    for i in ranked:
        text = classes[labels[i]]
        if scores is not None:
            text = f"{text} {_percent(scores[i])}"
        text, size = _fitted(text, font, canvas.width)
        others = [spot for _, _, spot in placed]
        placed.append((i, text, _place(rectangles[i], size, canvas.size, others)))
    for i, text, spot in reversed(placed):
        _draw_chip(brush, spot, text, font, class_color(labels[i]))
    return canvas


def draw_classes(
    picture: Image.Image,
    top: Sequence[tuple[str, float]],
    *,
    min_side: int = 320,
) -> Image.Image:
    """Write a classifier's best answers on a picture, one line each, best first.

    Args:
        picture: Any mode; not changed.
        top: (class name, score in [0, 1]).
        min_side: As in `draw_boxes`.

    Returns:
        A new RGB picture.
    """
    canvas, _ = _enlarged(picture, min_side)
    font = _font(_type_size(canvas.size, 0))
    pad = _padding(font)
    lines = [_fitted(f"{_percent(score)}  {name}", font, canvas.width) for name, score in top]
    height = _line_height(font)
    lines = lines[: max(1, canvas.height // height)]
    if lines:
        width = min(canvas.width, max(size[0] for _, size in lines))
        panel = Image.new("RGB", (width, height * len(lines)), (0, 0, 0))
        behind = canvas.crop((0, 0, width, min(canvas.height, height * len(lines))))
        canvas.paste(Image.blend(behind, panel.crop((0, 0, *behind.size)), 0.65), (0, 0))
        brush = ImageDraw.Draw(canvas)
        for row, (text, _) in enumerate(lines):
            shade = (255, 255, 255) if row == 0 else (205, 205, 205)
            middle = row * height + height / 2
            brush.text((pad, middle), text, fill=shade, font=font, anchor="lm")
    return canvas


def _percent(score: float) -> str:
    """A score in [0, 1] as text; small ones keep a digit, so that none reads as nothing."""
    if 0 < score < 0.0005:
        return "<0.1%"
    return f"{100 * score:.{1 if 0 < score < 0.01 else 0}f}%"


def contact_sheet(
    pictures: Sequence[Image.Image],
    *,
    columns: int | None = None,
    cell: int = 320,
    captions: Sequence[str] | None = None,
    gap: int = 8,
) -> Image.Image:
    """Lay pictures out on one sheet, each scaled to fit its cell.

    Args:
        pictures: At least one.
        columns: Cells in a row; default: about a square, a little wider than high.
        cell: Side of a cell in pixels.
        captions: One line under each picture.
        gap: Pixels between cells and around them.

    Returns:
        An RGB picture on white.

    Raises:
        ValueError: No picture was given.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    assert captions is None or len(captions) == len(pictures)
    columns = min(len(pictures), columns or math.ceil(math.sqrt(len(pictures) * 1.2)))
    font = _font(max(_MIN_TYPE, cell // 22))
    strip = _line_height(font) if captions else 0
    scales = [min(cell / picture.width, cell / picture.height) for picture in pictures]
    sizes = [
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        for picture, scale in zip(pictures, scales, strict=True)
    ]
    # A row is as high as its highest picture, so that wide pictures leave no empty bands.
    starts = range(0, len(pictures), columns)
    heights = [max(height for _, height in sizes[at : at + columns]) + strip for at in starts]
    sheet_size = (columns * (cell + gap) + gap, sum(heights) + gap * (len(heights) + 1))
    sheet = Image.new("RGB", sheet_size, (255, 255, 255))
    brush = ImageDraw.Draw(sheet)
    for number, (picture, size) in enumerate(zip(pictures, sizes, strict=True)):
        row, column = divmod(number, columns)
        left, upper = gap + column * (cell + gap), gap * (row + 1) + sum(heights[:row])
        small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        room = heights[row] - strip
        sheet.paste(small, (left + (cell - size[0]) // 2, upper + (room - size[1]) // 2))
        if captions:
            text, _ = _fitted(captions[number], font, cell)
            where = (left + cell / 2, upper + room + strip / 2)
            brush.text(where, text, fill=(40, 40, 40), font=font, anchor="mm")
    return sheet


def _enlarged(picture: Image.Image, min_side: int) -> tuple[Image.Image, int]:
    """An RGB copy, enlarged by the returned whole factor if it is small."""
    factor = max(1, math.ceil(min_side / max(picture.size)))
    copy = picture.convert("RGB")
    if factor == 1:
        return (copy.copy() if copy is picture else copy), 1
    size = (copy.width * factor, copy.height * factor)
    return copy.resize(size, Image.Resampling.BICUBIC), factor


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _type_size(canvas: tuple[int, int], num_boxes: int) -> int:
    """Type height in pixels; a crowded picture gets smaller labels."""
    crowd = 1.0 if num_boxes <= 12 else max(0.65, math.sqrt(math.sqrt(12 / num_boxes)))
    return max(_MIN_TYPE, round(math.sqrt(canvas[0] * canvas[1]) / 26 * crowd))


def _padding(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return max(2, round(_text_height(font) / 5))


def _text_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    _, upper, _, lower = font.getbbox("Ágjy")
    return math.ceil(lower - upper)


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return _text_height(font) + _padding(font)


def _fitted(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> tuple[str, tuple[int, int]]:
    """The text, shortened with "…" to `width`, and the (width, height) of its chip in pixels."""

    def chip_width(value: str) -> int:
        return math.ceil(font.getlength(value)) + 2 * _padding(font)

    text = " ".join(text.split())
    shown = text
    while chip_width(shown) > width and text:
        text = text[:-1]
        shown = text.rstrip() + "…"
    return shown, (min(chip_width(shown), width), _line_height(font))


def _pixels(box: np.ndarray, canvas: tuple[int, int]) -> Rectangle:
    """Whole pixels inside the canvas; half-open, at least 1 x 1."""
    width, height = canvas
    left = min(max(round(box[0]), 0), width - 1)
    upper = min(max(round(box[1]), 0), height - 1)
    right = min(max(round(box[2]), left + 1), width)
    lower = min(max(round(box[3]), upper + 1), height)
    return left, upper, right, lower


def _draw_frame(brush: ImageDraw.ImageDraw, rectangle: Rectangle, color: Color, width: int) -> None:
    left, upper, right, lower = rectangle
    brush.rectangle((left, upper, right - 1, lower - 1), outline=color, width=width)


def _place(
    box: Rectangle, size: tuple[int, int], canvas: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a label of `size` goes: the first free place at its box, else the least covered."""
    left, upper, right, lower = box
    width, height = size
    corners = (
        (left, upper - height),  # above, which hides nothing of the object
        (left, lower),
        (right - width, upper - height),
        (right - width, lower),
        (left, upper),
        (left, lower - height),
        (right - width, upper),
    )
    best: Rectangle | None = None
    best_covered = math.inf
    for wanted_x, wanted_y in corners:
        x = max(0, min(wanted_x, canvas[0] - width))
        y = max(0, min(wanted_y, canvas[1] - height))
        spot = (x, y, x + width, y + height)
        # A label pushed back into the picture lies on the object, a little worse than beside it.
        covered = 0.25 * abs(y - wanted_y) * width + sum(_overlap(spot, other) for other in taken)
        if covered < best_covered:
            best, best_covered = spot, covered
    assert best is not None
    return best


def _overlap(first: Rectangle, second: Rectangle) -> int:
    """Shared area in square pixels."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def _draw_chip(
    brush: ImageDraw.ImageDraw,
    spot: Rectangle,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    color: Color,
) -> None:
    left, upper, right, lower = spot
    brush.rectangle((left, upper, right - 1, lower - 1), fill=color)
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    shade = (0, 0, 0) if luma > 140 else (255, 255, 255)
    where = (left + _padding(font), (upper + lower) / 2)
    brush.text(where, text, fill=shade, font=font, anchor="lm")
