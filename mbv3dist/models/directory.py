"""Model directories: `model.safetensors` + `model.json`, all that is needed to use a model.

`model.json` says which model it is, how pictures become its input, and how its outputs become
detections. Training, evaluation, prediction and export obey it.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mbv3dist.messages import one_line, shown
from mbv3dist.models.anchors import AnchorConfig
from mbv3dist.models.description import check_fields, check_size, parse_json
from mbv3dist.models.mobilenetv3 import BN_EPS, TIMM_BN_EPS, create_classifier
from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.models.weights import load_state

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "model.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TASKS = ("classification", "detection")
# architecture -> (task, variant)
ARCHITECTURES = {
    "mobilenetv3_small": ("classification", "small"),
    "mobilenetv3_large": ("classification", "large"),
    "ssdlite_mobilenetv3_small": ("detection", "small"),
    "ssdlite_mobilenetv3_large": ("detection", "large"),
}


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model's input.

    Attributes:
        resize: pixels. Detectors: both sides become this, the input size. Classifiers: the shorter
            side becomes this, then the centre is cropped to the input size.
        interpolation: "bilinear".
        antialias: whether shrinking averages over all pixels it covers.
        dtype: "uint8" or "float32", the type in which pixels are resized.
        mean: per channel (RGB), subtracted from pixels in [0, 1].
        std: per channel, divides what is left.
    """

    resize: int
    interpolation: str = "bilinear"
    antialias: bool = True
    dtype: str = "uint8"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class Thresholds:
    """How raw outputs become detections; arguments of `ops.nms.postprocess`.

    Attributes:
        score: least probability.
        nms: IoU above which the weaker of two boxes of a class is dropped.
        topk_candidates: boxes per class that enter NMS.
        max_detections: detections kept per picture.
    """

    score: float = 0.001
    nms: float = 0.55
    topk_candidates: int = 300
    max_detections: int = 300


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights; the content of `model.json`.

    Attributes:
        architecture: a name of `ARCHITECTURES`.
        task: "classification" or "detection"; follows from the architecture.
        classes: names, without background, in the order of the outputs.
        input_size: side of the square canvas in pixels.
        preprocess: how pictures become inputs.
        width: channel multiplier.
        dropout: classifiers: probability before the last layer.
        reduced_tail: whether the last stage has half its channels.
        bn_eps: epsilon of the batch norms.
        anchors: detectors only.
        thresholds: detectors only.
        provenance: where the weights come from, free form.
    """

    architecture: str
    task: str
    classes: tuple[str, ...]
    input_size: int
    preprocess: Preprocess
    width: float = 1.0
    dropout: float = 0.2
    reduced_tail: bool = False
    bn_eps: float = BN_EPS
    anchors: AnchorConfig | None = None
    thresholds: Thresholds | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse contradictions, with ValueError."""
        task, _ = _lookup(self.architecture)
        if self.task != task:
            raise ValueError(
                f"model task: {self.architecture} is for {task}, not {shown(self.task)}; choose an "
                f"architecture for {self.task}: {', '.join(_names(self.task)) or 'there is none'}"
            )
        if not self.classes:
            raise ValueError("model classes: the list is empty; give at least one class")
        if (self.anchors is None) == (task == "detection"):
            raise ValueError(
                f"model anchors: detectors need them, classifiers have none ({self.architecture})"
            )


@dataclass(frozen=True)
class LoadedModel:
    """A model with its description, as `load_model` gives it."""

    model: nn.Module
    spec: ModelSpec


