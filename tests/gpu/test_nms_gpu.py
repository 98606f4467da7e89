"""Post-process on a real GPU: equal to torchvision's there, few launches, no waiting.

On the device torchvision's sums of areas are fused by its compiler, and torch's softmax adds up in
an order of its own; the kernels follow both, so "equal" is to the last bit here too.
"""

from functools import partial

import numpy as np
import pytest
import torch
from nms_cases import difference, has_ties, mismatches, random_case, torchvision_detections
from torch import nn
from torch.autograd import DeviceType

from mbv3dist.models.anchors import AnchorConfig, make_anchors
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops.boxes import anchors_to_pixels, clip_boxes, decode_boxes
from mbv3dist.ops.nms import Detections, choose_reference, postprocess, postprocess_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZE = (320, 320)
OPTIONS = {
    "size": SIZE,
    "score_threshold": 0.001,
    "nms_threshold": 0.55,
    "topk_candidates": 300,
    "max_detections": 300,
}
MOST_LAUNCHES = 8


def raw_outputs(batch: int, num_classes: int, *, seed: int, background: float = 0.0) -> tuple:
    """Raw outputs and anchors on the device."""
    anchors = make_anchors(AnchorConfig(), feature_sizes(SIZE))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, len(anchors), num_classes + 1, generator=generator)
    logits[..., 0] += background
    deltas = torch.randn(batch, len(anchors), 4, generator=generator)
    return logits.cuda(), deltas.cuda(), anchors.cuda()


def poison() -> None:
    """Leave memory behind that shows where a result was not written."""
    torch.full((1 << 28,), 0xAB, dtype=torch.uint8, device="cuda")


def random_cases(number: int, *, batch: int, most_anchors: int, most_classes: int):
    rng = np.random.default_rng(most_anchors)
    for turn in range(number):
        num_anchors = most_anchors if turn == 0 else int(rng.integers(1, most_anchors + 1))
        num_classes = most_classes if turn == 1 else int(rng.integers(1, most_classes + 1))
        yield random_case(rng, batch=batch, num_anchors=num_anchors, num_classes=num_classes).to(
            "cuda"
        )


@pytest.mark.parametrize("num_classes", [1, 2, 7, 20, 31, 32, 90, 200])
def test_scores_and_boxes_are_torchs_to_the_last_bit(num_classes):
    from mbv3dist.ops import nms_triton

    logits, deltas, anchors = raw_outputs(3, num_classes, seed=num_classes)
    for scale in (1, 20):
        boxes, keys, _ = nms_triton._score_and_decode(
            logits * scale, deltas * scale, anchors, SIZE, 0.0
        )
        expected = (logits * scale).softmax(-1)[..., 1:].transpose(1, 2)
        scores = keys.view(torch.float32).where(keys >= 0, 0.0)
        assert torch.equal(scores, expected)
        pixels = anchors_to_pixels(anchors, SIZE)
        assert torch.equal(boxes, clip_boxes(decode_boxes(deltas * scale, pixels), SIZE))


@pytest.mark.parametrize(
    ("most_anchors", "most_classes", "number"), [(60, 8, 100), (40, 91, 20), (5000, 3, 12)]
)
def test_the_same_is_chosen_of_the_same_scores(most_anchors, most_classes, number):
    from mbv3dist.ops import nms_triton

    sizes = {"most_anchors": most_anchors, "most_classes": most_classes}
    wrong = []
    for turn, case in enumerate(random_cases(number, batch=4, **sizes)):
        options = dict(case.options)
        boxes, keys, _ = nms_triton._score_and_decode(
            case.logits, case.deltas, case.anchors, options.pop("size"), options["score_threshold"]
        )
        scores = keys.view(torch.float32).where(keys >= 0, -torch.inf)
        poison()
        ours = case.run(postprocess)
        if difference(ours, choose_reference(scores, boxes, **options)):
            wrong.append((turn, case.logits.shape, case.options))
    assert not wrong


