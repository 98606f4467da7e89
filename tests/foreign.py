"""Models of torchvision and timm with random weights that give varied outputs, and pictures."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models.detection import ssdlite as torchvision_ssdlite

# Odd sides, tall, wide, smaller and larger than a canvas.
SIZES = ((333, 500), (500, 375), (97, 211), (640, 480), (41, 37), (320, 320), (225, 224), (700, 90))


@functools.cache
def drawn_pictures(count: int = len(SIZES), *, seed: int = 0) -> list[Image.Image]:
    """RGB pictures of odd sizes, with gradients, shapes and noise."""
    rng = np.random.default_rng(seed)
    pictures = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        ramp = np.linspace(0, 1, width)[None, :, None] * rng.uniform(0, 200, 3)
        pixels = (
            ramp + np.linspace(0, 55, height)[:, None, None] + rng.normal(0, 9, (height, width, 3))
        )
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(6):
            x, y = rng.integers(0, width), rng.integers(0, height)
            w, h = rng.integers(4, max(5, width // 2)), rng.integers(4, max(5, height // 2))
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
        pictures.append(picture)
    return pictures


def torchvision_detector(num_outputs: int = 91, *, reduced_tail: bool = True) -> nn.Module:
    """Build torchvision's SSDLite with random weights, in evaluation mode."""

    def backbone(**arguments: object) -> nn.Module:
        return torchvision.models.mobilenet_v3_large(**{**arguments, "reduced_tail": reduced_tail})

    torch.manual_seed(0)
    with mock.patch.object(torchvision_ssdlite, "mobilenet_v3_large", backbone):
        model = torchvision_ssdlite.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=num_outputs
        )
    _settle(model, lambda images: model.head(list(model.backbone(images).values())), size=160)
    heads = model.head
    with torch.no_grad():  # scores from 0 to 1 instead of 1 / 91 everywhere
        for head, spread in ((heads.classification_head, 0.1), (heads.regression_head, 0.05)):
            for layers in head.module_list:
                layers[1].weight.normal_(0, spread)
                layers[1].bias.normal_(0, 0.1)
    return model.eval()


def torchvision_classifier(variant: str, num_classes: int = 1000, **options: object) -> nn.Module:
    """Build torchvision's classifier with random weights, in evaluation mode."""
    torch.manual_seed(0)
    build = getattr(torchvision.models, f"mobilenet_v3_{variant}")
    model = build(num_classes=num_classes, **options)
    _settle(model, model, size=64)
    return _with_logits_of_2(model.eval(), model.classifier[3])


def timm_classifier(name: str, num_classes: int = 1000) -> nn.Module:
    """Build timm's classifier with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes)
    _settle(model, model, size=64)
    return _with_logits_of_2(model.eval(), model.classifier)


def _with_logits_of_2(model: nn.Module, last: nn.Linear) -> nn.Module:
    """Scale the last layer, so that logits are about as large as those of a trained model."""
    with torch.no_grad():
        last.weight.mul_(2 / float(model(drawn_images(64)).std()))
    return model


def drawn_images(size: int) -> Tensor:
    """Pictures as float32 [8, 3, size, size] from -1 to 1."""
    pixels = np.stack([np.asarray(p.resize((size, size))) for p in drawn_pictures(8, seed=1)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _settle(model: nn.Module, forward: Callable[[Tensor], object], *, size: int) -> None:
    """Let the batch norms see pictures, so that their statistics are those of such pictures.

    With those they were made with, all pictures give nearly the same outputs.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # the average over all batches
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0, 0.1)
        model.train()
        for batch in drawn_images(size).split(4):
            forward(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
