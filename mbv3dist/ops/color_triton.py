"""Colour distortion and normalisation on a GPU: what color.py's reference does, in two launches.

Contrast needs a picture's mean first, so one launch sums the gray levels and a second one does all
operations and the normalisation, with the pixels in registers in between. Bytes per pixel of a
picture: 3 read twice (the second time mostly from the L2 cache), 6 or 12 written; the reference
takes some forty passes. A picture's parameters are the same for all threads of a program, so what
a picture does not need (half of the changes) costs it nothing.

Arithmetic is that of the reference to the last bit: the launches forbid the compiler to fuse
multiplications with additions, and where the reference rounds once, `tl.fma` stands. Sums of gray
levels are integers, so they do not depend on an order.
"""

# Kernels are Triton's language: their parameters have no Python types, constants are in capitals.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbv3dist.ops.color import LEVELS, LUMA, NUM_PARAMETERS

BLOCK = 1024  # pixels of a program
NUM_WARPS = 4

_RED: tl.constexpr = tl.constexpr(LUMA[0])
_GREEN: tl.constexpr = tl.constexpr(LUMA[1])
_BLUE: tl.constexpr = tl.constexpr(LUMA[2])
_LEVELS: tl.constexpr = tl.constexpr(LEVELS)


def normalize_images(
    images: Tensor,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    color: Tensor | None,
    with_hue: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Do what `color.normalize_images` does; the result is in channels_last memory order."""
    images = images.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)
    batch, _, height, width = images.shape
    num_blocks = triton.cdiv(height * width, BLOCK)
    grid = (num_blocks, batch)
    if not images.numel():
        return out
    sums = torch.empty(batch, num_blocks, dtype=torch.int32, device=images.device)
    if color is not None:
        color = _checked(color, batch)
        sum_gray[grid](
            images,
            color,
            sums,
            height * width,
            WITH_HUE=with_hue,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    scale, shift = zip(
        *((1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)), strict=True
    )
    distort_and_normalize[grid](
        images,
        sums if color is None else color,  # without colours neither is read
        sums,
        out,
        height * width,
        num_blocks,
        *scale,
        *shift,
        WITH_COLOR=color is not None,
        WITH_HUE=with_hue,
        BLOCK=BLOCK,
        SUMS=triton.next_power_of_2(num_blocks),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _checked(color: Tensor, batch: int) -> Tensor:
    if color.shape != (batch, NUM_PARAMETERS):
        raise ValueError(f"colours must be [{batch}, {NUM_PARAMETERS}], got {list(color.shape)}")
    return color.float().contiguous()


@triton.jit
def _gray(red, green, blue):
    return tl.floor(tl.fma(blue, _BLUE, tl.fma(green, _GREEN, red * _RED)))


@triton.jit
def _mix(value, other, ratio):
    mixed = tl.fma(other, 1.0 - ratio, value * ratio)
    return tl.floor(tl.minimum(tl.maximum(mixed, 0.0), 255.0))


@triton.jit
def _brighten(value, factor):
    return tl.floor(tl.minimum(value * factor, 255.0))


@triton.jit
def _unit(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _channel(place, value, falling, rising, least):
    channel = tl.where(place == 1, falling, tl.where(place == 4, rising, least))
    channel = tl.where((place == 0) | (place == 5), value, channel)
    return tl.floor(channel * _LEVELS)


@triton.jit
def _turn_hue(red, green, blue, shift):
    red *= 1.0 / 255.0
    green *= 1.0 / 255.0
    blue *= 1.0 / 255.0
    value = tl.maximum(red, tl.maximum(green, blue))
    chroma = value - tl.minimum(red, tl.minimum(green, blue))
    saturation = tl.div_rn(chroma, tl.where(chroma == 0, 1.0, value))
    divisor = tl.where(chroma == 0, 1.0, chroma)
    to_red = tl.div_rn(value - red, divisor)
    to_green = tl.div_rn(value - green, divisor)
    to_blue = tl.div_rn(value - blue, divisor)
    hue = tl.where(value == green, to_red + 2.0 - to_blue, to_green + 4.0 - to_red)
    hue = tl.where(value == red, to_blue - to_green, hue) * (1.0 / 6.0) + 1.0
    hue = hue - tl.floor(hue) + shift
    hue = (hue - tl.floor(hue)) * 6.0
    sextant = tl.floor(hue)
    ramp = saturation * (hue - sextant)
    falling = _unit((1.0 - ramp) * value)
    rising = _unit((ramp + (1.0 - saturation)) * value)
    least = _unit((1.0 - saturation) * value)
    place = sextant.to(tl.int32)
    red = _channel(place % 6, value, falling, rising, least)
    green = _channel((place + 4) % 6, value, falling, rising, least)
    blue = _channel((place + 2) % 6, value, falling, rising, least)
    return red, green, blue


@triton.jit
def _before_late_contrast(red, green, blue, color, mean, WITH_HUE: tl.constexpr):
    """Brightness was done; contrast where it comes first, then saturation and hue."""
    contrast = tl.load(color + 1)
    saturation = tl.load(color + 2)
    if (contrast != 1.0) & (tl.load(color + 4) == 0.0):
        red = _mix(red, mean, contrast)
        green = _mix(green, mean, contrast)
        blue = _mix(blue, mean, contrast)
    if saturation != 1.0:
        gray = _gray(red, green, blue)
        red = _mix(red, gray, saturation)
        green = _mix(green, gray, saturation)
        blue = _mix(blue, gray, saturation)
    if WITH_HUE:
        shift = tl.load(color + 3)
        if shift != 0.0:
            red, green, blue = _turn_hue(red, green, blue, shift)
    return red, green, blue


@triton.jit
def _load_pixels(images, pixel, is_inside):
    red = tl.load(images + pixel * 3, mask=is_inside, other=0).to(tl.float32)
    green = tl.load(images + pixel * 3 + 1, mask=is_inside, other=0).to(tl.float32)
    blue = tl.load(images + pixel * 3 + 2, mask=is_inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit(do_not_specialize=["num_pixels"])
def sum_gray(
    images,  # uint8 [B, pixels, 3]
    color,  # float32 [B, 6]
    sums,  # int32 [B, blocks]
    num_pixels,
    WITH_HUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the gray levels of a block of a picture, as they are when its contrast is changed."""
    sample = tl.program_id(1).to(tl.int64)
    color += sample * 6
    if tl.load(color + 1) != 1.0:
        pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        is_inside = pixel < num_pixels
        red, green, blue = _load_pixels(images + sample * num_pixels * 3, pixel, is_inside)
        brightness = tl.load(color)
        red = _brighten(red, brightness)
        green = _brighten(green, brightness)
        blue = _brighten(blue, brightness)
        if tl.load(color + 4) != 0.0:
            red, green, blue = _before_late_contrast(red, green, blue, color, 0.0, WITH_HUE)
        gray = tl.where(is_inside, _gray(red, green, blue), 0.0).to(tl.int32)
        tl.store(sums + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(gray, 0))


@triton.jit(do_not_specialize=["num_pixels", "num_blocks"])
def distort_and_normalize(
    images,  # uint8 [B, pixels, 3]
    color,  # float32 [B, 6]
    sums,  # int32 [B, blocks]
    out,  # float [B, pixels, 3]
    num_pixels,
    num_blocks,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    WITH_COLOR: tl.constexpr,
    WITH_HUE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Change a block's colours and write it normalised."""
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = pixel < num_pixels
    images += sample * num_pixels * 3
    out += sample * num_pixels * 3
    red, green, blue = _load_pixels(images, pixel, is_inside)
    if WITH_COLOR:
        color += sample * 6
        brightness = tl.load(color)
        red = _brighten(red, brightness)
        green = _brighten(green, brightness)
        blue = _brighten(blue, brightness)
        contrast = tl.load(color + 1)
        mean = 0.0
        if contrast != 1.0:
            block = tl.arange(0, SUMS)
            part = tl.load(sums + sample * num_blocks + block, mask=block < num_blocks, other=0)
            mean = tl.div_rn(tl.sum(part, 0).to(tl.float32), num_pixels.to(tl.float32))
        red, green, blue = _before_late_contrast(red, green, blue, color, mean, WITH_HUE)
        if (contrast != 1.0) & (tl.load(color + 4) != 0.0):
            red = _mix(red, mean, contrast)
            green = _mix(green, mean, contrast)
            blue = _mix(blue, mean, contrast)
        # The six orders in lexicographic order: which channel each place of the result takes.
        order = tl.load(color + 5).to(tl.int32)
        first = tl.where(order < 2, red, tl.where(order < 4, green, blue))
        second = tl.where(
            (order == 0) | (order == 5), green, tl.where((order == 1) | (order == 3), blue, red)
        )
        third = tl.where(
            (order == 0) | (order == 2), blue, tl.where((order == 1) | (order == 4), green, red)
        )
        red, green, blue = first, second, third
    kind = out.dtype.element_ty
    tl.store(out + pixel * 3, tl.fma(red, red_scale, red_shift).to(kind), mask=is_inside)
    tl.store(out + pixel * 3 + 1, tl.fma(green, green_scale, green_shift).to(kind), mask=is_inside)
    tl.store(out + pixel * 3 + 2, tl.fma(blue, blue_scale, blue_shift).to(kind), mask=is_inside)
