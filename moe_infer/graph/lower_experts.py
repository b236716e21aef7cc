"""Experts in standard operators: only those that a token chose are read and run.

The (token, choice) pairs are sorted by expert. Each expert is one If, whose branch gathers its
tokens and reads the expert's weights from the outer scope; the other branch gives no rows. The
rows of all experts, one behind the other, are then brought back into the pairs' order, weighted
and added, so the sum over a token's choices has always the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from moe_infer.graph.lower_builder import Builder
from moe_infer.graph.lower_data import ExpertData, Weight
from moe_infer.graph.lower_nodes import LayerNode
from moe_infer.graph.lower_router import Routing, rms_norm


def lower_experts(b: Builder, layer: LayerNode, data: ExpertData, x: str, routing: Routing) -> str:
    """Adds the experts of one layer.

    Args:
        b: where the nodes go.
        layer: the layer; its sub-layer has weights.
        data: gives the initializers of an expert.
        x: (tokens, d_model) float32.
        routing: of these tokens.

    Returns:
        (tokens, d_model) float32: the weighted sum over each token's experts.
    """
    top_k, d_model = layer.config.top_k, layer.d_model
    flat = b.op("Reshape", routing.experts, b.ints(-1))
    pairs = b.op("Shape", flat)
    _, order = b.outputs("TopK", [flat, pairs], ("_sorted", "_order"), axis=0, largest=0)
    tokens = order if top_k == 1 else b.op("Div", order, b.ints(top_k))
    counts, starts, ends = _spans(b, flat, layer.config.expert_count)
    used = b.op("Greater", counts, b.ints(0))
    rows = [
        _expert(b, layer, e, data, x, used, (tokens, starts, ends))
        for e in range(layer.config.expert_count)
    ]
    sorted_rows = b.op("Concat", *rows, axis=0)
    zero, one = (b.names.constant(np.array(i, np.int64)) for i in (0, 1))
    positions = b.op("Range", zero, b.op("Squeeze", pairs, b.ints(0)), one)
    inverse = b.op("ScatterElements", order, order, positions, axis=0)
    output = b.op("Gather", sorted_rows, inverse, axis=0)
    if top_k == 1:
        return b.op("Mul", output, routing.weights)
    by_token = b.op("Reshape", output, b.ints(-1, top_k, d_model))
    weights = b.op("Unsqueeze", routing.weights, b.ints(2))
    return b.sum(b.op("Mul", by_token, weights), 1)


def _spans(b: Builder, flat: str, expert_count: int) -> tuple[str, str, str]:
    """For each expert: how many pairs chose it, where they begin and end in the sorted order."""
    ids = b.names.constant(np.arange(expert_count, dtype=np.int64).reshape(-1, 1))
    equal = b.op("Equal", ids, b.op("Unsqueeze", flat, b.ints(0)))
    counts = b.sum(b.cast(equal, TensorProto.INT64), 1)
    ends = b.op("CumSum", counts, b.names.constant(np.array(0, np.int64)))
    return counts, b.op("Sub", ends, counts), ends


def _expert(
    outer: Builder,
    layer: LayerNode,
    e: int,
    data: ExpertData,
    x: str,
    used: str,
    spans: tuple[str, str, str],
) -> str:
    """One If; gives (rows of this expert, d_model)."""
    tokens, starts, ends = spans
    index = outer.ints(e)
    condition = outer.op("Gather", used, index)
    b = Builder(outer.names, f"{outer.prefix}/expert_{e}")
    start, end = b.op("Gather", starts, index), b.op("Gather", ends, index)
    rows = b.op("Gather", x, b.op("Slice", tokens, start, end), axis=0)
    weights = {name: _Reader(b, found, start) for name, found in data.expert(layer, e).items()}
    output = _SUBLAYERS[layer.config.expert_sublayer_type](b, rows, weights, layer)
    rows_name = b.names.new(f"{b.prefix}/rows")
    then_branch = b.branch(f"{b.prefix}/run", output, rows_name, layer.d_model)
    skip = Builder(outer.names, f"{outer.prefix}/expert_{e}/skip")
    empty = numpy_helper.from_array(np.zeros((0, layer.d_model), np.float32))
    nothing = skip.op("Constant", value=empty)
    else_branch = skip.branch(f"{b.prefix}/skip", nothing, rows_name, layer.d_model)
    name = outer.names.new(f"{b.prefix}/If")
    outer.nodes.append(
        helper.make_node(
            "If", [condition], [name], name, then_branch=then_branch, else_branch=else_branch
        )
    )
    return name


class _Reader:
    """One packed tensor of an expert as it lies in the file: whole, or in two parts."""

    def __init__(self, b: Builder, pieces: list[Weight], run_time: str) -> None:
        self._b = b
        self._pieces = pieces
        self._run_time = run_time

    def vector(self) -> str:
        """The tensor, which has one dimension, in float32."""
        (piece,) = self._pieces
        return (
            piece.name if piece.dtype == "float32" else self._b.cast(piece.name, TensorProto.FLOAT)
        )

    def product(self, x: str) -> str:
        """X @ tensor^T, for a tensor that is not made of two parts."""
        (piece,) = self._pieces
        return self._gemm(x, piece)

    def products(self, x: str) -> tuple[str, str]:
        """(x @ first part^T, x @ second part^T); packed, their rows alternate."""
        if len(self._pieces) == 2:
            return self._gemm(x, self._pieces[0]), self._gemm(x, self._pieces[1])
        b, (piece,) = self._b, self._pieces
        pairs = b.op("Reshape", self._gemm(x, piece), b.ints(-1, piece.shape[0] // 2, 2))
        first, second = (b.names.constant(np.array(i, np.int64)) for i in (0, 1))
        return b.op("Gather", pairs, first, axis=2), b.op("Gather", pairs, second, axis=2)

    def _gemm(self, x: str, piece: Weight) -> str:
        return self._b.op("Gemm", x, self._float32(piece), transB=1)

    def _float32(self, piece: Weight) -> str:
        if piece.dtype == "float32":
            return piece.name
        b = self._b
        # ONNX Runtime would fold a Cast of a constant when the session is made, and so convert
        # every expert into private memory. A Reshape to a shape that is known only at run time
        # keeps it from that, and copies nothing.
        zero = b.op("Mul", self._run_time, b.ints(0))
        shape = b.op("Add", b.ints(*piece.shape), zero)
        return b.cast(b.op("Reshape", piece.name, shape), TensorProto.FLOAT)


def _t5_ff(b: Builder, x: str, weights: dict[str, _Reader], layer: LayerNode) -> str:
    normed = rms_norm(b, x, weights["layer_norm"].vector(), layer.d_model)
    gate, up = weights["gate_up"].products(normed)
    inner = b.op("Mul", _gelu_tanh(b, gate), up)
    return b.op("Add", x, weights["down"].product(inner))


def _gated_silu(b: Builder, x: str, weights: dict[str, _Reader], layer: LayerNode) -> str:
    gate, up = weights["gate_up"].products(x)
    inner = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    return weights["down"].product(inner)


def _gelu_tanh(b: Builder, x: str) -> str:
    cube = b.op("Mul", b.op("Mul", x, x), x)
    inner = b.op("Add", x, b.op("Mul", cube, b.scalar(0.044715)))
    tanh = b.op("Tanh", b.op("Mul", inner, b.scalar(math.sqrt(2.0 / math.pi))))
    return b.op("Mul", b.op("Mul", x, b.scalar(0.5)), b.op("Add", tanh, b.scalar(1.0)))


_SUBLAYERS: dict[str, Callable[[Builder, str, dict[str, _Reader], LayerNode], str]] = {
    "T5_FF": _t5_ff,
    "Gated_SiLU": _gated_silu,
}
