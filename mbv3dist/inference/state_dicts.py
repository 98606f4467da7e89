"""Models of ours as state dicts of torchvision and timm: the way back of `import`.

What is written is what a model of that library loads with `strict=True`: the same names in the
same order, types and shapes. Weights that came from there go back equal to the last bit.
"""

import io
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mbv3dist.models.anchors import AnchorConfig
from mbv3dist.models.directory import LoadedModel, ModelSpec, Thresholds
from mbv3dist.models.mobilenetv3 import BN_EPS, TIMM_BN_EPS
from mbv3dist.models.weights import to_timm, to_torchvision
from mbv3dist.writing import write_whole

STATE_DICT_FORMATS = ("torchvision", "timm")
_HALF = (0.5, 0.5, 0.5)
_SUFFIXES = (".pth", ".pt", ".safetensors")
_TIMM_NAMES = {
    ("small", 0.5): "mobilenetv3_small_050",
    ("small", 0.75): "mobilenetv3_small_075",
    ("small", 1.0): "mobilenetv3_small_100",
    ("large", 0.75): "mobilenetv3_large_075",
    ("large", 1.0): "mobilenetv3_large_100",
}


def write_state_dict(
    loaded: LoadedModel, out: str | Path, *, format: str, overwrite: bool = False
) -> dict[str, Any]:
    """Write a model's weights under another library's names.

    A detector in timm's format is its backbone: timm has no SSDLite, and a backbone is what its
    users go on with.

    Args:
        loaded: The model.
        out: File: `.pth` or `.pt` (`torch.save` of a plain state dict) or `.safetensors`.
        format: "torchvision" or "timm".
        overwrite: Replace an existing file.

    Returns:
        {lines, file, bytes, format, entries, parameters}; the lines say which model of the library
        takes the weights, and what of our description a state dict cannot hold.

    Raises:
        ValueError: No model of the library takes these weights, or the file's name is no use.
        OSError: The file cannot be written.
    """
    out, spec = Path(out), loaded.spec
    assert format in STATE_DICT_FORMATS
    if out.suffix not in _SUFFIXES:
        raise ValueError(
            f"{out}: a state dict is written to one of {', '.join(_SUFFIXES)}; give such a name"
        )
    if out.is_dir() or (out.exists() and not overwrite):
        raise ValueError(f"{out} exists; give another name, or --overwrite to replace a file")
    if format == "torchvision":
        builder = _torchvision_builder(spec)
        state = to_torchvision(loaded.model)
    else:
        builder = _timm_builder(spec)
        state = to_timm(loaded.model)
    # Contiguous, and each with memory of its own: channels_last weights would be stored so.
    tensors = OrderedDict((k, v.detach().cpu().clone().contiguous()) for k, v in state.items())
    content = _content(tensors, out.suffix)
    write_whole(out, content)
    parameters = sum(v.numel() for k, v in tensors.items() if k.endswith(("weight", "bias")))
    return {
        "lines": [
            f"{out}: state dict of {format}, {len(tensors)} entries, {parameters} parameters",
            f"load it into {builder}",
            *_left_out(spec, format),
        ],
        "file": str(out),
        "bytes": len(content),
        "format": format,
        "entries": len(tensors),
        "parameters": parameters,
    }


def _torchvision_builder(spec: ModelSpec) -> str:
    """The call that makes torchvision's model of the same shape.

    Raises:
        ValueError: There is none.
    """
    if spec.width != 1.0:
        raise ValueError(
            f"model.json: width {spec.width}: torchvision scales other layers than timm, whose "
            "rule this model follows, so none of its models takes the weights; give --format timm"
        )
    variant = spec.architecture.rpartition("_")[2]
    if spec.task == "classification":
        tail = ", reduced_tail=True" if spec.reduced_tail else ""
        return f"torchvision.models.mobilenet_v3_{variant}(num_classes={len(spec.classes)}{tail})"
    outputs = len(spec.classes) + 1
    if variant == "small":
        return (
            f"an SSD of {outputs} outputs built on mobilenet_v3_small as torchvision's "
            "ssdlite320_mobilenet_v3_large is on large; torchvision has no function for it"
        )
    tail = "" if spec.reduced_tail else ", on a backbone with the full tail (reduced_tail=False)"
    return (
        "torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, "
        f"weights_backbone=None, num_classes={outputs}){tail}"
    )


def _timm_builder(spec: ModelSpec) -> str:
    """The call that makes timm's model of the same shape.

    Raises:
        ValueError: There is none.
    """
    variant = spec.architecture.rpartition("_")[2]
    name = _TIMM_NAMES.get((variant, spec.width))
    if name is None or spec.reduced_tail:
        tail = " with the reduced tail" if spec.reduced_tail else ""
        raise ValueError(
            f"model.json: timm has no MobileNetV3 {variant} of width {spec.width}{tail}, so none "
            "of its models takes the weights; "
            + ("give --format torchvision" if spec.width == 1.0 else "give --format onnx")
        )
    if spec.task == "detection":
        return f'timm.create_model("{name}", features_only=True): the backbone, without the heads'
    return f'timm.create_model("{name}", num_classes={len(spec.classes)})'


def _left_out(spec: ModelSpec, format: str) -> list[str]:
    """What differs from the library's defaults and stands in no state dict, one line each."""
    usual_eps = BN_EPS if format == "torchvision" else TIMM_BN_EPS
    lines = []
    if spec.bn_eps != usual_eps:
        lines.append(f"BatchNorm's epsilon is {spec.bn_eps:g}, {format}'s default {usual_eps:g}")
    wanted = spec.preprocess
    lines.append(
        f"pictures: {wanted.dtype}, {wanted.interpolation}, antialias {wanted.antialias}, resized "
        f"to {wanted.resize} for {spec.input_size} pixels, mean {wanted.mean}, std {wanted.std}"
    )
    if spec.task != "detection" or format == "timm":
        return lines
    if (wanted.mean, wanted.std) != (_HALF, _HALF):
        lines.append("mean and std go to image_mean and image_std, which default to 0.5")
    if spec.input_size != 320:
        lines.append(f"the input is {spec.input_size} pixels wide, torchvision's 320")
    if spec.anchors != AnchorConfig():
        lines.append("the anchors of model.json are not torchvision's: replace anchor_generator")
    if spec.thresholds != Thresholds():
        lines.append(f"thresholds differ from torchvision's defaults: {spec.thresholds}")
    return lines


def _content(tensors: Mapping[str, Tensor], suffix: str) -> bytes:
    """The file's bytes, in memory: what the libraries' writers say of a full disk helps nobody."""
    if suffix == ".safetensors":
        return bytes(save(dict(tensors), metadata={"format": "pt"}))
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()
