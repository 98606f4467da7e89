"""JPEG regions decoded by a GPU, a batch at a time, into memory of the device.

nvImageCodec gives pictures to the card's JPEG engine first and to nvJPEG's CUDA kernels next; where
it or its nvJPEG library is not installed, torchvision's CUDA decoder does whole pictures. What
these refuse (CMYK, lossless, arithmetic coding, damage) is decoded on the CPU, which tells refused
from damaged: the damaged ones are named by their place in the batch.

The pixels are not bit for bit those of the CPU: engines round the inverse transform and the colour
conversion in their own way. Nor do they notice all damage that a CPU decoder notices; checksums do.

Shapes: n pictures of a batch; sizes int32 [n, 2], width and height; regions int64 [n, 4], xyxy
pixels of the picture as it is stored, half-open.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Chroma that is interpolated at a region's edge lacks the neighbours beyond it: such pixels are
# decoded and not used.
EDGE = 2

_INSTALL = "pip install 'mbv3dist[gpu]', or set --data.decode cpu"


class DeviceCrop(NamedTuple):
    """Decoded RGB pixels in memory of the device, and what keeps that memory."""

    address: int
    pitch: int
    height: int
    width: int
    owner: Any


@dataclass
class Crops:
    """Decoded regions of a batch, as `ops.resample.resample` takes them.

    Attributes:
        pixels: uint8 [any] on the device; the offsets of `layout` count from its first byte.
        layout: int64 [n, 4] on the device: first byte, bytes from row to row, height, width. Four
            zeros where there is no picture.
        damaged: what is wrong with a picture, by its place.
        num_on_cpu: how many pictures the GPU refused and the CPU decoded.
        owners: what keeps memory that is not torch's; to be kept until the work that reads the
            pixels is done on the device (an event after it has passed).
    """

    pixels: Tensor
    layout: Tensor
    damaged: dict[int, ValueError] = field(default_factory=dict)
    num_on_cpu: int = 0
    owners: list[Any] = field(default_factory=list)


# Decodes regions of pictures; None for a picture that it cannot decode for whatever reason.
Engine = Callable[[Sequence[np.ndarray], np.ndarray], list[DeviceCrop | None]]


def decode_regions(
    engine: Engine,
    data: Sequence[memoryview],
    sizes: np.ndarray,
    regions: np.ndarray,
    *,
    device: torch.device,
    decode_on_cpu: Callable[[int], np.ndarray],
    is_jpeg: np.ndarray | None = None,
) -> Crops:
    """Decode a batch's regions on the current stream of the device.

    Args:
        engine: from `open_engine`.
        data: the pictures' bytes, unchanged until this returns.
        sizes: int32 [n, 2].
        regions: int64 [n, 4], inside the pictures, not empty.
        device: where the pixels go.
        decode_on_cpu: returns the region of the picture at a place, uint8 [h, w, 3], or raises
            ValueError: it is damaged.
        is_jpeg: bool [n], which pictures to try on the GPU; by default all of them.

    Returns:
        The crops. Each is exactly its region.
    """
    count = len(data)
    tried = np.flatnonzero(np.ones(count, bool) if is_jpeg is None else is_jpeg)
    wider = widen(regions[tried], sizes[tried])
    arrays = [np.frombuffer(data[place], np.uint8) for place in tried.tolist()]
    found: dict[int, DeviceCrop] = {}
    for place, area, crop in zip(
        tried.tolist(), wider, engine(arrays, wider) if arrays else [], strict=True
    ):
        if crop is not None:
            found[place] = _inside(crop, area, regions[place])

    missing = [place for place in range(count) if place not in found]
    on_cpu: dict[int, np.ndarray] = {}
    damaged: dict[int, ValueError] = {}
    for place in missing:
        try:
            on_cpu[place] = decode_on_cpu(place)
        except ValueError as error:
            damaged[place] = error
    pixels, offsets = _upload(on_cpu, device)
    layout = np.zeros((count, 4), np.int64)
    for place, array in on_cpu.items():
        height, width = array.shape[:2]
        layout[place] = offsets[place], 3 * width, height, width
    base = pixels.data_ptr()
    for place, crop in found.items():
        layout[place] = crop.address - base, crop.pitch, crop.height, crop.width
    return Crops(
        pixels=pixels,
        layout=_to_device(torch.from_numpy(layout), device),
        damaged=damaged,
        num_on_cpu=len(on_cpu),
        owners=[crop.owner for crop in found.values()],
    )


def widen(regions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the regions, int64 [n, 4], with `EDGE` more pixels on each side that has them."""
    low = np.maximum(regions[:, :2] - EDGE, 0)
    high = np.minimum(regions[:, 2:] + EDGE, sizes)
    return np.concatenate([low, high], axis=1)


