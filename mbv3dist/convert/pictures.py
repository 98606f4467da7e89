"""From a picture file of any common kind to an upright RGB picture that decodes in full.

Pillow is imported inside the functions, so that importing the converters stays cheap.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbv3dist.convert.files import show
from mbv3dist.data.formats import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

REENCODE_QUALITY = 95
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit
_FULL_CHROMA = 0  # Pillow's number for 4:4:4


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: Upright RGB.
        clean: Whether the file is an upright RGB JPEG whose bytes can be kept.
        kind: Why not: ``png``, ``webp``, ..., ``cmyk``, ``grayscale``, ``exif_rotated``; ``jpeg``
            if clean.
        orientation: EXIF orientation that was undone, 1 to 8.
        stored_size: (width, height) before that.
        has_alpha: Whether it was laid on white.
    """

    image: Image
    clean: bool
    kind: str
    orientation: int
    stored_size: tuple[int, int]
    has_alpha: bool


def load_picture(data: bytes) -> Picture:
    """Decode a picture file in full.

    Raises:
        PictureError: with the reason, if it cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    from mbv3dist.data.decode import FORMATS, exif_orientation

    if not data:
        raise PictureError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Only these: others of Pillow's readers start programs, such as a PostScript printer.
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if max(image.size) > _MAX_JPEG_SIDE:
                raise PictureError(
                    f"{image.width} x {image.height} pixels: a JPEG holds at most "
                    f"{_MAX_JPEG_SIDE} on a side; make it smaller"
                )
            image.load()
            return _upright_rgb(image, exif_orientation(image))
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        # Pillow's own message holds a memory address: reports would differ from run to run.
        raise PictureError("not a picture that can be read") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise PictureError(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Exception as error:
        # Pillow's plugins raise nearly anything on damaged bytes: struct.error, IndexError, ...
        raise PictureError(f"damaged picture ({show(str(error))})") from error


def _upright_rgb(image: Image, orientation: int) -> Picture:
    from mbv3dist.data.decode import to_rgb, upright

    stored_size, mode, form = image.size, image.mode, image.format or "unknown"
    is_jpeg = form in ("JPEG", "MPO")  # MPO: a JPEG with further pictures behind it, from cameras
    rgb, has_alpha = to_rgb(image)
    rgb = upright(rgb, orientation)
    if not is_jpeg:
        kind = form.lower()
    elif orientation > 1:
        kind = "exif_rotated"
    elif mode == "L":
        kind = "grayscale"
    elif mode != "RGB":
        kind = mode.lower()
    else:
        kind = "jpeg"
    return Picture(rgb, kind == "jpeg", kind, orientation, stored_size, has_alpha)


def shrunk_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side brought down to ``shorter`` pixels."""
    width, height = size
    if min(width, height) <= shorter:
        return width, height
    scale = shorter / min(width, height)
    return max(shorter, round(width * scale)), max(shorter, round(height * scale))


def shrink(image: Image, shorter: int) -> Image:
    """Return the picture at its shrunk size (antialiased), or as it is if that is no smaller."""
    from PIL.Image import Resampling

    size = shrunk_size(image.size, shorter)
    return image if size == image.size else image.resize(size, Resampling.BILINEAR)


def encode_jpeg(image: Image, *, quality: int, full_chroma: bool) -> bytes:
    """Return an RGB picture as baseline JPEG bytes, without EXIF, comment or colour profile."""
    plain = image.copy()
    plain.info = {}  # Pillow would carry the original's comment over
    buffer = io.BytesIO()
    if full_chroma:
        plain.save(buffer, "JPEG", quality=quality, subsampling=_FULL_CHROMA)
    else:
        plain.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def rotate_box(
    corners: tuple[float, float, float, float], orientation: int, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Move a box along when a picture is brought upright.

    Args:
        corners: xyxy pixels, half-open, in the stored picture.
        orientation: EXIF orientation of the stored picture, 1 to 8.
        size: (width, height) of the stored picture.
    """
    width, height = size
    x0, y0, x1, y1 = corners
    if orientation in (2, 3, 7, 8):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    if orientation >= 5:
        x0, y0, x1, y1 = y0, x0, y1, x1
    return x0, y0, x1, y1
