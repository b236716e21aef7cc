"""Experts in standard operators: only those that a token chose are read and run.

The (token, choice) pairs are sorted by expert. Each expert is one If, whose branch gathers its
tokens and reads the expert's weights from the outer scope; the other branch gives no rows. The
rows of all experts, one behind the other, are then brought back into the pairs' order, weighted
and added, so the sum over a token's choices has always the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    found = data.expert(layer, e)
    weights = {
        name: _Reader(b, pieces, found.get(f"{name}_bias"), start) for name, pieces in found.items()
    }
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
    """One packed tensor of an expert as it lies in the file, whole or in parts, and its bias."""

    def __init__(
        self, b: Builder, pieces: list[Weight], biases: list[Weight] | None, run_time: str
    ) -> None:
        self._b = b
        self._pieces = pieces
        self._biases: Sequence[Weight | None] = biases or [None] * len(pieces)
        self._run_time = run_time

    def vector(self) -> str:
        """The tensor, which has one dimension, in float32."""
        (piece,) = self._pieces
        return self._vector(piece)

    def product(self, x: str) -> str:
        """X @ tensor^T + bias, for a tensor that is not made of two parts."""
        (product,) = self._products(x)
        return product

    def products(self, x: str) -> tuple[str, str]:
        """The same of the first and of the second part; packed, their rows alternate."""
        found = self._products(x)
        if len(found) == 2:
            return found[0], found[1]
        b, (piece,), (product,) = self._b, self._pieces, found
        pairs = b.op("Reshape", product, b.ints(-1, piece.shape[0] // 2, 2))
        first, second = (b.names.constant(np.array(i, np.int64)) for i in (0, 1))
        return b.op("Gather", pairs, first, axis=2), b.op("Gather", pairs, second, axis=2)

    def _products(self, x: str) -> list[str]:
        products = []
        # Packed or in parts, the bias is as its tensor is: a file holds all in one form.
        for piece, bias in zip(self._pieces, self._biases, strict=True):
            added = [] if bias is None else [self._vector(bias)]
            products.append(self._b.op("Gemm", x, self._float32(piece), *added, transB=1))
        return products

    def _vector(self, piece: Weight) -> str:
        if piece.dtype == "float32":
            return piece.name
        return self._b.cast(piece.name, TensorProto.FLOAT)

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


Activation = Callable[[Builder, str], str]
SubLayerNodes = Callable[[Builder, str, dict[str, _Reader], LayerNode], str]


def _t5_ff(b: Builder, x: str, weights: dict[str, _Reader], layer: LayerNode) -> str:
    normed = rms_norm(b, x, weights["layer_norm"].vector(), layer.d_model)
    gate, up = weights["gate_up"].products(normed)
    inner = b.op("Mul", _gelu_tanh(b, gate), up)
    return b.op("Add", x, weights["down"].product(inner))


def _gated(activation: Activation) -> SubLayerNodes:
    def add(b: Builder, x: str, weights: dict[str, _Reader], layer: LayerNode) -> str:
        gate, up = weights["gate_up"].products(x)
        return weights["down"].product(b.op("Mul", activation(b, gate), up))

    return add


def _plain(activation: Activation) -> SubLayerNodes:
    def add(b: Builder, x: str, weights: dict[str, _Reader], layer: LayerNode) -> str:
        return weights["down"].product(activation(b, weights["up"].product(x)))

    return add


def _clamped_swiglu(b: Builder, x: str, weights: dict[str, _Reader], layer: LayerNode) -> str:
    config = layer.config
    gate, up = weights["gate_up"].products(x)
    if config.swiglu_limit > 0:
        gate = _at_most(b, gate, config.swiglu_limit)
        up = _at_least(b, _at_most(b, up, config.swiglu_limit), -config.swiglu_limit)
    sigmoid = b.op("Sigmoid", b.op("Mul", gate, b.scalar(config.activation_alpha)))
    up = b.op("Add", up, b.scalar(config.activation_beta))
    return weights["down"].product(b.op("Mul", b.op("Mul", gate, sigmoid), up))


# By comparisons, so that NaN stays NaN, which ONNX does not say of Min, Max and Clip.


def _at_most(b: Builder, x: str, limit: float) -> str:
    return b.op("Where", b.op("Greater", x, b.scalar(limit)), b.scalar(limit), x)


def _at_least(b: Builder, x: str, limit: float) -> str:
    return b.op("Where", b.op("Less", x, b.scalar(limit)), b.scalar(limit), x)


def _silu(b: Builder, x: str) -> str:
    return b.op("Mul", x, b.op("Sigmoid", x))


def _relu(b: Builder, x: str) -> str:
    return _at_least(b, x, 0.0)


def _gelu(b: Builder, x: str) -> str:
    erf = b.op("Erf", b.op("Mul", x, b.scalar(math.sqrt(0.5))))
    return b.op("Mul", b.op("Mul", x, b.scalar(0.5)), b.op("Add", erf, b.scalar(1.0)))


def _gelu_tanh(b: Builder, x: str) -> str:
    cube = b.op("Mul", b.op("Mul", x, x), x)
    inner = b.op("Add", x, b.op("Mul", cube, b.scalar(0.044715)))
    tanh = b.op("Tanh", b.op("Mul", inner, b.scalar(math.sqrt(2.0 / math.pi))))
    return b.op("Mul", b.op("Mul", x, b.scalar(0.5)), b.op("Add", tanh, b.scalar(1.0)))


_SUBLAYERS: dict[str, SubLayerNodes] = {
    "T5_FF": _t5_ff,
    "Gated_SiLU": _gated(_silu),
    "Gated_GELU": _gated(_gelu),
    "Gated_GELU_Tanh": _gated(_gelu_tanh),
    "Gated_ReLU": _gated(_relu),
    "Clamped_SwiGLU": _clamped_swiglu,
    "SiLU_FF": _plain(_silu),
    "ReLU_FF": _plain(_relu),
    "GELU_FF": _plain(_gelu),
    "GELU_Tanh_FF": _plain(_gelu_tanh),
}