def open_engine(device: torch.device) -> tuple[Engine, str]:
    """Return what decodes on this device, and its name: nvImageCodec, or torchvision.

    Raises:
        ValueError: there is no GPU, or no library that decodes on it.
    """
    if device.type != "cuda":
        raise ValueError(f"--data.decode gpu needs a CUDA device, not {device.type}; set it to cpu")
    if not torch.cuda.is_available():
        raise ValueError("--data.decode gpu needs a CUDA device, and there is none; set it to cpu")
    problems = []
    for make in (NvImageCodecEngine, TorchvisionEngine):
        try:
            engine = make(device)
            check_engine(engine)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            problems.append(f"{make.NAME}: {' '.join(str(error).split()) or type(error).__name__}")
        else:
            return engine, make.NAME
    raise ValueError(
        f"--data.decode gpu: no library here decodes on the GPU ({'; '.join(problems)}); {_INSTALL}"
    )


def check_engine(engine: Engine) -> None:
    """Raise ValueError unless an engine decodes a region of a plain JPEG: libraries may be missing.

    nvImageCodec without nvJPEG opens as well as with it, and then refuses every picture.
    """
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 120, 40)).save(file, "JPEG")
    region = np.array([[8, 4, 40, 36]])
    crop = engine([np.frombuffer(file.getvalue(), np.uint8)], region)[0]
    if crop is None:
        raise ValueError("it refuses a plain JPEG; is the nvJPEG library (nvidia-nvjpeg) missing?")
    _check_shape(crop, region[0])


class NvImageCodecEngine:
    """nvImageCodec on the JPEG engine of the card, then on nvJPEG's CUDA kernels."""

    NAME = "nvImageCodec"

    def __init__(self, device: torch.device, codec: Any = None):
        """Open a decoder on a device; `codec` is the nvidia.nvimgcodec package."""
        if codec is None:
            with _quiet_stderr():  # on import it tells of every format it has no library for
                codec = importlib.import_module("nvidia.nvimgcodec")
        self._codec = codec
        self._device = device
        kinds = codec.BackendKind
        self._decoder = codec.Decoder(
            device_id=torch.cuda.current_device() if device.index is None else device.index,
            backends=[codec.Backend(kinds.HW_GPU_ONLY), codec.Backend(kinds.HYBRID_CPU_GPU)],
            # As libjpeg does it. Without, chroma is doubled in blocks, several levels off.
            options=":fancy_upsampling=1",
        )
        # Regions are of the picture as it is stored.
        self._params = codec.DecodeParams(apply_exif_orientation=False)

    def __call__(self, data: Sequence[np.ndarray], regions: np.ndarray) -> list[DeviceCrop | None]:
        """Decode regions on the current stream."""
        crops: list[DeviceCrop | None] = [None] * len(data)
        streams, places = [], []
        for place, (array, (x0, y0, x1, y1)) in enumerate(zip(data, regions.tolist(), strict=True)):
            try:
                stream = self._codec.CodeStream(array)
                region = self._codec.Region(y0, x0, y1, x1)
                streams.append(stream.get_sub_code_stream(region=region))
            except RuntimeError:  # not a picture: whoever decodes it next says why
                continue
            places.append(place)
        if streams:
            queue = torch.cuda.current_stream(self._device).cuda_stream
            images = self._decoder.decode(streams, params=self._params, cuda_stream=queue)
            for place, stream, image in zip(places, streams, images, strict=True):
                if image is not None:
                    # The compressed bytes may still be on their way to the device.
                    crops[place] = device_crop(image, owner=(image, stream, data[place]))
                    _check_shape(crops[place], regions[place])
        return crops


