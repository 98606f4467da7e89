"""Weights of other libraries: torchvision's and timm's state dicts under our names, and back.

Our classifiers carry timm's names. Our detectors carry `backbone.` + timm's names, `extras.`,
`class_heads.` and `box_heads.`. `torchvision_keys` gives torchvision's name of each of our entries;
it is one to one, so it serves both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mbv3dist.messages import one_line, shown
from mbv3dist.models.pickles import PickledObjectError, load_pickle
from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.models.weights_torchvision import (
    classifier_modules,
    feature_modules,
    unflatten_head,
)

State = dict[str, Tensor]
# Where checkpoints of training scripts keep the weights.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
# Where timm's and torchvision's scripts keep the moving average of the weights beside these: what
# they report scores of.
_AVERAGES = ("state_dict_ema", "model_ema")
_AVERAGED_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, which adds "module." too
_PREFIXES = ("module.", "_orig_mod.")  # left by DDP and torch.compile
_COUNTER = ".num_batches_tracked"  # no effect on outputs; old checkpoints lack it


def read_state(path: str | Path) -> State:
    """Read a state dict, as `read_checkpoint` does."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[State, str | None]:
    """Read a state dict from a `.safetensors` file, or from a `.pth` file without running code.

    Args:
        path: the file. A checkpoint of a training script will do: its weights' moving average if it
            has one, as timm takes it, else what is under "model" or "state_dict".

    Returns:
        name -> tensor, on the CPU, without the prefixes of DDP, torch.compile and moving averages;
        and the checkpoint's name of the moving average, or None if it is not one.

    Raises:
        ValueError: if the file is missing, damaged, or holds no weights.
    """
    path = Path(path)
    content, average = _load(path), None
    for wrapper in (*_AVERAGES, *_WRAPPERS):
        inner = content.get(wrapper) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and (inner or wrapper not in _AVERAGES):
            content = inner
            average = wrapper if wrapper in _AVERAGES else average
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"weights: {path} holds no state dict; save model.state_dict() into it")
    state = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if len(state) != len(content):
        other = next(name for name in content if name not in state)
        raise ValueError(
            f"weights: {path} holds {shown(other)}, which is no tensor; save model.state_dict() "
            "into it"
        )
    if all(name.startswith("module.") for name in state if name != _AVERAGED_COUNTER):
        state.pop(_AVERAGED_COUNTER, None)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    return state, average


def _load(path: Path) -> Any:
    """What a file holds, or ValueError with the reason why it holds no weights."""
    if path.is_dir():
        raise ValueError(f"weights: {path} is a folder; give a .pth or .safetensors file")
    if not path.is_file():
        raise ValueError(f"weights: {path} does not exist; give a .pth or .safetensors file")
    try:
        return load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    except PickledObjectError as error:
        raise ValueError(
            f"weights: {path} holds a pickled {error.kind}, not weights alone; load it where it "
            "was made and save its weights: torch.save(model.state_dict(), FILE)"
        ) from error
    except (SafetensorError, ValueError) as error:
        reason = one_line(str(error))
        raise ValueError(
            f"weights: {path} cannot be read as weights ({reason}); it is damaged, or a pickle of "
            "more than tensors: save model.state_dict() instead"
        ) from error


def torchvision_keys(model: nn.Module) -> dict[str, str]:
    """Name, in torchvision's model of the same shape, of each entry of our state dict.

    Args:
        model: a classifier or a detector of ours, not wrapped.

    Returns:
        our name -> torchvision's name, in the order of our state dict.
    """
    if isinstance(model, SSDLite):
        stage, feature = model.backbone.c4_stage, 0
        for index, blocks in enumerate(model.backbone.blocks):
            feature += len(blocks) if index < stage else 0
        # features.0 is the stem, so the tapped bottleneck comes after `feature` others.
        modules = feature_modules(model.backbone, split_at=feature + 1)
        modules = {f"backbone.{ours}": f"backbone.{theirs}" for ours, theirs in modules.items()}
        modules["extras"] = "backbone.extra"
        modules["class_heads"] = "head.classification_head.module_list"
        modules["box_heads"] = "head.regression_head.module_list"
    else:
        modules = classifier_modules(model)
    keys = {}
    for name in model.state_dict():
        module = name.rpartition(".")[0]
        while module not in modules:
            module = module.rpartition(".")[0]
            assert module, f"{name} has no counterpart in torchvision"
        keys[name] = modules[module] + name[len(module) :]
    return keys


