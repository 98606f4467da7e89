"""The configuration of a training run: dataclasses, read strictly from YAML, overridden by flags.

One path checks both sources: `load_config` builds the dataclasses from the YAML file, then applies
`--section.key value` overrides with the same coercion. Unknown keys, wrong types and values outside
their range are refused with one line that names the key and the cure. Nothing here imports torch.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Architecture = Literal[
    "mobilenetv3_small",
    "mobilenetv3_large",
    "ssdlite_mobilenetv3_small",
    "ssdlite_mobilenetv3_large",
]
ViewName = Literal["resize", "center_crop", "random_resized_crop", "random_crop", "ssd"]


def opt(default: Any, doc: str) -> Any:
    """A dataclass field with its documentation, which `mbv3dist train --help` prints."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class ViewConfig:
    """How a picture is placed on the training canvas, and how strongly its colours vary."""

    name: ViewName = opt("resize", "kind of view; ssd = zoom-out + IoU crop + flip")
    scale_min: float = opt(0.08, "random_resized_crop: smallest share of the area")
    scale_max: float = opt(1.0, "random_resized_crop: largest share of the area")
    ratio_min: float = opt(3 / 4, "random_resized_crop: smallest width / height")
    ratio_max: float = opt(4 / 3, "random_resized_crop: largest width / height")
    resize: int = opt(0, "shorter side in pixels before a crop; 0 = canvas * 256 / 224")
    padding: int = opt(4, "random_crop: pixels of fill around the resized picture")
    flip: float = opt(0.5, "probability of a horizontal flip")
    zoom_out_probability: float = opt(0.5, "ssd: probability of zooming out")
    zoom_out_max: float = opt(4.0, "ssd: largest side of the zoomed-out canvas / picture side")
    min_ious: tuple[float, ...] = opt((0.1, 0.3, 0.5, 0.7, 0.9), "ssd: minimum IoU of a crop")
    crop_probability: float = opt(6 / 7, "ssd: probability of cropping at all")
    crop_scale_min: float = opt(0.3, "ssd: smallest side of a crop / picture side")
    fill: tuple[int, int, int] = opt((124, 116, 104), "colour of the canvas outside the picture")
    brightness: float = opt(0.0, "largest relative change of brightness; 0 = off")
    contrast: float = opt(0.0, "largest relative change of contrast; 0 = off")
    saturation: float = opt(0.0, "largest relative change of saturation; 0 = off")
    hue: float = opt(0.0, "largest hue shift in turns, 0 to 0.5; 0 = off")
    color_probability: float = opt(0.5, "probability of each colour change")


