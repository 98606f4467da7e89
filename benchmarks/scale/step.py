"""Our training step in the forms that scaling.py compares.

- alone: the bare model, as training with one process has it;
- apart: in DDP over a group of this rank alone, so all of DDP's own work is done and nothing is
  sent; a hook notes when each bucket of gradients is there;
- together: as training with several processes has it: Accelerate's DDP with our bucket sizes, and
  the all-reduce of the loss's normalizer;
- traced: the same, with the start and the end noted of every bucket that is sent, and of the wait
  for the normalizer.

Model, DDP's settings, optimiser, targets and loss come from mbv3dist.training; the body of `_step`
is that of `training/run.py` without loader, schedule and records. Pictures and boxes are drawn.
"""

import copy
import hashlib
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from steps.systems import draw_boxes, draw_images
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # torch.distributed's, where its types are
from torch.nn.parallel import DistributedDataParallel

from mbv3dist.config import ModelConfig, TrainConfig
from mbv3dist.data.batch import Batch
from mbv3dist.models.ssdlite import SSDLite, parameter_groups
from mbv3dist.ops.color import normalize_images
from mbv3dist.training.build import build_model
from mbv3dist.training.classification import ClassificationTask
from mbv3dist.training.detection import DetectionTask
from mbv3dist.training.optim import build_optimizer, set_lr, train_mode
from mbv3dist.training.processes import start_sum, step_seed
from mbv3dist.training.setup import Task, keep_buffers_local, make_accelerator

WARM_UP = 3  # DDP lays out its buckets in the first step and uses them from the second one on
NUM_CLASSES = {"classification": 1000, "detection": 20}


class Marks:
    """Points in time: the host's clock, or events in the GPU's stream, read when it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        """Return this moment, on a GPU that of the current stream."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait until all points have come to pass."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds from one point to another."""
        if self._device.type != "cuda":
            return float(second - first)
        return float(first.elapsed_time(second)) / 1000


@dataclass
class Trace:
    """Points of one step."""

    start: Any
    normalizer: tuple[Any, Any] | None = None  # the wait for it, after the forward pass
    buckets: list[list[Any]] = field(default_factory=list)  # bytes, ready, end
    backward_end: Any = None


@dataclass
class Form:
    """A model of its own, wrapped, with its optimiser."""

    bare: nn.Module
    model: Any
    optimizer: Any
    sends: bool


def _drawn_batch(
    task: str, *, batch: int, size: int, rank: int, world_size: int, device: torch.device
) -> Batch:
    """Return this rank's share of a drawn global batch: every rank has other pictures."""
    mine = slice(rank * batch, (rank + 1) * batch)
    images = draw_images(batch * world_size, size)[mine]
    drawn: dict[str, Any]
    if task == "detection":
        boxes, labels = draw_boxes(batch * world_size, size, NUM_CLASSES[task])
        drawn = {"boxes": boxes[mine], "labels": labels[mine]}
        drawn["difficult"] = torch.zeros(batch, boxes.shape[1], dtype=torch.bool)
    else:
        drawn = {"label": torch.arange(batch) * 7 % NUM_CLASSES[task] + rank}
    return Batch(
        image=images.contiguous(memory_format=torch.channels_last),
        index=torch.arange(batch),
        epoch=torch.zeros(batch, dtype=torch.int64),
        weight=torch.ones(batch),
        size=torch.full((batch, 2), size, dtype=torch.int32),
        view=torch.zeros(batch, 8),
        color=torch.zeros(batch, 6),
        **drawn,
    ).to(device, non_blocking=False)


