"""A model's input from whole pictures, as the library that trained it makes it.

The loader's decoder resizes one way: uint8, bilinear, antialiased. Models of torchvision and timm
want others, and equal outputs need equal pixels to the last bit. So their pictures are decoded
whole and resized here by the functions those libraries call themselves:

- uint8 with antialiasing: Pillow's resize (torchvision's and timm's transforms on pictures);
- uint8 without: torch's, rounded to levels (torchvision's transforms on uint8 tensors);
- float32: normalised first, then torch's (what torchvision's detectors do inside the model).

Shapes: pictures [3, H, W], S side of the canvas in pixels.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mbv3dist.data.decode import MAX_PIXELS, Picture
from mbv3dist.data.packed import Compressed
from mbv3dist.models.spec import ModelSpec, Preprocess

_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def whole_inputs(files: Compressed, spec: ModelSpec, *, pool: Executor) -> Tensor:
    """Decode and prepare the pictures of a batch.

    Args:
        files: Of a batch of `eval_batches(..., decode="gpu")`.
        spec: Of the model.
        pool: Threads that share the work.

    Returns:
        float32 [B, 3, S, S], normalised, on the CPU.

    Raises:
        DamagedShardError: A picture cannot be decoded; it is named.
    """

    def prepare(place: int) -> Tensor | ValueError:
        try:
            return whole_input(Picture(files.data[place]).image(), spec)
        except ValueError as error:
            return error

    inputs = []
    for place, result in enumerate(pool.map(prepare, range(len(files.data)))):
        if isinstance(result, ValueError):
            files.report(place, result)
            raise result  # an evaluation has no budget for damage, so `report` has raised already
        inputs.append(result)
    return torch.stack(inputs)


def whole_input(picture: Image.Image | Tensor, spec: ModelSpec) -> Tensor:
    """Prepare one picture.

    Args:
        picture: RGB; or float [3, H, W] in [0, 1], on the CPU.
        spec: Of the model.

    Returns:
        float32 [3, S, S], normalised.

    Raises:
        ValueError: The picture is so long and thin that resizing it would fill the memory.
    """
    preprocess, size = spec.preprocess, spec.input_size
    height, width = (
        picture.shape[1:] if isinstance(picture, Tensor) else (picture.height, picture.width)
    )
    if spec.task == "detection":
        target = (size, size)
    else:
        target = _shorter_side_to(preprocess.resize, height=height, width=width)
    if target[0] * target[1] > MAX_PIXELS:
        raise ValueError(
            f"a picture of {width} x {height} pixels becomes {target[1]} x {target[0]} when its "
            f"shorter side is resized to {preprocess.resize}, and the limit is {MAX_PIXELS} "
            "pixels; crop it"
        )
    if preprocess.dtype == "float32":
        values = (
            picture.float() if isinstance(picture, Tensor) else _levels(picture).float().div_(255)
        )
        resized = _interpolate(_normalize(values, preprocess), target, preprocess)
        return _center_crop(resized, size, fill=_normalize(torch.zeros(3, 1, 1), preprocess))
    if isinstance(picture, Tensor):
        picture = _picture(picture)
    if preprocess.antialias:
        resized = _levels(picture.resize(target[::-1], _PILLOW[preprocess.interpolation]))
    else:
        resized = _interpolate(_levels(picture).float(), target, preprocess)
        resized = resized.round().clamp(0, 255)
    cropped = _center_crop(resized, size, fill=torch.zeros(3, 1, 1))
    return _normalize(cropped.float().div_(255), preprocess)


def _levels(picture: Image.Image) -> Tensor:
    """A picture as uint8 [3, H, W], in the memory order of torchvision's `pil_to_tensor`.

    The order matters: torch resizes channels-last memory by another kernel, which rounds otherwise.
    """
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _picture(values: Tensor) -> Image.Image:
    """The nearest picture to float [3, H, W] in [0, 1]."""
    levels = (values * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.contiguous().numpy())


def _normalize(values: Tensor, preprocess: Preprocess) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return (values - mean).div_(std)


def _interpolate(values: Tensor, target: tuple[int, int], preprocess: Preprocess) -> Tensor:
    """Resize float [3, H, W] to (height, width)."""
    return F.interpolate(
        values[None],
        size=target,
        mode=preprocess.interpolation,
        align_corners=False,
        antialias=preprocess.antialias,
    )[0]


def _shorter_side_to(resize: int, *, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture whose shorter side becomes `resize`, as torchvision rounds."""
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


def _center_crop(values: Tensor, size: int, *, fill: Tensor) -> Tensor:
    """The central [3, size, size], where torchvision's `center_crop` has it; black around."""
    for axis in (1, 2):
        excess = values.shape[axis] - size
        if excess < 0:
            values = _pad(values, axis=axis, size=size, fill=fill)
        elif excess > 0:
            values = values.narrow(axis, round(excess / 2.0), size)
    return values


def _pad(values: Tensor, *, axis: int, size: int, fill: Tensor) -> Tensor:
    """Add `fill` before and after along an axis; the smaller half comes first."""
    length = values.shape[axis]
    shape = list(values.shape)
    shape[axis] = size
    padded = fill.to(values.dtype).expand(shape).clone()
    padded.narrow(axis, (size - length) // 2, length).copy_(values)
    return padded
