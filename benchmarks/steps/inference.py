"""Classifiers as they are deployed: a forward pass without gradients, ours with folded batch norms.

Weights and pictures are in the precision itself, without autocast. Peers are as their libraries
give them: folding is no call of theirs; a compiler puts their batch norms behind convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mbv3dist.inference.fold import fold_batch_norms
from mbv3dist.ops.color import normalize_images
from steps.systems import HALF, Mark, Setting, System, draw_images, make_classifier

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inference_system(library: str, variant: str, setting: Setting, *, batch: int) -> System:
    """A classifier in evaluation mode: `step` is a forward pass and returns the logits."""
    torch.manual_seed(0)
    model: nn.Module = make_classifier(library, variant).eval()
    if library == "ours":
        model = fold_batch_norms(model)
    dtype = DTYPES[setting.amp]
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = model.requires_grad_(False).to(setting.device, dtype)
    model = model.to(memory_format=layout)
    pixels = draw_images(batch, 224).to(setting.device)
    images = normalize_images(pixels, mean=HALF, std=HALF).to(dtype)
    images = images.contiguous(memory_format=layout)
    forward = setting.compiled(model)

    def step(mark: Mark) -> Tensor:
        with torch.no_grad():
            logits: Tensor = forward(images)
        mark("forward")
        return logits

    return System(library, setting, step, None, None)
