"""What end_to_end.py measures: a process that trains from files, ours or a peer's way.

    python -m end_to_end_systems NAME

It takes jobs from `child.Child`: "open" makes data and model ready, "round" trains one epoch,
times it but for its first steps, and says how long it waited for data. Ours is the training loop
that users run, `mbv3dist.train`, started anew in each round, and its own record of the run. The
peers are training loops around their data sets, loaders and models, as their reference scripts
put them together, without logging, and without reading the loss at each step, which would wait.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from pixel_peers.serve import Answer, answer_jobs
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ARCHITECTURES = {
    "small": "mobilenetv3_small",
    "large": "mobilenetv3_large",
    "detector": "ssdlite_mobilenetv3_large",
}
TITLES = {
    "ours": "mbv3dist train",
    "ours_delayed": "mbv3dist train, delayed",
    "torchvision": "torchvision as in its references: PIL, contiguous",
    "torchvision_tuned": "torchvision tuned: v2 on uint8 tensors, channels_last",
    "timm": "timm: create_loader with prefetcher, channels_last",
}
DELAY_S = 1.0  # a batch; a benchmark has to see it
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Round = Callable[[], Answer]


def open_system(name: str, job: dict[str, Any]) -> Round:
    """Return what trains for one round."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.backends.cudnn.benchmark = True
    if name.startswith("ours"):
        return open_ours(name, job)
    return open_peer(name, job)


# ---------------------------------------------------------------------------------------- ours


def open_ours(name: str, job: dict[str, Any]) -> Round:
    """`mbv3dist.train` on the shards; the figures are those of its own metrics.jsonl."""
    from mbv3dist.data.loader import Loader
    from mbv3dist.training import run as training

    if name == "ours_delayed":

        class Delayed(Loader):
            def __iter__(self) -> Iterator[Any]:
                for item in super().__iter__():
                    time.sleep(DELAY_S)
                    yield item

        vars(training)["Loader"] = Delayed
    runs = Path(job["place"]) / f"runs-{name}-{job['model']}"
    recipe = Path(job["place"]) / f"recipe-{name}-{job['model']}.json"  # YAML, too
    recipe.write_text(json.dumps(our_recipe(job, runs)), encoding="utf-8")
    return partial(our_round, recipe, runs, job)


