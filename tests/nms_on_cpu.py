"""Runs the post-process kernels in Triton's interpreter and prints where they differ.

A process of its own: the interpreter has to be asked for before Triton is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

from unittest import mock

import numpy as np
import torch
import torchvision.ops.boxes as theirs
from nms_cases import LAYOUTS, SCORES, Case, difference, random_case
from torch import Tensor

from mbv3dist.ops import nms, nms_triton
from mbv3dist.ops.boxes import anchors_to_pixels, clip_boxes, decode_boxes

APART = 30  # instead of torchvision's 1000, so that small cases are on both sides of it
NUM_CASES = len(LAYOUTS) * len(SCORES)  # each with each


def expected(case: Case) -> tuple[nms.Detections, dict[str, float]]:
    """What torchvision's ops make of the kernel's own scores and boxes, and the errors of those.

    The interpreter's exponential is not torch's, so scores differ in their last bits; what is
    chosen of them must not.
    """
    options = dict(case.options)
    size, threshold = options.pop("size"), options["score_threshold"]
    tensors = (case.logits, case.deltas, case.anchors)
    boxes, keys, _ = nms_triton._score_and_decode(*tensors, size, threshold)
    is_found = keys >= 0
    scores = keys.view(torch.float32).where(is_found, -torch.inf)
    exact = case.logits.softmax(-1)[..., 1:].transpose(1, 2)
    is_clear = ((exact - threshold).abs() > 1e-6 * exact) & (exact > 1e-30)
    assert torch.equal((is_found & is_clear), (exact > threshold) & is_clear)
    pixels = anchors_to_pixels(case.anchors, size)
    distance = (boxes - clip_boxes(decode_boxes(case.deltas, pixels), size)).abs()
    errors = {
        "scores": ((scores - exact) / exact)[is_found & is_clear].abs(),
        "boxes": distance[~distance.isnan()],
    }
    assert torch.equal(boxes.isnan(), distance.isnan())
    worst = {name: x.max().item() if x.numel() else 0.0 for name, x in errors.items()}
    return nms.choose_reference(scores, boxes, **options), worst


def main() -> None:
    rng = np.random.default_rng(11)
    report = {"pictures": 0, "detections": 0, "wrong": [], "scores": 0.0, "boxes": 0.0}
    report |= {"apart": 0, "unmoved": 0}

    def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        is_apart = len(boxes) <= APART
        report["apart" if is_apart else "unmoved"] += 1
        way = theirs._batched_nms_coordinate_trick if is_apart else theirs._batched_nms_vanilla
        return way(boxes, scores, labels, threshold)

    for turn in range(NUM_CASES):
        layout = LAYOUTS[turn % len(LAYOUTS)]
        case = random_case(
            rng,
            batch=2 if turn % 5 == 0 else 1,
            num_anchors=int(rng.choice([1, 20, 33, 64, 80])),
            num_classes=7 if turn == 0 else int(rng.integers(1, 4)),
            layout=layout,
            scores=SCORES[turn % len(SCORES)],
        )
        with mock.patch.object(nms, "batched_nms", batched_nms):
            there, errors = expected(case)
        values = (case.logits, case.deltas, case.anchors, *case.options.values())
        # A grid's products are exact: fused with a sum or not, they are the same.
        fused = layout == "grid"
        ours = nms.Detections(*nms_triton.postprocess(*values, moved_apart=APART, fused=fused))
        if difference(ours, there):
            report["wrong"].append((turn, case.options, ours.count.tolist(), there.count.tolist()))
        report["pictures"] += len(case.logits)
        report["detections"] += int(there.count.sum())
        for name, error in errors.items():
            report[name] = max(report[name], error)
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    main()
