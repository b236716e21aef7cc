"""The operator in float64 numpy: the oracle to which everything else is compared.

Written for clarity, not for speed. Only experts that a token chose are read and computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from moe_infer.op import RMS_NORM_EPSILON, LayerConfig, output_shape
from moe_infer.weights import ExpertWeights

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Expert: TypeAlias = Mapping[str, np.ndarray[Any, Any]]
"""Packed tensors of one expert, as ``moe_infer.op.ExpertTensor`` tells their layout."""
SubLayerFunction: TypeAlias = Callable[[Array, Expert, LayerConfig], Array]


def moe_layer(
    hidden_states: np.ndarray[Any, Any],
    config: LayerConfig,
    weights: ExpertWeights | Mapping[int, Expert],
    router_logits: np.ndarray[Any, Any] | None = None,
) -> Array:
    """The whole operator.

    Args:
        hidden_states: (tokens, d_model) or (batch, seq, d_model), any floating type.
        config: the layer.
        weights: the experts; a mapping gives the packed tensors of expert ``e`` under ``e``.
            Sub-layers without weights do not look at it.
        router_logits: (..., expert_count) with the leading dimensions of ``hidden_states``; None:
            the scores come from ``expert_centroids``.

    Returns:
        float64, in the shape of ``hidden_states``.

    Raises:
        ValueError: the inputs and the configuration do not fit.
    """
    output_shape(hidden_states.shape)
    d_model = hidden_states.shape[-1]
    experts, routing_weights = route(hidden_states, config, router_logits)
    x = hidden_states.reshape(-1, d_model).astype(np.float64)
    sublayer = _SUBLAYERS[config.expert_sublayer_type]
    output = np.zeros_like(x)
    for e in np.unique(experts):
        tensors: Expert = {}
        if config.tensors:
            found = weights.expert(int(e)) if isinstance(weights, ExpertWeights) else weights[e]
            tensors = {name: array.astype(np.float64) for name, array in found.items()}
        tokens, choices = np.nonzero(experts == e)
        with np.errstate(over="ignore", invalid="ignore"):
            expert_output = sublayer(x[tokens], tensors, config)
            # A token chooses an expert at most once, so the tokens are distinct.
            output[tokens] += routing_weights[tokens, choices, None] * expert_output
    if config.moe_variant == "base_layer":
        with np.errstate(invalid="ignore"):
            output += (1.0 - routing_weights) * x
    result: Array = output.reshape(hidden_states.shape)
    return result


def route(
    hidden_states: np.ndarray[Any, Any],
    config: LayerConfig,
    router_logits: np.ndarray[Any, Any] | None = None,
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], Array]:
    """Which experts each token takes, and with which weights.

    Experts are chosen by their scores, in descending order; among equal scores the lower index
    wins, of experts as of groups. A token with NaN among its scores takes experts 0, 1, ... with
    weights NaN.

    Args:
        hidden_states: (..., d_model).
        config: the layer.
        router_logits: (..., expert_count) or None.

    Returns:
        (experts, weights), both (tokens, top_k).

    Raises:
        ValueError: the inputs and the configuration do not fit.
    """
    d_model = hidden_states.shape[-1]
    config.check_inputs(d_model, router_logits is not None)
    expected = (*hidden_states.shape[:-1], config.expert_count)
    if router_logits is not None and router_logits.shape != expected:
        raise ValueError(
            f"MoELayer: router_logits must have shape {expected}, got {router_logits.shape}"
        )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scores = _scores(hidden_states.reshape(-1, d_model), config, router_logits)
        experts = _largest(_ranking(scores, config), config.top_k)
        chosen = np.take_along_axis(scores, experts, axis=-1)
        weights = _weights(scores, experts, chosen, config)
    bad = np.isnan(scores).any(axis=-1)
    experts[bad] = np.arange(config.top_k)
    weights[bad] = np.nan
    return experts.astype(np.int64), weights


def rms_norm(x: Array, weight: Array) -> Array:
    """Weight * x / sqrt(mean(x^2) + 1e-6) over the last axis."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    normed: Array = weight * x / np.sqrt(mean_square + RMS_NORM_EPSILON)
    return normed


def _scores(
    x: np.ndarray[Any, Any], config: LayerConfig, router_logits: np.ndarray[Any, Any] | None
) -> Array:
    if router_logits is not None:
        logits: Array = router_logits.reshape(-1, config.expert_count).astype(np.float64)
        return logits
    hidden = x.astype(np.float64)
    if config.moe_variant == "cpm_2":
        hidden = rms_norm(hidden, np.asarray(config.layernorm_weight, np.float64))
    centroids = np.asarray(config.expert_centroids, np.float64)
    scores: Array = hidden @ centroids.reshape(-1, config.expert_count)
    return scores


