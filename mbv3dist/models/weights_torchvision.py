"""Names that torchvision gives to the parts of a MobileNetV3 that timm's blocks make up.

Both libraries cut the network into the same layers in the same order and name them differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn


def classifier_modules(model: nn.Module) -> dict[str, str]:
    """Map our module names of a classifier to torchvision's, head included."""
    head = {"conv_head": "classifier.0", "classifier": "classifier.3"}
    return {**feature_modules(model, split_at=None), **head}


def rename_classifier(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the state dict of a classifier of torchvision to the names and shapes of `model`.

    Unknown names stay as they are.
    """
    ours = {theirs: name for name, theirs in classifier_modules(model).items()}
    renamed = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{ours[module]}.{leaf}" if module in ours else name] = value
    return unflatten_head(renamed)


def unflatten_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the linear layer that torchvision has for `conv_head` a 1x1 convolution."""
    head = state.get("conv_head.weight")
    if head is not None and head.ndim == 2:
        state["conv_head.weight"] = head[:, :, None, None]
    return state


def feature_modules(model: nn.Module, *, split_at: int | None) -> dict[str, str]:
    """Map timm's module names of a trunk to torchvision's.

    Args:
        model: a classifier or a Backbone.
        split_at: number of the feature that torchvision's detector cuts in two, after its
            expansion; None for a classifier.

    Returns:
        our module -> torchvision's module, for every convolution and batch norm.
    """

    def feature(number: int, layer: str) -> str:
        if split_at is None or number < split_at:
            part = "features" if split_at is None else "features.0"
            return f"{part}.{number}.{layer}"
        if number > split_at:
            return f"features.1.{number - split_at}.{layer}"
        # The cut feature: block.0 goes to the first half, block.1 and the rest to the second.
        layer = layer.removeprefix("block.")
        return (
            f"features.0.{number}.{layer[2:]}"
            if layer.startswith("0.")
            else f"features.1.0.{layer}"
        )

    modules = {"conv_stem": feature(0, "0"), "bn1": feature(0, "1")}
    number = 0
    for stage_index, stage in enumerate(model.get_submodule("blocks").children()):
        for block_index, block in enumerate(stage.children()):
            number += 1
            for name, layer in _block_layers(block):
                modules[f"blocks.{stage_index}.{block_index}.{name}"] = feature(number, layer)
    return modules


def _block_layers(block: nn.Module) -> Iterable[tuple[str, str]]:
    """Pairs (timm's layer, torchvision's layer) of a block."""
    if isinstance(block, ConvBnAct):
        return [("conv", "0"), ("bn1", "1")]
    if isinstance(block, DepthwiseSeparableConv):
        convolutions = [("conv_dw", "bn1"), ("conv_pw", "bn2")]
        squeeze_after = 0
    else:
        assert isinstance(block, InvertedResidual)
        convolutions = [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")]
        squeeze_after = 1
    layers: list[tuple[str, str]] = []
    position = 0
    for index, (convolution, norm) in enumerate(convolutions):
        layers += [(convolution, f"block.{position}.0"), (norm, f"block.{position}.1")]
        position += 1
        if index == squeeze_after and not isinstance(block.se, nn.Identity):
            layers += [("se.conv_reduce", f"block.{position}.fc1")]
            layers += [("se.conv_expand", f"block.{position}.fc2")]
            position += 1
    return layers
