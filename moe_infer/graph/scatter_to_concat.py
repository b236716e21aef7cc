"""Scatters that are concatenations.

PyTorch's exporter writes an assignment to a part of a tensor (``x[..., :k] = y``) as a
``ScatterND`` with a range as indices: so DeepSeek-V3's attention in transformers 5 puts queries and
keys together. TensorRT 10.6 refuses a ``ScatterND`` from ONNX Runtime ("Attribute reduction is not
supported", also where it is the default), the graph falls apart around it, and the parts need sizes
that TensorRT is not told. A concatenation says the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper

from moe_infer.graph.edits import remove_unread
from moe_infer.graph.lower_builder import Names
from moe_infer.graph.match import GraphView, text_attribute
from moe_infer.graph.shape_values import ShapeValues
from moe_infer.graph.shapes import ValueTypes


@dataclass(frozen=True)
class _Rows:
    """Rows ``first`` up to ``end`` of the ``count`` along the first axis."""

    first: int
    end: int
    count: int


def concatenate_scatters(model: onnx.ModelProto, types: ValueTypes) -> int:
    """Replaces ``ScatterND`` of consecutive rows by ``Concat``; the model computes the same bits.

    Args:
        model: changed in place; only the main graph.
        types: of its values (:func:`moe_infer.graph.shapes.infer_types`); completed.

    Returns:
        The number of nodes that were replaced.
    """
    view = GraphView(model, types, Path())  # external data is not read
    values = ShapeValues(view, types.shape)
    names = Names(model)
    nodes: list[NodeProto] = []
    ranges: set[str] = set()
    replaced = 0
    for node in view.nodes:
        rows = _rows(view, values, types, node)
        if rows is None:
            nodes.append(node)
        else:
            nodes += _concat(node, rows, names, types)
            ranges.update(_chain(view, node.input[1]))
            replaced += 1
    if replaced:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(names.initializers)
        remove_unread(model, ranges)
    return replaced


def _chain(view: GraphView, name: str) -> list[str]:
    """A value, and those from which nodes make it."""
    found = [name]
    for value in found:  # grows
        node = view.producer(value)
        found += [given for given in (node.input if node else ()) if given not in found]
    return found


def _rows(view: GraphView, values: ShapeValues, types: ValueTypes, node: NodeProto) -> _Rows | None:
    """Which rows a scatter replaces; None: it is none, or they are not known to be consecutive."""
    if node.op_type != "ScatterND" or node.domain:
        return None
    if text_attribute(node, "reduction", "none") != "none":
        return None
    data, indices, updates = (types.shape(name) for name in node.input)
    if not data or not updates or not isinstance(data[0], int) or not isinstance(updates[0], int):
        return None
    if indices is None or len(indices) != 2 or indices[1] != 1:
        return None  # an index is of more or less than a row
    span = _span(view, values, node.input[1], 0)
    if span is None:
        return None
    first, end = span
    if not 0 <= first < end <= data[0] or end - first != updates[0]:
        return None
    return _Rows(first, end, data[0])


_DEEPEST = 8


def _span(view: GraphView, values: ShapeValues, name: str, depth: int) -> tuple[int, int] | None:
    """First and end of consecutive integers, in the order of a tensor's entries."""
    constant = view.small(name)
    if constant is not None and constant.dtype.kind == "i" and constant.size:
        flat = constant.ravel().astype(np.int64)
        first, end = int(flat[0]), int(flat[0]) + flat.size
        return (first, end) if np.array_equal(flat, np.arange(first, end)) else None
    node = view.producer(name)
    if node is None or node.domain or depth == _DEEPEST:
        return None
    if node.op_type in ("Unsqueeze", "Squeeze", "Identity", "Cast", "Reshape"):
        return _span(view, values, node.input[0], depth + 1)
    if node.op_type == "Range":
        start, limit, delta = (_scalar(values, given) for given in node.input)
        if start is None or limit is None or delta != 1 or limit <= start:
            return None
        return start, limit
    if node.op_type == "Slice" and len(node.input) >= 3:
        return _sliced(view, values, node, depth)
    return None


def _sliced(
    view: GraphView, values: ShapeValues, node: NodeProto, depth: int
) -> tuple[int, int] | None:
    """The same of a ``Slice`` of one axis."""
    whole = _span(view, values, node.input[0], depth + 1)
    begin, end, axis, step = (
        _scalar(values, name) if name else default
        for name, default in itertools.zip_longest(node.input[1:], (None, None, 0, 1), fillvalue="")
    )
    if whole is None or begin is None or end is None or axis not in (0, -1) or step != 1:
        return None
    start, stop, _ = slice(begin, end).indices(whole[1] - whole[0])
    return (whole[0] + start, whole[0] + stop) if start < stop else None


def _scalar(values: ShapeValues, name: str) -> int | None:
    found = values.ints(name)
    return found[0] if found is not None and len(found) == 1 else None


def _concat(node: NodeProto, rows: _Rows, names: Names, types: ValueTypes) -> list[NodeProto]:
    """The nodes in its place; the output keeps its name."""
    data, _, updates = node.input
    made: list[NodeProto] = []

    def kept(first: int, end: int) -> list[str]:
        if first == end:
            return []
        part = names.new(f"{node.output[0]}_rows_{first}")
        limits = [names.constant(np.array([i], np.int64)) for i in (first, end, 0)]
        made.append(helper.make_node("Slice", [data, *limits], [part], f"{part}.slice"))
        _state_type(types, data, part, end - first)
        return [part]

    parts = [*kept(0, rows.first), updates, *kept(rows.end, rows.count)]
    made.append(helper.make_node("Concat", parts, [node.output[0]], node.name, axis=0))
    return made


def _state_type(types: ValueTypes, like: str, name: str, rows: int) -> None:
    if like in types.infos:
        info = onnx.ValueInfoProto()
        info.CopyFrom(types.infos[like])
        info.name = name
        info.type.tensor_type.shape.dim[0].dim_value = rows
        types.infos[name] = info
