"""Crop, antialiased resize, flip, placement and normalisation of packed pictures, on the device.

Decoded crops of different sizes lie in one buffer; one launch makes the batch of them. On the CPU
resizing costs a quarter of what decoding costs, and only the crops' bytes go to the device.

The pixels are Pillow's (`Image.resize` with BILINEAR and `box`): a triangle filter as wide as the
scale, or one pixel where pictures grow, with weights that sum to 1; first along rows, rounded to
whole levels, then along columns, rounded again. (Tall pictures Pillow 13 filters along columns
first, which moves up to every fourth pixel by a level.) The filter reaches beyond the box as far as
the crop has pixels, so a crop with that many more pixels on each side is as good as the picture.

Shapes: B crops in `pixels`, uint8 [any], rows of RGB triplets; the canvas is H x W pixels.
layout: int64 [B, 4], per crop its first byte in `pixels`, bytes from row to row, height and width.
places: float32 [B, 8], per crop the source rectangle xyxy in pixels of the crop and the canvas
rectangle xyxy it fills, with x0 > x1 where it is mirrored: `Batch.view` moved to the crop's origin.
A row of zeros stands for no picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbv3dist.ops.color import has_triton

FloatTriple = tuple[float, float, float]


@torch.no_grad()
def resample(
    pixels: Tensor,
    layout: Tensor,
    places: Tensor,
    *,
    size: tuple[int, int],
    fill: tuple[int, int, int],
    mean: FloatTriple | None = None,
    std: FloatTriple | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Draw packed crops onto canvases.

    Args:
        pixels: uint8 [any], see above. For the kernel, an offset of `layout` may lead to any memory
            of the device; for the reference, it stays in the storage of `pixels`.
        layout: int64 [B, 4], see above, on the same device.
        places: float32 [B, 8], see above, on the same device.
        size: H and W.
        fill: levels of the canvas outside of the pictures.
        mean: for a `dtype` of floats: the result is (x / 255 - mean) / std.
        std: likewise.
        dtype: uint8, float16, bfloat16 or float32.

    Returns:
        [B, 3, H, W] of `dtype`, in channels_last memory order.
    """
    if (mean is None) != (std is None) or (mean is None) != (dtype == torch.uint8):
        raise ValueError(f"mean and std belong to a dtype of floats, and uint8 has none: {dtype}")
    batch = len(layout)
    if layout.shape != (batch, 4) or places.shape != (batch, 8):
        raise ValueError(
            f"layout must be [B, 4] and places [B, 8], got {list(layout.shape)} and "
            f"{list(places.shape)}"
        )
    if pixels.is_cuda and has_triton():
        from mbv3dist.ops import resample_triton

        with torch.cuda.device_of(pixels):  # Triton launches on the current device
            return resample_triton.resample(
                pixels, layout, places, size=size, fill=fill, mean=mean, std=std, dtype=dtype
            )
    canvas = torch.tensor(fill, dtype=torch.uint8, device=pixels.device)
    canvas = canvas.repeat(batch, *size, 1)
    for out, row, place in zip(canvas, layout.tolist(), places.double().tolist(), strict=True):
        _draw(pixels, row, place, out)
    images = canvas.permute(0, 3, 1, 2)
    if mean is None or std is None:
        return images
    shape = (1, 3, 1, 1)
    means, stds = (torch.tensor(v, device=pixels.device).view(shape) for v in (mean, std))
    return images.float().div_(255).sub_(means).div_(stds).to(dtype)


def _draw(pixels: Tensor, row: list[int], place: list[float], out: Tensor) -> None:
    """Draw one crop onto `out`, uint8 [H, W, 3]: the reference."""
    first, pitch, height, width = row
    x0, x1 = int(min(place[4], place[6])), int(max(place[4], place[6]))
    y0, y1 = int(place[5]), int(place[7])
    if x0 == x1 or y0 == y1:
        return
    crop = pixels.as_strided((height, width, 3), (pitch, 3, 1), pixels.storage_offset() + first)
    across = _weights(place[0], place[2], x1 - x0, width).to(pixels.device)
    down = _weights(place[1], place[3], y1 - y0, height).to(pixels.device)
    rows = torch.einsum("xw,hwc->hxc", across, crop.float()).add_(0.5).floor_()
    patch = torch.einsum("yh,hxc->yxc", down, rows).add_(0.5).floor_().clamp_(0, 255)
    out[y0:y1, x0:x1] = patch.flip(1) if place[4] > place[6] else patch


def _weights(low: float, high: float, count: int, length: int) -> Tensor:
    """Return float32 [count, length]: how much of each source pixel is in each target pixel."""
    step = (high - low) / count
    centers = low + (torch.arange(count, dtype=torch.float64) + 0.5) * step
    places = torch.arange(length, dtype=torch.float64) + 0.5
    distance = (places[None, :] - centers[:, None]).abs() / max(step, 1.0)
    weights = (1 - distance).clamp_(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()
