"""Leaves all but the MoELayer nodes to other providers, where TensorRT cannot build the rest."""

from __future__ import annotations

from typing import Any

import onnx

from moe_infer.graph.lower_nodes import all_nodes, is_layer

OPTION = "trt_op_types_to_exclude"
"""Of ONNX Runtime's TensorRT provider: names of operators, by commas, whatever their domain."""

_NO_ENGINE = "failed to create engine"
"""In what ONNX Runtime says when TensorRT cannot build a part of a graph that its parser took."""


def exclude_the_rest(model: onnx.ModelProto, options: dict[Any, Any]) -> None:
    """Sets the option of the TensorRT provider.

    Args:
        model: without functions.
        options: of the provider; what is excluded in them already stays so.
    """
    given = [name for name in str(options.get(OPTION, "")).split(",") if name]
    rest = {n.op_type for n in all_nodes(model.graph) if not is_layer(n)}
    options[OPTION] = ",".join([*given, *sorted(rest.difference(given))])


def add_remedy(error: Exception) -> None:
    """Says in the exception of a run how the layers run on TensorRT all the same."""
    if _NO_ENGINE in str(error):
        error.args = (
            f"{error}; TensorRT cannot build a part of the graph: make the session with"
            " layers_only=True, then TensorRT runs the MoELayer nodes and the other providers the"
            " rest",
            *error.args[1:],
        )
