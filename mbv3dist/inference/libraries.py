"""The models of torchvision and timm that can be imported, and how each prepares its pictures.

Preprocessing is asked of the installed libraries themselves, as far as they tell: torchvision's
weights carry their transforms, timm's tags their data configuration. Neither needs a network.
"""

import difflib
import math
from dataclasses import dataclass

import timm
import torchvision
from timm.data import resolve_data_config
from timm.models._efficientnet_builder import round_channels

from mbv3dist.messages import shown
from mbv3dist.models.directory import Preprocess
from mbv3dist.models.mobilenetv3 import BN_EPS, TIMM_BN_EPS

_DETECTOR = "ssdlite320_mobilenet_v3_large"
_TORCHVISION = {
    _DETECTOR: "ssdlite_mobilenetv3_large",
    "mobilenet_v3_small": "mobilenetv3_small",
    "mobilenet_v3_large": "mobilenetv3_large",
}
_TIMM = {
    "mobilenetv3_small_050": ("mobilenetv3_small", 0.5),
    "mobilenetv3_small_075": ("mobilenetv3_small", 0.75),
    "mobilenetv3_small_100": ("mobilenetv3_small", 1.0),
    "mobilenetv3_large_075": ("mobilenetv3_large", 0.75),
    "mobilenetv3_large_100": ("mobilenetv3_large", 1.0),
}
ARCHS = (*_TORCHVISION, *_TIMM)
_TENSORFLOW = "it pads pictures as TensorFlow does, and the networks here as PyTorch does"
_MINIMAL = "it has other kernels and activations, and no squeeze-and-excitation"
_REFUSED = {
    "mobilenetv3_large_150d": "it has more layers than the networks here",
    "mobilenetv3_rw": "its squeeze-and-excitation and its head have other shapes",
    "tf_mobilenetv3_large_075": _TENSORFLOW,
    "tf_mobilenetv3_large_100": _TENSORFLOW,
    "tf_mobilenetv3_small_075": _TENSORFLOW,
    "tf_mobilenetv3_small_100": _TENSORFLOW,
    "tf_mobilenetv3_large_minimal_100": _MINIMAL,
    "tf_mobilenetv3_small_minimal_100": _MINIMAL,
}
_FIRST_TAG = "IMAGENET1K_V1"  # also what torchvision's own training scripts validate with
_FULL_TAIL = {"mobilenetv3_small": 576, "mobilenetv3_large": 960}


@dataclass(frozen=True)
class Source:
    """A model of another library.

    Attributes:
        library: "torchvision" or "timm".
        arch: The library's name of it.
        tag: Which of its weights; decides about preprocessing only.
        architecture: Our name of it.
        width: Channel multiplier.
        input_size: Side of its input in pixels.
        preprocess: How the library prepares pictures for it.
        bn_eps: The library's epsilon of batch norms.
        outputs_entry: Entry of the state dict whose first dimension follows the class count.
        tail_entry: Entry whose second dimension is the number of channels of the trunk.
        remarks: What a user should know, in lines.
    """

    library: str
    arch: str
    tag: str
    architecture: str
    width: float
    input_size: int
    preprocess: Preprocess
    bn_eps: float
    outputs_entry: str
    tail_entry: str
    remarks: tuple[str, ...] = ()

    @property
    def is_detector(self) -> bool:
        """Whether it detects; its first output is the background then."""
        return self.arch == _DETECTOR

    @property
    def full_tail_channels(self) -> int:
        """Channels of the trunk with the full tail."""
        full = _FULL_TAIL[self.architecture.removeprefix("ssdlite_")]
        return int(round_channels(full, self.width))

    @property
    def shown(self) -> str:
        """For messages."""
        return f"{self.library}'s {self.arch}" + (f" ({self.tag})" if self.tag else "")


def find_source(arch: str, *, file_name: str) -> Source:
    """Look up a model by the name that its library gives it.

    Args:
        arch: The name, with or without a tag after a dot; timm's may begin with "timm/".
        file_name: Of the checkpoint; libraries' own names for their weights tell the tag.

    Raises:
        ValueError: There is no such model or tag, or it cannot be imported.
    """
    name, _, tag = arch.removeprefix("hf-hub:").removeprefix("timm/").partition(".")
    if name in _REFUSED:
        raise ValueError(
            f"--arch {name}: cannot be imported, because {_REFUSED[name]}; what can: "
            f"{', '.join(ARCHS)}"
        )
    if name == _DETECTOR:
        return _torchvision_detector(tag)
    if name in _TORCHVISION:
        return _torchvision_classifier(name, tag, file_name)
    if name in _TIMM:
        return _timm_classifier(name, tag, file_name)
    near = difflib.get_close_matches(name[:100], ARCHS, n=1, cutoff=0.8)
    meant = f"did you mean {near[0]!r}? There" if near else "there"
    raise ValueError(f"--arch {shown(arch)} is unknown; {meant} are {', '.join(ARCHS)}")


