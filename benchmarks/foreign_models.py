"""Models of torchvision and timm with random weights whose outputs follow the picture.

As they are made, such models say nearly the same about every picture, and comparing two of them
shows little. Here their batch norms have seen the pictures, and their last layers are scaled, so
that scores go from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import ssdlite as torchvision_ssdlite

DETECTOR = "ssdlite320_mobilenet_v3_large"
LOGIT_SPREAD = 2.0  # standard deviation of a classifier's logits


def build(
    arch: str, pictures: Sequence[Image.Image], *, num_outputs: int, reduced_tail: bool, seed: int
) -> nn.Module:
    """Build a model by its library's name, in evaluation mode; `pictures` set its statistics."""
    torch.manual_seed(seed)
    if arch == DETECTOR:
        return _detector(pictures, num_outputs=num_outputs, reduced_tail=reduced_tail)
    if arch.startswith("mobilenet_v3_"):
        maker = getattr(torchvision.models, arch)
        model = maker(num_classes=num_outputs, reduced_tail=reduced_tail)
        last = model.classifier[3]
    else:
        model = timm.create_model(arch, num_classes=num_outputs)
        last = model.classifier
    images = _images(pictures, 128)
    _settle(model, model, images)
    with torch.no_grad():
        last.weight.mul_(LOGIT_SPREAD / float(model.eval()(images).std()))
    return model


def _detector(
    pictures: Sequence[Image.Image], *, num_outputs: int, reduced_tail: bool
) -> nn.Module:
    def backbone(**arguments: object) -> nn.Module:
        return torchvision.models.mobilenet_v3_large(**{**arguments, "reduced_tail": reduced_tail})

    # The function itself has the full tail only with weights that it downloads.
    with mock.patch.object(torchvision_ssdlite, "mobilenet_v3_large", backbone):
        model = torchvision_ssdlite.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=num_outputs
        )
    _settle(model, lambda x: model.head(list(model.backbone(x).values())), _images(pictures, 320))
    heads = model.head
    with torch.no_grad():
        for head, spread in ((heads.classification_head, 0.05), (heads.regression_head, 0.05)):
            for layers in head.module_list:
                layers[1].weight.normal_(0, spread)
                layers[1].bias.normal_(0, 0.1)
    return model.eval()


def _images(pictures: Sequence[Image.Image], size: int) -> Tensor:
    pixels = np.stack([np.asarray(picture.resize((size, size))) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _settle(model: nn.Module, forward: Callable[[Tensor], object], images: Tensor) -> None:
    """Give the batch norms uneven scales, and statistics of these images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # the average over all batches
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0, 0.1)
        model.train()
        for batch in images.split(8):
            forward(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
