"""8-bit ONNX files: onnxruntime's static quantisation on pictures of a data set.

Weights get a scale for each channel, activations one for each tensor, from the range they take on
the pictures: "Quantizing deep convolutional networks for efficient inference",
https://arxiv.org/abs/1806.08342. Only what keeps its accuracy is quantised (`left_in_float`).

Shapes: B pictures, S side of the canvas in pixels.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from mbv3dist.data.index import open_split, training_split
from mbv3dist.data.loader import eval_batches
from mbv3dist.data.store import node_options
from mbv3dist.inference.onnx_file import RAW_OUTPUTS, runner
from mbv3dist.models.directory import ModelSpec
from mbv3dist.models.onnx_model import to_canvas
from mbv3dist.models.preprocess import evaluation_view
from mbv3dist.models.preprocess_whole import whole_inputs

BATCH_SIZE = 8
# With what lies between convolutions in 8 bits too, nothing goes back to float on the way but the
# gates (HardSigmoid has no 8-bit kernel, and is quantised at its ends).
_QUANTIZED = ("Conv", "Gemm", "Mul", "Add", "GlobalAveragePool", "HardSigmoid", "Clip", "Relu")
_FIRST_LAYERS = re.compile(r"model\.(backbone\.)?(conv_stem|bn1|blocks\.0\.)")
_PREPROCESSED = ("onnx.quant.pre_process", "onnxruntime.quant")  # see quantize_onnx


def quantize(
    model: onnx.ModelProto,
    spec: ModelSpec,
    data: str,
    *,
    split: str | None = None,
    num_pictures: int = 128,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Quantise a model on pictures of a data set.

    Args:
        model: Of `make_onnx`.
        spec: Its description.
        data: Data set made by convert, folder or URL.
        split: Its split; None: train, trainval, or the only one.
        num_pictures: How many of its pictures.

    Returns:
        The quantised model, and {data, split, pictures, signal_to_noise_db: {output: decibels}}.

    Raises:
        ValueError: There is no such split, or it is damaged.
    """
    split = find_split(data, split)
    canvases = calibration_canvases(spec, data, split=split, num_pictures=num_pictures)
    quantized = quantize_onnx(model, canvases)
    return quantized, {
        "data": data,
        "split": split,
        "pictures": sum(map(len, canvases)),
        "signal_to_noise_db": signal_to_noise(quantized, model, canvases[0]),
    }


def find_split(data: str, split: str | None) -> str:
    """Name the split that a model is quantised on: the given one, train, trainval, the only one.

    Raises:
        ValueError: There is no such split.
    """
    split = split or training_split(data)
    open_split(data, split, cache_dir=node_options().folder)
    return split


def calibration_canvases(
    spec: ModelSpec, data: str, *, split: str, num_pictures: int
) -> list[np.ndarray]:
    """Read pictures as evaluation prepares them.

    Args:
        spec: Of the model.
        data: Data set made by convert, folder or URL.
        split: Its split.
        num_pictures: How many; all of a smaller split. Conversion has shuffled them.

    Returns:
        Canvases of the type that the exported graph takes, in batches of up to 8.

    Raises:
        ValueError: There is no such split, or it is damaged.
    """
    cache = node_options()
    opened = open_split(data, split, cache_dir=cache.folder)
    batches = eval_batches(
        opened,
        view=evaluation_view(spec),
        size=spec.input_size,
        batch_size=min(BATCH_SIZE, num_pictures),
        cache=cache,
        decode="cpu" if spec.preprocess.is_drawn else "gpu",
    )
    found: list[np.ndarray] = []
    missing = num_pictures
    with ThreadPoolExecutor(2) as pool, closing(batches):  # type: ignore[type-var]
        for batch in batches:
            if batch.compressed is None:
                canvas = batch.image
            else:
                canvas = to_canvas(whole_inputs(batch.compressed, spec, pool=pool), spec.preprocess)
            # A copy: the loader fills its buffers again.
            found.append(canvas[:missing].contiguous().numpy().copy())
            missing -= len(found[-1])
            if missing <= 0:
                break
    return found


def quantize_onnx(model: onnx.ModelProto, canvases: list[np.ndarray]) -> onnx.ModelProto:
    """Quantise a model that `make_onnx` has made.

    Args:
        model: In float32.
        canvases: Of `calibration_canvases`.

    Returns:
        The quantised model, with the inputs, outputs and metadata of the other.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    # Its wish for a pass that folds batch norms and fuses nodes: there is nothing left of either.
    prepared.metadata_props.append(
        onnx.StringStringEntryProto(key=_PREPROCESSED[0], value=_PREPROCESSED[1])
    )
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        quantize_static(
            prepared,
            path,
            _Reader(canvases),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_quantize=quantized_nodes(model),
            per_channel=True,
            # 7-bit weights: without VNNI, x86 processors add pairs of products in 16 bits, which
            # full 8 bits overflow. The file is to give the same on all of them.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
        quantized = onnx.load(path)
    metadata = {item.key: item.value for item in model.metadata_props}
    pictures = sum(map(len, canvases))
    helper.set_model_props(quantized, {**metadata, "int8": f"calibrated on {pictures} pictures"})
    quantized.producer_name, quantized.producer_version = "mbv3dist", model.producer_version
    quantized.doc_string = model.doc_string
    onnx.checker.check_model(quantized)
    return quantized


def quantized_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that are quantised: the network but its first layers.

    Normalisation, stem and first block work on few channels of wide ranges: in float they cost
    nothing and halve the error. Box arithmetic and scores stay in float as a matter of course.
    """
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _QUANTIZED
        and node.name.startswith("model.")
        and not _FIRST_LAYERS.match(node.name)
    ]


def signal_to_noise(
    quantized: onnx.ModelProto, model: onnx.ModelProto, canvas: np.ndarray
) -> dict[str, float]:
    """Compare the network's outputs of a quantised model with those in float32.

    Args:
        quantized: Of `quantize_onnx`.
        model: What it was made of.
        canvas: Input of both.

    Returns:
        Decibels, by output: 20 are an error of a tenth of the signal.
    """
    wanted, found = (
        runner(each, source="int8")(torch.from_numpy(canvas)) for each in (model, quantized)
    )
    return {
        name: 10 * float(torch.log10(signal.square().sum() / noise.square().sum().clamp(min=1e-30)))
        for name, signal in wanted.items()
        if name in ("logits", *RAW_OUTPUTS)
        for noise in [found[name] - signal]
    }


class _Reader:
    """Canvases as onnxruntime's calibration asks for them."""

    def __init__(self, canvases: list[np.ndarray]) -> None:
        self._rest = iter(canvases)

    def get_next(self) -> dict[str, Any] | None:
        canvas = next(self._rest, None)
        return None if canvas is None else {"images": canvas}


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice from onnxruntime's tools, which speak through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
