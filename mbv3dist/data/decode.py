"""Pixels of a view: decode any picture and draw its view onto a canvas.

The picture is upright (EXIF applied) and RGB, the source rectangle is resized to the destination's
size with an antialiased bilinear filter (resize.py), and the filter may reach beyond the source
rectangle where the picture goes on. So Resize followed by a crop gives the pixels it gives in
torchvision, and only the region around the crop is needed. JPEG scaling while decoding
(`Image.draft`) is not used: it changes the pixels.

`Picture` decodes with Pillow, whatever the file is; pixels.py decodes many plain JPEGs at once to
the same pixels, only the regions that views show.
"""

from __future__ import annotations

import io
import os
from typing import IO

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin

from mbv3dist.data.files import MAX_PICTURE_BYTES, UnusableFileError, open_regular
from mbv3dist.data.formats import PictureError
from mbv3dist.data.views import View

# Pillow itself warns from 89 megapixels on and refuses twice that; here the limit is the refusal.
MAX_PIXELS = 178_956_970
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_NPY = b"\x93NUMPY"
DEFAULT_FILL = (124, 116, 104)  # ImageNet's mean colour

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


def decoder_version() -> tuple[str, str]:
    """Return the decoder's name and its version: what pixels may depend on."""
    from PIL import __version__, features

    from mbv3dist.data import nvimgcodec

    others = f"pillow {__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    if nvimgcodec.problem():
        return "pillow", others
    return "nvimgcodec", f"{nvimgcodec.version()}, {others}"


class Picture:
    """A picture whose header is parsed, ready to have a view of it drawn.

    Attributes:
        height: Of the upright picture, in pixels.
        width: Of the upright picture, in pixels.

    Raises:
        ValueError: When the bytes are no picture, damaged, or too many pixels; with the reason.
    """

    def __init__(self, data: bytes | memoryview):
        self._pixels: np.ndarray | None = None
        if bytes(data[:6]) == _NPY:
            self._pixels = read_raw(data)
            self.height, self.width = self._pixels.shape[:2]
            return
        self._image = _open(io.BytesIO(data), bytes(data[:16]))
        self.width, self.height = self._image.size
        # Only now: the orientation of a PNG may stand behind its pixels.
        self._orientation = exif_orientation(self._image)
        if self._orientation in _SWAPS_SIDES:
            self.width, self.height = self.height, self.width

    def image(self) -> Image.Image:
        """Return the whole picture, upright, mode RGB.

        Raises:
            ValueError: When the picture is damaged or cut off.
        """
        if self._pixels is not None:
            return Image.fromarray(self._pixels)
        try:
            self._image.load()
            image = to_rgb(self._image)[0]
        except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
            raise ValueError(f"picture cannot be decoded: {error}") from error
        return upright(image, self._orientation)

    def draw(
        self, view: View, out: np.ndarray, *, fill: tuple[int, int, int] = DEFAULT_FILL
    ) -> None:
        """Draw the view onto `out` (uint8 [H, W, 3]); the canvas outside of it becomes `fill`.

        Raises:
            ValueError: When the picture is damaged or cut off.
        """
        from mbv3dist.data.resize import draw_region  # compiles; only who draws waits for it

        pixels = np.asarray(self.image()) if self._pixels is None else self._pixels
        canvas = out if out.flags.c_contiguous else np.empty(out.shape, np.uint8)
        draw_region(
            np.ascontiguousarray(pixels).reshape(self.height, 3 * self.width),
            (0, 0),
            (self.width, self.height),
            np.array(view.src, np.float64),
            np.array(view.dst, np.int32),
            view.flip,
            np.array(fill, np.uint8),
            canvas,
        )
        if canvas is not out:
            out[...] = canvas


def check_header(path: str | os.PathLike[str]) -> None:
    """Look at a picture's header only, in a fraction of the time that decoding takes.

    Raises:
        ValueError: The file is no picture, or has too many bytes or pixels; with the reason.
        OSError: It cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_PICTURE_BYTES:
            raise UnusableFileError(f"it has more than {MAX_PICTURE_BYTES >> 20} MiB")
        prefix = file.read(16)
        file.seek(0)
        if not prefix.startswith(_NPY):
            _open(file, prefix)


def read_raw(data: bytes | memoryview) -> np.ndarray:
    """Return the pixels of a raw member, uint8 [H, W, 3]: a .npy file, C order.

    Raises:
        ValueError: It is something else, or not whole.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is not of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy parses the header as Python text
        raise ValueError(f"raw picture: its header is damaged: {error}") from error
    if fortran or dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"raw picture: it holds {dtype} {shape}, not uint8 [height, width, 3]")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ValueError(f"raw picture: {shape[1]} x {shape[0]} pixels are too many")
    pixels = np.frombuffer(data, np.uint8, offset=file.tell())
    if len(pixels) != shape[0] * shape[1] * 3:
        raise ValueError(f"raw picture: {len(pixels)} bytes of pixels for {shape}")
    return pixels.reshape(shape)


def _open(file: IO[bytes], prefix: bytes) -> Image.Image:
    """Parse the header and refuse too many pixels; `prefix` is how the file begins."""
    image = _parse(file, prefix)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}; "
            "make the picture smaller"
        )
    return image


def _parse(file: IO[bytes], prefix: bytes) -> Image.Image:
    """Parse the header. `Image.open` would do, but it warns about large pictures from any thread.

    Silencing that warning, or lifting the limit behind it, would be global to the process.
    """
    try:
        if prefix.startswith(b"\xff\xd8"):
            return JpegImagePlugin.JpegImageFile(file)
        Image.init()
        for name in FORMATS:
            factory, accept = Image.OPEN[name]
            if accept is not None and accept(prefix) is True:
                return factory(file, "")
    except Exception as error:
        raise ValueError(f"picture header is damaged: {error}") from error
    raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}")


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) when there is none or EXIF is damaged."""
    # A JPEG without these has none, and Pillow would parse for long to find that out. Of a TIFF,
    # Pillow gives size and pixels upright already.
    if image.format == "TIFF" or (
        image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys()
    ):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1  # Pillow raises nearly anything; viewers show the picture as it is stored
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture of this EXIF orientation (1 to 8) upright."""
    return image.transpose(_UPRIGHT[orientation]) if orientation > 1 else image


def to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return a picture of any mode as RGB, and whether alpha was laid on white.

    Raises:
        PictureError: For pixels of 32 bits, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        # 65535 = 255 * 257, so this maps both ends exactly.
        values = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(values.astype(np.uint8)).convert("RGB"), False
    if image.mode in ("I", "F"):
        raise PictureError("pixels of 32 bits; save it with 8 bits per channel")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB"), True
    return image if image.mode == "RGB" else image.convert("RGB"), False
