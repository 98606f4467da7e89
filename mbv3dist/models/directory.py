"""Model directories: `model.safetensors` + `model.json`, all that is needed to use a model.

`spec.py` has what stands in `model.json`; here models are made from it, saved and loaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from mbv3dist.messages import one_line
from mbv3dist.models.description import check_size
from mbv3dist.models.mobilenetv3 import create_classifier
from mbv3dist.models.spec import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SPEC_FILE,
    TASKS,
    ModelSpec,
    Preprocess,
    Thresholds,
    lookup,
    new_spec,
    spec_from_json,
    spec_to_json,
)
from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.models.weights import load_state
from mbv3dist.writing import writing

__all__ = [
    "ARCHITECTURES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SPEC_FILE",
    "TASKS",
    "WEIGHTS_FILE",
    "LoadedModel",
    "ModelSpec",
    "Preprocess",
    "Thresholds",
    "create_model",
    "load_model",
    "model_from_spec",
    "new_spec",
    "save_model",
    "spec_from_json",
    "spec_to_json",
]

WEIGHTS_FILE = "model.safetensors"
_WANTED = f"give a directory with {SPEC_FILE} and {WEIGHTS_FILE}, as train and import write it"
_CHECKPOINTS = (".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".tar")  # endings in the wild


@dataclass(frozen=True)
class LoadedModel:
    """A model with its description, as `load_model` gives it."""

    model: nn.Module
    spec: ModelSpec


def create_model(
    name: str, classes: Sequence[str], *, pretrained: bool | str = False, **options: Any
) -> nn.Module:
    """Build a new model by name, in training mode, on the CPU.

    Args:
        name: a name of `ARCHITECTURES`.
        classes: names without background.
        pretrained: start from ImageNet weights, downloaded by "timm" (or True) or "torchvision".
        **options: further arguments of `new_spec`, such as `input_size` and `width`.

    Raises:
        ValueError: on an unknown name, impossible values, or weights that cannot be had.
    """
    return model_from_spec(
        new_spec(name, classes, pretrained=pretrained, **options), pretrained=pretrained
    )


def model_from_spec(spec: ModelSpec, *, pretrained: bool | str = False) -> nn.Module:
    """Build the model of a description, in training mode, on the CPU.

    Args:
        spec: what to build.
        pretrained: start from ImageNet weights, downloaded by "timm" (or True) or "torchvision".

    Raises:
        ValueError: on impossible values, or weights that cannot be had.
    """
    task, variant = lookup(spec.architecture)
    if task == "classification":
        classifier: nn.Module = create_classifier(
            variant,
            num_classes=len(spec.classes),
            width=spec.width,
            dropout=spec.dropout,
            reduced_tail=spec.reduced_tail,
            bn_eps=spec.bn_eps,
            pretrained=pretrained,
        )
        return classifier
    return SSDLite(
        variant,
        num_classes=len(spec.classes),
        input_size=spec.input_size,
        width=spec.width,
        reduced_tail=spec.reduced_tail,
        anchor_config=spec.anchors,
        bn_eps=spec.bn_eps,
        pretrained=pretrained,
    )


def save_model(model: nn.Module, spec: ModelSpec, path: str | Path) -> None:
    """Write a model directory; it appears, or replaces an older one, in one step.

    Args:
        model: the model of `spec`, not wrapped by DDP or torch.compile.
        spec: its description.
        path: the directory; missing parents are made.

    Raises:
        ValueError: if something that is no model directory is in the way.
        OSError: if it cannot be written; nothing is left of it, and an older one stays.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and (_is_model(path) or not any(path.iterdir()))):
        raise ValueError(f"model directory: {path} exists and is no model; give another path")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    assert not any(k.startswith(("module.", "_orig_mod.")) for k in tensors), "unwrap the model"
    files = {
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        SPEC_FILE: spec_to_json(spec).encode(),
    }
    with writing(path, num_bytes=sum(map(len, files.values()))):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _replace(path, files, work=work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _replace(path: Path, files: Mapping[str, bytes], *, work: Path) -> None:
    """Write a folder with these files in the place of an older one, which stays if that fails."""
    new, old = work / "new", work / "old"
    new.mkdir()
    for name, content in files.items():
        with (new / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    if path.exists():
        os.rename(path, old)  # a folder with files in it cannot be replaced by rename
    try:
        os.rename(new, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise


def load_model(path: str | Path) -> LoadedModel:
    """Read a model directory.

    Args:
        path: the directory.

    Returns:
        The model in evaluation mode on the CPU, and its description. The state of torch's random
        generator is left as it was.

    Raises:
        ValueError: if files are missing or damaged, or weights and description do not agree.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"model directory: {path} is a file; {_cure_of_file(path)}")
    if not path.exists():
        raise ValueError(f"model directory: {path} does not exist; {_WANTED}")
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ValueError(f"model directory: {path / name} is missing; {_WANTED}")
    spec = spec_from_json((path / SPEC_FILE).read_bytes(), source=str(path / SPEC_FILE))
    weights = path / WEIGHTS_FILE
    check_size(
        weights,
        width=spec.width,
        num_classes=len(spec.classes),
        input_size=spec.input_size,
        anchors_per_cell=spec.anchors.num_per_cell if spec.anchors else 0,
    )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(
            f"model directory: {weights} is damaged ({one_line(str(error))}); copy it again"
        ) from error
    with torch.random.fork_rng(devices=[]):
        model = model_from_spec(spec)
    load_state(model, state, source=str(weights))
    return LoadedModel(model=model.eval(), spec=spec)


def _cure_of_file(path: Path) -> str:
    """What to do with a file that was given in the place of a model directory."""
    ending = path.suffix.lower()
    if path.name in (SPEC_FILE, WEIGHTS_FILE):
        return f"give the directory it is in, {path.parent}"
    if ending in _CHECKPOINTS:
        return (
            f"if it is a checkpoint of torchvision or timm, `mbv3dist import {path} DIR --arch "
            "NAME` makes a model directory of it"
        )
    if ending == ".pt2":
        return (
            "a program for torch.export.load, which no command here takes; give the model "
            "directory that it was exported from, or an .onnx file to eval and predict"
        )
    if ending == ".onnx":
        return (
            "an export, which eval and predict take; here give the model directory that it was "
            "exported from"
        )
    return _WANTED


def _is_model(path: Path) -> bool:
    return (path / SPEC_FILE).is_file() and (path / WEIGHTS_FILE).is_file()
