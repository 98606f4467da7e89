"""Whole pictures made smaller, one at a time, as converting asks for them.

`pixels.Pictures` does that for chunks of views; what it keeps about a chunk takes a tenth of a
millisecond a picture if a chunk is one picture. Here all is one compiled call.
"""

from __future__ import annotations

import numpy as np

from mbv3dist.data import jpeg, nvimgcodec
from mbv3dist.data.compiled import compiled
from mbv3dist.data.picture_header import plain_size
from mbv3dist.data.resize import draw_region


def shrunk(data: bytes, size: tuple[int, int], wanted: tuple[int, int]) -> np.ndarray | None:
    """Return the pixels of a plain JPEG, resized with antialiasing, uint8 [height, width, 3].

    Args:
        data: The file.
        size: Its (width, height).
        wanted: Those of the result.

    Returns:
        None if it is no plain JPEG of that size, or cannot be decoded here.
    """
    if nvimgcodec.problem():
        return None
    decoder = jpeg.thread_decoder()
    decoder.reserve(3 * size[0] * size[1])
    canvas = np.empty((wanted[1], wanted[0], 3), np.uint8)
    file = np.frombuffer(data, np.uint8)
    is_drawn = _shrink(
        decoder.words,
        decoder.view,
        decoder.info,
        decoder.pixels,
        file,
        file.ctypes.data,
        size[0],
        size[1],
        canvas,
    )
    return canvas if is_drawn else None


@compiled
def _shrink(
    words: np.ndarray,
    view: np.ndarray,
    info: np.ndarray,
    pixels: np.ndarray,
    file: np.ndarray,
    address: int,
    width: int,
    height: int,
    canvas: np.ndarray,
) -> bool:
    """Decode a file with a thread's `JpegDecoder` and draw it; return whether that was possible."""
    if plain_size(file) != (width, height):
        return False
    if not jpeg.decode_region(words, view, info, address, len(file), 0, 0, width, height):
        return False
    src = np.array([0.0, 0.0, width, height])
    dst = np.array([0, 0, canvas.shape[1], canvas.shape[0]], np.int32)
    region = pixels[: 3 * width * height].reshape(height, 3 * width)
    draw_region(region, (0, 0), (width, height), src, dst, False, np.zeros(3, np.uint8), canvas)
    return True
