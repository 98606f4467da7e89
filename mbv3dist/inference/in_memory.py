"""Pictures in memory, as notebooks have them, in the one form that the decoder takes."""

import io
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ImageLike: TypeAlias = Image.Image | np.ndarray | Tensor
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def is_float_picture(image: ImageLike) -> bool:
    """Whether it is a tensor of numbers from 0 to 1.

    Raises:
        ValueError: A tensor has another form.
    """
    if not isinstance(image, Tensor):
        return False
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"a tensor has shape {tuple(image.shape)}; give [3, H, W]")
    if not image.is_floating_point():
        return False
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError("a float tensor has values outside 0 to 1; divide it by 255")
    return True


def encoded(image: ImageLike) -> bytes:
    """A picture as the bytes of a lossless file, so that one decoder serves all.

    Raises:
        ValueError: It has another form.
    """
    if isinstance(image, Tensor):
        if is_float_picture(image):
            image = (image * 255).round().to(torch.uint8)
        image = image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        grey_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not grey_or_rgb:
            raise ValueError(
                f"an array is {image.dtype} {image.shape}; give uint8 [H, W, 3] or [H, W]"
            )
        image = Image.fromarray(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
