"""Rates of the device, measured: copies to it, training steps, and steps fed by the loader.

The step is that of training/run.py, on one rank, without what happens between steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mbv3dist.config import TrainConfig
from mbv3dist.data.batch import Batch
from mbv3dist.data.decode_choice import GAIN, Decode
from mbv3dist.data.index import Split
from mbv3dist.models.ssdlite import SSDLite, parameter_groups
from mbv3dist.ops.color import normalize_images
from mbv3dist.tools.doctor_data import open_loader
from mbv3dist.training.build import build_model
from mbv3dist.training.classification import ClassificationTask
from mbv3dist.training.detection import DetectionTask
from mbv3dist.training.meter import Meter
from mbv3dist.training.optim import build_optimizer, set_lr, train_mode
from mbv3dist.training.setup import Task
from mbv3dist.training.to_device import ToDevice

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MIN_STEPS = 2

Step = Callable[[Batch, Meter], None]


def make_step(
    config: TrainConfig, classes: tuple[str, ...], device: torch.device, *, precision: str
) -> Step:
    """Makes a model from random weights and returns its training step, for batches on the device.

    Args:
        config: the recipe; weights it starts from do not change its speed and are left aside.
        classes: of the data set.
        device: where to compute.
        precision: no, bf16 or fp16.
    """
    random = dataclasses.replace(config.model, pretrained=False, init_from="")
    config = dataclasses.replace(config, model=random)
    spec, model = build_model(config, classes)
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(parameter_groups(model), config.optim, fused=precision != "fp16")
    set_lr(optimizer, 0.0)  # the same batch again and again would take the weights anywhere
    task = _make_task(config, model)
    train_mode(model, freeze_bn=config.model.freeze_bn)
    view, accumulation = config.data.view, config.optim.accumulation_steps

    def step(batch: Batch, meter: Meter) -> None:
        micro_batches = batch.split(accumulation)
        targets = [task.targets(micro) for micro in micro_batches]
        normalizer = torch.stack([task.normalizer(t) for t in targets]).sum().float()
        for micro, target in zip(micro_batches, targets, strict=True):
            images = normalize_images(
                micro.image,
                mean=spec.preprocess.mean,
                std=spec.preprocess.std,
                color=micro.color if view.has_color else None,
                with_hue=view.hue > 0,
            )
            with torch.autocast(
                device.type, dtype=_AUTOCAST.get(precision), enabled=precision in _AUTOCAST
            ):
                outputs = model(images)
            losses = task.losses(outputs, micro, target)
            (torch.stack(list(losses.values())).sum() / normalizer.clamp(min=1)).backward()
            meter.add(losses, normalizer)
        if config.optim.clip_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        meter.step(len(batch))

    return step


def _make_task(config: TrainConfig, model: nn.Module) -> Task:
    if isinstance(model, SSDLite):
        return DetectionTask.from_config(config, model.anchors)
    return ClassificationTask.from_config(config)


def measure_step(step: Step, batch: Batch, *, seconds: float) -> float:
    """Pictures per second of training steps on one batch that lies on the device."""
    device = batch.image.device
    meter = Meter(device)
    step(batch, meter)  # chooses kernels, fills the allocator's memory
    meter.read()
    step(batch, meter)
    per_step = len(batch) / meter.read()["images_per_s"]
    meter.restart_clock()
    for _ in range(max(_MIN_STEPS, int(seconds / per_step))):
        step(batch, meter)
    return float(meter.read()["images_per_s"])


def measure_steps(
    split: Split,
    config: TrainConfig,
    device: torch.device,
    *,
    tries: list[tuple[int, str]],
    seconds: float,
    **options: Any,
) -> tuple[list[dict[str, Any]], Step]:
    """Measures steps of (batch size, precision); the first batch is halved until it fits.

    Returns:
        A {batch_size, precision, images_per_s} for each try that fits into the GPU's memory, and
        the step of the first.
    """
    results: list[dict[str, Any]] = []
    steps: list[Step] = []
    for batch_size, precision in tries:
        while batch_size >= 2:
            try:
                step = make_step(config, split.classes, device, precision=precision)
                batch = resident_batch(split, config, device, batch_size=batch_size, **options)
                rate = measure_step(step, batch, seconds=seconds)
            except torch.OutOfMemoryError:
                if results:
                    break  # what was to be tried besides does not fit
                batch_size //= 2
                continue
            steps.append(step)
            values = {"batch_size": batch_size, "precision": precision, "images_per_s": rate}
            results.append(values)
            break
        if not results:
            raise ValueError(
                "the GPU's memory does not hold a step of two pictures; see with nvidia-smi who "
                "else uses it"
            )
    return results, steps[0]


def resident_batch(
    split: Split, config: TrainConfig, device: torch.device, *, batch_size: int, **options: Any
) -> Batch:
    """A batch of the split on the device, to be used again and again."""
    with open_loader(split, config, num_threads=1, batch_size=batch_size, **options) as loader:
        _, batch = next(iter(loader))
        moved: Batch = batch.to(device, non_blocking=False)
        values: dict[str, Any] = {
            item.name: value.clone()
            for item in dataclasses.fields(moved)
            if isinstance(value := getattr(moved, item.name), torch.Tensor)
        }
        return dataclasses.replace(moved, **values, fences=[])


def measure_copy(
    device: torch.device, *, batch_size: int, size: int, seconds: float
) -> dict[str, float]:
    """MB/s of copies of a batch's pictures to a GPU, from page-locked and from plain memory."""
    shape = (batch_size, 3, size, size)
    rates = {}
    for name, pinned in (("mb_per_s", True), ("pageable_mb_per_s", False)):
        source = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        target = torch.empty(shape, dtype=torch.uint8, device=device)
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            for _ in range(4):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            count += 4
        rates[name] = count * source.numel() / spent / 1e6
    return rates


