"""ONNX graphs, node by node.

A value is named by a string, as in ONNX itself. Constants become initialisers; equal ones are
stored once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

# The lowest set with everything needed: the quantiser asks for channel-wise QuantizeLinear (13).
OPSET = 13
IR_VERSION = 7  # of ONNX 1.8, the first release with that set

ELEMENT_TYPES = {
    "uint8": TensorProto.UINT8,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
}


class GraphBuilder:
    """A graph that grows."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._names: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """Return a name that no other node or value has: the one given, or with a number."""
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else self.unique(f"{name}_{count}")

    def weight(self, name: str, tensor: Tensor) -> str:
        """Store a tensor as an initialiser and return its name."""
        name = self.unique(name)
        array = tensor.detach().cpu().contiguous().numpy()
        self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def constant(self, value: Any, dtype: str, name: str = "constant") -> str:
        """Store a number or an array and return its name; equal ones share it."""
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype))
        array = array.reshape(np.shape(value))  # ascontiguousarray makes vectors of scalars
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.unique(name)
            self._initializers[self._constants[key]] = numpy_helper.from_array(
                array, self._constants[key]
            )
        return self._constants[key]

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name, which is the node's."""
        return self.add_many(kind, *inputs, outputs=1, name=name, **attributes)[0]

    def add_many(
        self, kind: str, *inputs: str, outputs: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node and return the names of its outputs."""
        name = self.unique(name or kind)
        results = [name, *(f"{name}:{number}" for number in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        return results

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        name: str,
        description: str,
        metadata: Mapping[str, str],
        version: str,
    ) -> onnx.ModelProto:
        """Return the checked model."""
        graph = helper.make_graph(
            self.nodes, name, inputs, outputs, initializer=list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mbv3dist",
            producer_version=version,
            doc_string=description,
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model
