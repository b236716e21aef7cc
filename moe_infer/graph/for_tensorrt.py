"""What keeps ONNX Runtime's TensorRT provider from building an engine, said in another way."""

from __future__ import annotations

import onnx

from moe_infer.graph.known_sizes import fold_known_sizes
from moe_infer.graph.scatter_to_concat import concatenate_scatters
from moe_infer.graph.shapes import ValueTypes


def suit_tensorrt(model: onnx.ModelProto, types: ValueTypes) -> None:
    """Changes a graph in place, so that TensorRT takes more of it; it computes the same bits.

    Args:
        model: only the main graph is looked at.
        types: of its values (:func:`moe_infer.graph.shapes.infer_types`); completed.
    """
    fold_known_sizes(model, types)
    concatenate_scatters(model, types)