@pytest.mark.parametrize(
    ("most_anchors", "most_classes", "number"), [(12, 3, 150), (60, 8, 100), (5000, 3, 12)]
)
def test_equals_torchvision(most_anchors, most_classes, number):
    sizes = {"most_anchors": most_anchors, "most_classes": most_classes}
    wrong = []
    for turn, case in enumerate(random_cases(number, batch=8, **sizes)):
        theirs = torchvision_detections(case, stable=has_ties(case))
        if mismatches(case.run(postprocess), theirs):
            wrong.append((turn, case.logits.shape, case.options))
    assert not wrong


@pytest.mark.parametrize("num_classes", [20, 90])
@pytest.mark.parametrize("background", [0.0, 9.0])
def test_equals_torchvision_at_full_size(num_classes, background):
    """Where 90 classes are dense, torchvision does not move them apart."""
    raw = raw_outputs(4, num_classes, seed=3, background=background)
    poison()
    ours = postprocess(*raw, **OPTIONS)
    assert difference(ours, postprocess_reference(*raw, **OPTIONS)) == 0
    assert ours.count.min() > 0


def kernels_of(function) -> list[str]:
    """Names of what a call does on the device."""
    function()  # compiles
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("background", [0.0, 9.0, 100.0])
def test_launches_are_few_and_nothing_waits(background):
    raw = raw_outputs(8, 90, seed=4, background=background)
    call = partial(postprocess, *raw, **OPTIONS)
    names = kernels_of(call)
    assert 0 < len(names) <= MOST_LAUNCHES, names
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_captures_it():
    raw = raw_outputs(4, 20, seed=5)
    call = partial(postprocess, *raw, **OPTIONS)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for background in (0.0, 9.0, 100.0, 4.0):
        fresh = raw_outputs(4, 20, seed=6, background=background)
        for there, here in zip(raw, fresh, strict=True):
            there.copy_(here)
        for field in (found.boxes, found.scores, found.labels, found.count):
            field.fill_(77)
        graph.replay()
        assert difference(found, postprocess_reference(*raw, **OPTIONS)) == 0


def test_nan_ends_too():
    logits, deltas, anchors = raw_outputs(2, 20, seed=7)
    logits[0] = torch.nan
    logits[1, ::3] = torch.inf
    deltas[1, ::5] = torch.nan
    found = postprocess(logits, deltas, anchors, **OPTIONS)
    assert found.count.tolist()[0] == 0
    assert difference(found, postprocess_reference(logits, deltas, anchors, **OPTIONS)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    logits, deltas, anchors = raw_outputs(2, 20, seed=8)
    half = logits.to(dtype), deltas.to(dtype)
    ours = postprocess(*half, anchors, **OPTIONS)
    assert difference(ours, postprocess(*(x.float() for x in half), anchors, **OPTIONS)) == 0


def test_the_op_keeps_the_rules_of_ops():
    raw = raw_outputs(2, 5, seed=9)
    arguments = (*raw, list(SIZE), 0.001, 0.55, 300, 300)
    torch.library.opcheck(torch.ops.mbv3dist.postprocess.default, arguments)


class Detector(nn.Module):
    """Raw outputs as a model has them, and post-process."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(6, 21), nn.Linear(6, 4)
        self.register_buffer("anchors", make_anchors(AnchorConfig(), feature_sizes(SIZE)))

    def forward(self, features: torch.Tensor) -> Detections:
        """Features are float32 [B, A, 6]."""
        return postprocess(self.classes(features), self.boxes(features), self.anchors, **OPTIONS)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_post_processes(mode):
    """Scores of compiled layers may differ in their last bits, so counts and sums are compared."""
    model = Detector().cuda().eval()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(4):
        features = torch.randn(2, len(model.anchors), 6, device="cuda") * 3
        with torch.no_grad():
            found, there = compiled(features), model(features)
        assert (found.count - there.count).abs().max() <= 3
        torch.testing.assert_close(found.scores.sum(1), there.scores.sum(1), rtol=1e-3, atol=1e-3)
