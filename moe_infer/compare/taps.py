"""Lets values from inside a graph out of it, in a type that numpy has."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx
from onnx import TensorProto, helper

PREFIX = "moe_infer/verify"
"""First part of the names of additional outputs."""


def add_outputs(model: onnx.ModelProto, values: Iterable[str]) -> dict[str, str]:
    """Adds an output for each value of the main graph, cast to float32.

    Args:
        model: changed in place.
        values: names; those that the graph does not make are left out.

    Returns:
        Names of the additional outputs by the value's.
    """
    made = {o for node in model.graph.node for o in node.output}
    made |= {i.name for i in model.graph.input}
    taps: dict[str, str] = {}
    for value in values:
        if value not in made or value in taps:
            continue
        name = f"{PREFIX}/{len(taps)}"
        model.graph.node.append(
            helper.make_node("Cast", [value], [name], name, to=TensorProto.FLOAT)
        )
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        taps[value] = name
    return taps


def without_numpy_type(model: onnx.ModelProto) -> Collection[str]:
    """Outputs in bfloat16, which ONNX Runtime does not give to numpy."""
    return [
        o.name for o in model.graph.output if o.type.tensor_type.elem_type == TensorProto.BFLOAT16
    ]
