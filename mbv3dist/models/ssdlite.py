"""SSDLite detectors on MobileNetV3.

SSDLite: "MobileNetV2", https://arxiv.org/abs/1801.04381, section 6.2; the feature maps: "Searching
for MobileNetV3", section 6.3. Layers, order of anchors and initial weights are those of
torchvision's `ssdlite320_mobilenet_v3_large`: weights of either give the same outputs to the last
bit.

Shapes: B pictures, A anchors (all maps), C classes without background, S anchors in a cell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.models._efficientnet_builder import round_channels
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.mobilenetv3 import DETECTOR_BN_MOMENTUM, Backbone, bn_eps_of

EXTRA_CHANNELS = (512, 256, 256, 128)
NUM_MAPS = 2 + len(EXTRA_CHANNELS)
Norm = Callable[[int], nn.Module]  # channels -> batch norm


class SSDLite(nn.Module):
    """Detector: normalised images -> class logits and box deltas of all anchors.

    Attributes:
        anchors: float32 [A, 4], cxcywh as fractions of the canvas; a buffer, not saved.
        input_size: side of the square canvas in pixels.
        num_classes: C, without background.
    """

    anchors: Tensor

    def __init__(
        self,
        variant: str,
        *,
        num_classes: int,
        input_size: int = 320,
        width: float = 1.0,
        reduced_tail: bool = True,
        anchor_config: AnchorConfig | None = None,
        bn_eps: float | None = None,
        bn_momentum: float = DETECTOR_BN_MOMENTUM,
        pretrained: bool | str = False,
    ) -> None:
        """Build a detector.

        Args:
            variant: "small" or "large".
            num_classes: number of classes without background.
            input_size: side of the square canvas in pixels.
            width: channel multiplier of backbone and extras.
            reduced_tail: halve the last stage's channels; ImageNet weights need the full tail.
            anchor_config: anchors; None: torchvision's.
            bn_eps: epsilon of the batch norms; None: that of the pretrained weights, else 1e-3.
            bn_momentum: momentum of the batch norms.
            pretrained: take the backbone from ImageNet weights of "timm" (or True) or
                "torchvision" (full tail only).

        Raises:
            ValueError: on impossible values, or weights that cannot be had.
        """
        super().__init__()
        if input_size < 32:
            raise ValueError(f"model.input_size: {input_size} must be at least 32 pixels")
        if bn_eps is None:
            bn_eps = bn_eps_of(pretrained)
        norm = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        config = anchor_config or AnchorConfig()
        self.input_size = input_size
        self.num_classes = num_classes
        self.backbone = Backbone(
            variant,
            width=width,
            reduced_tail=reduced_tail,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            pretrained=pretrained,
        )
        extras = [round_channels(c, width, channel_min=16) for c in EXTRA_CHANNELS]
        channels = [*self.backbone.out_channels, *extras]
        self.extras = nn.ModuleList(
            _extra_block(channels_in, channels_out, norm)
            for channels_in, channels_out in zip(channels[1:], extras, strict=False)
        )
        self.class_heads, self.box_heads = (
            nn.ModuleList(_head(c, config.num_per_cell * columns, norm) for c in channels)
            for columns in (num_classes + 1, 4)
        )
        # torchvision draws an untrained backbone from N(0, 0.03) too; ours keeps timm's fan-out
        # scaling (docs/decisions.md).
        for part in (self.extras, self.class_heads, self.box_heads):
            init_convolutions(part)
        canvas = (input_size, input_size)
        anchors = make_anchors(config, feature_sizes(canvas), size=canvas)
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute raw outputs.

        Args:
            images: float [B, 3, input_size, input_size], normalised.

        Returns:
            class logits [B, A, C + 1] (column 0 is the background) and box deltas [B, A, 4].
        """
        size = self.input_size
        assert images.shape[-2:] == (size, size), f"{tuple(images.shape)}, built for {size} px"
        features = list(self.backbone(images))
        for block in self.extras:
            features.append(block(features[-1]))
        class_logits = [
            _per_anchor(head(x), self.num_classes + 1)
            for head, x in zip(self.class_heads, features, strict=True)
        ]
        box_deltas = [
            _per_anchor(head(x), 4) for head, x in zip(self.box_heads, features, strict=True)
        ]
        return torch.cat(class_logits, dim=1), torch.cat(box_deltas, dim=1)


def feature_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of the six feature maps, (rows, columns), for a canvas of (height, width) pixels.

    Each stride-2 convolution pads by half its kernel and so rounds up: C4 lies behind four of
    them, every later map behind one more.
    """
    height, width = size
    sizes = []
    for halvings in range(1, 4 + NUM_MAPS):
        height, width = (height + 1) // 2, (width + 1) // 2
        if halvings >= 4:
            sizes.append((height, width))
    return sizes


def init_convolutions(module: nn.Module) -> None:
    """Draw convolution weights from N(0, 0.03) and zero their biases, as torchvision's SSDLite."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, mean=0.0, std=0.03)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def module_groups(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Split a model into the parts that have a learning rate, or a freeze switch, of their own.

    Args:
        model: a detector or a classifier, not wrapped.

    Returns:
        "base", "extras", "heads" for a detector; "base", "heads" for a classifier, where the heads
        are `conv_head` and `classifier`. Together they hold every parameter once.
    """
    if isinstance(model, SSDLite):
        return {
            "base": [model.backbone],
            "extras": [model.extras],
            "heads": [model.class_heads, model.box_heads],
        }
    assert isinstance(model, MobileNetV3), f"{type(model).__name__} is no model of ours"
    heads = ("conv_head", "classifier")
    return {
        "base": [child for name, child in model.named_children() if name not in heads],
        "heads": [getattr(model, name) for name in heads],
    }


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of each part of `module_groups`, in the order of the model."""
    return {
        name: [parameter for module in modules for parameter in module.parameters()]
        for name, modules in module_groups(model).items()
    }


def _per_anchor(x: Tensor, columns: int) -> Tensor:
    """Turn a head's map [B, S * columns, H, W] into [B, H * W * S, columns]."""
    # In channels_last this is a view; row, column, shape is the order of the anchors.
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, columns)


def _conv_bn_relu6(
    channels_in: int,
    channels_out: int,
    norm: Norm,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            channels_in,
            channels_out,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        norm(channels_out),
        nn.ReLU6(inplace=True),
    )


def _extra_block(channels_in: int, channels_out: int, norm: Norm) -> nn.Sequential:
    """Halve a map: 1x1 -> depthwise 3x3 with stride 2 -> 1x1."""
    middle = channels_out // 2
    return nn.Sequential(
        _conv_bn_relu6(channels_in, middle, norm),
        _conv_bn_relu6(middle, middle, norm, kernel=3, stride=2, groups=middle),
        _conv_bn_relu6(middle, channels_out, norm),
    )


def _head(channels: int, columns: int, norm: Norm) -> nn.Sequential:
    """Predict from a map: depthwise 3x3 -> 1x1 with bias."""
    return nn.Sequential(
        _conv_bn_relu6(channels, channels, norm, kernel=3, groups=channels),
        nn.Conv2d(channels, columns, 1),
    )
