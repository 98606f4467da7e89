"""Pixels on their way into a data set: decoded, made smaller, and stored as JPEG or raw.

Pixels are uint8 [H, W, 3], RGB. A raw member is a plain ``.npy`` file of version 1.0 in C order,
which NumPy, and any reader that decodes by extension, opens.

JPEGs are decoded in full before they are made smaller. Decoding to a fraction of the size
(Pillow's `draft`) takes a third of the time for large photographs, but with twice the final size
to spare the pixels differ by 0.9 levels on average and by 8 in the worst of 200 pictures.
"""

from __future__ import annotations

import io
import re

import numpy as np

from mbv3dist.convert.pictures import Picture, encode_jpeg

_RAW_HEAD = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '\|u1', 'fortran_order': False, "
    rb"'shape': \(([1-9]\d{0,9}), ([1-9]\d{0,9}), 3\), \} *\n",
    re.DOTALL,
)


def pixels_at(picture: Picture, size: tuple[int, int]) -> np.ndarray:
    """Return a picture's pixels at a (width, height) that is its own or smaller."""
    if size != picture.size and picture.decoded is None:
        from mbv3dist.data.shrunk import shrunk  # compiled code: takes a second to load

        # Decodes faster than Pillow, to the same pixels, and resizes as `shrink` does.
        pixels = shrunk(picture.data, picture.size, size)
        if pixels is not None:
            return pixels
    return shrink(np.asarray(picture.image), size)


def shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return pixels at a (width, height) that is theirs or smaller, resized with antialiasing."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    from mbv3dist.data.resize import draw_region

    canvas = np.empty((size[1], size[0], 3), np.uint8)
    draw_region(
        np.ascontiguousarray(pixels).reshape(height, 3 * width),
        (0, 0),
        (width, height),
        np.array([0, 0, width, height], np.float64),
        np.array([0, 0, *size], np.int32),
        False,
        np.zeros(3, np.uint8),
        canvas,
    )
    return canvas


def jpeg_bytes(pixels: np.ndarray, *, quality: int, full_chroma: bool) -> bytes:
    """Return pixels as a baseline JPEG."""
    from PIL import Image

    return encode_jpeg(Image.fromarray(pixels), quality=quality, full_chroma=full_chroma)


def raw_bytes(pixels: np.ndarray) -> bytes:
    """Return pixels as the bytes of a raw member."""
    buffer = io.BytesIO()
    plain = np.ascontiguousarray(pixels)
    np.lib.format.write_array(buffer, plain, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def raw_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a raw member, or None if it is none, or not whole."""
    found = _RAW_HEAD.match(data)
    if found is None:
        return None
    height, width = int(found[1]), int(found[2])
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (height, width, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    # Compared, not parsed: NumPy's parser raises a dozen kinds of errors on damaged bytes.
    head = header.getvalue()
    is_whole = data.startswith(head) and len(data) == len(head) + height * width * 3
    return (width, height) if is_whole else None
