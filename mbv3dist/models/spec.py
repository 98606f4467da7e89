"""What is known about a model beside its weights: the content of `model.json`.

It says which model it is, how pictures become its input, and how its outputs become detections.
Training, evaluation, prediction and export obey it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mbv3dist.messages import one_line, shown
from mbv3dist.models.anchors import AnchorConfig
from mbv3dist.models.description import check_fields, parse_json
from mbv3dist.models.mobilenetv3 import BN_EPS, bn_eps_of

SPEC_FILE = "model.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic")
DTYPES = ("uint8", "float32")
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
        interpolation: "bilinear" or "bicubic".
        antialias: whether shrinking averages over all pixels it covers.
        dtype: type in which pixels are resized. "uint8": rounded to whole levels, then normalised,
            as Pillow and torchvision do it with pictures. "float32": normalised first, then
            resized without rounding, as torchvision's detectors do it themselves.
        mean: per channel (RGB), subtracted from pixels in [0, 1].
        std: per channel, divides what is left.
        whole: whether the whole picture is resized before the crop, as torchvision and timm do it.
            Else only what the crop shows is decoded and resized: the same filter at places that are
            rounded otherwise, so that about one value in a thousand differs by a level.
    """

    resize: int
    interpolation: str = "bilinear"
    antialias: bool = True
    dtype: str = "uint8"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    whole: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be done, with ValueError."""
        for name, allowed in (("interpolation", INTERPOLATIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model preprocess: {name} {shown(getattr(self, name))} is not offered; there "
                    f"are {', '.join(allowed)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"model preprocess: std {self.std} must be above 0")
        if self.resize < 1:
            raise ValueError(f"model preprocess: resize {self.resize} must be at least 1 pixel")

    @property
    def is_drawn(self) -> bool:
        """Whether the loader's own decoder makes these pixels; else whole pictures are resized."""
        pixels = (self.interpolation, self.antialias, self.dtype)
        return not self.whole and pixels == ("bilinear", True, "uint8")

    def changes_from(self, other: Preprocess) -> str:
        """What differs from another one in words, such as "dtype float32 -> uint8"."""
        names = [entry.name for entry in fields(self)]
        return ", ".join(
            f"{name} {getattr(other, name)} -> {getattr(self, name)}"
            for name in names
            if getattr(other, name) != getattr(self, name)
        )


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
        task, _ = lookup(self.architecture)
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
    pretrained: bool | str = False,
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
        pretrained: whose ImageNet weights will be loaded, "timm" (or True) or "torchvision"; then
            batch norm epsilon, mean and std are those the weights were trained with.
        provenance: free form.

    Raises:
        ValueError: on an unknown architecture or contradictions.
    """
    task, _ = lookup(architecture)
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
        bn_eps=bn_eps_of(pretrained),
        anchors=(anchors or AnchorConfig()) if detector else None,
        thresholds=(thresholds or Thresholds()) if detector else None,
        provenance=dict(provenance or {}),
    )


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


def lookup(architecture: str) -> tuple[str, str]:
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
