"""Pictures that the device finishes: crops that it resizes, or files that it decodes.

With `data.decode: hybrid` threads decode regions and pack them one behind the other in page-locked
memory; the device resizes, places and mirrors them in one launch. With `gpu` it decodes as well.
Here is only what is handed over; who does it is in training/to_device.py.

Shapes: B samples of a batch; regions int64 [B, 4], xyxy pixels; places float32 [B, 8], a view whose
source rectangle counts from its region's corner (`Batch.view`), zeros where there is no picture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # converting uses pixels.py, and starts without torch
    import torch

# A larger region is resized on the CPU: its way to the device would take longer than that.
MAX_CANVASES = 3


@dataclass
class PackedCrops:
    """Decoded crops of a batch, to be resized by the device.

    Attributes:
        pixels: uint8 [any], rows of RGB triplets, crops in any order; only what is used.
        layout: int64 [B, 4], first byte of each crop, bytes from row to row, height, width.
        places: float32 [B, 8], see above.
        size: Height and width of the canvas.
        fill: Colour of the canvas outside.
    """

    pixels: torch.Tensor
    layout: torch.Tensor
    places: torch.Tensor
    size: tuple[int, int]
    fill: tuple[int, int, int]


@dataclass
class Compressed:
    """Files of a batch, to be decoded and resized by the device.

    Attributes:
        data: Their bytes; empty where there is no picture.
        sizes: int32 [B, 2], width and height.
        regions: int64 [B, 4], the pixels that are needed.
        is_jpeg: bool [B], what the device may try.
        places: float32 [B, 8], see above.
        size: Height and width of the canvas.
        fill: Colour of the canvas outside.
        decode_on_cpu: Returns a region, uint8 [h, w, 3], or raises ValueError: it is damaged.
        report: To be told of damage: place and what is wrong. Raises if the run cannot go on.
    """

    data: list[memoryview]
    sizes: np.ndarray
    regions: np.ndarray
    is_jpeg: np.ndarray
    places: np.ndarray
    size: tuple[int, int]
    fill: tuple[int, int, int]
    decode_on_cpu: Callable[[int], np.ndarray]
    report: Callable[[int, ValueError], None]


@dataclass
class Packing:
    """The memory of one batch that threads fill with crops.

    Attributes:
        pixels: uint8 [B * MAX_CANVASES canvases].
        layout: int64 [B, 4].
        places: float32 [B, 8].
        used: Bytes taken so far.
    """

    pixels: np.ndarray
    layout: np.ndarray
    places: np.ndarray
    used: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reserve(self, counts: np.ndarray) -> np.ndarray:
        """Take room for crops of so many bytes, int64 [n]; returns where each begins, int64 [n]."""
        offsets = np.zeros(len(counts), np.int64)
        np.cumsum(counts[:-1], out=offsets[1:])
        with self.lock:
            start = self.used
            self.used += int(counts.sum())
        assert self.used <= len(self.pixels)
        return offsets + start


def move_to_region(vectors: np.ndarray, src: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Return views (float32 [n, 8], of float64 src [n, 4]) whose sources count from regions."""
    moved = vectors.copy()
    moved[:, :4] = src - np.concatenate([regions[:, :2], regions[:, :2]], axis=1)
    return moved
