"""What needs a GPU: training under each precision, deterministic resume, no hidden synchronisation.

Skipped where there is none; `make gpu` runs them on a machine that has one.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import kill_when, run_mbv3dist

from mbv3dist.models.directory import create_model
from mbv3dist.models.loss import match_batch, multibox_loss
from mbv3dist.ops.nms import postprocess

WITH_GPU = {"CUDA_VISIBLE_DEVICES": "0"}  # the tests' processes see none unless asked
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("processes", [0, 1])  # 1: NCCL with a world of one
def test_detector_trains(detection_recipe, tmp_path, precision, processes):
    flags = ["--out", tmp_path, "--mixed_precision", precision]
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
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
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
