"""What needs a GPU: training under each precision, deterministic resume, no hidden synchronisation.

Skipped where there is none; `make gpu` runs them on a machine that has one.
"""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import kill_when, run_mbv3dist
from torch import nn

from mbv3dist.models.directory import create_model
from mbv3dist.models.loss import match_batch, multibox_loss
from mbv3dist.ops.nms import postprocess
from mbv3dist.training.setup import BUCKET_MB

WITH_GPU = {"CUDA_VISIBLE_DEVICES": "0"}  # the tests' processes see none unless asked
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    ("precision", "processes", "decode"),
    # 1: by torchrun, with a process group, but without DDP, which needs two
    [("no", 0, "cpu"), ("bf16", 0, "auto"), ("fp16", 0, "cpu"), ("bf16", 1, "cpu")],
)
def test_detector_trains(detection_recipe, tmp_path, precision, processes, decode):
    flags = ["--out", tmp_path, "--mixed_precision", precision, "--data.decode", decode]
    done = run_mbv3dist("train", detection_recipe, *flags, processes=processes, env=WITH_GPU)
    assert done.returncode == 0, done.stderr
    assert f"on cuda, precision {precision}" in done.stdout
    text = (tmp_path / "tiny_detector" / "metrics.jsonl").read_text()
    losses = [json.loads(line)["loss"] for line in text.splitlines()]
    assert all(0 < loss < 1000 for loss in losses)


def test_compiled_classifier_trains(classification_recipe, tmp_path):
    flags = ["--out", tmp_path, "--compile", "true", "--mixed_precision", "bf16"]
    done = run_mbv3dist("train", classification_recipe, *flags, timeout=600, env=WITH_GPU)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny_classifier" / "last" / "model.safetensors").is_file()


def test_deterministic_resume_has_the_same_bits(detection_recipe, tmp_path):
    flags = ["--out", tmp_path, "--deterministic", "true"]
    whole = run_mbv3dist("train", detection_recipe, *flags, "--name", "whole", env=WITH_GPU)
    assert whole.returncode == 0, whole.stderr
    words = ["train", detection_recipe, *flags, "--name", "killed", "--resume", "auto"]
    kill_when(words, tmp_path / "killed" / "checkpoints" / "step-00000003", env=WITH_GPU)
    again = run_mbv3dist(*words, env=WITH_GPU)
    assert again.returncode == 0, again.stderr

    def digest(name: str) -> str:
        path: Path = tmp_path / name / "last" / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert digest("killed") == digest("whole")


def test_ddp_over_nccl_gives_the_gradients_of_the_bare_model(tmp_path):
    """A group of one takes all of DDP's ways, and the collectives that training uses."""
    device = torch.device("cuda", 0)
    images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)).to(device)
    model = create_model("mobilenetv3_small", ["a", "b"]).to(device)
    bare = copy.deepcopy(model)
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1, device_id=device
    )
    try:
        side = dist.new_group(backend="gloo")  # as stop requests are agreed on
        votes = torch.ones(1)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=side)
        box = ["a choice"]
        dist.broadcast_object_list(box, src=0)
        total = torch.full((), 7.0, device=device)
        handle = dist.all_reduce(total, async_op=True)
        wrapped = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[0],
            bucket_cap_mb=BUCKET_MB,
            gradient_as_bucket_view=True,
        )
        for _ in range(2):  # buckets are laid out anew after the first
            for network in (wrapped, bare):
                network.zero_grad()
                torch.manual_seed(0)  # dropout
                network(images).square().sum().backward()
            handle.wait()
        assert (votes.item(), box, total.item()) == (1, ["a choice"], 7)
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, bare)
        )
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()
    finally:
        dist.destroy_process_group()


def random_targets(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(batch, 12, 2, generator=generator) * size * 0.7
    boxes = torch.cat([corner, corner + size * 0.25], dim=-1)
    return boxes, torch.randint(0, 3, (batch, 12), generator=generator)


def test_loss_does_not_synchronise_and_equals_the_cpu():
    model = create_model("ssdlite_mobilenetv3_small", ["a", "b", "c"])
    images = torch.randn(4, 3, 320, 320)
    boxes, labels = random_targets(4, 320)
    values = {}
    for device in ("cpu", "cuda"):
        model = model.to(device)
        inputs = [tensor.to(device) for tensor in (images, boxes, labels)]
        logits, deltas = model(inputs[0])
        try:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            targets = match_batch(model.anchors, *inputs[1:], size=(320, 320))
            loss = multibox_loss(logits, deltas, targets)
            (loss.regression_sum + loss.classification_sum).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        values[device] = (loss.regression_sum.item(), loss.num_positives.item())
    assert values["cuda"][1] == values["cpu"][1]
    assert values["cuda"][0] == pytest.approx(values["cpu"][0], rel=1e-2)


def test_postprocess_equals_the_cpu():
    generator = torch.Generator().manual_seed(0)
    model = create_model("ssdlite_mobilenetv3_small", ["a", "b", "c"])
    count = len(model.anchors)
    logits = torch.randn(4, count, 4, generator=generator) * 3
    deltas = torch.randn(4, count, 4, generator=generator)
    options = {
        "size": (320, 320),
        "score_threshold": 0.05,
        "nms_threshold": 0.55,
        "topk_candidates": 300,
        "max_detections": 100,
    }
    here = postprocess(logits, deltas, model.anchors, **options)
    there = postprocess(logits.cuda(), deltas.cuda(), model.anchors.cuda(), **options)
    assert torch.equal(here.labels, there.labels.cpu())
    torch.testing.assert_close(here.boxes, there.boxes.cpu(), atol=1e-3, rtol=1e-4)
