"""Batched colour changes equal torchvision's per picture."""

import torch
from torchvision.transforms.v2 import functional as tvf

from mbv3dist.training.color import adjust_color


def test_equal_to_torchvision_within_a_level():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 17, 23, generator=generator)
    color = torch.rand(6, 4, generator=generator) * 0.8 + 0.6
    color[:, 3] = torch.rand(6, generator=generator) - 0.5
    expected = images
    for index, function in enumerate(
        (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    ):
        expected = torch.stack(
            [function(x, f) for x, f in zip(expected, color[:, index].tolist(), strict=True)]
        )
    assert (adjust_color(images, color) - expected).abs().max() < 1 / 255


def test_identity_changes_nothing():
    images = torch.rand(2, 3, 8, 8)
    color = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(2, 4)
    assert torch.allclose(adjust_color(images, color), images, atol=1e-6)
