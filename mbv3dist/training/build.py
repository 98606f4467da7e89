"""The model that a recipe asks for: from random weights, ImageNet's, or another model's."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mbv3dist.config import TrainConfig
from mbv3dist.models.anchors import recipe_anchors
from mbv3dist.models.directory import (
    ModelSpec,
    Thresholds,
    load_model,
    model_from_spec,
    new_spec,
)
from mbv3dist.models.weights import transfer


def build_model(
    config: TrainConfig, classes: tuple[str, ...], *, train_fingerprint: str = ""
) -> tuple[ModelSpec, nn.Module]:
    """Build the model of the recipe.

    With `model.init_from` it starts from another model's weights: of the same task, or a
    detector's backbone from a classifier. It is given pictures as that model was: the same mean and
    std, so that weights go on seeing what they were trained on.

    Args:
        config: The recipe.
        classes: Names of the data set's classes.
        train_fingerprint: Of the training split, for the model's provenance.

    Returns:
        Description and model. With `init_from` the description's provenance says under that name
        what was taken over and what was made afresh.

    Raises:
        ValueError: The weights do not fit, or cannot be had.
    """
    recipe = config.model
    is_detector = config.task == "detection"
    pretrained = recipe.pretrained and recipe.pretrained_from
    spec = new_spec(
        recipe.architecture,
        classes,
        input_size=recipe.input_size,
        width=recipe.width,
        dropout=recipe.dropout,
        reduced_tail=recipe.reduced_tail,
        anchors=recipe_anchors(recipe) if is_detector else None,
        thresholds=Thresholds(
            score=recipe.score_threshold,
            nms=recipe.nms_threshold,
            topk_candidates=recipe.topk_candidates,
            max_detections=recipe.max_detections,
        )
        if is_detector
        else None,
        pretrained=pretrained,
        provenance={"run": config.name, "data": train_fingerprint, "seed": config.seed},
    )
    source = load_model(recipe.init_from) if recipe.init_from else None
    if source is not None:
        if source.spec.task != config.task and not is_detector:
            raise ValueError(
                f"--model.init_from {recipe.init_from} is a {source.spec.task} model, this run "
                f"trains a {config.task} model; give a model of the same task"
            )
        theirs = source.spec.preprocess
        preprocess = replace(spec.preprocess, mean=theirs.mean, std=theirs.std)
        spec = replace(spec, bn_eps=source.spec.bn_eps, preprocess=preprocess)
    model = model_from_spec(spec, pretrained=pretrained)
    if recipe.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = recipe.bn_momentum
    if source is not None:
        fresh = transfer(model, source.model.state_dict(), source=recipe.init_from)
        note = _describe(recipe.init_from, source.spec, classes, fresh)
        changes = spec.preprocess.changes_from(source.spec.preprocess)
        if changes and source.spec.task == config.task:
            note += (
                f"; pictures are prepared as training does it, and model.json says so: {changes}"
            )
        spec = replace(spec, provenance={**spec.provenance, "init_from": note})
    return spec, model


def _describe(where: str, source: ModelSpec, classes: Sequence[str], fresh: list[str]) -> str:
    """Say in a line where weights come from, and which layers stay as they were drawn."""
    layers = sorted({name.partition(".")[0] for name in fresh})
    if not layers:
        return f"all weights from {where}"
    reason = ""
    if tuple(classes) != source.classes and len(classes) != len(source.classes):
        reason = f" (it has {len(source.classes)} classes, the data {len(classes)})"
    return f"weights from {where}; made afresh: {', '.join(layers)}{reason}"
