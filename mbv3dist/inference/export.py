"""`mbv3dist export`: a model as a file for other programs.

- `onnx`: one graph from canvas to detections, for onnxruntime and its like (`onnx_file.py`); with
  `--int8` quantised on pictures of a data set (`quantize.py`);
- `torch-export`: a `.pt2` for `torch.export.load`, its post-process the op `mbv3dist::postprocess`;
- `torchvision`, `timm`: weights under the names of these libraries (`state_dicts.py`).

Batch norms are folded in the first two. What is written is compared with the model first, and
appears under its name whole or not at all.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mbv3dist.inference.check import check_export
from mbv3dist.inference.describe import describe_input, describe_outputs
from mbv3dist.inference.fold import DeployedNetwork, example_canvas, export_program
from mbv3dist.inference.formats import ENDINGS, EXPORT_FORMATS, FORMAT_BY_ENDING
from mbv3dist.inference.state_dicts import write_state_dict
from mbv3dist.models.directory import (
    SPEC_FILE,
    LoadedModel,
    ModelSpec,
    load_model,
    spec_to_json,
)
from mbv3dist.models.onnx_model import require
from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.writing import check_place, write_whole

LOW_SIGNAL_DB = 15.0  # of an 8-bit file's outputs; trained detectors have some 30
_OF_DETECTIONS = ("boxes_px", "scores", "detections", "unmatched")  # the rest: of the network
_ONNX_EXTRA = ("onnx", "onnxruntime")


def export_model(
    model: str | Path | LoadedModel,
    out: str | Path,
    *,
    format: str | None = None,
    raw: bool = False,
    int8: str | None = None,
    split: str | None = None,
    num_pictures: int = 128,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model for other programs.

    Args:
        model: Model directory, or a loaded model.
        out: File; missing folders are made.
        format: Of `EXPORT_FORMATS`; None: by the file's ending.
        raw: Detectors, onnx and torch-export: class logits, box deltas and anchors instead of
            detections.
        int8: onnx: data set on whose pictures the model is quantised.
        split: Its split; None: train, trainval or the only one.
        num_pictures: How many of them.
        overwrite: Replace an existing file.

    Returns:
        {lines, file, bytes, format, ...}; lines are for people. For onnx and torch-export: task,
        outputs (their names), check: {output: largest difference from the model; boxes_px, scores,
        detections, unmatched for detections}; int8: {data, split, pictures, signal_to_noise_db} or
        None.

    Raises:
        ValueError: The arguments do not go together, packages are missing, or what would be
            written does not compute what the model does.
        OSError: The file cannot be written.
    """
    out = Path(out)
    format = _choose_format(out, format)
    _check_arguments(format, raw=raw, int8=int8, split=split, num_pictures=num_pictures)
    if format == "onnx":
        require(_ONNX_EXTRA, what="export --format onnx")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ValueError(f"{out} exists; give another name, or --overwrite to replace a file")
    check_place(out)
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    if format in ("torchvision", "timm"):
        return write_state_dict(loaded, out, format=format, overwrite=overwrite)
    if raw and loaded.spec.task != "detection":
        raise ValueError(
            f"--raw is for detectors; {loaded.spec.architecture} gives its logits as it is"
        )
    if format == "torch-export":
        return export_torch(loaded, out, raw=raw)
    return export_onnx(loaded, out, raw=raw, int8=int8, split=split, num_pictures=num_pictures)


def export_onnx(
    loaded: LoadedModel,
    out: str | Path,
    *,
    raw: bool = False,
    int8: str | None = None,
    split: str | None = None,
    num_pictures: int = 128,
) -> dict[str, Any]:
    """Write an ONNX file, replacing an older one; arguments and result as for `export_model`."""
    require(_ONNX_EXTRA, what="export --format onnx")
    from mbv3dist.inference.onnx_file import make_onnx, runner

    out = Path(out)
    if int8 is not None:  # tracing takes a while: what cannot be quantised on is told before
        from mbv3dist.inference.quantize import find_split, quantize

        split = find_split(int8, split)
    model = make_onnx(loaded, raw=raw)
    check = check_export(
        runner(model, source=str(out)),
        loaded,
        source=str(out),
        libraries="torch, onnx and onnxruntime",
    )
    facts, more = None, []
    if int8 is not None:
        model, facts = quantize(model, loaded.spec, int8, split=split, num_pictures=num_pictures)
        noise = ", ".join(f"{name} {db:.1f} dB" for name, db in facts["signal_to_noise_db"].items())
        more = [
            f"quantised on {facts['pictures']} pictures of {int8}; signal to noise: {noise}",
            f"what that costs: mbv3dist eval {out} DATA --split SPLIT, beside the model's score",
        ]
        if min(facts["signal_to_noise_db"].values()) < LOW_SIGNAL_DB:
            more.append("that is a low figure: quantise on more pictures, of the kind that is met")
    content = model.SerializeToString()
    write_whole(out, content)
    outputs = {value.name: value.doc_string for value in model.graph.output}
    return _result(loaded.spec, out, "onnx", len(content), outputs, check, more) | {"int8": facts}