def _largest(values: Array, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # A stable sort keeps the lower index first among equals.
    return np.argsort(-values, axis=-1, kind="stable")[:, :count]


def _ranking(scores: Array, config: LayerConfig) -> Array:
    """Values by which the experts are chosen, minus infinity for what must not be."""
    grouped = config.chosen_groups < config.n_group
    if config.router_bias is None and not grouped:
        return scores  # sigmoid, which only sigmoid_topk has, changes no order
    ranking = _sigmoid(scores)
    if config.router_bias is not None:
        ranking = ranking + np.asarray(config.router_bias, np.float64)
    if not grouped:
        return ranking
    size = config.expert_count // config.n_group
    by_group = ranking.reshape(-1, config.n_group, size)
    group_scores = np.sort(by_group, axis=-1)[:, :, -2:].sum(axis=-1)
    open_groups = np.zeros(group_scores.shape, bool)
    np.put_along_axis(open_groups, _largest(group_scores, config.chosen_groups), True, axis=-1)
    limited: Array = np.where(open_groups[:, :, None], by_group, -np.inf).reshape(ranking.shape)
    return limited


def _weights(
    scores: Array, experts: np.ndarray[Any, Any], chosen: Array, config: LayerConfig
) -> Array:
    if config.moe_variant in ("default", "cpm_2"):
        weights = np.ones_like(chosen)
    elif config.moe_variant == "base_layer":
        weights = _sigmoid(chosen)
    elif config.moe_variant == "softmax_topk":
        weights = np.take_along_axis(_softmax(scores), experts, axis=-1)
    elif config.moe_variant == "topk_softmax":
        weights = _softmax(chosen)
    elif config.moe_variant == "sigmoid_topk":
        weights = _sigmoid(chosen)
    elif config.moe_variant == "sparse_mixer":
        weights = _sparse_mixer(scores, experts, config.router_jitter)
    else:
        raise NotImplementedError(f"router '{config.moe_variant}' has no reference")
    if config.router.single_expert:
        return weights  # no share of a sum
    if config.normalize_routing_weights:
        epsilon = 1e-20 if config.moe_variant == "sigmoid_topk" else 0.0
        weights = weights / (weights.sum(axis=-1, keepdims=True) + epsilon)
    scaled: Array = weights * config.routed_scaling_factor
    return scaled


def _sparse_mixer(scores: Array, experts: np.ndarray[Any, Any], jitter: float) -> Array:
    """Each choice's share of a softmax over the experts not chosen before and near enough to it.

    As Phi-3.5-MoE's SparseMixer (https://arxiv.org/abs/2409.12136) evaluates; training samples.
    """
    left, weights = scores.copy(), np.empty(experts.shape)
    for choice in range(experts.shape[1]):
        expert = experts[:, choice, None]
        best = np.take_along_axis(scores, expert, axis=-1)
        # 0 / 0 and infinity / infinity are NaN, which is not greater: such a score stays.
        far = (best - scores) / np.maximum(np.abs(scores), best) > 2.0 * jitter
        share = np.exp(np.where(far, -np.inf, left) - best)
        weights[:, choice] = np.take_along_axis(share, expert, axis=-1)[:, 0] / share.sum(axis=-1)
        np.put_along_axis(left, expert, -np.inf, axis=-1)
    return weights


def _softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    quotient: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return quotient


def _sigmoid(x: Array) -> Array:
    # exp of a negative number only, so that neither end overflows.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def _gelu(x: Array) -> Array:
    erf = np.array([math.erf(v) for v in (x / math.sqrt(2.0)).ravel()]).reshape(x.shape)
    product: Array = 0.5 * x * (1.0 + erf)
    return product


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _t5_ff(x: Array, tensors: Expert, config: LayerConfig) -> Array:
    normed = rms_norm(x, tensors["layer_norm"])
    gate, up = tensors["gate_up"][0::2], tensors["gate_up"][1::2]
    inner = _gelu_tanh(normed @ gate.T) * (normed @ up.T)
    output: Array = x + inner @ tensors["down"].T
    return output


def _product(x: Array, tensors: Expert, name: str) -> Array:
    """X @ tensor^T, with the tensor's bias where the expert has one."""
    product: Array = x @ tensors[name].T
    return product + tensors[f"{name}_bias"] if f"{name}_bias" in tensors else product


def _gated(activation: Callable[[Array], Array]) -> SubLayerFunction:
    def compute(x: Array, tensors: Expert, config: LayerConfig) -> Array:
        both = _product(x, tensors, "gate_up")
        return _product(activation(both[:, 0::2]) * both[:, 1::2], tensors, "down")

    return compute


def _plain(activation: Callable[[Array], Array]) -> SubLayerFunction:
    def compute(x: Array, tensors: Expert, config: LayerConfig) -> Array:
        return _product(activation(_product(x, tensors, "up")), tensors, "down")

    return compute


def _clamped_swiglu(x: Array, tensors: Expert, config: LayerConfig) -> Array:
    both = _product(x, tensors, "gate_up")
    limit = config.swiglu_limit or np.inf
    gate, up = np.minimum(both[:, 0::2], limit), np.clip(both[:, 1::2], -limit, limit)
    inner = gate * _sigmoid(config.activation_alpha * gate) * (up + config.activation_beta)
    return _product(inner, tensors, "down")


def _identity(x: Array, tensors: Expert, config: LayerConfig) -> Array:
    return x


_SUBLAYERS: dict[str, SubLayerFunction] = {
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
    "Identity": _identity,
}
