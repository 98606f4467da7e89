"""From a picture file of any common kind to an upright RGB picture that decodes in full.

Pillow is imported inside the functions, so that importing the converters stays cheap.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbv3dist.convert.files import show
from mbv3dist.convert.structure import PlainHeader, plain_header, scan_is_whole
from mbv3dist.data.formats import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

REENCODE_QUALITY = 95
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit
_FULL_CHROMA = 0  # Pillow's number for 4:4:4


@dataclass(frozen=True)
class Picture:
    """A picture that is known to decode in full.

    Attributes:
        size: (width, height), upright.
        clean: Whether the file is an upright RGB JPEG whose bytes can be kept.
        kind: Why not: ``png``, ``webp``, ..., ``cmyk``, ``grayscale``, ``exif_rotated``; ``jpeg``
            if clean.
        orientation: EXIF orientation that is undone, 1 to 8.
        stored_size: (width, height) before that.
        has_alpha: Whether it was laid on white.
        data: The file's bytes.
        decoded: Its pixels, upright RGB, if finding that out took decoding.
    """

    size: tuple[int, int]
    clean: bool
    kind: str
    orientation: int
    stored_size: tuple[int, int]
    has_alpha: bool
    data: bytes
    decoded: Image | None = None

    @property
    def image(self) -> Image:
        """The pixels, upright RGB."""
        decoded = self.decoded or load_picture(self.data).decoded
        assert decoded is not None
        return decoded


def open_picture(data: bytes, header: PlainHeader | None = None) -> Picture:
    """Make sure that a picture file decodes in full: by its structure or, failing that, decoding.

    Args:
        data: The file.
        header: What `clean_header` says of it, if that is known and not None.

    Raises:
        PictureError: with the reason, if it does not.
    """
    header = header or clean_header(data)
    if header is None or not scan_is_whole(data, header.scan, has_restarts=header.has_restarts):
        return load_picture(data)
    return clean_picture(header, data)


def clean_header(head: bytes) -> PlainHeader | None:
    """Return the header of a JPEG whose bytes can be kept if its scan is whole.

    Args:
        head: The file, or its beginning.

    Returns:
        None if decoding has to tell.
    """
    header = plain_header(head)
    if header is None or (header.has_metadata and not _is_upright(head)):
        return None
    return header


def clean_picture(header: PlainHeader, data: bytes = b"") -> Picture:
    """Return a JPEG that has not been decoded; without its bytes, nobody may ask for pixels."""
    return Picture(header.size, True, "jpeg", 1, header.size, False, data)


def _is_upright(head: bytes) -> bool:
    """Return whether a JPEG's metadata can be read and does not say that it is rotated."""
    from PIL import Image

    from mbv3dist.data.decode import exif_orientation

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(head), formats=("JPEG",))
            return image.mode == "RGB" and exif_orientation(image) == 1
    except Exception:
        return False  # Pillow's plugins raise nearly anything: decoding will tell


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
            return _upright_rgb(image, exif_orientation(image), data)
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


def _upright_rgb(image: Image, orientation: int, data: bytes) -> Picture:
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
    is_clean = kind == "jpeg"
    return Picture(rgb.size, is_clean, kind, orientation, stored_size, has_alpha, data, rgb)


def picture_problem(error: Exception) -> str:
    """Return what is wrong with a picture that could not be read or used."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or type(error).__name__}"
    return str(error)


def shrunk_size(
    size: tuple[int, int], *, shorter: int | None = None, longer: int | None = None
) -> tuple[int, int]:
    """Return (width, height) with one side brought down to a number of pixels, never up.

    Args:
        size: (width, height).
        shorter: Pixels that the shorter side is brought to, or None.
        longer: Pixels that the longer side is brought to, or None.
    """
    width, height = size
    if shorter is not None and min(size) > shorter:
        scale = shorter / min(size)
        return max(shorter, round(width * scale)), max(shorter, round(height * scale))
    if longer is not None and max(size) > longer:
        scale = longer / max(size)
        return max(1, round(width * scale)), max(1, round(height * scale))
    return size


def encode_jpeg(image: Image, *, quality: int, full_chroma: bool) -> bytes:
    """Return an RGB picture as baseline JPEG bytes, without EXIF, comment or colour profile."""
    if image.info:  # Pillow would carry the original's comment over
        image = image.copy()
        image.info = {}
    buffer = io.BytesIO()
    if full_chroma:
        image.save(buffer, "JPEG", quality=quality, subsampling=_FULL_CHROMA)
    else:
        image.save(buffer, "JPEG", quality=quality)
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