def measure_ways(
    split: Split,
    config: TrainConfig,
    device: torch.device,
    *,
    batch_size: int,
    num_threads: int,
    seconds: float,
    **options: Any,
) -> tuple[dict[Decode, float], dict[Decode, str]]:
    """Pictures per second that one rank gets onto a GPU, by `data.decode`; no steps beside it.

    Returns:
        The rates of the ways that work, and why the others do not.
    """
    rates: dict[Decode, float] = {}
    problems: dict[Decode, str] = {}
    for decode in GAIN:
        try:
            to_device = ToDevice(device, decode)
        except ValueError as error:
            problems[decode] = str(error)
            continue
        loader = open_loader(
            split,
            config,
            num_threads=num_threads,
            batch_size=batch_size,
            pin_memory=True,
            decode=decode,
            **options,
        )
        count, start, ramp = 0, 0.0, config.data.prefetch + 1
        with loader:
            for number, batch in loader:
                to_device(batch)
                count += len(batch)
                if number == ramp:
                    torch.cuda.synchronize(device)
                    count, start = 0, time.perf_counter()
                elif number > ramp + 1 and time.perf_counter() - start > seconds:
                    break
            torch.cuda.synchronize(device)
        rates[decode] = count / (time.perf_counter() - start)
    return rates, problems


def measure_together(
    step: Step,
    split: Split,
    config: TrainConfig,
    device: torch.device,
    *,
    batch_size: int,
    num_threads: int,
    decode: Decode,
    seconds: float,
    **options: Any,
) -> dict[str, Any]:
    """Training steps fed by the loader, as one rank runs.

    Returns:
        {images_per_s, data_wait, device_wait, num_threads, decode}; shares of the time, 0 to 1.
    """
    meter, to_device = Meter(device), ToDevice(device, decode)
    loader = open_loader(
        split,
        config,
        num_threads=num_threads,
        batch_size=batch_size,
        pin_memory=device.type == "cuda",
        decode=decode,
        **options,
    )
    first = None  # step that is measured
    with loader:
        meter.ask()
        start = time.perf_counter()
        for number, batch in loader:
            batch = to_device(batch)
            meter.begin()
            step(batch, meter)
            spent = time.perf_counter() - start
            # What was decoded before the first step began is used up before the clock starts.
            if first is None and (number >= config.data.prefetch or spent > seconds / 2):
                meter.read()
                first, start = number + 1, time.perf_counter()
            elif first is not None and spent > seconds and number - first >= _MIN_STEPS - 1:
                break
            meter.ask()
        values = meter.read()
    shown = ("images_per_s", "data_wait", "device_wait")
    told = {"num_threads": num_threads, "decode": decode}
    return {**{name: values[name] for name in shown}, **told}
