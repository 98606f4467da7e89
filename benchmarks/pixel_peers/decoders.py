"""Decode, crop, resize, flip: one thread's work for a list of pictures, without any loader.

A decoder takes the bytes of JPEGs and, for each, the crop (int64 [n, 4], xyxy) and whether it is
mirrored (bool [n]), and writes uint8 [n, S, S, 3]. Pillow's is the reference of the others' pixels.
"""

from __future__ import annotations

import importlib
import io
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Decoder = Callable[[Sequence[Any], np.ndarray, np.ndarray, np.ndarray], None]
CHUNK = 16  # pictures that a thread takes at a time


def pillow_decoder() -> Decoder:
    """Pillow: crop, then its antialiased bilinear resize."""
    from PIL import Image

    flip = Image.Transpose.FLIP_LEFT_RIGHT

    def draw(data: Sequence[Any], crops: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
        side = (out.shape[2], out.shape[1])
        for place, item in enumerate(data):
            image = Image.open(io.BytesIO(item)).convert("RGB")
            x0, y0, x1, y1 = crops[place].tolist()
            patch = image.crop((x0, y0, x1, y1)).resize(side, Image.Resampling.BILINEAR)
            out[place] = np.asarray(patch.transpose(flip) if flips[place] else patch)

    return draw


def torchvision_decoder() -> Decoder:
    """On uint8 tensors: torchvision's decode_jpeg, resized_crop with antialias, horizontal_flip."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)

    def draw(data: Sequence[Any], crops: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
        slots = torch.from_numpy(out).permute(0, 3, 1, 2)
        for place, item in enumerate(data):
            file = torch.frombuffer(item, dtype=torch.uint8)
            image = decode_jpeg(file, ImageReadMode.RGB)
            x0, y0, x1, y1 = crops[place].tolist()
            size = list(out.shape[1:3])
            patch = functional.resized_crop(image, y0, x0, y1 - y0, x1 - x0, size, antialias=True)
            slots[place] = functional.horizontal_flip(patch) if flips[place] else patch

    return draw


def simplejpeg_decoder() -> Decoder:
    """By libjpeg-turbo through simplejpeg, and OpenCV's bilinear resize, which aliases."""
    import cv2  # type: ignore[import-not-found, unused-ignore]
    import simplejpeg  # type: ignore[import-not-found, unused-ignore]

    cv2.setNumThreads(1)

    def draw(data: Sequence[Any], crops: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
        side = (out.shape[2], out.shape[1])
        for place, item in enumerate(data):
            image = simplejpeg.decode_jpeg(item, colorspace="RGB")
            x0, y0, x1, y1 = crops[place].tolist()
            patch = cv2.resize(image[y0:y1, x0:x1], side, interpolation=cv2.INTER_LINEAR)
            out[place] = patch[:, ::-1] if flips[place] else patch

    return draw


def make_decoder(name: str) -> Decoder:
    """Return a decoder of the peers', or ours."""
    if name == "ours":
        decoder: Decoder = importlib.import_module("pixel_peers.ours_decoder").draw
        return decoder
    makers = {
        "pillow": pillow_decoder,
        "torchvision": torchvision_decoder,
        "simplejpeg": simplejpeg_decoder,
    }
    return makers[name]()


class Pictures:
    """Files in memory with the crops that were drawn for them (see `save_views`)."""

    def __init__(self, path: Path):
        with np.load(path) as saved:
            self.crops, self.flips, self.size = saved["crops"], saved["flips"], int(saved["size"])
            names = saved["names"].tolist()
        root = path.parent / "folder"
        # Writable, because torch.frombuffer warns of what is not.
        self.files = [bytearray((root / name).read_bytes()) for name in names]

    def __len__(self) -> int:
        return len(self.files)


def decode_all(decoder: Decoder, pictures: Pictures, out: np.ndarray, *, threads: int) -> float:
    """Decode every picture once with so many threads and return images/s.

    Args:
        decoder: Called by each thread with chunks of pictures.
        pictures: What to decode.
        out: uint8 [threads, CHUNK, S, S, 3], written over and over.
        threads: 1 runs in this thread.
    """
    numbers = itertools.count(0, CHUNK)
    errors: list[BaseException] = []

    def work(slots: np.ndarray) -> None:
        try:
            while (start := next(numbers)) < len(pictures):
                part = slice(start, start + CHUNK)
                files = pictures.files[part]
                decoder(files, pictures.crops[part], pictures.flips[part], slots[: len(files)])
        except BaseException as error:
            errors.append(error)

    started = time.perf_counter()
    if threads == 1:
        work(out[0])
    else:
        workers = [threading.Thread(target=work, args=(out[n],)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if errors:
        raise errors[0]
    return len(pictures) / (time.perf_counter() - started)


def differences(decoder: Decoder, reference: Decoder, pictures: Pictures) -> np.ndarray:
    """Return the mean absolute difference of each picture to the reference's, float64 [n]."""
    result = np.empty(len(pictures))
    slots = np.empty((2, 1, pictures.size, pictures.size, 3), np.uint8)
    for place, item in enumerate(pictures.files):
        part = slice(place, place + 1)
        for draw, out in ((decoder, slots[0]), (reference, slots[1])):
            draw([item], pictures.crops[part], pictures.flips[part], out)
        result[place] = np.abs(slots[0].astype(np.int16) - slots[1]).mean()
    return result


def new_slots(threads: int, size: int) -> np.ndarray:
    """Return what `decode_all` writes to."""
    return np.zeros((threads, CHUNK, size, size, 3), np.uint8)