@dataclass(frozen=True)
class DataConfig:
    """Which data set is read, and in what batches."""

    path: str = opt("", "data set made by `mbv3dist convert`")
    train_split: str = opt("train", "split to train on")
    val_split: str = opt("", "split to validate on; empty = no validation")
    global_batch_size: int = opt(32, "samples per optimiser step over all ranks")
    lanes: int | None = opt(None, "lanes of the plan; default: largest divisor of the batch <= 64")
    block_shards: int = opt(4, "shards each lane shuffles together")
    tail: Literal["carry", "drop"] = opt("carry", "carry batches over epochs, or drop the rest")
    num_threads: int = opt(2, "decoding threads per rank")
    prefetch: int = opt(3, "batches decoded ahead per rank")
    verify: Literal["open", "always"] = opt("open", "always: checksum every sample when read")
    view: ViewConfig = field(default_factory=ViewConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The network, and for detectors its anchors and post-processing."""

    architecture: Architecture = opt("ssdlite_mobilenetv3_large", "network")
    input_size: int = opt(320, "side of the square input in pixels")
    width: float = opt(1.0, "width multiplier")
    dropout: float = opt(0.2, "classifiers: dropout before the last layer")
    bn_momentum: float | None = opt(None, "BatchNorm's momentum; default: the architecture's own")
    reduced_tail: bool = opt(False, "halve the channels of the last stage")
    pretrained: bool = opt(False, "start from timm's ImageNet weights (needs network)")
    init_from: str = opt("", "model directory to start from; heads of other classes are re-made")
    anchor_scales: tuple[float, ...] = opt(
        (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0), "detectors: anchor side / canvas, a map each + 1"
    )
    anchor_ratios: tuple[float, ...] = opt((2.0, 3.0), "detectors: anchor ratios beside 1")
    score_threshold: float = opt(0.001, "detectors: detections below are not scored")
    nms_threshold: float = opt(0.55, "detectors: IoU above which the weaker box goes")
    topk_candidates: int = opt(300, "detectors: boxes per class that enter NMS")
    max_detections: int = opt(300, "detectors: boxes kept per picture")
    min_negatives: int = opt(0, "detectors: hard negatives of a picture without objects")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning rates and their schedule."""

    name: Literal["sgd", "adam", "adamw", "rmsproptf"] = opt("sgd", "optimiser")
    lr: float = opt(0.01, "learning rate at the peak, for the whole global batch")
    base_lr: float | None = opt(None, "learning rate of the backbone; default lr; 0 freezes it")
    extras_lr: float | None = opt(None, "learning rate of SSDLite's extra layers; default lr")
    heads_lr: float | None = opt(None, "learning rate of the heads; default lr")
    momentum: float = opt(0.9, "sgd, rmsproptf: momentum")
    nesterov: bool = opt(False, "sgd: Nesterov momentum")
    weight_decay: float = opt(4e-5, "weight decay")
    decay_norm_and_bias: bool = opt(False, "apply weight decay to norms and biases too")
    schedule: Literal["cosine", "multistep", "step", "exponential", "constant"] = opt(
        "cosine", "how the learning rate falls after warm-up"
    )
    min_lr_ratio: float = opt(0.0, "cosine: last learning rate / lr")
    milestones: tuple[float, ...] = opt((), "multistep: epochs at which the rate falls")
    step_epochs: float = opt(2.0, "step, exponential: epochs per factor of gamma")
    gamma: float = opt(0.1, "multistep, step, exponential: factor")
    warmup_epochs: float = opt(0.0, "epochs of linear warm-up")
    accumulation_steps: int = opt(1, "micro-batches per optimiser step on each rank")
    clip_grad_norm: float = opt(0.0, "largest gradient norm; 0 = off")
    label_smoothing: float = opt(0.0, "classifiers: label smoothing")
    ema_decay: float = opt(0.0, "decay of the weights' moving average per step; 0 = off")


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    every_epochs: int = opt(1, "validate every n epochs and at the end")
    batch_size: int = opt(32, "pictures per rank and step")
    early_stop: int = opt(0, "stop after n validations without gain; 0 = off")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every_epochs: float = opt(1.0, "epochs between checkpoints (fractions allowed); 0 = off")
    every_steps: int = opt(0, "steps between checkpoints, beside every_epochs; 0 = off")
    keep_last: int = opt(2, "checkpoints kept; the best model is kept in any case")


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside the console and metrics.jsonl."""

    wandb: bool = opt(False, "log to Weights & Biases (WANDB_MODE=offline works)")
    project: str = opt("mbv3dist", "Weights & Biases project")
    log_every_steps: int = opt(20, "steps between metric records")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run; one YAML file in configs/ each."""

    name: str = opt("", "run name; default: the YAML file's name")
    out: str = opt("runs", "folder of runs; this one goes to OUT/NAME")
    seed: int = opt(0, "seed of weights, order and augmentation")
    epochs: int = opt(10, "passes over the training split")
    resume: str = opt("never", "auto: go on from the last good checkpoint of this run; never")
    overwrite: bool = opt(False, "remove an existing run of this name first")
    mixed_precision: Literal["", "no", "fp16", "bf16"] = opt(
        "", "no, fp16 or bf16; empty: what the launcher says"
    )
    deterministic: bool = opt(False, "deterministic GPU kernels, for bit-exact resume")
    channels_last: bool = opt(True, "NHWC memory format")
    compile: bool = opt(False, "torch.compile the model")
    sync_bn: bool = opt(False, "BatchNorm statistics over all ranks (GPUs only)")
    num_cpu_threads: int = opt(0, "torch's threads per process; 0 = leave as launched")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def task(self) -> str:
        """The kind of model: detection or classification, as the architecture has it."""
        return "detection" if self.model.architecture.startswith("ssdlite_") else "classification"

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.out) / self.name


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing keys that appear twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} appears twice (line {node.start_mark.line + 1})")
        return mapping


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a recipe and applies `--section.key value` overrides.

    Args:
        path: YAML file.
        overrides: command line words such as `["--optim.lr", "0.01", "--epochs=5"]`.

    Raises:
        ValueError: unknown key, wrong type or value out of range; the message names the key.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; pass a YAML file such as those in configs/")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a valid recipe: {reason}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path}: a recipe is a mapping of keys, got {type(tree).__name__}")
    merged = _merge(tree, _parse_overrides(overrides))
    merged.setdefault("name", path.stem)
    config: TrainConfig = _build(TrainConfig, merged, where="", source=str(path))
    check_config(config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values that YAML and JSON can hold."""
    return {
        key: config_to_dict(value)
        if dataclasses.is_dataclass(value)
        else (list(value) if isinstance(value, tuple) else value)
        for key in (f.name for f in dataclasses.fields(config))
        for value in [getattr(config, key)]
    }


def config_help() -> str:
    """All keys with type, default and meaning, for `mbv3dist train --help`."""
    lines: list[str] = []

    def walk(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[entry.name]):
                walk(hints[entry.name], f"{prefix}{entry.name}.")
            else:
                lines.append(
                    f"  --{prefix}{entry.name} {_type_name(hints[entry.name])}\n"
                    f"        {entry.metadata['doc']} (default: {_show(entry.default)})"
                )

    walk(TrainConfig, "")
    return "\n".join(lines)


def _show(value: Any) -> str:
    return " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value) or "empty"


def _parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r}: expected a flag such as --optim.lr 0.01")
        key, separator, text = word[2:].partition("=")
        if not separator:
            values = []
            while remaining and not remaining[0].startswith("--"):
                values.append(remaining.pop(0))
            if not values:
                raise ValueError(f"--{key}: a value is missing, for instance --{key} VALUE")
            text = values[0] if len(values) == 1 else "[" + ", ".join(values) + "]"
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"--{key}: {parent} is a value, not a section")
        try:
            node[leaf] = _Text(text, yaml.safe_load(text))
        except yaml.YAMLError:
            node[leaf] = _Text(text, text)
    return tree


@dataclass(frozen=True)
class _Text:
    """A value from the command line: a string field keeps its exact letters."""

    text: str
    value: Any


def _merge(base: Mapping[Any, Any], extra: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _build(cls: type, tree: Any, *, where: str, source: str) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ValueError(f"{source}: {where.rstrip('.')} is a section of keys, got {tree!r}")
    hints = typing.get_type_hints(cls)
    names = [entry.name for entry in dataclasses.fields(cls)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
            raise ValueError(f"{source}: unknown key {where}{key}; did you mean {where}{near[0]}?")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(
                typing.cast(type, hints[key]), value, where=f"{where}{key}.", source=source
            )
        else:
            try:
                values[key] = _coerce(value, hints[key])
            except (TypeError, ValueError):
                shown = value.text if isinstance(value, _Text) else value
                raise ValueError(
                    f"{source}: {where}{key} = {shown!r}: expected {_type_name(hints[key])}"
                ) from None
    return cls(**values)


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(str(a) or "''" for a in args)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(a) for a in args)
    if origin is tuple:
        return f"[{_type_name(args[0])}, ...]"
    return "none" if hint is type(None) else str(hint.__name__)


def _coerce(value: Any, hint: Any) -> Any:
    """The value as the field's type, or TypeError/ValueError. `1e-3` is a string in YAML 1.1."""
    if isinstance(value, _Text):
        value = value.text if hint is str else value.value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        value = "no" if value is False and "no" in args else value  # YAML reads `no` as False
        value = "" if value is None else value
        if value not in args:
            raise ValueError(value)
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, args[0])
    if origin is tuple:
        items = [value] if isinstance(value, int | float) else value
        if not isinstance(items, list | tuple):
            raise TypeError(value)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ValueError(value)
        return tuple(_coerce(item, args[0]) for item in items)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if hint is str and value is None:
        return ""
    if type(value) is hint:
        return value
    raise TypeError(value)


