"""Anchors: torchvision's, the documented 300 px priors, and refused configurations."""

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from mbv3dist.models.anchors import AnchorConfig, make_anchors, scales_between
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops.boxes import anchors_to_pixels

SIZES_320 = [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]


def torchvision_anchors(config: AnchorConfig, sizes: list, size: tuple[int, int]) -> torch.Tensor:
    generator = DefaultBoxGenerator(
        [list(config.ratios)] * config.num_maps, scales=list(config.scales), clip=config.clip
    )
    images = ImageList(torch.zeros(1, 3, *size), [size])
    return generator(images, [torch.zeros(1, 1, *s) for s in sizes])[0]


def test_default_is_torchvisions_ssdlite() -> None:
    anchors = make_anchors(AnchorConfig(), SIZES_320)
    assert anchors.shape == (3234, 4)
    generator = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    theirs = generator._grid_default_boxes([list(s) for s in SIZES_320], [320, 320])
    torch.testing.assert_close(anchors, theirs, rtol=0, atol=0)
    assert scales_between(0.2, 0.95) == pytest.approx(AnchorConfig().scales)


@pytest.mark.parametrize("clip", [True, False])
def test_pixels_are_torchvisions_on_any_canvas(clip: bool) -> None:
    config = AnchorConfig(
        scales=(0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.1), ratios=(1.5, 2.0, 4.0), clip=clip
    )
    size = (200, 344)
    sizes = feature_sizes(size)
    ours = anchors_to_pixels(make_anchors(config, sizes), size)
    theirs = torchvision_anchors(config, sizes, size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_300_px_priors_with_steps() -> None:
    pixels = [(60, 105), (105, 150), (150, 195), (195, 240), (240, 285), (285, 330)]
    steps = (16, 32, 64, 100, 150, 300)
    config = AnchorConfig(
        scales=(*(low / 300 for low, _ in pixels), pixels[-1][1] / 300), steps=steps
    )
    expected = []
    for map_size, step, (low, high) in zip((19, 10, 5, 3, 2, 1), steps, pixels, strict=True):
        for row in range(map_size):
            for column in range(map_size):
                centre = [(column + 0.5) * step / 300, (row + 0.5) * step / 300]
                between = math.sqrt(low * high)
                shapes = [(low, low), (between, between)]
                for ratio in (2, 3):
                    shapes.append((low * math.sqrt(ratio), low / math.sqrt(ratio)))
                    shapes.append((low / math.sqrt(ratio), low * math.sqrt(ratio)))
                expected += [[*centre, w / 300, h / 300] for w, h in shapes]
    anchors = make_anchors(config, feature_sizes((300, 300)), size=(300, 300))
    assert anchors.shape == (3000, 4)
    torch.testing.assert_close(anchors, torch.tensor(expected).clamp(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"scales": (0.5,)}, {"scales": (0.0, 1.0)}, {"ratios": (-2.0,)}, {"steps": (16.0, 32.0)}],
)
def test_impossible_configurations_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AnchorConfig(**arguments)


def test_scales_for_another_number_of_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="give 7 scales"):
        make_anchors(AnchorConfig(scales=(0.2, 0.5, 0.9)), SIZES_320)
    with pytest.raises(ValueError, match="0 < minimum < maximum"):
        scales_between(0.9, 0.2)
