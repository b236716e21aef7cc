"""Sizes that a graph computes although they are known.

Exporters read the size of a value at run time even where it is a constant of the model, and make
indices of it (DeepSeek-V3's rotary embedding: the even columns of a head). ONNX Runtime folds
constants but not these, runs the few nodes on the CPU, and its TensorRT provider then refuses to
build an engine from the rest: their results have no known length.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, numpy_helper

from moe_infer.graph.match import GraphView, values_read
from moe_infer.graph.shape_values import ShapeValues
from moe_infer.graph.shapes import ValueTypes


def fold_known_sizes(model: onnx.ModelProto, types: ValueTypes) -> int:
    """Replaces ``Shape``, and ``Gather`` of a ``Shape``, by constants where the sizes are known.

    Args:
        model: changed in place; only the main graph.
        types: of its values (:func:`moe_infer.graph.shapes.infer_types`).

    Returns:
        The number of nodes that became constants.
    """
    graph = model.graph
    view = GraphView(model, types, Path())  # external data is not read
    shapes = ShapeValues(view, types.shape)
    found = {
        place: sizes
        for place, node in enumerate(view.nodes)
        if _reads_sizes(view, node)
        and node.output[0] not in view.graph_outputs
        and (sizes := shapes.array(node.output[0])) is not None
        and sizes.size
    }
    for place, sizes in found.items():
        name = view.nodes[place].output[0]
        graph.initializer.append(numpy_helper.from_array(sizes, name))
    _remove(graph, set(found))
    read = {value for node in graph.node for value in values_read(node)} | view.graph_outputs
    shape_nodes = {p: n for p, n in enumerate(graph.node) if n.op_type == "Shape"}
    _remove(graph, {p for p, n in shape_nodes.items() if n.output[0] not in read})
    return len(found)


def _reads_sizes(view: GraphView, node: NodeProto) -> bool:
    """A ``Shape``, or a ``Gather`` of one."""
    if node.domain:
        return False
    source = view.producer(node.input[0]) if node.op_type == "Gather" else node
    return source is not None and source.op_type == "Shape" and not source.domain


def _remove(graph: onnx.GraphProto, places: set[int]) -> None:
    for place in sorted(places, reverse=True):
        del graph.node[place]
