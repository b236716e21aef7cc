"""Attributes that say what holds without them, and that TensorRT does not read all the same.

TensorRT 10.6's parser refuses a ``ScatterND`` that has the attribute ``reduction``, also where it
says "none", which is the default. PyTorch's exporter always writes it (``slice_scatter``, as in
DeepSeek-V3's attention of transformers 5.17).
"""

from __future__ import annotations

import onnx

DEFAULTS = {("ScatterND", "reduction"): b"none", ("ScatterElements", "reduction"): b"none"}
"""By operator of the standard domain and attribute."""


def drop_default_attributes(model: onnx.ModelProto) -> int:
    """Removes attributes that have their default value; the model computes the same.

    Args:
        model: changed in place; the main graph, its subgraphs and functions.

    Returns:
        How many were removed.
    """
    graphs = [model.graph.node, *(function.node for function in model.functions)]
    dropped = 0
    while graphs:
        for node in graphs.pop():
            for place in reversed(range(len(node.attribute))):
                attribute = node.attribute[place]
                graphs += [attribute.g.node, *(g.node for g in attribute.graphs)]
                default = DEFAULTS.get((node.op_type, attribute.name))
                if not node.domain and default is not None and attribute.s == default:
                    del node.attribute[place]
                    dropped += 1
    return dropped