def from_torchvision(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Rename a torchvision state dict for `model`; unknown names stay as they are."""
    ours = {theirs: name for name, theirs in torchvision_keys(model).items()}
    return unflatten_head({ours.get(name, name): value for name, value in state.items()})


def to_torchvision(model: nn.Module) -> State:
    """State dict of `model` under torchvision's names and shapes."""
    keys = torchvision_keys(model)
    state = {keys[name]: value for name, value in model.state_dict().items()}
    if not isinstance(model, SSDLite):
        state["classifier.0.weight"] = state["classifier.0.weight"].flatten(1)
    return state


def to_timm(model: nn.Module) -> State:
    """State dict of `model` under timm's names and shapes; of a detector, that of its backbone."""
    if isinstance(model, SSDLite):
        return dict(model.backbone.state_dict())
    return dict(model.state_dict())


def to_our_names(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Bring a state dict of ours, timm's or torchvision's to the names of `model`.

    A classifier's weights given for a detector become its backbone (the classifier's head is left
    out); a detector's backbone given for a classifier becomes its trunk.

    Args:
        model: a classifier or a detector of ours, not wrapped.
        state: name -> tensor.

    Returns:
        The state under our names. It may lack entries of the model, or have others.

    Raises:
        ValueError: if the names are of none of these libraries.
    """
    if "conv_stem.weight" in state:  # timm's classifier, or ours
        if not isinstance(model, SSDLite):
            return dict(state)
        return {f"backbone.{k}": v for k, v in state.items() if not _is_classifier_head(k)}
    if "backbone.conv_stem.weight" in state:  # our detector
        if isinstance(model, SSDLite):
            return dict(state)
        return {
            k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
        }
    if "backbone.features.0.0.0.weight" in state and isinstance(model, SSDLite):
        return from_torchvision(model, state)
    if "features.0.0.weight" in state:
        if not isinstance(model, SSDLite):
            return from_torchvision(model, state)
        names = feature_modules(model.backbone, split_at=None)
        ours = {theirs: f"backbone.{name}" for name, theirs in names.items()}
        renamed = {}
        for name, value in state.items():
            module, _, leaf = name.rpartition(".")
            if not name.startswith("classifier."):
                renamed[f"{ours.get(module, module)}.{leaf}"] = value
        return renamed
    first = ", ".join(list(state)[:3])
    raise ValueError(
        f"weights: names {first}, ... are of no MobileNetV3 known here; give a state dict of "
        "torchvision's or timm's mobilenetv3 or of a model directory"
    )


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a complete state dict (ours, timm's or torchvision's) into `model`.

    Args:
        model: a classifier or a detector of ours, not wrapped.
        state: name -> tensor.
        source: where it comes from, for messages.

    Raises:
        ValueError: on missing, unexpected or differently shaped entries, naming the first few.
    """
    state = to_our_names(model, state)
    _check(model, state, source=source, optional=())
    model.load_state_dict(state, strict=False)


def load_backbone_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Start a model from a file with weights of torchvision, timm or ours.

    A detector takes the backbone. A classifier takes everything but a last layer for another number
    of classes, and its `conv_head` if the file has one.

    Args:
        model: a classifier or a detector of ours, not wrapped.
        path: `.pth` or `.safetensors`.

    Returns:
        Names of the model's entries that were not in the file and stay as they were.

    Raises:
        ValueError: if the file does not fit the backbone, naming the first few entries.
    """
    state = to_our_names(model, read_state(path))
    own = model.state_dict()
    if isinstance(model, SSDLite):
        state = {k: v for k, v in state.items() if k.startswith("backbone.")}
        optional = tuple(k for k in own if not k.startswith("backbone."))
    else:
        optional = tuple(k for k in own if _is_classifier_head(k))
        if any(
            k in state and state[k].shape != own[k].shape for k in optional if "classifier." in k
        ):
            state = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    _check(model, state, source=str(path), optional=optional)
    model.load_state_dict(state, strict=False)
    return [name for name in own if name not in state and not name.endswith(_COUNTER)]


def transfer(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str = "weights"
) -> list[str]:
    """Start a model from one with other classes, or a detector from a classifier.

    Every entry of the same shape is taken. Only last layers (class predictions, and box predictions
    under another number of anchors) and parts that `state` lacks altogether (extras and heads, when
    it is a classifier's) stay freshly made.

    Args:
        model: a freshly made classifier or detector of ours, not wrapped.
        state: name -> tensor; ours, timm's or torchvision's names.
        source: where it comes from, for messages.

    Returns:
        Names of the entries that stay freshly made.

    Raises:
        ValueError: if anything else differs, naming the first few entries.
    """
    state = to_our_names(model, state)
    own = model.state_dict()
    present = {name.partition(".")[0] for name in state}
    remade = []
    for name, value in own.items():
        part = name.partition(".")[0]
        absent = part not in present and part not in ("backbone", "conv_stem", "bn1", "blocks")
        differs = name in state and state[name].shape != value.shape and _is_last_layer(name)
        if absent or differs:
            remade.append(name)
            state.pop(name, None)
    _check(model, state, source=source, optional=tuple(remade))
    model.load_state_dict(state, strict=False)
    return [name for name in remade if not name.endswith(_COUNTER)]


def _is_classifier_head(name: str) -> bool:
    return name.startswith(("conv_head.", "classifier."))


def _is_last_layer(name: str) -> bool:
    """Whether an entry's shape follows the number of classes, or of anchors in a cell."""
    parts = name.split(".")
    return parts[0] == "classifier" or (
        parts[0] in ("class_heads", "box_heads") and parts[2] == "1"
    )


def _check(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: tuple[str, ...]
) -> None:
    """Raise ValueError unless `state` fits `model`; entries in `optional` may be missing."""
    problem = misfit(model, state, optional=optional)
    if problem:
        raise ValueError(
            f"{source}: weights do not fit the model, {problem}; "
            "use the variant, width, reduced_tail and class count the weights were made with"
        )


def misfit(model: nn.Module, state: Mapping[str, Tensor], *, optional: tuple[str, ...] = ()) -> str:
    """Say why a state dict does not fit a model, naming the first few entries; empty if it does.

    Args:
        model: a classifier or a detector of ours, not wrapped.
        state: name -> tensor, under our names.
        optional: entries that may be missing; counters of batch norms always may.
    """
    own = model.state_dict()
    may_lack = set(optional)
    missing = [k for k in own if k not in state and k not in may_lack and not k.endswith(_COUNTER)]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    for what, names in (
        ("missing entries", missing),
        ("unexpected entries", unexpected),
        ("other shapes", shapes),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"{what}: {one_line(', '.join(names[:3]))}{more}"
    return ""