class TorchvisionEngine:
    """torchvision's batched CUDA decoder, which decodes whole pictures."""

    NAME = "torchvision"

    def __init__(self, device: torch.device):
        """Check that this torchvision decodes JPEGs on CUDA devices."""
        from torchvision import io as torchvision_io

        if not hasattr(torchvision_io, "decode_jpeg"):
            raise ValueError("this version has no decode_jpeg")
        self._decode_jpeg = torchvision_io.decode_jpeg
        self._mode = torchvision_io.ImageReadMode.RGB
        self._device = device

    def __call__(self, data: Sequence[np.ndarray], regions: np.ndarray) -> list[DeviceCrop | None]:
        """Decode the pictures on the current stream and cut the regions out."""
        try:
            images: list[Tensor | None] = list(self._decode(data))
        except RuntimeError:  # of any of them, without saying which
            images = []
            for array in data:
                try:
                    images += self._decode([array])
                except RuntimeError:
                    images.append(None)
        crops: list[DeviceCrop | None] = []
        for image, (x0, y0, x1, y1) in zip(images, regions.tolist(), strict=True):
            if image is None:
                crops.append(None)
                continue
            crop = image[:, y0:y1, x0:x1].permute(1, 2, 0).contiguous()
            height, width = crop.shape[:2]
            crops.append(DeviceCrop(crop.data_ptr(), 3 * width, height, width, crop))
        return crops

    def _decode(self, data: Sequence[np.ndarray]) -> list[Tensor]:
        encoded = [torch.from_numpy(array.copy()) for array in data]  # torch wants writable memory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions announce their decoder's end
            images: list[Tensor] = self._decode_jpeg(encoded, mode=self._mode, device=self._device)
        return images


def device_crop(image: Any, *, owner: Any) -> DeviceCrop:
    """Return a picture on the device, uint8 [h, w, 3] with or without padded rows."""
    about = image.__cuda_array_interface__
    height, width, channels = about["shape"]
    if about["typestr"] != "|u1" or channels != 3:
        raise RuntimeError(f"decoded as {about['typestr']} {about['shape']}, not as 8-bit RGB")
    row, column, channel = about.get("strides") or (3 * width, 3, 1)
    assert (column, channel) == (3, 1)
    return DeviceCrop(about["data"][0], row, height, width, owner)


def _check_shape(crop: DeviceCrop | None, region: np.ndarray) -> None:
    x0, y0, x1, y1 = region.tolist()
    if crop is not None and (crop.width, crop.height) != (x1 - x0, y1 - y0):
        raise RuntimeError(
            f"asked for a region of {x1 - x0} x {y1 - y0} pixels, the decoder made "
            f"{crop.width} x {crop.height}"
        )


def _inside(crop: DeviceCrop, area: np.ndarray, region: np.ndarray) -> DeviceCrop:
    """Return the part of a crop, decoded as `area`, that is `region`."""
    left, top = int(region[0] - area[0]), int(region[1] - area[1])
    return DeviceCrop(
        crop.address + top * crop.pitch + 3 * left,
        crop.pitch,
        int(region[3] - region[1]),
        int(region[2] - region[0]),
        crop.owner,
    )


def _upload(crops: dict[int, np.ndarray], device: torch.device) -> tuple[Tensor, dict[int, int]]:
    """Send crops to the device as one buffer; returns it and where each begins."""
    offsets, total = {}, 0
    for place, crop in crops.items():
        offsets[place] = total
        total += crop.size
    # Never empty: offsets of other memory count from its address.
    buffer = torch.zeros(max(total, 1), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, crop in crops.items():
        buffer.numpy()[offsets[place] : offsets[place] + crop.size] = crop.reshape(-1)
    return buffer.to(device, non_blocking=True), offsets


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send what native code writes to standard error nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