def check_config(config: TrainConfig) -> None:
    """Refuses values outside their range; the message names the flag to set."""
    data, model, optim = config.data, config.model, config.optim

    def require(condition: bool, flag: str, value: Any, cure: str) -> None:
        if not condition:
            raise ValueError(f"--{flag} = {value!r}: {cure}")

    require(bool(config.name), "name", config.name, "give the run a name")
    require("/" not in config.name, "name", config.name, "a name, not a path; see --out")
    require(config.epochs >= 1, "epochs", config.epochs, "at least 1")
    require(config.resume in ("auto", "never"), "resume", config.resume, "auto or never")
    require(bool(data.path), "data.path", data.path, "the folder `mbv3dist convert` wrote")
    for flag in ("global_batch_size", "block_shards", "num_threads", "prefetch"):
        value = getattr(data, flag)
        require(value >= 1, f"data.{flag}", value, "at least 1")
    require(model.input_size >= 32, "model.input_size", model.input_size, "at least 32")
    require(model.width > 0, "model.width", model.width, "above 0")
    require(0 <= model.dropout < 1, "model.dropout", model.dropout, "from 0 to below 1")
    require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
    require(optim.accumulation_steps >= 1, "optim.accumulation_steps", 0, "at least 1")
    require(0 <= optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, "from 0 to below 1")
    require(
        0 <= optim.warmup_epochs < config.epochs,
        "optim.warmup_epochs",
        optim.warmup_epochs,
        f"below --epochs {config.epochs}",
    )
    require(config.eval.every_epochs >= 1, "eval.every_epochs", 0, "at least 1")
    require(config.checkpoint.keep_last >= 1, "checkpoint.keep_last", 0, "at least 1")
    require(config.tracking.log_every_steps >= 1, "tracking.log_every_steps", 0, "at least 1")
    is_detector = config.task == "detection"
    allowed = ("ssd", "resize") if is_detector else typing.get_args(ViewName)[:4]
    cure = f"a {config.task} model takes {', '.join(allowed)}"
    require(data.view.name in allowed, "data.view.name", data.view.name, cure)
