"""Routing in standard operators: scores, the chosen experts and their weights.

In float32 whatever the graph's type. TopK gives the lower index first among equal scores, as ONNX
defines it. A token with NaN among its scores gets weights NaN, as in the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from moe_infer.graph.lower_builder import Builder
from moe_infer.op import RMS_NORM_EPSILON, LayerConfig

SMALLEST_SHARE = 1e-37
"""Nearly the smallest float32 of which every logarithm is right."""


@dataclass(frozen=True)
class Routing:
    """Names of the routing's values.

    Attributes:
        scores: (tokens, expert_count) float32, without NaN.
        experts: (tokens, top_k) int64.
        shares: (tokens, top_k) float32: a softmax over them gives each choice's part of the sum of
            the token's weights.
        weights: (tokens, top_k) float32.
    """

    scores: str
    experts: str
    shares: str
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
    ranking = _ranking(b, config, scores)
    chosen, experts = _top_k(b, ranking, config.top_k, (config.expert_count,))
    if ranking != scores:
        chosen = b.op("GatherElements", scores, experts, axis=1)
    weights = _weights(b, config, scores, chosen, experts)
    shares = chosen
    if config.moe_variant in ("sigmoid_topk", "sparse_mixer"):
        # A weight of 0 is nearly none of a sum, and nothing of a sum that is 0.
        shares = b.op("Log", b.op("Max", weights, b.scalar(SMALLEST_SHARE)))
    if config.routed_scaling_factor != 1.0:
        weights = b.op("Mul", weights, b.scalar(config.routed_scaling_factor))
    weights = b.op("Where", bad, b.scalar(float("nan")), weights)
    return Routing(scores, experts, shares, weights)


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


def _ranking(b: Builder, config: LayerConfig, scores: str) -> str:
    """Values by which the experts are chosen, minus infinity for what must not be."""
    grouped = config.chosen_groups < config.n_group
    if config.router_bias is None and not grouped:
        return scores  # sigmoid, which only sigmoid_topk has, changes no order
    ranking = _sigmoid(b, scores)
    if config.router_bias is not None:
        ranking = b.op("Add", ranking, b.floats(config.router_bias, (1, config.expert_count)))
    if not grouped:
        return ranking
    size = config.expert_count // config.n_group
    by_group = b.op("Reshape", ranking, b.ints(-1, config.n_group, size))
    best_two, _ = _top_k(b, by_group, 2, (config.n_group, size))
    group_scores = b.sum(best_two, 2)
    _, groups = _top_k(b, group_scores, config.chosen_groups, (config.n_group,))
    # 0 for the groups that were chosen, minus infinity for the others.
    closed = b.op("Expand", b.scalar(-math.inf), b.op("Shape", group_scores))
    opened = b.op("Expand", b.scalar(0.0), b.op("Shape", groups))
    penalty = b.op("ScatterElements", closed, groups, opened, axis=1)
    limited = b.op("Add", by_group, b.op("Unsqueeze", penalty, b.ints(2)))
    return b.op("Reshape", limited, b.ints(-1, config.expert_count))


def _top_k(b: Builder, values: str, k: int, row_shape: tuple[int, ...]) -> tuple[str, str]:
    """The k largest along the last axis and their indices, of (tokens, ``row_shape``) values."""
    # TopK without a row ends the process (SIGFPE) in ONNX Runtime before 1.32: it gets one more.
    padded = b.op("Concat", values, b.floats(np.zeros(row_shape), (1, *row_shape)), axis=0)
    found = b.outputs("TopK", [padded, b.ints(k)], ("_values", "_indices"), axis=-1)
    best, indices = (b.op("Slice", one, b.ints(0), b.ints(-1), b.ints(0)) for one in found)
    return best, indices


def _weights(b: Builder, config: LayerConfig, scores: str, chosen: str, experts: str) -> str:
    """Routing weights before ``routed_scaling_factor``."""
    if config.moe_variant in ("default", "cpm_2"):
        return b.scalar(1.0)
    if config.moe_variant == "base_layer":
        return _sigmoid(b, chosen)
    if config.moe_variant == "topk_softmax" or (
        config.moe_variant == "softmax_topk" and config.normalize_routing_weights
    ):
        # A softmax over all, renormalised over the chosen, is the softmax over the chosen.
        return b.op("Softmax", chosen, axis=-1)
    if config.moe_variant == "softmax_topk":
        return b.op("GatherElements", b.op("Softmax", scores, axis=-1), experts, axis=1)
    if config.moe_variant == "sigmoid_topk":
        weights, epsilon = _sigmoid(b, chosen), 1e-20
    elif config.moe_variant == "sparse_mixer":
        weights, epsilon = _sparse_mixer(b, config, scores, experts), 0.0
    else:
        raise NotImplementedError(f"router '{config.moe_variant}' has no lowering")
    if config.normalize_routing_weights:
        total = b.op("Add", b.sum(weights, 1, keep=True), b.scalar(epsilon))
        weights = b.op("Div", weights, total)
    return weights


def _sigmoid(b: Builder, x: str) -> str:
    # ONNX Runtime's Sigmoid on the CPU gives 1.5e-8 for whatever is below -18, so that the weights
    # of a token whose scores are all so low would have no ratios.
    small = b.op("Exp", b.op("Neg", b.op("Abs", x)))
    positive = b.op("GreaterOrEqual", x, b.scalar(0.0))
    above = b.op("Where", positive, b.scalar(1.0), small)
    return b.op("Div", above, b.op("Add", small, b.scalar(1.0)))


def _sparse_mixer(b: Builder, config: LayerConfig, scores: str, experts: str) -> str:
    """Each choice's share of a softmax over the experts not chosen before and near enough to it."""
    left = scores
    nothing = b.scalar(-math.inf)
    size = b.op("Abs", scores)
    shares = []
    for choice in range(config.top_k):
        expert = b.op("Slice", experts, b.ints(choice), b.ints(choice + 1), b.ints(1))
        best = b.op("GatherElements", scores, expert, axis=1)
        distance = b.op("Div", b.op("Sub", best, scores), b.op("Max", size, best))
        far = b.op("Greater", distance, b.scalar(2.0 * config.router_jitter))
        share = b.op("Exp", b.op("Sub", b.op("Where", far, nothing, left), best))
        total = b.sum(share, 1, keep=True)
        shares.append(b.op("Div", b.op("GatherElements", share, expert, axis=1), total))
        gone = b.op("Expand", nothing, b.op("Shape", expert))
        left = b.op("ScatterElements", left, expert, gone, axis=1)
    return shares[0] if len(shares) == 1 else b.op("Concat", *shares, axis=1)
