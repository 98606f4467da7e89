"""Checkpoints of torchvision and timm as model directories: `mbv3dist import`.

A state dict says nothing about the pictures its weights were trained on. So `--arch` names the
library's model, and preprocessing, batch norm epsilon and thresholds are that library's own; class
count and reduced tail are read off the weights.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mbv3dist.inference.class_names import count_outputs, find_classes
from mbv3dist.inference.libraries import ARCHS, Source, find_source
from mbv3dist.messages import shown
from mbv3dist.models.directory import ModelSpec, model_from_spec, new_spec, save_model
from mbv3dist.models.weights import load_state, misfit, read_checkpoint, to_our_names
from mbv3dist.writing import check_place

# What float32 holds exactly.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_COUNTER = ".num_batches_tracked"


def import_model(
    checkpoint: str | Path,
    out: str | Path,
    *,
    arch: str,
    classes: str | Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Turn a state dict of torchvision or timm into a model directory.

    Args:
        checkpoint: `.pth` or `.safetensors`; nothing in it is run.
        out: Model directory to write.
        arch: The library's name of the model, such as mobilenet_v3_large; a tag after a dot names
            the weights (mobilenetv3_large_100.ra_in1k, mobilenet_v3_large.IMAGENET1K_V2), which
            decides about preprocessing.
        classes: File with one foreground class name per line; None: the names of ImageNet or COCO,
            if the weights have as many outputs.
        overwrite: Replace an existing model directory.

    Returns:
        What was made, in lines to print.

    Raises:
        ValueError: The checkpoint is damaged or of another model, or names are missing.
        OSError: The directory cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    source = find_source(arch, file_name=checkpoint.name)
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; give another path, or --overwrite to replace a model")
    check_place(out)
    state, average = read_checkpoint(checkpoint)
    _check_kinds(state, checkpoint)
    spec, names_from = _describe(
        state, source, checkpoint=checkpoint, average=average, classes=classes
    )
    with torch.random.fork_rng(devices=[]):
        model = model_from_spec(spec)
    problem = misfit(model, to_our_names(model, state))
    if problem:
        raise _misfit_error(checkpoint, source, problem, state)
    load_state(model, state, source=str(checkpoint))
    infinite = [k for k, v in model.state_dict().items() if not bool(torch.isfinite(v).all())]
    if infinite:
        raise ValueError(
            f"{checkpoint}: {infinite[0]} holds values that are no finite numbers, so the model "
            "would detect nothing; take a checkpoint from before its training diverged"
        )
    save_model(model, spec, out)
    lines = _report(model, spec, source, names_from=names_from)
    if average is not None:
        lines.append(
            f"weights: their moving average, {average} of {checkpoint}, as timm takes it; the "
            "weights of the last step are left out"
        )
    return [f"{out}: {lines[0]}", *lines[1:], *source.remarks]


def _report(model: nn.Module, spec: ModelSpec, source: Source, *, names_from: str) -> list[str]:
    """What was made of which model, in lines."""
    parameters = sum(p.numel() for p in model.parameters())
    prepared = spec.preprocess
    return [
        f"{source.shown}, {len(spec.classes)} classes ({names_from}), "
        f"{'reduced' if spec.reduced_tail else 'full'} tail, {parameters} parameters",
        f"pictures: {prepared.dtype}, {prepared.interpolation}, antialias {prepared.antialias}, "
        f"resized to {prepared.resize} for {spec.input_size} pixels, mean {prepared.mean}, std "
        f"{prepared.std}; batch norm epsilon {spec.bn_eps:g}",
    ]


def _check_kinds(state: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Refuse tensors that could be loaded with a loss, or not at all."""
    for name, value in state.items():
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        fits = value.dtype in _FLOATS or name.endswith(_COUNTER)
        if not (plain and fits):
            kind = str(value.dtype if plain else value.layout).removeprefix("torch.")
            raise ValueError(
                f"{checkpoint}: {shown(name)} is {kind}; save the state dict of a float32 model "
                "(model.float().state_dict())"
            )


def _describe(
    state: Mapping[str, Tensor],
    source: Source,
    *,
    checkpoint: Path,
    average: str | None,
    classes: str | Path | None,
) -> tuple[ModelSpec, str]:
    """The description of what is in a checkpoint, and where the class names come from."""
    needed = (source.outputs_entry, source.tail_entry)
    lacking = [name for name in needed if name not in state or state[name].ndim < 2]
    if lacking:
        raise _misfit_error(checkpoint, source, f"missing entries: {lacking[0]}", state)
    num_outputs = count_outputs(state[source.outputs_entry], source)
    names, names_from = find_classes(
        classes, num_outputs, is_detector=source.is_detector, checkpoint=checkpoint
    )
    spec = new_spec(
        source.architecture,
        names,
        input_size=source.input_size,
        width=source.width,
        reduced_tail=_has_reduced_tail(state[source.tail_entry], source),
        provenance={
            "imported": {
                "library": source.library,
                "arch": source.arch,
                "tag": source.tag,
                "file": checkpoint.name,
                "sha256": _sha256(checkpoint),
                **({} if average is None else {"entry": average}),
            }
        },
    )
    return replace(spec, preprocess=source.preprocess, bn_eps=source.bn_eps), names_from


def _has_reduced_tail(weight: Tensor, source: Source) -> bool:
    """Whether the layer behind the trunk takes half the channels of the full tail."""
    return weight.shape[1] * 2 == source.full_tail_channels


def _misfit_error(
    checkpoint: Path, source: Source, problem: str, state: Mapping[str, Tensor]
) -> ValueError:
    fitting = _fitting(state)
    hint = (
        f"its entries are those of --arch {fitting[0]}"
        if fitting
        else f"give a state dict of one of {', '.join(ARCHS)}"
    )
    return ValueError(f"{checkpoint}: these are no weights of {source.arch}, {problem}; {hint}")


def _fitting(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the models that a state dict fits."""
    found = []
    for arch in ARCHS:
        source = find_source(arch, file_name="")
        outputs, tail = state.get(source.outputs_entry), state.get(source.tail_entry)
        if outputs is None or tail is None or min(outputs.ndim, tail.ndim) < 2:
            continue
        try:
            num_outputs = count_outputs(outputs, source)
        except ValueError:
            continue
        spec = new_spec(
            source.architecture,
            [str(number) for number in range(num_outputs - source.is_detector)],
            input_size=source.input_size,
            width=source.width,
            reduced_tail=_has_reduced_tail(tail, source),
        )
        with torch.device("meta"):
            model = model_from_spec(spec)
        if not misfit(model, to_our_names(model, state)):
            found.append(arch)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
