"""Routing in standard operators: scores, the chosen experts and their weights.

In float32 whatever the graph's type. TopK gives the lower index first among equal scores, as ONNX
defines it. A token with NaN among its scores takes experts 0, 1, ... with weights NaN, as the
reference does.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from moe_infer.graph.lower_builder import Builder
from moe_infer.op import RMS_NORM_EPSILON, LayerConfig


@dataclass(frozen=True)
class Routing:
    """Names of the routing's values.

    Attributes:
        scores: (tokens, expert_count) float32, without NaN.
        experts: (tokens, top_k) int64.
        chosen: (tokens, top_k) float32, the chosen experts' scores.
        weights: (tokens, top_k) float32.
    """

    scores: str
    experts: str
    chosen: str
    weights: str


def lower_router(b: Builder, config: LayerConfig, x: str, logits: str | None) -> Routing:
    """Adds the routing of one layer.

    Args:
        b: where the nodes go.
        config: the layer.
        x: (tokens, d_model) float32.
        logits: router_logits as the graph has them, or None.
    """
    scores = _scores(b, config, x, logits)
    numbers = b.cast(b.op("IsNaN", scores), TensorProto.FLOAT)
    bad = b.op("Greater", b.sum(numbers, 1, keep=True), b.scalar(0.0))
    scores = b.op("Where", bad, b.scalar(0.0), scores)
    chosen, experts = b.outputs(
        "TopK", [scores, b.ints(config.top_k)], ("_scores", "_experts"), axis=-1
    )
    weights = b.op(
        "Where", bad, b.scalar(float("nan")), _weights(b, config, scores, chosen, experts)
    )
    return Routing(scores, experts, chosen, weights)


def rms_norm(b: Builder, x: str, weight: str, d_model: int) -> str:
    """Weight * x / sqrt(mean(x^2) + epsilon) over the last axis; all float32."""
    mean = b.op("Div", b.sum(b.op("Mul", x, x), -1, keep=True), b.scalar(float(d_model)))
    root = b.op("Sqrt", b.op("Add", mean, b.scalar(RMS_NORM_EPSILON)))
    return b.op("Div", b.op("Mul", x, weight), root)


def _scores(b: Builder, config: LayerConfig, x: str, logits: str | None) -> str:
    if logits is not None:
        flat = b.op("Reshape", logits, b.ints(-1, config.expert_count))
        return b.cast(flat, TensorProto.FLOAT)
    centroids = config.expert_centroids or ()
    d_model = len(centroids) // config.expert_count
    if config.moe_variant == "cpm_2":
        x = rms_norm(b, x, b.floats(config.layernorm_weight, (d_model,)), d_model)
    return b.op("MatMul", x, b.floats(centroids, (d_model, config.expert_count)))


def _weights(b: Builder, config: LayerConfig, scores: str, chosen: str, experts: str) -> str:
    if config.moe_variant in ("default", "cpm_2"):
        return b.scalar(1.0)
    if config.moe_variant == "base_layer":
        return b.op("Sigmoid", chosen)
    if config.moe_variant == "topk_softmax" or config.normalize_routing_weights:
        # A softmax over all, renormalised over the chosen, is the softmax over the chosen.
        return b.op("Softmax", chosen, axis=-1)
    if config.moe_variant == "softmax_topk":
        return b.op("GatherElements", b.op("Softmax", scores, axis=-1), experts, axis=1)
    raise NotImplementedError(f"router '{config.moe_variant}' has no lowering")
