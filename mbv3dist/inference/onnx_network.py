"""A network as ONNX nodes: what `torch.export` sees of it, translated operation by operation.

MobileNetV3 and SSDLite need fourteen operations. Their translation is shorter than a description of
what torch's own ONNX exporter would do with them, takes milliseconds instead of a quarter of a
minute, and can use an operator set that old runtimes know (docs/decisions.md). An operation that is
not known here is an error, and what is written is compared with the network in any case.

Shapes: B pictures, S side of the canvas in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from mbv3dist.inference.onnx_builder import GraphBuilder


def add_network(
    builder: GraphBuilder, program: ExportedProgram, *, image: str, names: Sequence[str]
) -> list[str]:
    """Append a traced network to a graph.

    Args:
        builder: The graph.
        program: Of `fold.export_program`.
        image: The value that is its input.
        names: What its outputs are to be called.

    Returns:
        `names`.
    """
    signature = program.graph_signature
    tensors: Mapping[str, Tensor] = {**program.state_dict, **program.constants}
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored |= signature.inputs_to_lifted_tensor_constants
    output = next(node for node in program.graph.nodes if node.op == "output")
    results = [node for node in output.args[0] if isinstance(node, Node)]
    assert len(results) == len(names) and len(set(results)) == len(results)
    called = dict(zip(results, names, strict=True))
    values: dict[Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            is_stored = node.name in stored
            if is_stored and node.users:
                key = stored[node.name]
                values[node] = builder.weight(key, tensors[key])
            elif not is_stored:
                values[node] = image
        elif node.op == "call_function":
            kind = _kind(node)
            if kind == "sym_size":
                assert node.args[1] == 0, "only the batch is dynamic"
            elif kind == "dropout":
                assert node.args[2] is False, "dropout is for training"
                values[node] = values[_node(node.args[0])]
            elif kind != "_assert_tensor_metadata":
                values[node] = _translate(builder, node, kind, values, called.get(node, ""))
    return list(names)


def _kind(node: Node) -> str:
    """Return an operation's name without its overload; in place or not makes no difference."""
    name: str = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    if name.endswith("_"):
        # Nobody else may look at what is overwritten; then the new value is just a new value.
        assert len(_node(node.args[0]).users) == 1, f"{node}: its input is used again"
    return name.rstrip("_") if name != "_assert_tensor_metadata" else name


def _node(value: Any) -> Node:
    assert isinstance(value, Node), value
    return value


def _translate(
    builder: GraphBuilder, node: Node, kind: str, values: Mapping[Node, str], name: str
) -> str:
    """Append the ONNX nodes of one operation and return its value."""
    name = name or _place(node)
    x = values[_node(node.args[0])] if isinstance(node.args[0], Node) else ""
    match kind:
        case "conv2d":
            return _conv2d(builder, node, values, name)
        case "linear":
            weight, bias = (values[_node(value)] for value in node.args[1:3])
            return builder.add("Gemm", x, weight, bias, transB=1, name=name)
        case "relu":
            return builder.add("Relu", x, name=name)
        case "hardtanh":
            low, high = (builder.constant(float(v), "float32") for v in _numbers(node.args[1:]))
            return builder.add("Clip", x, low, high, name=name)
        case "hardsigmoid":
            return builder.add("HardSigmoid", x, alpha=1 / 6, beta=0.5, name=name)
        case "hardswish":
            # ONNX has a node of its own for this from operator set 14 on.
            gate = builder.add("HardSigmoid", x, alpha=1 / 6, beta=0.5, name=f"{name}.gate")
            return builder.add("Mul", x, gate, name=name)
        case "mean":
            assert list(_numbers(node.args[1])) == [2, 3] and node.args[2] is True
            return builder.add("GlobalAveragePool", x, name=name)
        case "adaptive_avg_pool2d":
            assert list(_numbers(node.args[1])) == [1, 1]
            return builder.add("GlobalAveragePool", x, name=name)
        case "flatten":
            assert node.args[1:] == (1,)
            return builder.add("Flatten", x, axis=1, name=name)
        case "add" | "sub" | "mul" | "div":
            assert not node.kwargs
            right = node.args[1]
            y = values[right] if isinstance(right, Node) else builder.constant(right, "float32")
            return builder.add(kind.capitalize(), x, y, name=name)
        case "to":
            assert node.args[1] is torch.float32
            return builder.add("Cast", x, to=1, name=name)
        case "permute":
            return builder.add("Transpose", x, perm=list(_numbers(node.args[1])), name=name)
        case "reshape":
            shape = [0 if isinstance(size, Node) else size for size in _list(node.args[1])]
            assert 0 not in shape[1:], "0 stands for the batch's size, the first of all"
            return builder.add("Reshape", x, builder.constant(shape, "int64"), name=name)
        case "cat":
            parts = [values[_node(part)] for part in _list(node.args[0])]
            axis = node.args[1] if len(node.args) > 1 else 0
            return builder.add("Concat", *parts, axis=axis, name=name)
    raise AssertionError(f"{node.target} has no translation to ONNX here; write one")


def _conv2d(builder: GraphBuilder, node: Node, values: Mapping[Node, str], name: str) -> str:
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    args = (*node.args, *defaults[len(node.args) :])
    stride, padding, dilation = (list(_numbers(value)) for value in args[3:6])
    weight = _node(args[1])
    return builder.add(
        "Conv",
        *(values[value] for value in args[:3] if isinstance(value, Node)),
        kernel_shape=list(weight.meta["val"].shape[2:]),
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        group=args[6],
        name=name,
    )


def _list(value: Any) -> list[Any]:
    assert isinstance(value, list | tuple), value
    return list(value)


def _numbers(value: Any) -> tuple[float, ...]:
    numbers = tuple(_list(value))
    assert all(isinstance(number, int | float) for number in numbers), value
    return numbers


def _place(node: Node) -> str:
    """Return where in the network an operation happens: the path of its module."""
    modules = node.meta.get("nn_module_stack") or {}
    path = list(modules.values())[-1][0] if modules else ""
    return path or str(node.name)