def new_spec(
    architecture: str,
    classes: Sequence[str],
    *,
    input_size: int = 0,
    width: float = 1.0,
    dropout: float = 0.2,
    reduced_tail: bool | None = None,
    anchors: AnchorConfig | None = None,
    thresholds: Thresholds | None = None,
    pretrained: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Describe a new model, with the defaults of its kind.

    Args:
        architecture: a name of `ARCHITECTURES`.
        classes: names without background.
        input_size: side of the canvas in pixels; 0: 320 for detectors, 224 for classifiers.
        width: channel multiplier.
        dropout: classifiers: probability before the last layer.
        reduced_tail: None: reduced in detectors that do not start from ImageNet weights.
        anchors: detectors: None: torchvision's.
        thresholds: detectors: None: torchvision's.
        pretrained: whether ImageNet weights of timm will be loaded; then batch norm epsilon, mean
            and std are those the weights were trained with.
        provenance: free form.

    Raises:
        ValueError: on an unknown architecture or contradictions.
    """
    task, _ = _lookup(architecture)
    detector = task == "detection"
    input_size = input_size or (320 if detector else 224)
    half = (0.5, 0.5, 0.5)
    plain = detector and not pretrained
    return ModelSpec(
        architecture=architecture,
        task=task,
        classes=tuple(classes),
        input_size=input_size,
        preprocess=Preprocess(
            resize=input_size if detector else round(input_size * 256 / 224),
            mean=half if plain else IMAGENET_MEAN,
            std=half if plain else IMAGENET_STD,
        ),
        width=width,
        dropout=dropout,
        reduced_tail=plain if reduced_tail is None else reduced_tail,
        bn_eps=TIMM_BN_EPS if pretrained else BN_EPS,
        anchors=(anchors or AnchorConfig()) if detector else None,
        thresholds=(thresholds or Thresholds()) if detector else None,
        provenance=dict(provenance or {}),
    )


def create_model(
    name: str, classes: Sequence[str], *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Build a new model by name, in training mode, on the CPU.

    Args:
        name: a name of `ARCHITECTURES`.
        classes: names without background.
        pretrained: start from timm's ImageNet weights, downloaded by timm.
        **options: further arguments of `new_spec`, such as `input_size` and `width`.

    Raises:
        ValueError: on an unknown name, impossible values, or weights that cannot be had.
    """
    return model_from_spec(
        new_spec(name, classes, pretrained=pretrained, **options), pretrained=pretrained
    )


def model_from_spec(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """Build the model of a description, in training mode, on the CPU.

    Args:
        spec: what to build.
        pretrained: start from timm's ImageNet weights, downloaded by timm.

    Raises:
        ValueError: on impossible values, or weights that cannot be had.
    """
    task, variant = _lookup(spec.architecture)
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
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and (_is_model(path) or not any(path.iterdir()))):
        raise ValueError(f"model directory: {path} exists and is no model; give another path")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    assert not any(k.startswith(("module.", "_orig_mod.")) for k in tensors), "unwrap the model"
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        try:
            save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # its own name for a full disk, too
            raise OSError(f"model directory: {path} could not be written ({error})") from None
        (new / SPEC_FILE).write_text(spec_to_json(spec), encoding="utf-8")
        for name in (WEIGHTS_FILE, SPEC_FILE):
            _sync_to_disk(new / name)
        if path.exists():
            os.rename(path, old)  # a folder with files in it cannot be replaced by rename
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ValueError(
                f"model directory: {path / name} is missing; give a directory with {SPEC_FILE} and "
                f"{WEIGHTS_FILE}, as train and import write it"
            )
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


def spec_to_json(spec: ModelSpec) -> str:
    """Render a description as the text of `model.json`; equal descriptions give equal text."""
    content = asdict(spec)
    content["provenance"] = dict(sorted(spec.provenance.items()))
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def spec_from_json(text: str | bytes, *, source: str = SPEC_FILE) -> ModelSpec:
    """Parse the text of `model.json`.

    Args:
        text: JSON.
        source: where it comes from, for messages.

    Raises:
        ValueError: if it is no description of a model.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{source}: no JSON ({one_line(str(error))}); copy it again") from error
    try:
        spec = _build(ModelSpec, content, source=source)
    except TypeError as error:
        raise ValueError(f"{source}: {error}; the file is not of this version") from error
    assert isinstance(spec, ModelSpec)
    return spec


_NESTED = {"preprocess": Preprocess, "anchors": AnchorConfig, "thresholds": Thresholds}


def _build(kind: type, content: Any, *, source: str) -> Any:
    """Build a dataclass from parsed JSON: lists become tuples, nested objects dataclasses."""
    if not isinstance(content, dict):
        raise ValueError(f"{source}: {shown(content)} is no object with {kind.__name__}'s keys")
    names = {f.name for f in fields(kind)}
    values = {}
    for name, value in content.items():
        if name not in names:
            continue  # keys may be added by later versions
        if name in _NESTED and value is not None:
            value = _build(_NESTED[name], value, source=source)
        values[name] = tuple(value) if isinstance(value, list) else value
    check_fields(kind, values, source=source)
    return kind(**values)


def _lookup(architecture: str) -> tuple[str, str]:
    """Return (task, variant) of an architecture; ValueError names the nearest one."""
    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(architecture[:100], ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"model architecture: {shown(architecture)} is unknown; did you mean {near!r}? There "
            f"are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture]


def _names(task: str) -> list[str]:
    return [name for name, (its_task, _) in ARCHITECTURES.items() if its_task == task]


def _is_model(path: Path) -> bool:
    return (path / SPEC_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def _sync_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
