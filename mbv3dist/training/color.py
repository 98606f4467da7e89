"""Colour changes on the device, for a whole batch at once.

The factors were drawn on the host, per sample (`Batch.color`), so that they do not depend on the
number of ranks or threads. The operations are torchvision's (`adjust_brightness` and friends), in
this order: brightness, contrast, saturation, hue.
"""

import torch
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision's rgb_to_grayscale


def adjust_color(images: Tensor, color: Tensor, *, with_hue: bool = True) -> Tensor:
    """Applies per-sample colour changes.

    Args:
        images: float [B, 3, H, W] in 0..1.
        color: float32 [B, 4], factors of brightness, contrast and saturation (1 = unchanged) and
            the hue shift in turns (0 = unchanged).
        with_hue: False leaves hues alone; the way to HSV and back is most of the cost.

    Returns:
        float [B, 3, H, W] in 0..1.
    """
    brightness, contrast, saturation, hue = (
        part[:, None, None, None].to(images.dtype) for part in color.unbind(1)
    )
    images = (images * brightness).clamp(0, 1)
    mean = _gray(images).mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean.expand_as(images), images, contrast).clamp(0, 1)
    images = torch.lerp(_gray(images).expand_as(images), images, saturation).clamp(0, 1)
    return _shift_hue(images, hue) if with_hue else images


def _gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of each sample; through HSV, with the sextant formula for the way back."""
    red, green, blue = images.unbind(1)
    value, _ = images.max(dim=1)
    chroma = value - images.min(dim=1).values
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * shift[:, :, 0, 0].unsqueeze(-1)
    # channel = value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (offset + hue) mod 6
    channels = [
        value - chroma * torch.minimum(k := (offset + hue) % 6, 4 - k).clamp(0, 1)
        for offset in (5.0, 3.0, 1.0)
    ]
    shifted = torch.stack(channels, dim=1)
    return torch.where(shift == 0, images, shifted)
