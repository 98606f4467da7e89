"""Our decoding without the loader: chunks of pictures to canvases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mbv3dist.data.pixels import Pictures

FILL = (124, 116, 104)


def draw(data: Sequence[Any], crops: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
    """Draw the crop of each picture on the whole of its canvas, as `decoders.Decoder`."""
    count = len(data)
    dst = np.tile(np.array((0, 0, out.shape[2], out.shape[1]), np.int32), (count, 1))
    draw_views(data, crops.astype(np.float64), dst, flips, out)


def draw_views(
    data: Sequence[Any], src: np.ndarray, dst: np.ndarray, flips: np.ndarray, out: np.ndarray
) -> None:
    """Draw the views of a chunk, one canvas each.

    Raises:
        ValueError: A picture cannot be decoded.
    """
    pictures = Pictures([memoryview(item) for item in data])
    pictures.draw(src, dst, flips, canvases=out, places=np.arange(len(data)), fill=FILL)
    for error in pictures.errors.values():
        raise error
