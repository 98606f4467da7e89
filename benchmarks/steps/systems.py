"""What train_step.py measures: a step of ours and of the peers, in stages, and its operations.

A system has its batch and model ready; `step(mark)` does forward, loss and backward, and calls
`mark(name)` at the end of each stage. Detectors of both kinds start with the same weights and get
the same pictures and boxes, so their losses have to agree: `loss` says what came out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from mbv3dist.config import ModelConfig, OptimConfig
from mbv3dist.models.loss import match_batch, multibox_loss
from mbv3dist.models.mobilenetv3 import create_classifier
from mbv3dist.models.ssdlite import SSDLite, parameter_groups
from mbv3dist.models.weights import load_state
from mbv3dist.ops.color import normalize_images
from mbv3dist.training.optim import build_optimizer

Mark = Callable[[str], None]
HALF = (0.5, 0.5, 0.5)
MAX_BOXES = 12  # of a picture
RATE = 1e-4  # of learning: on noise a higher one ends in gradients that fp16 cannot hold
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How systems are run.

    Attributes:
        device: Where.
        amp: "no", "bf16" or "fp16": autocast of the forward pass, with a gradient scaler for fp16.
        channels_last: Memory format of pictures and weights.
        compile: Mode of torch.compile, of `COMPILE_MODES`; "": not compiled. The loss of our
            detector is compiled too.
        graph: Forward, loss and backward as one CUDA graph; then there are no stages.
    """

    device: torch.device
    amp: str = "no"
    channels_last: bool = False
    compile: str = ""
    graph: bool = False

    @property
    def kind(self) -> str:
        """Its name in reports: "contiguous", "channels_last bf16 compiled graph", ..."""
        words = ["channels_last" if self.channels_last else "contiguous"]
        words += [self.amp] if self.amp != "no" else []
        words += ["compiled"] if self.compile else []
        words += [self.compile] if self.compile not in ("", "default") else []
        words += ["graph"] if self.graph else []
        return " ".join(words)

    def title(self, library: str) -> str:
        """Of a library's system in tables."""
        words = [library]
        words += ["channels_last"] if self.channels_last else []
        words += [self.amp] if self.amp != "no" else []
        if self.compile:
            words.append("compiled" + f" {self.compile}" * (self.compile != "default"))
        words += ["CUDA graph"] if self.graph else []
        return ", ".join(words)

    def compiled(self, function: Any, *, whole: bool = True) -> Any:
        """A model or function as this setting runs it.

        Compiled `whole`, it has to be one graph, so that a part that would silently run eagerly is
        an error.
        """
        if not self.compile:
            return function
        return torch.compile(function, dynamic=False, fullgraph=whole, mode=self.compile)

    def scaler(self) -> torch.amp.GradScaler | None:
        """What keeps fp16's gradients in range, as training has it."""
        return torch.amp.GradScaler(self.device.type) if self.amp == "fp16" else None

    def autocast(self) -> Any:
        """The forward pass's precision."""
        dtype = DTYPES[self.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def place(self, model: nn.Module) -> nn.Module:
        """A model on the device, in the memory format, in training mode."""
        model = model.to(self.device).train()
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


@dataclass
class System:
    """Something whose training step is measured.

    Attributes:
        library: "ours", "timm" or "torchvision".
        setting: How it is run.
        step: Does forward, loss and backward, with a mark after each stage; returns the loss.
        loss_only: Does the loss alone on outputs made before; None: not measured.
        optimizer: Steps on the gradients; None: inference, where a step is a forward pass.
        scaler: Scales the loss; None: not scaled.
    """

    library: str
    setting: Setting
    step: Callable[[Mark], Tensor]
    loss_only: Callable[[], object] | None
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler | None = None

    @property
    def title(self) -> str:
        """For tables."""
        return self.setting.title(self.library)

    def whole_step(self, mark: Mark) -> Tensor:
        """Do all of a step: gradients away, forward, loss, backward, optimiser; return the loss."""
        if self.setting.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        if self.optimizer is None:
            return self.step(mark)
        if not self.setting.graph:  # a graph writes its gradients anew each time
            self.optimizer.zero_grad(set_to_none=True)
        mark("zero_grad")
        loss = self.step(mark)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        mark("optimizer")
        return loss


def backward(loss: Tensor, scaler: torch.amp.GradScaler | None) -> None:
    """Gradients of a loss, scaled where the precision asks for it."""
    (loss if scaler is None else scaler.scale(loss)).backward()


def our_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """As training makes it: groups with and without decay; not fused with fp16."""
    config = OptimConfig(lr=RATE)
    return build_optimizer(parameter_groups(model), config, fused=setting.amp != "fp16")


def their_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As the references of timm and torchvision make it: torch's default, foreach on a GPU."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=4e-5)


class Clock:
    """Time between marks; on a GPU between events in its stream, read after one synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self("start")

    def __call__(self, name: str) -> None:
        """Note the end of a stage."""
        if self._is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def stages(self) -> dict[str, float]:
        """Return milliseconds of each stage."""
        if self._is_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            found[name] = found.get(name, 0.0) + self._ms(before, after)
        return found

    def until_end_of(self, last: Clock) -> float:
        """Return the milliseconds from this clock's start to another's last mark.

        What lies between their steps is in it. The device must have done them.
        """
        return self._ms(self._marks[0][1], last._marks[-1][1])

    def _ms(self, before: Any, after: Any) -> float:
        took: float = before.elapsed_time(after) if self._is_gpu else 1000 * (after - before)
        return took


def draw_boxes(batch: int, size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Boxes [B, M, 4] and labels [B, M] of pictures with 0 to 12 objects, as VOC and COCO have."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, MAX_BOXES + 1, (batch,), generator=generator)
    corner = torch.rand(batch, MAX_BOXES, 2, generator=generator) * 0.7 * size
    side = (torch.rand(batch, MAX_BOXES, 2, generator=generator) ** 2 * 0.8 + 0.05) * size
    boxes = torch.cat((corner, (corner + side).clamp(max=size)), -1)
    labels = torch.randint(0, num_classes, (batch, MAX_BOXES), generator=generator)
    is_padding = torch.arange(MAX_BOXES) >= counts[:, None]
    boxes[is_padding], labels[is_padding] = 0.0, -1
    return boxes, labels


def draw_images(batch: int, size: int) -> Tensor:
    """Return uint8 [B, 3, H, W] of noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def torchvision_detector(num_classes: int) -> nn.Module:
    """Torchvision's SSDLite with random weights, always the same; classes without background."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=num_classes + 1
    )
    return model


def our_detector(setting: Setting, *, batch: int, num_classes: int) -> System:
    """SSDLite-Large of ours: uint8 canvas pixels in, as the loader gives them."""
    model = SSDLite("large", num_classes=num_classes)
    load_state(model, torchvision_detector(num_classes).state_dict(), source="torchvision")
    model = setting.place(model)  # type: ignore[assignment]
    images = draw_images(batch, 320).to(setting.device)
    if setting.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    boxes, labels = (part.to(setting.device) for part in draw_boxes(batch, 320, num_classes))
    config = ModelConfig()

    def loss_of(logits: Tensor, deltas: Tensor) -> Tensor:
        targets = match_batch(model.anchors, boxes, labels, size=(320, 320))
        parts = multibox_loss(
            logits.float(), deltas.float(), targets, min_negatives=config.min_negatives
        )
        total = parts.regression_sum + parts.classification_sum
        return total / targets.num_positives.clamp(min=1)

    forward, loss = setting.compiled(model), setting.compiled(loss_of)
    scaler = setting.scaler()

    def step(mark: Mark) -> Tensor:
        inputs = normalize_images(images, mean=HALF, std=HALF)
        if not setting.channels_last:
            inputs = inputs.contiguous()
        mark("input")
        with setting.autocast():
            outputs = forward(inputs)
        mark("forward")
        value: Tensor = loss(*outputs)
        mark("loss")
        backward(value, scaler)
        mark("backward")
        return value

    with torch.no_grad(), setting.autocast():
        outputs = model(normalize_images(images, mean=HALF, std=HALF))
    outputs = tuple(out.detach().requires_grad_() for out in outputs)
    optimizer = our_optimizer(model, setting)
    loss_only = lambda: loss_of(*outputs).backward()  # noqa: E731
    return System("ours", setting, step, loss_only, optimizer, scaler)


def their_detector(setting: Setting, *, batch: int, num_classes: int) -> System:
    """Torchvision's SSDLite as it is called: a list of float pictures and a list of targets."""
    model: Any = setting.place(torchvision_detector(num_classes))
    pictures = draw_images(batch, 320).to(setting.device).float() / 255
    images = list(pictures)
    boxes, labels = draw_boxes(batch, 320, num_classes)
    targets = [
        {
            "boxes": own[kind >= 0].to(setting.device),
            "labels": (kind[kind >= 0] + 1).to(setting.device),
        }
        for own, kind in zip(boxes, labels, strict=True)
    ]
    marks: list[Mark] = []
    model.transform.register_forward_hook(lambda *_: marks[-1]("input") if marks else None)
    model.anchor_generator.register_forward_hook(lambda *_: marks[-1]("forward") if marks else None)
    if setting.channels_last:

        def to_channels_last(_module: nn.Module, _args: Any, result: Any) -> Any:
            result[0].tensors = result[0].tensors.contiguous(memory_format=torch.channels_last)
            return result

        model.transform.register_forward_hook(to_channels_last)
    if setting.compile:
        for part in (model.backbone, model.head):
            part.compile(dynamic=False, fullgraph=True, mode=setting.compile)
    scaler = setting.scaler()

    def step(mark: Mark) -> Tensor:
        marks.append(mark)
        with setting.autocast():
            losses = model(images, targets)
        marks.pop()
        value: Tensor = sum(losses.values())  # type: ignore[assignment]
        mark("loss")
        backward(value, scaler)
        mark("backward")
        return value

    loss_only = _their_loss(model, images, targets, setting)
    return System("torchvision", setting, step, loss_only, their_optimizer(model), scaler)


def _their_loss(
    model: Any, images: list[Tensor], targets: list[dict[str, Tensor]], setting: Setting
) -> Callable[[], object]:
    """The part of torchvision's forward that matches and computes the loss, with its backward."""
    with torch.no_grad(), setting.autocast():
        batch, moved = model.transform(images, targets)
        features = list(model.backbone(batch.tensors).values())
        outputs = model.head(features)
        anchors = model.anchor_generator(batch, features)
    outputs = {name: value.float().detach().requires_grad_() for name, value in outputs.items()}

    def run() -> None:
        matched = []
        for own, target in zip(anchors, moved, strict=True):
            if target["boxes"].numel() == 0:
                nothing = torch.full((own.size(0),), -1, dtype=torch.int64, device=own.device)
                matched.append(nothing)
            else:
                overlap = torchvision.ops.box_iou(target["boxes"], own)
                matched.append(model.proposal_matcher(overlap))
        sum(model.compute_loss(moved, outputs, anchors, matched).values()).backward()

    return run


def classifier(name: str, variant: str, setting: Setting, *, batch: int) -> System:
    """A classifier of ours, timm's or torchvision's: forward, cross-entropy, backward at 224 px."""
    torch.manual_seed(0)
    model = setting.place(make_classifier(name, variant))
    images = normalize_images(draw_images(batch, 224).to(setting.device), mean=HALF, std=HALF)
    if not setting.channels_last:
        images = images.contiguous()
    labels = torch.arange(batch, device=setting.device) % 1000
    forward, scaler = setting.compiled(model), setting.scaler()

    def step(mark: Mark) -> Tensor:
        with setting.autocast():
            logits = forward(images)
        mark("forward")
        value = F.cross_entropy(logits.float(), labels)
        mark("loss")
        backward(value, scaler)
        mark("backward")
        return value

    optimizer = our_optimizer(model, setting) if name == "ours" else their_optimizer(model)
    return System(name, setting, step, None, optimizer, scaler)


def make_classifier(library: str, variant: str) -> nn.Module:
    """A library's classifier with random weights, 1000 classes, dropout 0.2."""
    model: nn.Module
    if library == "ours":
        model = create_classifier(variant, num_classes=1000)
    elif library == "timm":
        model = timm.create_model(f"mobilenetv3_{variant}_100", drop_rate=0.2)
    else:
        model = getattr(torchvision.models, f"mobilenet_v3_{variant}")()
    return model
