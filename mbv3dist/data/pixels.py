"""Pixels of many views: JPEGs decoded by regions straight into a batch, without the GIL.

The fast lane of decode.py. A thread hands over a chunk of samples; two compiled calls read the
headers and draw all plain JPEGs among them (picture_header.py, jpeg.py, resize.py), another one raw
pixels. The rest, and what the fast lane cannot decode, is Pillow's: it draws the same pixels, or
says what is wrong. Of a JPEG only the rows down to the region's end are read: finding damage below
them is for checksums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbv3dist.data import jpeg, nvimgcodec
from mbv3dist.data.compiled import compiled
from mbv3dist.data.decode import MAX_PIXELS, Picture
from mbv3dist.data.packed import MAX_CANVASES, Packing, move_to_region
from mbv3dist.data.picture_header import memory, scan_headers
from mbv3dist.data.resize import draw_region, reach
from mbv3dist.data.view_kernels import Views
from mbv3dist.data.views import View


class Pictures:
    """The pictures of a chunk, their headers parsed, ready to have a view of each drawn.

    Attributes:
        data: The files.
        sizes: int32 [n, 2], width and height of the upright pictures; 0 where there is an error.
        errors: What is wrong with a picture, by its place in the chunk.
    """

    def __init__(self, data: Sequence[memoryview], addresses: np.ndarray | None = None):
        """Parse the headers; `addresses` int64 [n] are those of the data, if they are known."""
        count = len(data)
        self.data = data
        self._lengths = np.array([len(item) for item in data], np.int64)
        # Contiguous, as all arrays here: each layout would be compiled apart.
        self._addresses = _addresses(data) if addresses is None else addresses.copy()
        self.sizes = np.zeros((count, 2), np.int32)
        self._is_plain = np.zeros(count, np.bool_)
        self._raw_starts = np.zeros(count, np.int64)
        self.errors: dict[int, ValueError] = {}
        num_others = count
        if not nvimgcodec.problem():
            num_others = scan_headers(
                self._addresses,
                self._lengths,
                self.sizes,
                self._is_plain,
                self._raw_starts,
                MAX_PIXELS,
            )
        self._others: dict[int, Picture] = {}
        if num_others:
            self._open_rest()

    def _open(self, place: int) -> None:
        """Let Pillow look at a picture."""
        self.sizes[place] = 0
        try:
            picture = self._others[place] = Picture(self.data[place])
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
            decoder.reserve(_find_regions(self.sizes, src, dst, self._is_plain, regions))
            num_refused = _draw_jpegs(
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
            if num_refused:
                self._open_rest()
        if self._raw_starts.any():
            _draw_raw(
                self._addresses,
                self._raw_starts,
                self.sizes,
                src,
                dst,
                flips,
                np.array(fill, np.uint8),
                canvases,
                places,
            )
        for place, picture in self._others.items():
            view = View(tuple(src[place].tolist()), tuple(dst[place].tolist()), bool(flips[place]))
            try:
                picture.draw(view, canvases[places[place]], fill=fill)
            except ValueError as error:
                self.errors[place] = error

    def pack(
        self,
        views: Views,
        *,
        packing: Packing,
        places: np.ndarray,
        size: int,
        fill: tuple[int, int, int],
    ) -> None:
        """Decode each view's region into a packing; adds to `errors` what cannot be decoded.

        What is no plain JPEG, or has too many pixels, is drawn here and packed as a whole canvas.

        Args:
            views: The pictures' views.
            packing: Of the batch.
            places: int64 [n], whose is which row of the packing.
            size: Side of the canvas.
            fill: Colour of the canvas outside of the views.
        """
        canvas_bytes = 3 * size * size
        regions = self.regions(views.src, views.dst)
        taken = self._is_plain & (_num_bytes(regions) <= MAX_CANVASES * canvas_bytes)
        if taken.any():
            offsets = np.zeros(len(taken), np.int64)
            offsets[taken] = packing.reserve(_num_bytes(regions)[taken])
            decoder = jpeg.thread_decoder()
            base = packing.pixels.ctypes.data
            wanted = taken.copy()
            _decode_jpegs(
                decoder.words,
                decoder.view,
                decoder.info,
                base + offsets,
                self._addresses,
                self._lengths,
                taken,
                regions,
            )
            jpeg.aim(decoder.info, decoder.pixels.ctypes.data)
            self._is_plain &= taken | ~wanted
            self._open_rest()
            at, region = places[taken], regions[taken]
            width, height = region[:, 2] - region[:, 0], region[:, 3] - region[:, 1]
            rows = offsets[taken], 3 * width, height, width
            packing.layout[at] = np.stack(rows, axis=1)
            packing.places[at] = move_to_region(views.vectors()[taken], views.src[taken], region)
        rest = np.flatnonzero(~taken)
        if not len(rest):
            return
        offsets = packing.reserve(np.full(len(rest), canvas_bytes))
        start, end = int(offsets[0]), int(offsets[-1]) + canvas_bytes
        canvases = packing.pixels[start:end].reshape(-1, size, size, 3)
        others = Pictures([self.data[n] for n in rest.tolist()])
        others.draw(
            views.src[rest],
            views.dst[rest],
            views.flip[rest],
            canvases=canvases,
            places=np.arange(len(rest)),
            fill=fill,
        )
        self.errors |= {int(rest[n]): error for n, error in others.errors.items()}
        packing.layout[places[rest]] = np.stack(
            np.broadcast_arrays(offsets, 3 * size, size, size), axis=1
        )
        packing.places[places[rest]] = np.array((0, 0, size, size) * 2, np.float32)

    def regions(self, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """Return the pixels that views need, int64 [n, 4], xyxy; arguments as in `draw`."""
        regions = np.empty((len(src), 4), np.int64)
        _find_regions(self.sizes, src, dst, self._is_plain, regions)
        return regions

    @property
    def is_plain(self) -> np.ndarray:
        """Bool [n], which pictures are plain JPEGs."""
        return self._is_plain

    def _open_rest(self) -> None:
        """Let Pillow look at what has no fast lane, or was refused there."""
        for place in np.flatnonzero(~self._is_plain & (self._raw_starts == 0)).tolist():
            if place not in self._others and place not in self.errors:
                self._open(place)


def _addresses(data: Sequence[memoryview]) -> np.ndarray:
    """Return where the bytes lie, int64 [n]; of empty ones anything."""
    arrays = [np.frombuffer(item, np.uint8) for item in data if len(item)]
    places = iter([array.__array_interface__["data"][0] for array in arrays])
    return np.array([next(places) if len(item) else 0 for item in data], np.int64)


def decode_region(data: memoryview, region: np.ndarray) -> np.ndarray:
    """Return a region (int64 [4], xyxy) of any picture by Pillow, uint8 [h, w, 3].

    Raises:
        ValueError: The picture is damaged.
    """
    x0, y0, x1, y1 = region.tolist()
    return np.ascontiguousarray(np.asarray(Picture(data).image())[y0:y1, x0:x1])


def _num_bytes(regions: np.ndarray) -> np.ndarray:
    """Return the bytes of regions, int64 [n]."""
    count: np.ndarray = 3 * (regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])
    return count


@compiled
def _find_regions(
    sizes: np.ndarray, src: np.ndarray, dst: np.ndarray, plain: np.ndarray, regions: np.ndarray
) -> int:
    """Write all regions; returns the most bytes of a plain JPEG's."""
    most = 0
    for n in range(len(sizes)):
        x0, x1 = reach(src[n, 0], src[n, 2], dst[n, 2] - dst[n, 0], sizes[n, 0])
        y0, y1 = reach(src[n, 1], src[n, 3], dst[n, 3] - dst[n, 1], sizes[n, 1])
        regions[n, 0], regions[n, 1], regions[n, 2], regions[n, 3] = x0, y0, x1, y1
        if plain[n]:
            most = max(most, 3 * (x1 - x0) * (y1 - y0))
    return most


