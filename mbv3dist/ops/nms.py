"""Post-process of a detector's raw outputs: decode, threshold, top-k, NMS, best detections.

The rule is that of torchvision's `SSD.postprocess_detections`: per class, the candidates are the
`topk_candidates` best scores above the threshold; a candidate is dropped if a better one of its
class that was kept overlaps it by more than `nms_threshold`; the `max_detections` best are left.
Three implementations give the same result, and `postprocess` chooses by device:

- `nms_triton.py` on CUDA: the whole batch in six launches, without waiting for the device;
- `nms_cpu.py` on a CPU: only as many candidates of a picture as its detections need, best first;
- `postprocess_reference` anywhere else: torchvision's own ops, picture by picture. The other two
  are tested against it and against torchvision's method itself.

Where several scores are equal, the order is defined here: class first, then anchor. torchvision
leaves it to sorts that are not stable, so there it can differ between devices and releases.

Equal means: to the last bit of each overlap. torchvision's `batched_nms` has two ways. With few
candidates in a picture (1000 on a CPU, 25,000 on CUDA) it moves the classes apart by adding
label * (largest coordinate + 1) to all coordinates, which rounds them, and so moves an overlap near
the threshold to the other side now and then; with more it takes class after class, unmoved. Both
implementations here do as it does: they add the same numbers in the same cases. Likewise each
follows the rounding of torchvision's kernel on its own device (on CUDA the compiler fused the sum
of the areas). NaN in the outputs harms nothing: such scores are no candidates, and where such a box
is among the candidates that are moved apart, nothing of its picture is dropped, as in torchvision.

Shapes: B pictures, A anchors, C classes (without background), D = `max_detections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mbv3dist.ops.boxes import anchors_to_pixels, clip_boxes, decode_boxes
from mbv3dist.ops.color import has_triton

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Detections:
    """Detections of a batch, best score first, padded to a fixed number per picture.

    Attributes:
        boxes: float32 [B, D, 4], xyxy canvas pixels, clipped to the canvas; 0 where padded.
        scores: float32 [B, D], probabilities; 0 where padded.
        labels: int64 [B, D], 0-based without background; -1 where padded.
        count: int64 [B], detections of each picture.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor


torch.export.register_dataclass(Detections)  # so that an exported model may return it