def our_recipe(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    """The recipe of one round."""
    is_detector = job["model"] == "detector"
    model: dict[str, Any] = {
        "architecture": ARCHITECTURES[job["model"]],
        "input_size": job["size"],
    }
    view: dict[str, Any] = {"name": "random_resized_crop"}
    if is_detector:
        # What torchvision's detection reference draws; its model starts from random weights too.
        view = {
            "name": "ssd",
            "min_ious": [0.0, 0.1, 0.3, 0.5, 0.7, 0.9],
            "crop_probability": 6 / 7,
        }
        model["reduced_tail"] = True
    return {
        "name": "round",
        "out": str(runs),
        "overwrite": True,
        "epochs": 1,
        "mixed_precision": job["amp"],
        "data": {
            "path": str(Path(job["place"]) / "ours"),
            "train_split": "trainval" if is_detector else "train",
            "global_batch_size": job["batch"],
            "num_threads": job["workers"],
            "view": view,
        },
        "model": model,
        "optim": {"lr": 0.01, "ema_decay": 0.0},
        # Each record ends with a wait for the device: few of them.
        "tracking": {"log_every_steps": job["warm"]},
        "checkpoint": {"every_epochs": 0},
    }


def our_round(recipe: Path, runs: Path, job: dict[str, Any]) -> Answer:
    """Train for a round; drop the records of the steps that got it warm."""
    import mbv3dist

    with contextlib.redirect_stdout(sys.stderr):
        result = mbv3dist.train(mbv3dist.load_config(recipe), quiet=True)
    lines = (Path(result["run"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    shutil.rmtree(runs)
    steps, seconds, host, device, before = 0, 0.0, 0.0, 0.0, 0
    for record in records:
        count = record["step"] - before
        before = record["step"]
        if record["step"] <= job["warm"]:
            continue
        took = count * job["batch"] / record["images_per_s"]
        steps, seconds = steps + count, seconds + took
        host, device = host + took * record["data_wait"], device + took * record["device_wait"]
    if not all(math.isfinite(record["loss"]) for record in records):
        raise ValueError("the loss is not finite")
    return {
        "images": steps * job["batch"],
        "seconds": seconds,
        "host_wait_s": host,
        "device_wait_s": device,
        "loss": records[-1]["loss"],
    }


# --------------------------------------------------------------------------------------- peers


def open_peer(name: str, job: dict[str, Any]) -> Round:
    """A peer's loader, model and optimiser, and the loop around them."""
    device = torch.device(job["device"])
    is_detector = job["model"] == "detector"
    tuned = name != "torchvision"
    torch.manual_seed(0)
    loader: Any
    model: Any
    if is_detector:
        import torchvision

        model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=job["classes"] + 1
        )
        loader = detection_loader(job, tensors=tuned)
        step = partial(detector_step, model, device=device, amp=job["amp"])
    else:
        model = classifier(name, job)
        loader = timm_loader(job) if name == "timm" else image_loader(job, tensors=tuned)
        step = partial(classifier_step, model, device=device, amp=job["amp"], tuned=tuned)
    model = model.to(device).train()
    if tuned:
        model = model.to(memory_format=torch.channels_last)
        if is_detector:
            model.transform.register_forward_hook(_to_channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=4e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=job["amp"] == "fp16")
    return partial(peer_round, loader, step, optimizer, scaler, job)


def _to_channels_last(_module: nn.Module, _args: Any, result: Any) -> Any:
    result[0].tensors = result[0].tensors.contiguous(memory_format=torch.channels_last)
    return result


def peer_round(
    loader: Any, step: Callable[[Any], Tensor], optimizer: Any, scaler: Any, job: dict[str, Any]
) -> Answer:
    """Train for an epoch, and time what comes after `warm` steps."""
    from mbv3dist.training.meter import DataWait

    device = torch.device(job["device"])
    on_gpu = device.type == "cuda"
    wait = DataWait(partial(torch.cuda.Event, enable_timing=True) if on_gpu else None)
    batches = iter(loader)
    started, loss = 0.0, torch.zeros(())
    for number in range(job["warm"] + job["steps"]):
        if number == job["warm"]:
            _synchronize(device)
            wait.restart()
            started = time.perf_counter()
        wait.ask()
        batch = next(batches)
        wait.begin()
        loss = step(batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    _synchronize(device)
    seconds = time.perf_counter() - started
    if not math.isfinite(float(loss)):
        raise ValueError("the loss is not finite")
    return {
        "images": job["steps"] * job["batch"],
        "seconds": seconds,
        "host_wait_s": wait.host_s,
        "device_wait_s": wait.device_s(),
        "loss": float(loss),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _autocast(device: torch.device, amp: str) -> Any:
    dtype = DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def classifier(name: str, job: dict[str, Any]) -> nn.Module:
    """A peer's classifier with random weights."""
    if name == "timm":
        import timm

        made: nn.Module = timm.create_model(
            f"mobilenetv3_{job['model']}_100", num_classes=job["classes"], drop_rate=0.2
        )
        return made
    import torchvision

    create = getattr(torchvision.models, f"mobilenet_v3_{job['model']}")
    network: nn.Module = create(num_classes=job["classes"])
    return network


def classifier_step(
    model: nn.Module, batch: Any, *, device: torch.device, amp: str, tuned: bool
) -> Tensor:
    """Copy, normalise what is still uint8, forward and loss."""
    images, labels = batch
    layout = torch.channels_last if tuned else torch.contiguous_format
    images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        mean = torch.tensor(MEAN, device=device).view(3, 1, 1) * 255
        std = torch.tensor(STD, device=device).view(3, 1, 1) * 255
        images = (images.float() - mean) / std
    images = images.contiguous(memory_format=layout)
    with _autocast(device, amp):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels.to(device, non_blocking=True))


def detector_step(model: nn.Module, batch: Any, *, device: torch.device, amp: str) -> Tensor:
    """Copy, to floats, forward and loss: torchvision's model takes lists."""
    images, targets, _numbers = batch
    images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = images.float() / 255
    moved = [
        {
            "boxes": target["boxes"].to(device, non_blocking=True),
            "labels": (target["labels"] + 1).to(device, non_blocking=True),
        }
        for target in targets
    ]
    with _autocast(device, amp):
        losses = model(list(images), moved)
    total: Tensor = sum(losses.values())
    return total


def image_loader(job: dict[str, Any], *, tensors: bool) -> Any:
    """ImageFolder with torchvision's training transforms."""
    from pixel_peers.torchvision_peer import load_tensor, uint8_transform, v1_transform
    from torchvision.datasets import ImageFolder

    if tensors:
        dataset = ImageFolder(job["folder"], uint8_transform(job["size"]), loader=load_tensor)
    else:
        dataset = ImageFolder(job["folder"], v1_transform(job["size"]))
    return _data_loader(dataset, job)


def detection_loader(job: dict[str, Any], *, tensors: bool) -> Any:
    """A VOC folder with torchvision's SSD augmentation."""
    from pixel_peers.torchvision_peer import Voc, collate_boxes

    dataset = Voc(Path(job["folder"]), job["size"], tensors=tensors)
    return _data_loader(dataset, job, collate_fn=collate_boxes)


def _data_loader(dataset: Any, job: dict[str, Any], **options: Any) -> Any:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=job["batch"],
        shuffle=True,
        num_workers=job["workers"],
        drop_last=True,
        pin_memory=job["device"] == "cuda",
        persistent_workers=True,  # else they start again at each epoch, which here is short
        **options,
    )


def timm_loader(job: dict[str, Any]) -> Any:
    """A loader of timm, which normalises in its prefetcher."""
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("", root=job["folder"]),
        input_size=(3, job["size"], job["size"]),
        batch_size=job["batch"],
        is_training=True,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=job["workers"],
        device=torch.device(job["device"]),
        use_prefetcher=True,
        pin_memory=job["device"] == "cuda",
    )


# ------------------------------------------------------------------------------------- process


def versions(name: str) -> dict[str, str]:
    """Return what runs."""
    packages = {"ours": ["mbv3dist"], "timm": ["timm", "pillow"]}
    own = packages.get(name.partition("_")[0], ["torchvision", "pillow"])
    return machine.versions("torch", *own)


def main() -> None:
    """Serve one system."""
    name = sys.argv[1]
    rounds: list[Round] = []

    def handle(job: dict[str, Any]) -> Answer:
        if job["do"] == "open":
            rounds[:] = [open_system(name, job)]
            return {"versions": versions(name)}
        if job["do"] == "trace":
            return {"kernels": traced_round(rounds[0], job)}
        assert job["do"] == "round"
        return rounds[0]()

    answer_jobs(handle)
    sys.stderr.flush()
    os._exit(0)  # workers of DataLoaders would keep the process alive


def traced_round(train: Round, job: dict[str, Any]) -> list[str]:
    """Write a trace of one round; return the lines of its table of kernels."""
    import tracing

    rows = tracing.traced(train, Path(job["path"]), device=torch.device(job["device"]))
    return tracing.kernel_table(rows)


if __name__ == "__main__":
    main()
