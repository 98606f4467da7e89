"""A model as one ONNX file: canvas in, answers out, everything a program must know inside.

The graph's input is the canvas, a picture resized to S x S and nothing else: normalisation is part
of the graph, so that nobody can get mean and standard deviation wrong. How a picture becomes the
canvas stands in the input's description and, for programs, in the metadata:

- `model.json`: the model's description as in its model directory;
- `classes`: names in the order of the labels, a JSON list;
- `input`, `outputs`: JSON objects, name -> what it is;
- `postprocess`: "nms" (the outputs are detections) or "none" (they are the network's).

Shapes: B pictures, S side of the canvas, A anchors, C classes without background, D detections.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import onnx
import torch
from onnx import helper
from torch import Tensor

import mbv3dist
from mbv3dist.inference.describe import Description, Shape, describe_input, describe_outputs
from mbv3dist.inference.fold import DeployedNetwork, example_canvas, export_program
from mbv3dist.inference.onnx_builder import ELEMENT_TYPES, GraphBuilder
from mbv3dist.inference.onnx_network import add_network
from mbv3dist.inference.onnx_postprocess import add_postprocess
from mbv3dist.models.directory import LoadedModel, spec_to_json
from mbv3dist.models.onnx_model import open_session
from mbv3dist.models.ssdlite import SSDLite

INPUT = "images"
RAW_OUTPUTS = ("class_logits", "box_deltas")


def make_onnx(loaded: LoadedModel, *, raw: bool = False) -> onnx.ModelProto:
    """Translate a model to ONNX.

    Args:
        loaded: The model, in evaluation mode, on the CPU.
        raw: Detectors: give class logits, box deltas and anchors instead of detections.

    Returns:
        The checked model, with a batch of any size.

    Raises:
        ValueError: On thresholds that ONNX cannot express.
    """
    spec = loaded.spec
    assert spec.task == "detection" or not raw
    outputs = describe_outputs(loaded, raw=raw)
    input_text = describe_input(spec)
    program = export_program(DeployedNetwork(loaded), example_canvas(loaded))
    builder = GraphBuilder()
    builder.unique(INPUT)
    if spec.task == "classification":
        add_network(builder, program, image=INPUT, names=("logits",))
    else:
        model = loaded.model
        assert isinstance(model, SSDLite) and spec.thresholds is not None
        add_network(builder, program, image=INPUT, names=RAW_OUTPUTS)
        if raw:
            builder.add("Identity", builder.weight("anchors.all", model.anchors), name="anchors")
        else:
            add_postprocess(
                builder,
                *RAW_OUTPUTS,
                anchors=model.anchors,
                num_classes=len(spec.classes),
                size=spec.input_size,
                thresholds=spec.thresholds,
            )
    pixels: Shape = ["batch", 3, spec.input_size, spec.input_size]
    return builder.model(
        [_value(INPUT, (spec.preprocess.dtype, pixels, input_text))],
        [_value(name, description) for name, description in outputs.items()],
        name=spec.architecture,
        description=f"{spec.architecture} of mbv3dist, {len(spec.classes)} classes. {input_text}",
        metadata={
            "model.json": spec_to_json(spec),
            "classes": json.dumps(list(spec.classes), ensure_ascii=False),
            "input": json.dumps({INPUT: input_text}),
            "outputs": json.dumps({name: text for name, (_, _, text) in outputs.items()}),
            "postprocess": "none" if raw or spec.task == "classification" else "nms",
            "mbv3dist_version": mbv3dist.__version__,
        },
        version=mbv3dist.__version__,
    )


def runner(model: onnx.ModelProto, *, source: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return what runs a graph by onnxruntime and gives its outputs and its network's, by name.

    Args:
        model: Of `make_onnx`.
        source: Its name, for messages.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = [value.name for value in model.graph.output]
    if "boxes" in names:
        names += RAW_OUTPUTS  # they are inside, only not given
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in RAW_OUTPUTS)
    session = open_session(probe.SerializeToString(), source=source, num_threads=1)

    def run(canvas: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {INPUT: canvas.numpy()})
        return {name: torch.from_numpy(v) for name, v in zip(names, values, strict=True)}

    return run


def _value(name: str, description: Description) -> onnx.ValueInfoProto:
    dtype, shape, text = description
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[dtype], shape, doc_string=text)
