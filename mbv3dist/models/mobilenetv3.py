"""MobileNetV3 classifiers and the backbone of the detectors, built from timm's blocks.

"Searching for MobileNetV3", https://arxiv.org/abs/1905.02244, tables 1 and 2. Parameters keep
timm's names, so that timm's weights load as they are; weights.py maps torchvision's.

Shapes: images [B, 3, H, W], normalised.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import timm
import torchvision
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from mbv3dist.models.weights_torchvision import rename_classifier

VARIANTS = ("small", "large")
BN_EPS = 1e-3  # torchvision's; weights go with the eps they were trained with
TIMM_BN_EPS = 1e-5
CLASSIFIER_BN_MOMENTUM = 0.01  # torchvision's classifiers
DETECTOR_BN_MOMENTUM = 0.03  # torchvision's SSDLite

# timm's notation: block type, repeats, kernel, stride, expansion, channels, squeeze-excite ratio,
# "nre" for ReLU instead of hard-swish. {last} and {final} are halved by the reduced tail.
_STAGES = {
    "small": (
        ("ds_r1_k3_s2_e1_c16_se0.25_nre",),
        ("ir_r1_k3_s2_e4.5_c24_nre", "ir_r1_k3_s1_e3.67_c24_nre"),
        ("ir_r1_k5_s2_e4_c40_se0.25", "ir_r2_k5_s1_e6_c40_se0.25"),
        ("ir_r2_k5_s1_e3_c48_se0.25",),
        ("ir_r3_k5_s2_e6_c{last}_se0.25",),
        ("cn_r1_k1_s1_c{final}",),
    ),
    "large": (
        ("ds_r1_k3_s1_e1_c16_nre",),
        ("ir_r1_k3_s2_e4_c24_nre", "ir_r1_k3_s1_e3_c24_nre"),
        ("ir_r3_k5_s2_e3_c40_se0.25_nre",),
        ("ir_r1_k3_s2_e6_c80", "ir_r1_k3_s1_e2.5_c80", "ir_r2_k3_s1_e2.3_c80"),
        ("ir_r2_k3_s1_e6_c112_se0.25",),
        ("ir_r3_k5_s2_e6_c{last}_se0.25",),
        ("cn_r1_k1_s1_c{final}",),
    ),
}
_TAIL = {"small": (96, 576, 1024), "large": (160, 960, 1280)}  # last, final, conv_head
# The stage whose first block holds C4: the 9th (small) and the 13th (large) bottleneck.
_C4_STAGE = {"small": 4, "large": 5}
PRETRAINED_FROM = ("timm", "torchvision")
# Models with ImageNet weights; of torchvision's the best ones ("DEFAULT") are taken.
_PRETRAINED = {
    "timm": {
        ("large", 1.0): "mobilenetv3_large_100",
        ("small", 1.0): "mobilenetv3_small_100",
        ("small", 0.75): "mobilenetv3_small_075",
        ("small", 0.5): "mobilenetv3_small_050",
    },
    "torchvision": {
        ("large", 1.0): "mobilenet_v3_large",
        ("small", 1.0): "mobilenet_v3_small",
    },
}


def pretrained_library(pretrained: bool | str) -> str:
    """Whose ImageNet weights an argument `pretrained` asks for; True is timm's, "" is nobody's.

    Raises:
        ValueError: if there is no such library.
    """
    library = ("timm" if pretrained else "") if isinstance(pretrained, bool) else pretrained
    if library and library not in PRETRAINED_FROM:
        raise ValueError(
            f"model.pretrained: {library!r} is unknown; give one of {', '.join(PRETRAINED_FROM)}"
        )
    return library


def bn_eps_of(pretrained: bool | str) -> float:
    """Epsilon of the batch norms that weights of this origin were trained with."""
    return TIMM_BN_EPS if pretrained_library(pretrained) == "timm" else BN_EPS


def create_classifier(
    variant: str,
    *,
    num_classes: int,
    width: float = 1.0,
    dropout: float = 0.2,
    reduced_tail: bool = False,
    bn_eps: float | None = None,
    bn_momentum: float = CLASSIFIER_BN_MOMENTUM,
    pretrained: bool | str = False,
) -> MobileNetV3:
    """Build a classifier: images [B, 3, H, W] -> logits [B, num_classes].

    Args:
        variant: "small" or "large".
        num_classes: number of classes.
        width: channel multiplier; channels are rounded to multiples of 8.
        dropout: probability before the last layer.
        reduced_tail: halve the last stage's channels, as detectors without ImageNet weights do.
        bn_eps: epsilon of the batch norms; None: that of the pretrained weights, else 1e-3.
        bn_momentum: momentum of the batch norms.
        pretrained: start from ImageNet weights, downloaded by "timm" (or True) or "torchvision";
            the last layer is kept only with 1000 classes.

    Raises:
        ValueError: on unknown variants, impossible values, or weights that cannot be had.
    """
    if variant not in VARIANTS:
        raise ValueError(f"model variant: {variant!r} is unknown; choose 'small' or 'large'")
    if width <= 0:
        raise ValueError(f"model.width: {width} must be positive, for example 1.0 or 0.5")
    if num_classes < 1:
        raise ValueError(f"number of classes: {num_classes} must be at least 1")
    if bn_eps is None:
        bn_eps = bn_eps_of(pretrained)
    model = MobileNetV3(
        block_args=decode_arch_def(_arch_def(variant, reduced_tail=reduced_tail)),
        num_classes=num_classes,
        num_features=_TAIL[variant][2] // (2 if reduced_tail else 1),
        stem_size=16,
        fix_stem=width < 0.75,
        round_chs_fn=partial(round_channels, multiplier=width),
        norm_layer=partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum),
        act_layer=nn.Hardswish,
        se_layer=partial(
            SqueezeExcite,
            gate_layer="hard_sigmoid",
            force_act_layer=nn.ReLU,
            rd_round_fn=round_channels,
        ),
        drop_rate=dropout,
    )
    library = pretrained_library(pretrained)
    if library:
        state = pretrained_state(variant, library, width=width, reduced_tail=reduced_tail)
        if library == "torchvision":
            state = rename_classifier(model, state)
        if state["classifier.weight"].shape[0] != num_classes:
            state = {k: v for k, v in state.items() if not k.startswith("classifier.")}
        model.load_state_dict(state, strict=False)
    return model


def _arch_def(variant: str, *, reduced_tail: bool) -> list[list[str]]:
    last, final, _ = (channels // (2 if reduced_tail else 1) for channels in _TAIL[variant])
    return [[block.format(last=last, final=final) for block in stage] for stage in _STAGES[variant]]


def pretrained_state(
    variant: str, library: str, *, width: float, reduced_tail: bool
) -> dict[str, Tensor]:
    """Fetch ImageNet weights through a library's own download code.

    Args:
        variant: "small" or "large".
        library: of `PRETRAINED_FROM`.
        width: channel multiplier.
        reduced_tail: refused, since no such weights exist.

    Returns:
        The state dict of the library's classifier with 1000 classes, under its own names.

    Raises:
        ValueError: if the library has no such weights or they cannot be downloaded.
    """
    names = _PRETRAINED[library]
    name = names.get((variant, width))
    if name is None or reduced_tail:
        have = ", ".join(f"{v} at width {w}" for v, w in names)
        tail = " with the reduced tail" if reduced_tail else ""
        raise ValueError(
            f"model.pretrained: {library} has no ImageNet weights for {variant} at width "
            f"{width}{tail}; there are {have}, all with the full tail (set model.reduced_tail to "
            "false)"
        )
    try:
        if library == "timm":
            model = timm.create_model(name, pretrained=True)
        else:
            model = torchvision.models.get_model(name, weights="DEFAULT")
    except Exception as error:  # the downloaders raise a dozen unrelated types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.pretrained: weights of {library}'s {name} could not be fetched ({reason}); "
            "connect to the network or set model.pretrained to false and give a local file instead"
        ) from error
    return cast(nn.Module, model).state_dict()


class Backbone(nn.Module):
    """MobileNetV3 without its head, giving the two feature maps that SSDLite reads.

    Attributes:
        out_channels: channels of (C4, C5).
    """

    def __init__(
        self,
        variant: str,
        *,
        width: float = 1.0,
        reduced_tail: bool = False,
        bn_eps: float | None = None,
        bn_momentum: float = DETECTOR_BN_MOMENTUM,
        pretrained: bool | str = False,
    ) -> None:
        """Build it; arguments as for `create_classifier`."""
        super().__init__()
        model = create_classifier(
            variant,
            num_classes=1000,
            width=width,
            reduced_tail=reduced_tail,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            pretrained=pretrained,
        )
        self.conv_stem = model.conv_stem
        self.bn1 = model.bn1
        self.blocks = model.blocks
        self.c4_stage = _C4_STAGE[variant]
        tapped = self.blocks[self.c4_stage][0]
        assert isinstance(tapped, InvertedResidual)
        assert not tapped.has_skip
        self.out_channels = (tapped.conv_pw.out_channels, int(model.num_features))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the feature maps.

        Args:
            images: float [B, 3, H, W].

        Returns:
            C4, the expansion output of the tapped bottleneck, at stride 16, and C5, the output of
            the last convolution, at stride 32.
        """
        x = self.bn1(self.conv_stem(images))  # timm's bn1 holds the activation too
        for index, stage in enumerate(self.blocks):
            for position, block in enumerate(stage):
                if (index, position) == (self.c4_stage, 0):
                    c4 = block.bn1(block.conv_pw(x))
                    # The rest of InvertedResidual.forward; with stride 2 there is no shortcut.
                    x = block.se(block.bn2(block.conv_dw(c4)))
                    x = block.bn3(block.conv_pwl(x))
                else:
                    x = block(x)
        return c4, x
