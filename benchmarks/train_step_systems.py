"""What train_step.py measures: a step of ours and of the peers, in stages, and its operations.

A system has its batch and model ready; `step(mark)` does forward, loss and backward, and calls
`mark(name)` at the end of each stage. Detectors of both kinds start with the same weights and get
the same pictures and boxes, so their losses have to agree: `loss` says what came out.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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
WARM_UP = 3  # steps before a graph is captured, or compilation has settled
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How systems are run.

    Attributes:
        device: Where.
        amp: "no", "bf16" or "fp16": autocast of the forward pass.
        channels_last: Memory format of pictures and weights.
        compile: torch.compile of the model; the loss of ours is compiled with it.
        graph: Forward, loss and backward as one CUDA graph; then there are no stages.
    """

    device: torch.device
    amp: str = "no"
    channels_last: bool = False
    compile: bool = False
    graph: bool = False

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
        title: For tables.
        step: Does forward, loss and backward, with a mark after each stage; returns the loss.
        loss_only: Does the loss alone on outputs made before; None: not measured.
        optimizer: Steps on the gradients.
        losses: The first steps' losses, for comparing systems.
    """

    title: str
    step: Callable[[Mark], Tensor]
    loss_only: Callable[[], object] | None
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)


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
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            took = before.elapsed_time(after) if self._is_gpu else 1000 * (after - before)
            found[name] = found.get(name, 0.0) + took
        return found


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

    forward: Any = torch.compile(model, dynamic=False) if setting.compile else model
    loss: Any = torch.compile(loss_of, dynamic=False) if setting.compile else loss_of

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
        value.backward()
        mark("backward")
        return value

    with torch.no_grad(), setting.autocast():
        outputs = model(normalize_images(images, mean=HALF, std=HALF))
    outputs = tuple(out.detach().requires_grad_() for out in outputs)
    optimizer = build_optimizer(parameter_groups(model), OptimConfig())
    title = f"ours{_title(setting)}"
    return System(title, step, lambda: loss_of(*outputs).backward(), optimizer)


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
        model.backbone.compile(dynamic=False)
        model.head.compile(dynamic=False)

    def step(mark: Mark) -> Tensor:
        marks.append(mark)
        with setting.autocast():
            losses = model(images, targets)
        marks.pop()
        value: Tensor = sum(losses.values())  # type: ignore[assignment]
        mark("loss")
        value.backward()
        mark("backward")
        return value

    loss_only = _their_loss(model, images, targets, setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=4e-5)
    return System(f"torchvision{_title(setting)}", step, loss_only, optimizer)


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
    made: nn.Module
    if name == "ours":
        made = create_classifier(variant, num_classes=1000)
    elif name == "timm":
        made = timm.create_model(f"mobilenetv3_{variant}_100", drop_rate=0.2)
    else:
        made = getattr(torchvision.models, f"mobilenet_v3_{variant}")()
    model = setting.place(made)
    images = normalize_images(draw_images(batch, 224).to(setting.device), mean=HALF, std=HALF)
    if not setting.channels_last:
        images = images.contiguous()
    labels = torch.arange(batch, device=setting.device) % 1000
    forward: Any = torch.compile(model, dynamic=False) if setting.compile else model

    def step(mark: Mark) -> Tensor:
        with setting.autocast():
            logits = forward(images)
        mark("forward")
        value = F.cross_entropy(logits.float(), labels)
        mark("loss")
        value.backward()
        mark("backward")
        return value

    if name == "ours":
        optimizer = build_optimizer(parameter_groups(model), OptimConfig())
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=4e-5)
    return System(f"{name}{_title(setting)}", step, None, optimizer)


def _title(setting: Setting) -> str:
    words = [
        word
        for word, is_on in (
            ("channels_last", setting.channels_last),
            ("compiled", setting.compile),
            ("CUDA graph", setting.graph),
        )
        if is_on
    ]
    return f", {', '.join(words)}" if words else ""


def captured(system: System) -> System:
    """The same system as one CUDA graph of forward, loss and backward.

    Raises:
        RuntimeError: Something in the step cannot be captured, such as a synchronisation.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            system.optimizer.zero_grad(set_to_none=True)
            system.step(lambda name: None)
    torch.cuda.current_stream().wait_stream(stream)
    system.optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = system.step(lambda name: None)

    def step(mark: Mark) -> Tensor:
        graph.replay()  # writes the same gradients again: they are not added up
        mark("graph")
        return value

    return System(system.title, step, None, system.optimizer)


# Operations that make the host wait for a device, by name; indexing only with a mask of booleans.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique",
    "bincount",
    "repeat_interleave.Tensor",
)
INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")


class CountOps(TorchDispatchMode):
    """Counts dispatched operations, and those that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.num_ops = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        name = str(func)
        self.num_ops += 1
        short = name.removeprefix("aten.")
        if any(short.startswith(word) for word in WAITING):
            self.waits[name] += 1
        elif name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            self.waits[f"{name} with a mask"] += 1
        return func(*args, **(kwargs or {}))


def count_ops(action: Callable[[], object]) -> dict[str, Any]:
    """Return how many operations an action dispatches, and which of them wait."""
    with CountOps() as counter:
        action()
    waits = dict(sorted(counter.waits.items()))
    return {"ops": counter.num_ops, "waits": sum(waits.values()), "waiting_ops": waits}


def count_syncs(action: Callable[[], object]) -> int:
    """Return how often torch says that an action synchronised with the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(item.message) for item in caught)
