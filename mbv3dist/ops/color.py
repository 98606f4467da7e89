"""Colour distortion and normalisation of a whole batch, on the device.

The parameters are drawn on the host, per sample, so that they do not depend on the number of ranks
or threads. The operations are torchvision's v2 functions in the order of its
RandomPhotometricDistort, SSD's distortion (Liu et al., ECCV 2016): brightness, contrast,
saturation, hue, contrast here instead for half of the samples, and the channels permuted.

Pictures of whole levels (uint8) come out as torchvision's do, level by level. It cuts the fraction
off after each operation, and a level lost there can be two after the next one; so every operation
here rounds where and how torchvision's does, rather than once at the end. What can still differ
between two machines is the last bit of a float32 sum or product, which is a level now and then.
`color_triton.py` does the same on a GPU in two launches.

Shapes: B pictures of H x W; images [B, 3, H, W]; color: float32 [B, 6], one row per sample:
brightness, contrast and saturation factor (1 = unchanged), hue shift in turns (0 = unchanged),
1 where contrast comes last, number of the channels' order (0 = as they are).
"""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, to the digits that torchvision's gray has
CHANNEL_ORDERS = tuple(itertools.permutations(range(3)))
NUM_PARAMETERS = 6
# torchvision's way from 0..1 to uint8: each level has nearly the same share, and 1 is 255.
LEVELS = 255.999


@torch.no_grad()
def normalize_images(
    images: Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    color: Tensor | None = None,
    with_hue: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turn a batch of pixels into the model's input: colours, then (x / 255 - mean) / std.

    Args:
        images: uint8 [B, 3, H, W], best in channels_last memory order.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        color: float32 [B, 6] (see above), or None to leave colours alone.
        with_hue: False where no sample shifts its hue, which saves the way to HSV and back.
        dtype: of the result.

    Returns:
        [B, 3, H, W] of `dtype`, in the memory order of `images`.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, got {images.dtype}")
    if images.is_cuda and has_triton():
        from mbv3dist.ops import color_triton

        with torch.cuda.device_of(images):  # Triton launches on the current device
            return color_triton.normalize_images(
                images, mean=mean, std=std, color=color, with_hue=with_hue, dtype=dtype
            )
    if color is not None:
        images = adjust_color(images, color, with_hue=with_hue)
    shape = (1, 3, 1, 1)
    means, stds = (torch.tensor(v, device=images.device).view(shape) for v in (mean, std))
    return images.float().div_(255).sub_(means).div_(stds).to(dtype)


def adjust_color(images: Tensor, color: Tensor, *, with_hue: bool = True) -> Tensor:
    """Apply per-sample colour changes: the reference, and what a CPU uses.

    Sample by sample, since on a CPU a picture stays in the cache from one operation to the next,
    and what a sample does not need (half of the changes) costs nothing.

    Args:
        images: uint8 [B, 3, H, W], or float32 in 0..1, of which no fraction is cut off.
        color: float32 [B, 6] (see above).
        with_hue: False where no sample shifts its hue.

    Returns:
        [B, 3, H, W] of the same type, in the same memory order.
    """
    if color.shape != (len(images), NUM_PARAMETERS):
        raise ValueError(
            f"colours must be [{len(images)}, {NUM_PARAMETERS}], got {list(color.shape)}"
        )
    out = torch.empty_like(images)
    for image, changed, row in zip(images, out, color.tolist(), strict=True):
        brightness, contrast, saturation, shift, is_late, order = row
        pixels = _Pixels(image)
        if brightness != 1:
            pixels.brighten(brightness)
        if contrast != 1 and not is_late:
            pixels.adjust_contrast(contrast)
        if saturation != 1:
            pixels.blend(pixels.gray(), saturation)
        if with_hue and shift != 0:
            pixels.turn_hue(shift)
        if contrast != 1 and is_late:
            pixels.adjust_contrast(contrast)
        for target, channel in zip(changed, CHANNEL_ORDERS[int(order)], strict=True):
            target.copy_(pixels.values[channel])
    return out


@cache
def has_triton() -> bool:
    """Whether Triton is installed; where it is not, the reference works on the GPU."""
    return importlib.util.find_spec("triton") is not None


class _Pixels:
    """One picture while it is changed.

    Attributes:
        values: float32 [3, H, W], levels of 0..255 or fractions of 0..1.
        bound: their largest value.
    """

    def __init__(self, image: Tensor):
        self.is_levels = image.dtype == torch.uint8
        self.bound = 255.0 if self.is_levels else 1.0
        self.values = image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    def cut(self, values: Tensor) -> Tensor:
        """Cut off fractions of levels."""
        return values.floor_() if self.is_levels else values

    def brighten(self, factor: float) -> None:
        self.cut(self.values.mul_(factor).clamp_(0, self.bound))

    def gray(self) -> Tensor:
        """Return float32 [H, W]."""
        red, green, blue = self.values
        return self.cut((red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]))

    def blend(self, other: Tensor, ratio: float) -> None:
        """Mix with gray values; `add_` rounds the product and the sum at once."""
        mixed = self.values.mul_(ratio).add_(other, alpha=1.0 - ratio)
        self.cut(mixed.clamp_(0, self.bound))

    def adjust_contrast(self, factor: float) -> None:
        self.blend(self.gray().double().mean().float(), factor)

    def turn_hue(self, shift: float) -> None:
        """Through hue, saturation and value, and back."""
        values = self.values.mul_(1 / 255) if self.is_levels else self.values
        red, green = values[0], values[1]
        value, lowest = values.amax(0), values.amin(0)
        chroma = value - lowest
        is_gray = chroma == 0
        saturation = chroma / value.where(~is_gray, 1)
        # How far each channel is from the strongest one, in units of the chroma.
        to_red, to_green, to_blue = (value - values).div_(chroma.where(~is_gray, 1))
        hue = torch.where(value == green, to_red + 2 - to_blue, to_green + 4 - to_red)
        hue = torch.where(value == red, to_blue - to_green, hue)
        hue = hue.mul_(1 / 6).add_(1)
        hue = hue.sub_(hue.floor()).add_(shift)
        hue = hue.sub_(hue.floor()).mul_(6)

        sextant = hue.floor()
        ramp = saturation * (hue - sextant)
        least = 1 - saturation
        falling = (1 - ramp).mul_(value).clamp_(0, 1)
        rising = (ramp + least).mul_(value).clamp_(0, 1)
        least = least.mul_(value).clamp_(0, 1)
        # Red is strongest in sextants 5 and 0, green in 1 and 2, blue in 3 and 4.
        for channel, turn in zip(values, (0, 4, 2), strict=True):
            place = (sextant + turn).remainder_(6)
            torch.where(place == 4, rising, least, out=channel)
            torch.where(place == 1, falling, channel, out=channel)
            torch.where((place == 0) | (place == 5), value, channel, out=channel)
        if self.is_levels:
            self.cut(values.mul_(LEVELS))
