"""The models that latency.py measures: torchvision's twin of ours, and weights without training."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssdlite import SSDLiteHead

from mbv3dist.inference.check import drawn_canvases
from mbv3dist.models.directory import LoadedModel, model_from_spec, new_spec
from mbv3dist.models.preprocess import normalize
from mbv3dist.models.weights import to_torchvision


def stand_in(num_classes: int) -> LoadedModel:
    """An untrained Large whose answers look like a trained one's: most anchors are background."""
    spec = new_spec("ssdlite_mobilenetv3_large", [f"class {n}" for n in range(num_classes)])
    torch.manual_seed(0)
    model = model_from_spec(spec)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the average over all batches
    with torch.no_grad():
        model(normalize(drawn_canvases(spec, 8, seed=9), spec.preprocess))
        model.eval()
        for head in (*model.class_heads, *model.box_heads):
            head[1].weight.normal_(0, 0.03)
        for head in model.class_heads:
            head[1].weight.normal_(0, 0.06)
            head[1].bias.view(-1, num_classes + 1)[:, 0] = 11.0
    return LoadedModel(model, spec)


def torchvision_twin(loaded: LoadedModel) -> nn.Module:
    """Build torchvision's detector with our weights, anchors and thresholds."""
    spec, thresholds = loaded.spec, loaded.spec.thresholds
    assert spec.anchors is not None and thresholds is not None
    if not spec.reduced_tail or spec.architecture != "ssdlite_mobilenetv3_large":
        raise ValueError(
            f"{spec.architecture} with reduced_tail {spec.reduced_tail}: torchvision's function "
            "builds Large with the reduced tail; give such a model"
        )
    outputs = len(spec.classes) + 1
    twin = ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=outputs,
        image_mean=list(spec.preprocess.mean),
        image_std=list(spec.preprocess.std),
        score_thresh=thresholds.score,
        nms_thresh=thresholds.nms,
        topk_candidates=thresholds.topk_candidates,
        detections_per_img=thresholds.max_detections,
    )
    ratios, scales = list(spec.anchors.ratios), list(spec.anchors.scales)
    twin.anchor_generator = DefaultBoxGenerator([ratios] * (len(scales) - 1), scales=scales)
    with torch.no_grad():
        features = twin.eval().backbone(torch.zeros(1, 3, spec.input_size, spec.input_size))
    twin.head = SSDLiteHead(
        [feature.shape[1] for feature in features.values()],
        twin.anchor_generator.num_anchors_per_location(),
        outputs,
        partial(nn.BatchNorm2d, eps=spec.bn_eps, momentum=0.03),
    )
    twin.load_state_dict(to_torchvision(loaded.model))
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = spec.bn_eps
    return twin.eval()