def postprocess(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    *,
    size: tuple[int, int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Detections:
    """Turn raw outputs into detections, through the op `mbv3dist::postprocess`.

    On CUDA nothing waits for the device, so that it can be captured in a graph; torch.compile and
    torch.export see one op.

    Args:
        class_logits: float [B, A, C + 1], column 0 is the background.
        box_deltas: float [B, A, 4].
        anchors: float32 [A, 4], cxcywh in [0, 1].
        size: canvas (height, width) in pixels.
        score_threshold: a class is considered where its probability is above this.
        nms_threshold: of two boxes of one class with a larger IoU the weaker is dropped.
        topk_candidates: boxes per class and picture that enter NMS.
        max_detections: D, detections kept per picture.

    Returns:
        `Detections` of static shape [B, D].

    Raises:
        ValueError: When shapes do not belong together or an option has no meaning.
    """
    _check(class_logits, box_deltas, anchors, nms_threshold, topk_candidates, max_detections)
    return Detections(
        *torch.ops.mbv3dist.postprocess(
            class_logits.detach(),  # no gradient; torch.no_grad() would be a subgraph in an export
            box_deltas.detach(),
            anchors.detach(),
            size,
            score_threshold,
            nms_threshold,
            topk_candidates,
            max_detections,
        )
    )


@torch.no_grad()
def postprocess_reference(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    *,
    size: tuple[int, int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Detections:
    """Do what `postprocess` does, by torchvision's own ops, picture by picture."""
    _check(class_logits, box_deltas, anchors, nms_threshold, topk_candidates, max_detections)
    scores = class_logits.float().softmax(-1)[..., 1:].transpose(1, 2)  # [B, C, A]
    pixels = anchors_to_pixels(anchors.float(), size)
    return choose_reference(
        scores,
        clip_boxes(decode_boxes(box_deltas.float(), pixels), size),
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        topk_candidates=topk_candidates,
        max_detections=max_detections,
    )


def choose_reference(
    scores: Tensor,
    boxes: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Detections:
    """Do what comes after softmax and decoding, by torchvision's own ops.

    Args:
        scores: float32 [B, C, A], probabilities of the classes without background.
        boxes: float32 [B, A, 4], xyxy pixels, clipped.
        score_threshold: see `postprocess`, like the others.
        nms_threshold: see there.
        topk_candidates: see there.
        max_detections: see there.
    """
    batch, num_classes, num_anchors = scores.shape
    candidates = min(topk_candidates, num_anchors)
    scores = scores.where(scores > score_threshold, -torch.inf)  # NaN would be sorted to the front
    top_scores, top_anchors = scores.sort(dim=-1, descending=True, stable=True)
    top_scores, top_anchors = top_scores[..., :candidates], top_anchors[..., :candidates]
    labels = torch.arange(num_classes, device=scores.device)[:, None].expand(-1, candidates)
    result = Detections(
        boxes=boxes.new_zeros(batch, max_detections, 4),
        scores=boxes.new_zeros(batch, max_detections),
        labels=torch.full((batch, max_detections), -1, dtype=torch.int64, device=boxes.device),
        count=torch.zeros(batch, dtype=torch.int64, device=boxes.device),
    )
    for picture in range(batch):
        chosen = top_scores[picture] > score_threshold  # [C, K], class-major as in SSD
        picture_scores = top_scores[picture][chosen]
        picture_labels = labels[chosen]
        picture_boxes = boxes[picture][top_anchors[picture][chosen]]
        # What NMS does with scores is to sort by them. Places instead of scores are distinct: so
        # the order of equal scores is that of the docstring whatever the sort.
        order = picture_scores.argsort(descending=True, stable=True)
        places = torch.empty_like(picture_scores)
        places[order] = torch.arange(len(order), 0, -1, device=places.device, dtype=places.dtype)
        # batched_nms shifts boxes by their label: with torchvision's (from 1) rounding agrees too.
        keep = batched_nms(picture_boxes, places, picture_labels + 1, nms_threshold)
        keep = keep[:max_detections]
        kept = len(keep)
        result.boxes[picture, :kept] = picture_boxes[keep]
        result.scores[picture, :kept] = picture_scores[keep]
        result.labels[picture, :kept] = picture_labels[keep]
        result.count[picture] = kept
    return result


def _check(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> None:
    batch, num_anchors = class_logits.shape[:2]
    if box_deltas.shape != (batch, num_anchors, 4) or anchors.shape != (num_anchors, 4):
        raise ValueError(
            f"class_logits {list(class_logits.shape)} need box_deltas [{batch}, {num_anchors}, 4] "
            f"and anchors [{num_anchors}, 4], got {list(box_deltas.shape)} and "
            f"{list(anchors.shape)}"
        )
    if not nms_threshold >= 0:
        raise ValueError(f"nms_threshold must be at least 0, got {nms_threshold}")
    if topk_candidates < 1 or max_detections < 1:
        raise ValueError(
            "topk_candidates and max_detections must be at least 1, got "
            f"{topk_candidates} and {max_detections}"
        )


def _by_reference(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    size: Sequence[int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Outputs:
    """Post-process on a device that has no implementation of its own."""
    height, width = size
    found = postprocess_reference(
        class_logits,
        box_deltas,
        anchors,
        size=(height, width),
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        topk_candidates=topk_candidates,
        max_detections=max_detections,
    )
    return found.boxes, found.scores, found.labels, found.count


_op = torch.library.custom_op(
    "mbv3dist::postprocess",
    _by_reference,
    mutates_args=(),
    schema=(
        "(Tensor class_logits, Tensor box_deltas, Tensor anchors, SymInt[] size, "
        "float score_threshold, float nms_threshold, SymInt topk_candidates, "
        "SymInt max_detections) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_op.register_kernel("cpu")
def _(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    size: Sequence[int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Outputs:
    from mbv3dist.ops import nms_cpu  # Numba takes a while to import

    height, width = size
    pixels = anchors_to_pixels(anchors.float(), (height, width))
    return nms_cpu.choose(
        class_logits.float().softmax(-1),
        clip_boxes(decode_boxes(box_deltas.float(), pixels), (height, width)),
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        topk_candidates=topk_candidates,
        max_detections=max_detections,
    )


@_op.register_kernel("cuda")
def _(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    size: Sequence[int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Outputs:
    arguments = (class_logits, box_deltas, anchors, size)
    options = (score_threshold, nms_threshold, topk_candidates, max_detections)
    if not has_triton():
        return _by_reference(*arguments, *options)
    from mbv3dist.ops import nms_triton

    with torch.cuda.device_of(class_logits):  # Triton launches on the current device
        return nms_triton.postprocess(*arguments, *options)


@_op.register_fake
def _(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    size: Sequence[int],
    score_threshold: float,
    nms_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> Outputs:
    shape = (class_logits.shape[0], max_detections)
    return (
        class_logits.new_empty((*shape, 4), dtype=torch.float32),
        class_logits.new_empty(shape, dtype=torch.float32),
        class_logits.new_empty(shape, dtype=torch.int64),
        class_logits.new_empty(shape[:1], dtype=torch.int64),
    )