@compiled
def _decode_jpegs(
    words: np.ndarray,
    view: np.ndarray,
    info: np.ndarray,
    targets: np.ndarray,
    addresses: np.ndarray,
    lengths: np.ndarray,
    taken: np.ndarray,
    regions: np.ndarray,
) -> None:
    """Decode regions to addresses; those that cannot be decoded are taken no more."""
    for n in range(len(taken)):
        if taken[n]:
            jpeg.aim(info, targets[n])
            x0, y0, x1, y1 = regions[n, 0], regions[n, 1], regions[n, 2], regions[n, 3]
            taken[n] = jpeg.decode_region(
                words, view, info, addresses[n], lengths[n], x0, y0, x1, y1
            )


@compiled
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
) -> int:
    """Draw the plain ones; those that cannot be decoded are plain no more: returns how many."""
    refused = 0
    for n in range(len(plain)):
        if not plain[n]:
            continue
        x0, y0, x1, y1 = regions[n, 0], regions[n, 1], regions[n, 2], regions[n, 3]
        if not jpeg.decode_region(words, view, info, addresses[n], lengths[n], x0, y0, x1, y1):
            plain[n] = False
            refused += 1
            continue
        width, height = x1 - x0, y1 - y0
        region = pixels[: 3 * width * height].reshape(height, 3 * width)
        picture = (np.int64(sizes[n, 0]), np.int64(sizes[n, 1]))
        draw_region(region, (x0, y0), picture, src[n], dst[n], flips[n], fill, canvases[places[n]])
    return refused


@compiled
def _draw_raw(
    addresses: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    src: np.ndarray,
    dst: np.ndarray,
    flips: np.ndarray,
    fill: np.ndarray,
    canvases: np.ndarray,
    places: np.ndarray,
) -> None:
    """Draw raw pictures straight from their members."""
    for n in range(len(starts)):
        if starts[n] > 0:
            width, height = np.int64(sizes[n, 0]), np.int64(sizes[n, 1])
            pixels = memory(addresses[n] + starts[n], 3 * width * height)
            draw_region(
                pixels.reshape(height, 3 * width),
                (0, 0),
                (width, height),
                src[n],
                dst[n],
                flips[n],
                fill,
                canvases[places[n]],
            )
