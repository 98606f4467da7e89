"""The configuration of a training run: dataclasses with documentation and limits of every key.

`recipe.py` reads them from YAML and flags. Nothing here imports torch.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mbv3dist.messages import shown

Architecture = Literal[
    "mobilenetv3_small",
    "mobilenetv3_large",
    "ssdlite_mobilenetv3_small",
    "ssdlite_mobilenetv3_large",
]
ViewName = Literal["resize", "center_crop", "random_resized_crop", "random_crop", "ssd"]


def opt(default: Any, doc: str, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """A dataclass field with its documentation, which `train --help` prints, and its limits."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high})


@dataclass(frozen=True)
class ViewConfig:
    """How a picture is placed on the training canvas, and how strongly its colours vary."""

    name: ViewName = opt("resize", "kind of view; ssd = zoom-out + IoU crop + flip")
    scale_min: float = opt(
        0.08, "random_resized_crop: smallest share of the area", low=1e-6, high=1
    )
    scale_max: float = opt(1.0, "random_resized_crop: largest share of the area", low=1e-6, high=1)
    ratio_min: float = opt(3 / 4, "random_resized_crop: smallest width / height", low=1e-6)
    ratio_max: float = opt(4 / 3, "random_resized_crop: largest width / height", low=1e-6)
    resize: int = opt(0, "shorter side in pixels before a crop; 0 = canvas * 256 / 224", low=0)
    padding: int = opt(4, "random_crop: pixels of fill around the resized picture", low=0)
    flip: float = opt(0.5, "probability of a horizontal flip", low=0, high=1)
    zoom_out_probability: float = opt(0.5, "ssd: probability of zooming out", low=0, high=1)
    zoom_out_max: float = opt(
        4.0, "ssd: largest side of the zoomed-out canvas / picture side", low=1
    )
    min_ious: tuple[float, ...] = opt(
        (0.1, 0.3, 0.5, 0.7, 0.9), "ssd: minimum IoU of a crop", low=0, high=1
    )
    crop_probability: float = opt(6 / 7, "ssd: probability of cropping at all", low=0, high=1)
    crop_scale_min: float = opt(
        0.3, "ssd: smallest side of a crop / picture side", low=1e-6, high=1
    )
    fill: tuple[int, int, int] = opt(
        (124, 116, 104), "colour of the canvas outside the picture", low=0, high=255
    )
    brightness: float = opt(0.0, "largest relative change of brightness; 0 = off", low=0, high=1)
    contrast: float = opt(0.0, "largest relative change of contrast; 0 = off", low=0, high=1)
    saturation: float = opt(0.0, "largest relative change of saturation; 0 = off", low=0, high=1)
    hue: float = opt(0.0, "largest hue shift in turns, 0 to 0.5; 0 = off", low=0, high=0.5)
    color_probability: float = opt(0.5, "probability of each colour change", low=0, high=1)
    channel_swap: float = opt(
        0.0, "probability of permuting the colour channels; 0 = off", low=0, high=1
    )

    @property
    def has_color(self) -> bool:
        """Whether any colour can change."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        return max(*strengths, self.channel_swap) > 0


@dataclass(frozen=True)
class DataConfig:
    """Which data set is read, and in what batches."""

    path: tuple[str, ...] = opt(
        (), "data set made by `mbv3dist convert`, folder or URL; several are read as one"
    )
    train_split: str = opt("train", "split to train on")
    val_split: str = opt("", "split to validate on; empty = no validation")
    val_path: tuple[str, ...] = opt((), "data set to validate on; default: that of path")
    weights: tuple[float, ...] = opt(
        (), "times that each data set of path is read in an epoch; default: once", low=0
    )
    balance_classes: bool = opt(False, "read pictures of every class equally often")
    global_batch_size: int = opt(32, "samples per optimiser step over all ranks", low=1)
    lanes: int | None = opt(
        None, "lanes of the plan; default: largest divisor of the batch <= 64", low=1
    )
    block_shards: int = opt(4, "shards each lane shuffles together", low=1)
    tail: Literal["carry", "drop"] = opt("carry", "carry batches over epochs, or drop the rest")
    num_threads: int = opt(2, "decoding threads per rank", low=1)
    prefetch: int = opt(3, "batches decoded ahead per rank", low=1)
    decode: Literal["auto", "cpu", "hybrid", "gpu"] = opt(
        "auto", "who decodes; hybrid: the GPU resizes; auto: measured at the start on a GPU"
    )
    verify: Literal["open", "first", "always"] = opt(
        "first", "checksums of samples: never, in the run's first epoch, or at every read"
    )
    error_budget: int = opt(0, "damaged samples the run may go without; 0 stops at one", low=0)
    accept_changes: tuple[str, ...] = opt(
        (), "what may differ from the checkpoint's data state on resume; its error names it"
    )
    cache_dir: str = opt("", "folder for remote shards; default: $MBV3DIST_CACHE or ~/.cache")
    cache_gb: float = opt(64.0, "most that folder may hold, over all runs of a node", low=1e-6)
    view: ViewConfig = field(default_factory=ViewConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The network, and for detectors its anchors and post-processing."""

    architecture: Architecture = opt("ssdlite_mobilenetv3_large", "network")
    input_size: int = opt(320, "side of the square input in pixels", low=32)
    width: float = opt(1.0, "width multiplier", low=0.05)
    dropout: float = opt(0.2, "classifiers: dropout before the last layer", low=0, high=0.99)
    bn_momentum: float | None = opt(
        None, "BatchNorm's momentum; default: the architecture's own", low=0, high=1
    )
    freeze_bn: bool = opt(False, "keep BatchNorm's statistics as they are")
    reduced_tail: bool = opt(False, "halve the channels of the last stage")
    pretrained: bool = opt(False, "start from ImageNet weights (needs network)")
    pretrained_from: Literal["timm", "torchvision"] = opt(
        "timm", "whose ImageNet weights; torchvision's are the best it has (large: V2)"
    )
    init_from: str = opt("", "model directory to start from; heads of other classes are re-made")
    anchor_scales: tuple[float, ...] = opt(
        (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0),
        "detectors: anchor side / canvas, a map each + 1",
        low=1e-6,
        high=10,
    )
    anchor_ratios: tuple[float, ...] = opt(
        (2.0, 3.0), "detectors: anchor ratios beside 1", low=1e-6, high=100
    )
    anchor_steps: tuple[float, ...] = opt(
        (),
        "detectors: pixels between neighbouring anchors, one per map; default: canvas / cells",
        low=1e-6,
    )
    score_threshold: float = opt(0.001, "detectors: detections below are not scored", low=0, high=1)
    nms_threshold: float = opt(
        0.55, "detectors: IoU above which the weaker box goes", low=0, high=1
    )
    topk_candidates: int = opt(300, "detectors: boxes per class that enter NMS", low=1)
    max_detections: int = opt(300, "detectors: boxes kept per picture", low=1)
    min_negatives: int = opt(0, "detectors: hard negatives of a picture without objects", low=0)


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning rates and their schedule."""

    name: Literal["sgd", "adam", "adamw", "rmsproptf"] = opt("sgd", "optimiser")
    lr: float = opt(0.01, "learning rate at the peak, for the whole global batch")
    base_lr: float | None = opt(
        None, "learning rate of the backbone; default lr; 0 freezes it", low=0
    )
    extras_lr: float | None = opt(
        None, "learning rate of SSDLite's extra layers; default lr", low=0
    )
    heads_lr: float | None = opt(None, "learning rate of the heads; default lr", low=0)
    momentum: float = opt(0.9, "sgd, rmsproptf: momentum", low=0, high=0.9999)
    nesterov: bool = opt(False, "sgd: Nesterov momentum")
    weight_decay: float = opt(4e-5, "weight decay", low=0)
    decay_norm_and_bias: bool = opt(False, "apply weight decay to norms and biases too")
    schedule: Literal["cosine", "multistep", "step", "exponential", "constant"] = opt(
        "cosine", "how the learning rate falls after warm-up"
    )
    min_lr_ratio: float = opt(0.0, "cosine: last learning rate / lr", low=0, high=1)
    milestones: tuple[float, ...] = opt((), "multistep: epochs at which the rate falls", low=0)
    step_epochs: float = opt(2.0, "step, exponential: epochs per factor of gamma", low=1e-6)
    gamma: float = opt(0.1, "multistep, step, exponential: factor", low=1e-6, high=1)
    warmup_epochs: float = opt(0.0, "epochs of linear warm-up", low=0)
    accumulation_steps: int = opt(1, "micro-batches per optimiser step on each rank", low=1)
    clip_grad_norm: float = opt(0.0, "largest gradient norm; 0 = off", low=0)
    label_smoothing: float = opt(0.0, "classifiers: label smoothing", low=0, high=0.99)
    ema_decay: float = opt(
        0.0, "decay of the weights' moving average per step; 0 = off", low=0, high=0.999999
    )


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    every_epochs: int = opt(1, "validate every n epochs and at the end", low=1)
    batch_size: int = opt(32, "pictures per rank and step", low=1)
    early_stop: int = opt(0, "stop after n validations without gain; 0 = off", low=0)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every_epochs: float = opt(1.0, "epochs between checkpoints (fractions allowed); 0 = off", low=0)
    every_steps: int = opt(0, "steps between checkpoints, beside every_epochs; 0 = off", low=0)
    keep_last: int = opt(2, "checkpoints kept; the best model is kept in any case", low=1)


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside the console and metrics.jsonl."""

    wandb: bool = opt(False, "log to Weights & Biases (WANDB_MODE=offline works)")
    project: str = opt("mbv3dist", "Weights & Biases project")
    log_every_steps: int = opt(20, "steps between metric records", low=1)


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run; one YAML file in configs/ each."""

    name: str = opt("", "run name; default: the YAML file's name")
    out: str = opt("runs", "folder of runs; this one goes to OUT/NAME")
    seed: int = opt(0, "seed of weights, order and augmentation", low=0, high=2**63 - 1)
    epochs: int = opt(10, "passes over the training split", low=1)
    resume: Literal["auto", "never"] = opt("never", "auto: go on from the last good checkpoint")
    overwrite: bool = opt(False, "remove an existing run of this name first")
    mixed_precision: Literal["", "no", "fp16", "bf16"] = opt(
        "", "no, fp16 or bf16; empty: what the launcher says"
    )
    deterministic: bool = opt(False, "deterministic GPU kernels, for bit-exact resume")
    channels_last: bool = opt(True, "NHWC memory format")
    compile: bool = opt(False, "torch.compile the model")
    sync_bn: bool = opt(False, "BatchNorm statistics over all ranks (GPUs only)")
    num_cpu_threads: int = opt(0, "torch's threads per process; 0 = leave as launched", low=0)
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


def check_config(config: TrainConfig) -> None:
    """Refuses values outside their range; the message names the flag to set."""
    _check_ranges(config, prefix="")
    view, optim = config.data.view, config.optim

    def require(condition: bool, flag: str, value: Any, cure: str) -> None:
        if not condition:
            raise ValueError(f"--{flag} = {shown(value)}: {cure}")

    plain = bool(re.fullmatch(r"[\w.+-]+", config.name)) and config.name.strip(".") != ""
    require(plain, "name", config.name, "letters, digits, '.', '_', '+' and '-'; not a path")
    data = config.data
    require(any(data.path), "data.path", "", "the folder `mbv3dist convert` wrote")
    require(all(data.path), "data.path", data.path, "an empty name; leave it out")
    cure = f"one number for each of the {len(data.path)} data sets in --data.path"
    require(len(data.weights) in (0, len(data.path)), "data.weights", data.weights, cure)
    require(not data.weights or any(data.weights), "data.weights", data.weights, "all are 0")
    both = bool(data.weights) and data.balance_classes
    require(not both, "data.balance_classes", True, "choose it or --data.weights, not both")
    require(optim.lr > 0, "optim.lr", optim.lr, "must be above 0")
    longest = f"must be below --epochs {config.epochs}; --optim.warmup_epochs 0 turns warm-up off"
    require(
        optim.warmup_epochs < config.epochs, "optim.warmup_epochs", optim.warmup_epochs, longest
    )
    cure = f"must not be above its largest value, {view.scale_max}"
    require(view.scale_min <= view.scale_max, "data.view.scale_min", view.scale_min, cure)
    cure = f"must not be above its largest value, {view.ratio_max}"
    require(view.ratio_min <= view.ratio_max, "data.view.ratio_min", view.ratio_min, cure)
    both = config.model.pretrained and bool(config.model.init_from)
    require(not both, "model.pretrained", True, "choose it or --model.init_from, not both")
    both = config.overwrite and config.resume == "auto"
    require(not both, "overwrite", True, "choose it or --resume auto, not both")
    allowed = _DETECTOR_VIEWS if config.task == "detection" else _CLASSIFIER_VIEWS
    cure = f"a {config.task} model takes {', '.join(allowed)}"
    require(view.name in allowed, "data.view.name", view.name, cure)


def _check_ranges(config: Any, *, prefix: str) -> None:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value, prefix=f"{prefix}{entry.name}.")
            continue
        low, high = entry.metadata["low"], entry.metadata["high"]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not low <= number <= high:
                limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise ValueError(f"--{prefix}{entry.name} = {show_value(value)}: must be {limits}")


_DETECTOR_VIEWS = ("ssd", "resize")
_CLASSIFIER_VIEWS = ("random_resized_crop", "random_crop", "center_crop", "resize")


def show_value(value: Any) -> str:
    """A value as a flag would have it."""
    if isinstance(value, tuple):
        return " ".join(v if isinstance(v, str) else f"{v:g}" for v in value) or "none"
    return str(value) or "empty"
