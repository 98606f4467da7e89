"""Pixels of a view: decode a picture and draw its view onto a canvas, with Pillow.

The contract that a faster decoder takes over: the picture is upright (EXIF applied) and RGB, the
source rectangle is resized to the destination's size with an antialiased bilinear filter on uint8,
and the filter may reach beyond the source rectangle where the picture goes on. So Resize followed
by a crop gives the pixels it gives in torchvision, and only the region around the crop is needed.
JPEG scaling while decoding (`Image.draft`) is not used: it changes the pixels.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin

from mbv3dist.data.views import View

# Pillow itself warns from 89 megapixels on and refuses twice that; here the limit is the refusal.
MAX_PIXELS = 178_956_970
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
DEFAULT_FILL = (124, 116, 104)  # ImageNet's mean colour

# What a file can raise out of Pillow's parsers when its bytes are damaged.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError)
_SWAPS_SIDES = (5, 6, 7, 8)  # EXIF orientations that turn the picture by 90 degrees
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture:
    """A picture whose header is parsed, ready to have a view of it drawn.

    Attributes:
        height: Of the upright picture, in pixels.
        width: Of the upright picture, in pixels.

    Raises:
        ValueError: When the bytes are no picture, damaged, or too many pixels; with the reason.
    """

    def __init__(self, data: bytes | memoryview):
        self._image = _open(data)
        self._orientation = _orientation(self._image)
        self.width, self.height = self._image.size
        if self.width * self.height > MAX_PIXELS:
            raise ValueError(
                f"{self.width} x {self.height} pixels are more than the limit of {MAX_PIXELS}; "
                "make the picture smaller"
            )
        if self._orientation in _SWAPS_SIDES:
            self.width, self.height = self.height, self.width

    def image(self) -> Image.Image:
        """Return the whole picture, upright, mode RGB.

        Raises:
            ValueError: When the picture is damaged or cut off.
        """
        try:
            self._image.load()
            image = self._image if self._image.mode == "RGB" else _to_rgb(self._image)
        except _DAMAGE as error:
            raise ValueError(f"picture cannot be decoded: {error}") from error
        if self._orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[self._orientation])
        return image

    def draw(
        self, view: View, out: np.ndarray, *, fill: tuple[int, int, int] = DEFAULT_FILL
    ) -> None:
        """Draw the view onto `out` (uint8 [H, W, 3]); the canvas outside of it becomes `fill`."""
        image = self.image()
        x0, y0, x1, y1 = view.dst
        size = (x1 - x0, y1 - y0)
        src = view.src
        left, top = round(src[0]), round(src[1])
        same = (left, top, left + size[0], top + size[1])
        if src == same:
            patch = image if image.size == size else image.crop(same)
        else:
            patch = image.resize(size, Image.Resampling.BILINEAR, box=src)
        if view.flip:
            patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if size != (out.shape[1], out.shape[0]):
            # As rows of bytes: numpy copies whole rows 20 times faster than three bytes at a time.
            row = np.tile(np.array(fill, dtype=np.uint8), out.shape[1])
            out[...] = row.reshape(out.shape[1], 3)
        out[y0:y1, x0:x1] = np.asarray(patch)


def decode_view(
    data: bytes | memoryview,
    view: View,
    out: np.ndarray,
    *,
    fill: tuple[int, int, int] = DEFAULT_FILL,
) -> tuple[int, int]:
    """Decode a picture and draw its view onto a canvas.

    Args:
        data: The file's bytes.
        view: Which part goes where.
        out: uint8 [H, W, 3], the canvas; every pixel is written.
        fill: RGB of the canvas outside of the picture.

    Returns:
        Height and width of the upright picture in pixels.

    Raises:
        ValueError: When the picture cannot be decoded, with the reason.
    """
    picture = Picture(data)
    picture.draw(view, out, fill=fill)
    return picture.height, picture.width


def picture_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return height and width of the upright picture from its header alone."""
    picture = Picture(data)
    return picture.height, picture.width


def decode_picture(data: bytes | memoryview) -> np.ndarray:
    """Return the whole upright picture, uint8 [H, W, 3]."""
    return np.array(Picture(data).image())


def _open(data: bytes | memoryview) -> Image.Image:
    """Parse the header. `Image.open` would do, but it warns about large pictures from any thread.

    Silencing that warning, or lifting the limit behind it, would be global to the process.
    """
    file = io.BytesIO(data)
    prefix = bytes(data[:16])
    try:
        if prefix.startswith(b"\xff\xd8"):
            return JpegImagePlugin.JpegImageFile(file)
        Image.init()
        for name in FORMATS:
            factory, accept = Image.OPEN[name]
            if accept is not None and accept(prefix) is True:
                return factory(file, "")
    except _DAMAGE as error:
        raise ValueError(f"picture header is damaged: {error}") from error
    raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) when there is none; damaged EXIF counts as none."""
    if image.format == "JPEG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; transparency is laid on white, as convert does."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
