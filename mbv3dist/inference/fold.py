"""Networks as they are deployed: pixels in, batch norms folded into convolutions.

In evaluation mode a batch norm multiplies each channel by a constant and adds another; both can be
part of the convolution whose output it reads: "Quantizing deep convolutional networks for
efficient inference", https://arxiv.org/abs/1806.08342, section 3.2.2.

Shapes: B pictures, S side of the canvas in pixels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mbv3dist.models.directory import LoadedModel, Preprocess


class DeployedNetwork(nn.Module):
    """A network without batch norms that normalises its input itself.

    Its input is the canvas: uint8 [B, 3, S, S], or float32 in [0, 1] for models whose pictures are
    resized as floats (`Preprocess.dtype`). Its outputs are those of the model.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, loaded: LoadedModel) -> None:
        """Build it from a model, which is not changed."""
        super().__init__()
        preprocess = loaded.spec.preprocess
        levels = levels_of(preprocess)
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
            for values in (preprocess.mean, preprocess.std)
        )
        self.is_uint8 = preprocess.dtype == "uint8"
        self.register_buffer("shift", (levels * mean).float())
        self.register_buffer("scale", (1 / (levels * std)).float())
        self.model = fold_batch_norms(loaded.model)
        self.eval()

    def forward(self, images: Tensor) -> Any:
        """Compute the model's outputs from canvases."""
        pixels = images.float() if self.is_uint8 else images
        return self.model((pixels - self.shift) * self.scale)


def levels_of(preprocess: Preprocess) -> float:
    """The value of a white pixel on the canvas: 255 for uint8, 1 for float32."""
    return 255.0 if preprocess.dtype == "uint8" else 1.0


def example_canvas(loaded: LoadedModel, batch_size: int = 2) -> Tensor:
    """Random canvases of the type and size that the deployed network of a model takes."""
    size = loaded.spec.input_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch_size, 3, size, size), generator=generator)
    if loaded.spec.preprocess.dtype == "uint8":
        return pixels.to(torch.uint8)
    return pixels.float() / 255


def export_program(network: nn.Module, example: Tensor) -> ExportedProgram:
    """Trace a network for batches of any size.

    Args:
        network: In evaluation mode, with one input.
        example: An input with a batch of 2: sizes 0 and 1 would be taken for constants.
    """
    assert example.shape[0] == 2 and not network.training
    batch = Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every batch norm is part of the convolution before it.

    Outputs are equal but for rounding. Constants are computed in float64, so that each weight is
    rounded once.

    Args:
        model: A model of ours, in evaluation mode; it is not changed.

    Returns:
        The copy, in evaluation mode, without any batch norm.
    """
    assert not model.training, "statistics of a batch cannot be folded"
    folded = copy.deepcopy(model)
    for parent in folded.modules():
        # In timm's blocks and in ours alike, a batch norm is registered right after its convolution
        # (between them may be an Identity); export compares the outputs in any case.
        before: nn.Module | None = None
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                assert isinstance(before, nn.Conv2d), f"{name}: no convolution before it"
                _fold(before, child)
                # timm's batch norms hold the activation too.
                setattr(parent, name, getattr(child, "act", nn.Identity()))
            if not isinstance(child, nn.Identity):
                before = child
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    return folded.requires_grad_(False)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give a convolution the weights and the bias that make its batch norm superfluous."""
    assert conv.out_channels == norm.num_features
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factor = torch.rsqrt(variance + norm.eps)
    shift = torch.zeros_like(mean)
    if norm.affine:
        factor, shift = factor * norm.weight.double(), norm.bias.double()
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    weight = conv.weight.double() * factor.view(-1, 1, 1, 1)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype))
    conv.bias = nn.Parameter(((bias - mean) * factor + shift).to(conv.weight.dtype))
