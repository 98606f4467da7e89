"""Runs the Triton kernels in Triton's interpreter and prints how far they are from the references.

A process of its own: the interpreter has to be asked for before Triton is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from packed import FILL, random_colors, random_crops, random_images

from mbv3dist.ops import color_triton, resample_triton
from mbv3dist.ops.color import normalize_images
from mbv3dist.ops.resample import resample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def colors() -> dict:
    generator = torch.Generator().manual_seed(1)
    worst, different, count = 0.0, 0, 0
    for height, width, with_color, with_hue in (
        (1, 1, True, True),
        (37, 41, True, True),  # two blocks, the second one not full
        (16, 64, True, False),  # one block, full
        (33, 40, False, True),
    ):
        images = random_images(generator, 6, height, width)
        color = random_colors(generator, 6)
        if not with_hue:
            color[:, 3] = 0
        options = {
            "mean": MEAN,
            "std": STD,
            "color": color if with_color else None,
            "with_hue": with_hue,
            "dtype": torch.float32,
        }
        out = color_triton.normalize_images(images, **options)
        assert out.is_contiguous(memory_format=torch.channels_last)
        levels = torch.tensor(STD).view(3, 1, 1) * 255
        error = ((out - normalize_images(images, **options)) * levels).abs()
        worst = max(worst, error.max().item())
        different += int((error > 0.5).sum())
        count += error.numel()
    return {"worst": worst, "different": different / count}


def crops() -> dict:
    rng = np.random.default_rng(2)
    errors, different, normalized = [], 0.0, 0.0
    for most, canvas in ((4, 9), (40, 33), (90, 40), (30, 70)):
        case = random_crops(rng, number=3, most=most, canvas=canvas)
        expected = case.pop("expected")
        case["places"][2], expected[2] = 0, FILL  # no picture
        options = {"size": (canvas, canvas), "fill": FILL}
        out = resample_triton.resample(**case, **options, mean=None, std=None, dtype=torch.uint8)
        assert out.is_contiguous(memory_format=torch.channels_last)
        pixels = out.permute(0, 2, 3, 1).numpy().astype(int)
        errors.append(np.abs(pixels - expected))
        reference = resample(**case, **options).permute(0, 2, 3, 1).numpy().astype(int)
        different = max(different, float((pixels != reference).mean()))
        options |= {"mean": MEAN, "std": STD, "dtype": torch.bfloat16}
        out = resample_triton.resample(**case, **options)
        error = out.float() - resample(**case, **options).float()
        normalized = max(normalized, error.abs().max().item())
    return {
        "worst": int(max(error.max() for error in errors)),
        "mean": float(max(error.mean() for error in errors)),
        "different": different,
        "normalized": normalized,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"colors": colors(), "crops": crops()}))
