"""Small models with weights that say something: no training, but answers that differ."""

from functools import cache
from pathlib import Path

import onnx
import torch
from torch import nn

from mbv3dist.inference.onnx_file import make_onnx
from mbv3dist.models.directory import (
    LoadedModel,
    Preprocess,
    model_from_spec,
    new_spec,
    save_model,
)

CLASSES = ("blue", "green", "red")


def lively_model(
    architecture: str,
    *,
    size: int = 96,
    width: float = 0.5,
    seed: int = 0,
    slim: bool = False,
    **options,
) -> LoadedModel:
    """A model whose batch norms do something, and whose scores spread over (0, 1).

    Args:
        architecture: Of `ARCHITECTURES`.
        size: Side of the canvas in pixels.
        width: Channel multiplier.
        seed: Of the weights.
        slim: Leave the blocks with a shortcut out: faster to trace, in no model directory.
        **options: Further arguments of `new_spec`; `preprocess` replaces that of the result.
    """
    preprocess = options.pop("preprocess", {})
    spec = new_spec(architecture, CLASSES, input_size=size, width=width, **options)
    spec = type(spec)(
        **{**vars(spec), "preprocess": Preprocess(**{**vars(spec.preprocess), **preprocess})}
    )
    torch.manual_seed(seed)
    model = model_from_spec(spec).eval()
    if slim:
        blocks = getattr(model, "backbone", model).blocks
        for number, stage in enumerate(blocks):
            blocks[number] = nn.Sequential(*(block for block in stage if not block.has_skip))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
                layer.weight.uniform_(0.7, 1.4)
                layer.bias.normal_(0, 0.3)
        heads = getattr(model, "class_heads", []), getattr(model, "box_heads", [])
        for head in (layer for group in heads for layer in group):
            head[1].weight.normal_(0, 0.3)
            head[1].bias.normal_(0, 1)
        for group in model.modules():
            if isinstance(group, nn.Linear):
                group.weight.normal_(0, 0.03)
    return LoadedModel(model, spec)


def save_lively(loaded: LoadedModel, folder: Path) -> Path:
    """The model as a model directory."""
    save_model(loaded.model, loaded.spec, folder)
    return folder


@cache
def detector() -> LoadedModel:
    """The detector that several files of tests export; not to be changed."""
    return lively_model("ssdlite_mobilenetv3_small")


@cache
def detector_graph() -> onnx.ModelProto:
    """`detector` as ONNX; tracing takes seconds. Not to be changed."""
    return make_onnx(detector())


@cache
def raw_graph() -> onnx.ModelProto:
    """`detector` without post-process as ONNX, likewise."""
    return make_onnx(detector(), raw=True)


@cache
def classifier() -> LoadedModel:
    """A classifier whose pictures are resized as floats, likewise."""
    return lively_model("mobilenetv3_small", size=64, preprocess={"dtype": "float32"})


@cache
def classifier_graph() -> onnx.ModelProto:
    """`classifier` as ONNX, likewise."""
    return make_onnx(classifier())
