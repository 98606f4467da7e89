"""The small data set of the comparison, drawn and converted by our own converter."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mbv3dist import convert_imagefolder

NUM_CLASSES = 4
SHARD_BYTES = 96 * 1024


def make_data(root: Path, *, num_samples: int, side: int = 24) -> Path:
    """Draw `num_samples` JPEG files in class folders and convert them to `root`/data, split train.

    Returns:
        The data set's folder; the same numbers give the same bytes.
    """
    rng = np.random.default_rng(0)
    for number in range(num_samples):
        folder = root / "pictures" / f"class_{number % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        slope = np.linspace(0, 1, side)[:, None, None] * rng.uniform(-80, 80, 3)
        pixels = rng.uniform(60, 190, 3) + slope + rng.normal(0, 12, (side, side, 3))
        encoded = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=85)
        (folder / f"{number:06d}.jpg").write_bytes(encoded.getvalue())
    convert_imagefolder(
        root / "pictures", root / "data", split="train", workers=1, shard_bytes=SHARD_BYTES
    )
    return root / "data"
