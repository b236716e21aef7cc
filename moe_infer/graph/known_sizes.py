"""Sizes that a graph computes although they are known.

Exporters read the size of a value at run time even where it is a constant of the model, and make
indices of it (DeepSeek-V3's rotary embedding: the even columns of a head). ONNX Runtime folds
constants but not these, runs the few nodes on the CPU, and its TensorRT provider then refuses to
build an engine from the rest: their results have no known length.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from moe_infer.graph.external import is_external
from moe_infer.graph.match import values_read
from moe_infer.graph.shapes import Dim, ValueTypes

_MOST_INDICES = 64


def fold_known_sizes(model: onnx.ModelProto, types: ValueTypes) -> int:
    """Replaces ``Shape``, and ``Gather`` of a ``Shape``, by constants where the sizes are known.

    Args:
        model: changed in place; only the main graph.
        types: of its values (:func:`moe_infer.graph.shapes.infer_types`).

    Returns:
        The number of nodes that became constants.
    """
    graph = model.graph
    outputs = {output.name for output in graph.output}
    shapes: dict[str, list[Dim]] = {}
    small = _small_constants(graph)
    folded: set[int] = set()
    for place, node in enumerate(graph.node):
        name = node.output[0] if node.output else ""
        sizes: list[Dim] | None = None
        dims: tuple[int, ...] = ()
        if node.op_type == "Shape" and not node.domain:
            sizes = shapes[name] = _sizes(node, types)
            dims = (len(sizes),)
        elif node.op_type == "Gather" and not node.domain and node.input[0] in shapes:
            indices = small.get(node.input[1])
            if indices is not None:
                sizes = _gathered(shapes[node.input[0]], indices)
                dims = indices.shape
        if sizes and name not in outputs and all(isinstance(size, int) for size in sizes):
            values = np.array(sizes, np.int64).reshape(dims)
            graph.initializer.append(numpy_helper.from_array(values, name))
            folded.add(place)
    _remove(graph, folded)
    read = {value for node in graph.node for value in values_read(node)} | outputs
    unread = {
        p for p, n in enumerate(graph.node) if n.op_type == "Shape" and n.output[0] not in read
    }
    _remove(graph, unread)
    return len(folded)


def _sizes(node: NodeProto, types: ValueTypes) -> list[Dim]:
    """What a ``Shape`` node gives; empty where not even the rank is known."""
    dims = types.shape(node.input[0])
    if dims is None:
        return []
    bounds = {a.name: a.i for a in node.attribute}
    return list(dims[bounds.get("start", 0) : bounds.get("end", len(dims))])


def _gathered(sizes: list[Dim], indices: np.ndarray) -> list[Dim] | None:
    chosen = indices.reshape(-1).tolist()
    if not all(-len(sizes) <= i < len(sizes) for i in chosen):
        return None  # wrong; it is the runtime's to say so
    return [sizes[i] for i in chosen]


def _small_constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Initializers and Constant nodes that can be indices."""
    tensors = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and not node.domain:
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensors[node.output[0]] = attribute.t
    inputs = {i.name for i in graph.input}  # a caller may give another value
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if name not in inputs
        and not is_external(tensor)
        and tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        and int(np.prod(tensor.dims)) <= _MOST_INDICES
    }


def _remove(graph: onnx.GraphProto, places: set[int]) -> None:
    for place in sorted(places, reverse=True):
        del graph.node[place]