def export_torch(loaded: LoadedModel, out: str | Path, *, raw: bool = False) -> dict[str, Any]:
    """Write a `.pt2` file, replacing an older one; arguments and result as for `export_model`.

    Its extra file `model.json` is the model's description. A detector's post-process is the op
    `mbv3dist::postprocess`, so a program that loads the file imports `mbv3dist.ops.nms` first; with
    `raw` it needs torch alone.
    """
    out = Path(out)
    outputs = {name: text for name, (_, _, text) in describe_outputs(loaded, raw=raw).items()}
    program = export_program(_Answers(loaded, raw=raw), example_canvas(loaded))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={SPEC_FILE: spec_to_json(loaded.spec)})
    buffer.seek(0)
    module = torch.export.load(buffer).module()

    check = check_export(_runner(module, list(outputs)), loaded, source=str(out), libraries="torch")
    write_whole(out, buffer.getvalue())
    more = []
    if "boxes" in outputs:
        more = ["import mbv3dist.ops.nms before torch.export.load: it has the post-process"]
    size = len(buffer.getvalue())
    return _result(loaded.spec, out, "torch-export", size, outputs, check, more)


class _Answers(nn.Module):
    """A deployed network with what follows it, as one module for `torch.export`."""

    anchors: Tensor

    def __init__(self, loaded: LoadedModel, *, raw: bool) -> None:
        super().__init__()
        self._raw = raw
        self._spec = loaded.spec
        self.network = DeployedNetwork(loaded)
        if isinstance(loaded.model, SSDLite):
            self.register_buffer("anchors", loaded.model.anchors.clone())
        self.eval()

    def forward(self, images: Tensor) -> Any:
        """Compute logits, (class logits, deltas, anchors) or (boxes, scores, labels, count)."""
        outputs = self.network(images)
        if self._spec.task == "classification":
            return outputs
        if self._raw:
            return *outputs, self.anchors.clone()
        thresholds, size = self._spec.thresholds, self._spec.input_size
        assert thresholds is not None
        return torch.ops.mbv3dist.postprocess(
            *outputs,
            self.anchors,
            (size, size),
            thresholds.score,
            thresholds.nms,
            thresholds.topk_candidates,
            thresholds.max_detections,
        )


def _runner(module: nn.Module, names: list[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """What runs a program and gives its outputs and its network's, by name."""

    def run(canvas: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), _NetworkOutputs() as network:
            values = module(canvas)
        values = (values,) if isinstance(values, Tensor) else values
        return {**network.found, **dict(zip(names, values, strict=True))}

    return run


class _NetworkOutputs(TorchDispatchMode):
    """Notes what the post-process is given while a program runs, which a `.pt2` does not tell."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mbv3dist.postprocess.default:
            self.found = {"class_logits": args[0], "box_deltas": args[1]}
        return func(*args, **(kwargs or {}))


def _choose_format(out: Path, format: str | None) -> str:
    """The format asked for, or that of the file's ending.

    Raises:
        ValueError: They do not go together, or the ending tells nothing.
    """
    ending = out.suffix.lower()
    if format is None:
        if ending not in FORMAT_BY_ENDING:
            told = " and ".join(f"{end} means {name}" for end, name in FORMAT_BY_ENDING.items())
            raise ValueError(
                f"{out}: its ending does not tell the format ({told}); give --format, one of "
                f"{', '.join(EXPORT_FORMATS)}"
            )
        return FORMAT_BY_ENDING[ending]
    if format not in EXPORT_FORMATS:
        raise ValueError(f"--format {format}: there are {', '.join(EXPORT_FORMATS)}")
    if ending not in ENDINGS[format]:
        raise ValueError(
            f"{out}: files of --format {format} end in {' or '.join(ENDINGS[format])}; rename it"
        )
    return format


def _check_arguments(
    format: str, *, raw: bool, int8: str | None, split: str | None, num_pictures: int
) -> None:
    """Refuse flags that mean nothing together, with ValueError."""
    if raw and format not in ("onnx", "torch-export"):
        raise ValueError(f"--raw: {format} files hold weights and no post-process; leave it out")
    if int8 is not None and format != "onnx":
        raise ValueError(f"--int8: only onnx files are quantised, not {format}; leave it out")
    if split is not None and int8 is None:
        raise ValueError(f"--split {split} is the split of --int8 DATA; give that too")
    if num_pictures < 1:
        raise ValueError(f"--num-pictures {num_pictures}: quantising needs at least 1 picture")


def _result(
    spec: ModelSpec,
    out: Path,
    format: str,
    num_bytes: int,
    outputs: dict[str, str],
    check: dict[str, float],
    more: list[str],
) -> dict[str, Any]:
    """What `export_model` returns."""
    network = {name: value for name, value in check.items() if name not in _OF_DETECTIONS}
    compared = ", ".join(f"{name} by up to {value:.1e}" for name, value in network.items())
    compared = f"the network's outputs differ from the model's: {compared}"
    if "boxes_px" in check:
        compared += (
            f"; detections from what these make: boxes by up to {check['boxes_px']:.1e} px, scores "
            f"by {check['scores']:.1e}, {check['unmatched']} of {check['detections']} without a "
            "counterpart"
        )
    return {
        "lines": [
            f"{out}: {format}, {num_bytes / 1e6:.2f} MB",
            f"input images [B, 3, {spec.input_size}, {spec.input_size}], {spec.preprocess.dtype}: "
            + describe_input(spec),
            *(f"output {name}: {text}" for name, text in outputs.items()),
            f"checked on drawn pictures: {compared}",
            *more,
        ],
        "file": str(out),
        "bytes": num_bytes,
        "format": format,
        "task": spec.task,
        "outputs": list(outputs),
        "check": check,
    }