def _torchvision_detector(tag: str) -> Source:
    tags = torchvision.models.get_model_weights(_DETECTOR).__members__
    _check_tag(_DETECTOR, tag, list(tags))
    half = (0.5, 0.5, 0.5)
    return Source(
        library="torchvision",
        arch=_DETECTOR,
        tag=tag,
        architecture=_TORCHVISION[_DETECTOR],
        width=1.0,
        input_size=320,
        # GeneralizedRCNNTransform of the model itself.
        preprocess=Preprocess(
            320, antialias=False, dtype="float32", mean=half, std=half, whole=True
        ),
        bn_eps=BN_EPS,
        outputs_entry="head.classification_head.module_list.0.1.weight",
        tail_entry="backbone.extra.0.0.0.weight",
    )


def _torchvision_classifier(name: str, tag: str, file_name: str) -> Source:
    weights = torchvision.models.get_model_weights(name).__members__
    _check_tag(name, tag, list(weights))
    remarks: tuple[str, ...] = ()
    if not tag:
        files = {entry.url.rpartition("/")[2]: key for key, entry in weights.items()}
        tag = files.get(file_name, "")
        others = [key for key in weights if key not in (_FIRST_TAG, "DEFAULT")]
        if not tag and others:
            remarks = (
                f"pictures are prepared as for {_FIRST_TAG}; for weights of {', '.join(others)} "
                f"give --arch {name}.{others[0]}",
            )
    preset = weights[tag or _FIRST_TAG].transforms()
    return Source(
        library="torchvision",
        arch=name,
        tag=tag,
        architecture=_TORCHVISION[name],
        width=1.0,
        input_size=preset.crop_size[0],
        preprocess=Preprocess(
            resize=preset.resize_size[0],
            interpolation=preset.interpolation.value,
            antialias=bool(preset.antialias),
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            whole=True,
        ),
        bn_eps=BN_EPS,
        outputs_entry="classifier.3.weight",
        tail_entry="classifier.0.weight",
        remarks=remarks,
    )


def _timm_classifier(name: str, tag: str, file_name: str) -> Source:
    known = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    _check_tag(name, tag, known)
    if not tag:
        files = {_file(f"{name}.{key}"): key for key in known}
        files.pop("", None)
        tag = files.get(file_name, "")
    own = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name).to_dict()
    data = resolve_data_config(pretrained_cfg=own)
    assert data["crop_mode"] == "center"
    size = data["input_size"][1]
    remarks: tuple[str, ...] = ()
    if not tag and len(known) > 1:
        remarks += (
            f"pictures are prepared as for {name}.{own['tag']}; of other weights give the tag "
            f"({', '.join(known)})",
        )
    larger = own.get("test_input_size")
    if larger:
        crop = own.get("test_crop_pct") or data["crop_pct"]
        remarks += (
            f"timm's published score is at {larger[1]} pixels: for that set input_size "
            f"{larger[1]} and preprocess.resize {math.floor(larger[1] / crop)} in model.json",
        )
    return Source(
        library="timm",
        arch=name,
        tag=tag,
        architecture=_TIMM[name][0],
        width=_TIMM[name][1],
        input_size=size,
        # timm's transforms are torchvision's on pictures, which Pillow resizes with antialiasing.
        preprocess=Preprocess(
            resize=math.floor(size / data["crop_pct"]),
            interpolation=data["interpolation"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            whole=True,
        ),
        bn_eps=TIMM_BN_EPS,
        outputs_entry="classifier.weight",
        tail_entry="conv_head.weight",
        remarks=remarks,
    )


def _file(name: str) -> str:
    """Return timm's own name of a file of weights."""
    return str(timm.get_pretrained_cfg(name).url or "").rpartition("/")[2]


def _check_tag(name: str, tag: str, known: list[str]) -> None:
    if tag and tag not in known:
        raise ValueError(
            f"--arch {name}.{shown(tag)[1:-1]}: there are no weights of this tag; leave it out, or "
            f"give one of {', '.join(known)}"
        )