def _first(batch: Batch, count: int) -> Batch:
    """Return the batch's first samples."""
    assert len(batch) % count == 0, (len(batch), count)
    return batch.split(len(batch) // count)[0]


class Forms:
    """The step's forms on this rank, and what is measured of them."""

    def __init__(
        self,
        device: torch.device,
        *,
        architecture: Any,
        size: int,
        batch: int,
        amp: Any,
        delay_s: float = 0.0,
    ):
        """Build all forms and warm them up.

        Args:
            device: This rank's.
            architecture: Of the recipe.
            size: Side of the pictures.
            batch: The largest one, of this rank.
            amp: "no", "bf16" or "fp16".
            delay_s: By how much every all-reduce of a bucket is slowed down: for tests, which
                must see it.
        """
        assert delay_s == 0.0 or device.type == "cpu", "only a host can be put to sleep"
        self._device, self._marks, self._delay_s = device, Marks(device), delay_s
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._trace: Trace | None = None
        model_config = ModelConfig(architecture=architecture, input_size=size)
        self._config = TrainConfig(mixed_precision=amp, model=model_config)
        task = self._config.task
        self._accelerator = make_accelerator(self._config)
        torch.manual_seed(0)
        names = tuple(f"class {number}" for number in range(NUM_CLASSES[task]))
        self._spec, model = build_model(self._config, names)
        model = model.to(device).to(memory_format=torch.channels_last)
        self._batch = _drawn_batch(
            task,
            batch=batch,
            size=size,
            rank=self._rank,
            world_size=self._world_size,
            device=device,
        )
        self._task: Task = (
            DetectionTask.from_config(self._config, model.anchors)
            if isinstance(model, SSDLite)
            else ClassificationTask.from_config(self._config)
        )
        self._forms = {"alone": self._alone(model), "apart": self._apart(model)}
        if self._world_size > 1:
            self._forms["together"] = self._together(model)
            self._forms["traced"] = self._traced(model)
        for form in self._forms.values():
            train_mode(form.model)
            for _ in range(WARM_UP):
                self._step(form, self._batch, None)
        self._marks.wait()

    def forget(self) -> None:
        """Let go of the models, before others are built."""
        self._forms.clear()
        self._accelerator.free_memory()

    def _with_optimizer(self, bare: nn.Module, model: Any) -> Form:
        optimizer = self._optimizer(bare)
        return Form(bare, model, self._accelerator.prepare_optimizer(optimizer), sends=False)

    def _optimizer(self, bare: nn.Module) -> torch.optim.Optimizer:
        fused = self._accelerator.mixed_precision != "fp16"
        return build_optimizer(parameter_groups(bare), self._config.optim, fused=fused)

    def _alone(self, model: nn.Module) -> Form:
        bare = copy.deepcopy(model)
        # `evaluation_mode` leaves out DDP, as one process does, and keeps the precision's wrapping.
        return self._with_optimizer(
            bare, self._accelerator.prepare_model(bare, evaluation_mode=True)
        )

    def _apart(self, model: nn.Module) -> Form:
        groups = [dist.new_group([rank]) for rank in range(self._world_size)]
        bare = copy.deepcopy(model)
        precise = self._accelerator.prepare_model(bare, evaluation_mode=True)
        handler = self._accelerator.ddp_handler
        assert handler is not None
        places = [self._device.index] if self._device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            precise, device_ids=places, process_group=groups[self._rank], **handler.to_kwargs()
        )
        keep_buffers_local(wrapped)
        wrapped.register_comm_hook(None, self._note_ready)
        return self._with_optimizer(bare, wrapped)

    def _together(self, model: nn.Module) -> Form:
        bare = copy.deepcopy(model)
        wrapped, optimizer = self._accelerator.prepare(bare, self._optimizer(bare))
        keep_buffers_local(wrapped)
        if self._delay_s:
            wrapped.register_comm_hook(None, self._note_sent)
        return Form(bare, wrapped, optimizer, sends=True)

    def _traced(self, model: nn.Module) -> Form:
        bare = copy.deepcopy(model)
        wrapped, optimizer = self._accelerator.prepare(bare, self._optimizer(bare))
        keep_buffers_local(wrapped)
        wrapped.register_comm_hook(None, self._note_sent)
        return Form(bare, wrapped, optimizer, sends=True)

    def _note_ready(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Note that a bucket's gradients are there; nothing has to be sent."""
        values = bucket.buffer()
        if self._trace is not None:
            size = values.numel() * values.element_size()
            self._trace.buckets.append([size, self._marks.now(), None])
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(values)
        return done

    def _note_sent(self, state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average a bucket over the ranks, as DDP does without a hook; note start and end."""
        values = bucket.buffer()
        values.div_(self._world_size)
        row: list[Any] = [values.numel() * values.element_size(), self._marks.now(), None]
        if self._trace is not None:
            self._trace.buckets.append(row)
        work = dist.all_reduce(values, async_op=True)
        assert work is not None

        def ended(future: Any) -> torch.Tensor:
            if self._delay_s:
                time.sleep(self._delay_s)
            # On a GPU this runs at once, in a stream that waits for the all-reduce.
            row[2] = self._marks.now()
            found: torch.Tensor = future.value()[0]
            return found

        later: torch.futures.Future[torch.Tensor] = work.get_future().then(ended)
        return later

    def _step(self, form: Form, batch: Batch, trace: Trace | None) -> Tensor:
        """Do one training step; return its loss."""
        accelerator, task = self._accelerator, self._task
        world_size = self._world_size if form.sends else 1
        self._trace = trace
        torch.manual_seed(step_seed(0, 0, self._rank))
        set_lr(form.optimizer, 1.0)
        targets = task.targets(batch)
        normalizer = torch.stack([task.normalizer(targets)]).sum().float()
        summed = start_sum(normalizer) if form.sends else lambda: normalizer
        preprocess = self._spec.preprocess
        images = normalize_images(batch.image, mean=preprocess.mean, std=preprocess.std)
        losses = task.losses(form.model(images), batch, targets)
        began = self._marks.now() if trace else None
        scale = world_size / summed().clamp(min=1)
        if trace and form.sends:
            trace.normalizer = (began, self._marks.now())
        loss = torch.stack(list(losses.values())).sum() * scale
        accelerator.backward(loss)
        if trace:
            trace.backward_end = self._marks.now()
        form.optimizer.step()
        form.optimizer.zero_grad()
        return loss.detach()

    def steps(self, name: str, *, batch: int, steps: int) -> dict[str, Any]:
        """Do some steps; return their times and what their traces show.

        Returns:
            {steps_s, traces}: seconds of each step, and of each step of "apart" and "traced" when
            what happened, in seconds from its start.
        """
        form, part = self._forms[name], _first(self._batch, batch)
        if name != "alone":
            dist.all_reduce(torch.zeros(1, device=self._device))  # all ranks begin at once
        self._step(form, part, None)
        points = [self._marks.now()]
        traces = []
        for _ in range(steps):
            trace = Trace(points[-1]) if name in ("apart", "traced") else None
            loss = self._step(form, part, trace)
            points.append(self._marks.now())
            if trace:
                traces.append(trace)
        if name == "apart" and self._device.type == "cpu":
            self._keep_busy(form, part)
        self._trace = None
        self._marks.wait()
        if not math.isfinite(float(loss)):
            raise ValueError(f"the loss of {name} became {float(loss)}")
        between = self._marks.between
        return {
            "steps_s": [between(a, b) for a, b in pairwise(points)],
            "traces": [self._told(trace) for trace in traces],
        }

    def _keep_busy(self, form: Form, part: Batch) -> None:
        """Go on until all ranks are done: the last one is not to have the host for itself."""
        done = dist.all_reduce(torch.zeros(1), async_op=True)
        assert done is not None
        while not done.is_completed():
            self._step(form, part, None)
        done.wait()

    def _told(self, trace: Trace) -> dict[str, Any]:
        """Return a trace in seconds from the step's start."""

        def since(point: Any) -> float | None:
            return None if point is None else self._marks.between(trace.start, point)

        return {
            "normalizer": [since(point) for point in trace.normalizer or ()],
            "buckets": [[size, since(ready), since(end)] for size, ready, end in trace.buckets],
            "backward_end": since(trace.backward_end),
        }

    def facts(self) -> dict[str, Any]:
        """Return what has to be sent, and where this runs."""
        bare = self._forms["alone"].bare
        on_gpu = self._device.type == "cuda"
        return {
            "parameters": sum(value.numel() for value in bare.parameters()),
            "device": torch.cuda.get_device_name(self._device) if on_gpu else "cpu",
            "backend": dist.get_backend(),
            "threads": torch.get_num_threads(),
        }

    def digest(self, name: str) -> str:
        """Return a digest of a form's weights."""
        if name not in self._forms:
            return ""
        content = hashlib.sha256()
        for value in self._forms[name].bare.parameters():
            content.update(value.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()
