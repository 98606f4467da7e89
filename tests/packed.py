"""Random packed crops with what Pillow makes of them, and random colours, for the pixel tests."""

import numpy as np
import torch
from PIL import Image

from mbv3dist.ops.color import CHANNEL_ORDERS

FILL = (12, 130, 250)


def random_picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Noise, or what photographs have more of: soft gradients. uint8 [H, W, 3]."""
    if rng.random() < 0.5:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def random_span(rng: np.random.Generator, side: int) -> tuple[float, float]:
    low, high = np.sort(rng.uniform(0, side, 2)).tolist()
    return (low, high) if high - low > 0.5 and rng.random() < 0.9 else (0.0, float(side))


def random_crops(rng: np.random.Generator, *, number: int, most: int, canvas: int) -> dict:
    """Return the arguments of `resample`, and the canvases that Pillow draws, uint8 [B, S, S, 3].

    Crops have up to `most` pixels a side, hold what the filter needs and a little more at random,
    lie in the buffer in no order, and have padding at the ends of their rows.
    """
    expected = np.empty((number, canvas, canvas, 3), np.uint8)
    expected[:] = FILL
    places = np.zeros((number, 8))
    layout = np.zeros((number, 4), np.int64)
    parts, end = [], 0
    for n in range(number):
        width, height = (int(side) for side in rng.integers(1, most + 1, 2))
        picture = random_picture(rng, width, height)
        (sx0, sx1), (sy0, sy1) = random_span(rng, width), random_span(rng, height)
        dx0, dy0 = (int(at) for at in rng.integers(0, canvas, 2))
        dx1, dy1 = int(rng.integers(dx0 + 1, canvas + 1)), int(rng.integers(dy0 + 1, canvas + 1))
        size = (dx1 - dx0, dy1 - dy0)
        drawn = Image.fromarray(picture).resize(
            size, Image.Resampling.BILINEAR, box=(sx0, sy0, sx1, sy1)
        )
        flip = bool(rng.random() < 0.5)
        if flip:
            drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected[n, dy0:dy1, dx0:dx1] = np.asarray(drawn)

        left, right = needed(sx0, sx1, size[0], width, int(rng.integers(0, 4)))
        top, bottom = needed(sy0, sy1, size[1], height, int(rng.integers(0, 4)))
        pad = int(rng.integers(0, 5))
        rows = np.full((bottom - top, 3 * (right - left) + pad), 77, np.uint8)
        rows[:, : 3 * (right - left)] = picture[top:bottom, left:right].reshape(bottom - top, -1)
        parts.append((end, rows))
        layout[n] = end, rows.shape[1], bottom - top, right - left
        end += rows.size
        places[n] = sx0 - left, sy0 - top, sx1 - left, sy1 - top, dx0, dy0, dx1, dy1
        if flip:
            places[n, [4, 6]] = dx1, dx0
    pixels = np.concatenate([rows.reshape(-1) for _, rows in parts])
    return {
        "pixels": torch.from_numpy(pixels),
        "layout": torch.from_numpy(layout),
        "places": torch.from_numpy(places.astype(np.float32)),
        "expected": expected,
    }


def needed(low: float, high: float, count: int, side: int, spare: int) -> tuple[int, int]:
    """First and one past the last source pixel that the filter needs, and some more."""
    step = (high - low) / count
    reach = max(step, 1.0)
    first = int(low + step / 2 - reach + 0.5) - spare
    last = int(high - step / 2 + reach + 0.5) + 1 + spare
    return max(first, 0), min(last, side)


def random_colors(generator: torch.Generator, number: int) -> torch.Tensor:
    """float32 [B, 6] as the host draws them, each change left out now and then."""
    color = torch.rand(number, 6, generator=generator) * 2
    color[:, 3] = torch.rand(number, generator=generator) - 0.5
    is_off = torch.rand(number, 4, generator=generator) < 0.25
    color[:, :4] = torch.where(is_off, torch.tensor([1.0, 1.0, 1.0, 0.0]), color[:, :4])
    color[:, 4] = torch.randint(0, 2, (number,), generator=generator)
    color[:, 5] = torch.randint(0, len(CHANNEL_ORDERS), (number,), generator=generator)
    return color


def random_images(generator: torch.Generator, number: int, height: int, width: int) -> torch.Tensor:
    """uint8 [B, 3, H, W], channels_last: noise, few levels, and nearly gray."""
    shape = (number, 3, height, width)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    images[1::3] = images[1::3] // 64 * 64
    images[2::3, 1] = images[2::3, 0]
    return images.contiguous(memory_format=torch.channels_last)
