"""Pixels of many views: plain JPEGs decoded by regions straight into a batch, without the GIL.

The fast lane of decode.py. A thread hands over a chunk of samples; two compiled calls read the
headers and draw all plain JPEGs among them (jpeg_header.py, jpeg.py, resize.py). What is no plain
JPEG, and what the fast lane cannot decode, is Pillow's: it draws the same pixels, or says what is
wrong. Of a JPEG only the rows down to the region's end are read: damage below is for checksums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from mbv3dist.data import jpeg, nvimgcodec
from mbv3dist.data.decode import MAX_PIXELS, Picture
from mbv3dist.data.jpeg_header import scan_headers
from mbv3dist.data.resize import draw_region, reach
from mbv3dist.data.views import View


class Pictures:
    """The pictures of a chunk, their headers parsed, ready to have a view of each drawn.

    Attributes:
        sizes: int32 [n, 2], width and height of the upright pictures; 0 where there is an error.
        errors: What is wrong with a picture, by its place in the chunk.
    """

    def __init__(self, data: Sequence[memoryview]):
        """Parse the headers."""
        count = len(data)
        self._data = data
        self._addresses = np.empty(count, np.int64)
        self._lengths = np.empty(count, np.int64)
        for place, item in enumerate(data):
            array = np.frombuffer(item, np.uint8) if len(item) else np.zeros(1, np.uint8)
            self._addresses[place] = array.__array_interface__["data"][0]
            self._lengths[place] = len(item)
        self.sizes = np.zeros((count, 2), np.int32)
        self._is_plain = np.zeros(count, np.bool_)
        self.errors: dict[int, ValueError] = {}
        if not nvimgcodec.problem():
            scan_headers(self._addresses, self._lengths, self.sizes, self._is_plain)
            self._is_plain &= self.sizes[:, 0].astype(np.int64) * self.sizes[:, 1] <= MAX_PIXELS
        self._others: dict[int, Picture] = {}
        for place in np.flatnonzero(~self._is_plain).tolist():
            self._open(place)

    def _open(self, place: int) -> None:
        """Let Pillow look at a picture."""
        self.sizes[place] = 0
        try:
            picture = self._others[place] = Picture(self._data[place])
        except ValueError as error:
            self.errors[place] = error
        else:
            self.sizes[place] = picture.width, picture.height

    def draw(
        self,
        src: np.ndarray,
        dst: np.ndarray,
        flips: np.ndarray,
        *,
        canvases: np.ndarray,
        places: np.ndarray,
        fill: tuple[int, int, int],
    ) -> None:
        """Draw each picture's view onto its canvas; adds to `errors` what cannot be decoded.

        Args:
            src: float64 [n, 4], xyxy picture pixels.
            dst: int32 [n, 4], xyxy canvas pixels.
            flips: bool [n].
            canvases: uint8 [N, H, W, 3].
            places: int64 [n], which canvas is whose.
            fill: Colour of the canvas outside of the views.
        """
        if self._is_plain.any():
            decoder = jpeg.thread_decoder()
            regions = np.empty((len(src), 4), np.int64)
            decoder.reserve(_find_regions(self.sizes, self._is_plain, src, dst, regions))
            _draw_jpegs(
                decoder.words,
                decoder.view,
                decoder.info,
                decoder.pixels,
                self._addresses,
                self._lengths,
                self.sizes,
                self._is_plain,
                regions,
                src,
                dst,
                flips,
                np.array(fill, np.uint8),
                canvases,
                places,
            )
            # What is not plain any more could not be decoded.
            for place in np.flatnonzero(~self._is_plain).tolist():
                if place not in self._others and place not in self.errors:
                    self._open(place)
        for place, picture in self._others.items():
            view = View(tuple(src[place].tolist()), tuple(dst[place].tolist()), bool(flips[place]))
            try:
                picture.draw(view, canvases[places[place]], fill=fill)
            except ValueError as error:
                self.errors[place] = error


@njit(nogil=True, cache=True, error_model="numpy")
def _find_regions(
    sizes: np.ndarray, plain: np.ndarray, src: np.ndarray, dst: np.ndarray, regions: np.ndarray
) -> int:
    """Write which pixels each view needs: int64 [n, 4], xyxy; returns the most bytes of one."""
    most = 0
    for n in range(len(sizes)):
        if plain[n]:
            x0, x1 = reach(src[n, 0], src[n, 2], dst[n, 2] - dst[n, 0], sizes[n, 0])
            y0, y1 = reach(src[n, 1], src[n, 3], dst[n, 3] - dst[n, 1], sizes[n, 1])
            regions[n, 0], regions[n, 1], regions[n, 2], regions[n, 3] = x0, y0, x1, y1
            most = max(most, 3 * (x1 - x0) * (y1 - y0))
    return most


@njit(nogil=True, cache=True, error_model="numpy")
def _draw_jpegs(
    words: np.ndarray,
    view: np.ndarray,
    info: np.ndarray,
    pixels: np.ndarray,
    addresses: np.ndarray,
    lengths: np.ndarray,
    sizes: np.ndarray,
    plain: np.ndarray,
    regions: np.ndarray,
    src: np.ndarray,
    dst: np.ndarray,
    flips: np.ndarray,
    fill: np.ndarray,
    canvases: np.ndarray,
    places: np.ndarray,
) -> None:
    """Draw the plain ones; those that cannot be decoded are plain no more."""
    for n in range(len(plain)):
        if not plain[n]:
            continue
        x0, y0, x1, y1 = regions[n, 0], regions[n, 1], regions[n, 2], regions[n, 3]
        if not jpeg.decode_region(words, view, info, addresses[n], lengths[n], x0, y0, x1, y1):
            plain[n] = False
            continue
        width, height = x1 - x0, y1 - y0
        region = pixels[: 3 * width * height].reshape(height, 3 * width)
        picture = (np.int64(sizes[n, 0]), np.int64(sizes[n, 1]))
        draw_region(region, (x0, y0), picture, src[n], dst[n], flips[n], fill, canvases[places[n]])
