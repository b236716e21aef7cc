"""bfloat16 graphs for ONNX Runtime's CPU provider, which has almost no bfloat16 operators.

Each node computes in float32 between Casts; values between the nodes stay bfloat16, so they are
rounded where the graph rounds them. (For float16 ONNX Runtime does the same by itself.)
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from moe_infer.graph.lower_builder import Names
from moe_infer.graph.shapes import infer_types

_KEPT = frozenset({"Cast", "Constant", "Shape", "Size", "If", "Loop", "Scan"})
"""Operators that have bfloat16 on the CPU, or whose branches have their own nodes."""


def bfloat16_values(model: onnx.ModelProto) -> set[str]:
    """Names of the main graph's values that are bfloat16."""
    types = infer_types(model)
    return {n for n in types.infos if types.element_type(n) == TensorProto.BFLOAT16}


def wrap_bfloat16(model: onnx.ModelProto, half: set[str], names: Names) -> None:
    """Puts Casts around all nodes of the main graph with an input or output in ``half``."""
    if not half:
        return
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        touched = half.intersection((*node.input, *node.output))
        if not touched or node.op_type in _KEPT:
            nodes.append(node)
        else:
            nodes += _wrapped(node, half, names)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _wrapped(node: onnx.NodeProto, half: set[str], names: Names) -> list[onnx.NodeProto]:
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    casts: dict[str, str] = {}
    for i, name in enumerate(node.input):
        if name in half:
            if name not in casts:
                casts[name] = names.new(f"{name}/float32")
                before.append(helper.make_node("Cast", [name], [casts[name]], to=TensorProto.FLOAT))
            inner.input[i] = casts[name]
    for i, name in enumerate(node.output):
        if name in half:
            inner.output[i] = names.new(f"{name}/float32")
            after.append(
                helper.make_node("Cast", [inner.output[i]], [name], to=TensorProto.BFLOAT16)
            )
    return [*before, inner, *after]
