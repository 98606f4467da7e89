"""Colours, normalisation and resizing on a real GPU, against the references on the CPU."""

import numpy as np
import pytest
import torch
from packed import FILL, random_colors, random_crops, random_images

from mbv3dist.ops.color import normalize_images
from mbv3dist.ops.resample import resample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def poison(num_bytes: int) -> None:
    """Leave memory behind that shows where a result was not written."""
    torch.full((num_bytes,), 0xAB, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(("height", "width"), [(224, 224), (320, 320), (37, 41), (1, 1)])
@pytest.mark.parametrize("with_color", [True, False])
def test_colours_equal_the_reference_to_the_level(height, width, with_color):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        images = random_images(generator, 12, height, width)
        color = random_colors(generator, 12) if with_color else None
        options = {"mean": MEAN, "std": STD}
        expected = normalize_images(images, color=color, **options)
        poison(expected.numel() * 4)
        there = color if color is None else color.cuda()
        out = normalize_images(images.cuda(), color=there, **options)
        assert out.is_contiguous(memory_format=torch.channels_last)
        error = (out.cpu() - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        # On some processors torch rounds a sum twice at the end of a row: a level, rarely two.
        assert error.max() < 2.01
        assert (error > 1e-3).float().mean() < 1e-3
        half = normalize_images(images.cuda(), color=there, dtype=torch.bfloat16, **options)
        assert torch.equal(half, out.bfloat16())


def test_colours_do_not_synchronise_and_can_be_captured():
    generator = torch.Generator().manual_seed(7)
    images = random_images(generator, 4, 64, 64).cuda()
    color = random_colors(generator, 4).cuda()
    options = {"mean": MEAN, "std": STD, "color": color}
    normalize_images(images, **options)  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        normalize_images(images, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = normalize_images(images, **options)
    images.copy_(random_images(generator, 4, 64, 64))
    color.copy_(random_colors(generator, 4))
    graph.replay()
    assert torch.equal(out, normalize_images(images, **options))


@pytest.mark.parametrize(
    ("most", "canvas"), [(4, 9), (60, 224), (500, 224), (700, 320), (3000, 224)]
)
def test_crops_are_pillows(most, canvas):
    rng = np.random.default_rng(most)
    case = random_crops(rng, number=8, most=most, canvas=canvas)
    expected = case.pop("expected")
    case["places"][3], expected[3] = 0, FILL  # no picture
    there = {name: value.cuda() for name, value in case.items()}
    options = {"size": (canvas, canvas), "fill": FILL}
    poison(expected.size)
    out = resample(**there, **options)
    assert out.is_contiguous(memory_format=torch.channels_last)
    error = np.abs(out.permute(0, 2, 3, 1).cpu().numpy().astype(int) - expected)
    assert error.max() <= 1
    assert error.mean() <= 0.3
    reference = resample(**case, **options)
    assert (out.cpu() != reference).float().mean() < 0.005  # where a sum ends at a half
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        poison(expected.size * 4)
        normalized = resample(**there, **options, mean=MEAN, std=STD, dtype=dtype)
        levels = normalize_images(out, mean=MEAN, std=STD, dtype=dtype)
        torch.testing.assert_close(normalized, levels, atol=1e-5, rtol=1e-2)


def test_crops_may_lie_in_memory_of_their_own():
    """As decoders leave them: the layout counts from `pixels`, wherever they are."""
    case = random_crops(np.random.default_rng(0), number=4, most=90, canvas=64)
    expected = case.pop("expected")
    ends = [*case["layout"][1:, 0].tolist(), len(case["pixels"])]
    base = torch.zeros(1, dtype=torch.uint8, device="cuda")
    crops = []
    for n, end in enumerate(ends):
        crops.append(case["pixels"][int(case["layout"][n, 0]) : end].cuda())
        case["layout"][n, 0] = crops[n].data_ptr() - base.data_ptr()
    out = resample(base, case["layout"].cuda(), case["places"].cuda(), size=(64, 64), fill=FILL)
    error = np.abs(out.permute(0, 2, 3, 1).cpu().numpy().astype(int) - expected)
    assert error.max() <= 1
