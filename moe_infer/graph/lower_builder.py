"""Builds the nodes that a MoELayer is lowered to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


class Names:
    """Names that a model does not use yet, and constants shared by all that is added to it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.initializers: list[TensorProto] = []
        self._used = set(_all_names(model.graph))
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def new(self, name: str) -> str:
        """``name``, with a number behind it if it is taken."""
        unique, count = name, 1
        while unique in self._used:
            count += 1
            unique = f"{name}_{count}"
        self._used.add(unique)
        return unique

    def constant(self, values: np.ndarray[Any, Any]) -> str:
        """An initializer with these values; equal ones are made once."""
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._constants:
            name = self.new(f"moe_infer/constant_{len(self._constants)}")
            self.initializers.append(numpy_helper.from_array(values, name))
            self._constants[key] = name
        return self._constants[key]


class Builder:
    """Appends nodes of one graph or branch; values are handed around by their names."""

    def __init__(self, names: Names, prefix: str) -> None:
        self.names = names
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output, the name of which it returns."""
        return self.outputs(op_type, inputs, ("",), domain=domain, **attributes)[0]

    def outputs(
        self,
        op_type: str,
        inputs: Sequence[str],
        suffixes: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Adds a node with an output for each suffix."""
        name = self.names.new(f"{self.prefix}/{op_type}")
        outputs = [f"{name}{suffix}" for suffix in suffixes]
        self.nodes.append(
            helper.make_node(op_type, inputs, outputs, name, domain=domain, **attributes)
        )
        return outputs

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.names.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """A constant float32 scalar."""
        return self.names.constant(np.array(value, np.float32))

    def floats(self, values: Any, shape: tuple[int, ...]) -> str:
        """A constant float32 tensor."""
        return self.names.constant(np.asarray(values, np.float32).reshape(shape))

    def cast(self, value: str, to: int) -> str:
        """A Cast; ONNX Runtime removes it where the type is that already."""
        return self.op("Cast", value, to=to)

    def sum(self, value: str, axis: int, keep: bool = False) -> str:
        """ReduceSum over one axis."""
        return self.op("ReduceSum", value, self.ints(axis), keepdims=int(keep))

    def branch(self, name: str, output: str, rows: str, columns: int) -> onnx.GraphProto:
        """The nodes as a branch of an If that gives one float32 matrix."""
        info = helper.make_tensor_value_info(output, TensorProto.FLOAT, [rows, columns])
        return helper.make_graph(self.nodes, name, [], [info])


def _all_names(graph: onnx.GraphProto) -> list[str]:
    names = [v.name for v in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)]
    for node in graph.node:
        names += [node.name, *node.input, *node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names += _all_names(attribute.g)
            for subgraph in attribute.graphs:
                names += _all_names(subgraph)
    return names
